"""Training exit heads on a frozen backbone, with Accelerate.

The backbone runs over the images once: what the heads classify (the pooled taps) is kept on disk, and the epochs run on
it. The state of an unfinished training is one file; with it, the same call continues where it was stopped.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import Dataset

from ..backbone import input_size_of
from ..data import UNLABELLED, check_classes, check_training_classes
from ..model import CascadeModel
from ..utils.distributed import check_launch, create_accelerator, on_main
from .features import StoredTaps, Taps, store
from .trainer import Classifier, Heads, Recipe, Trainer, moments

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['train_heads']

_logger = logging.getLogger(__name__)


def train_heads(
    model: CascadeModel,
    train: Dataset,
    val: Dataset | None = None,
    *,
    epochs: int = 20,
    batch_size: int = 256,
    lr: float = 2e-3,
    weight_decay: float = 0.05,
    seed: int = 0,
    workers: int = 0,
    views: int = 1,
    classifier: bool = False,
    cache: str | Path | bool = True,
    state: str | Path | None = None,
    save_every: float = 30.0,
    log: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Trains the heads in place; the backbone stays in evaluation mode and is not changed.

    Cross-entropy summed over the exits, AdamW, cosine decay; what else was tried stands in docs/ablation.md. A
    calibration made for the old heads is dropped.

    Args:
        model: The cascade.
        train: Images with labels 0..C-1: an ImageData, or any data set of (normalised tensor, label). From an image
            without a label (-1) the heads learn what the frozen network answers; with `classifier` there is no such.
        val: Images to report accuracy on (without labels: agreement with the network), never trained on.
        batch_size: Over all processes together; with gradient accumulation (the accelerator's) of each part of a step.
        views: How many looks at each image, one an epoch in turn: the first as in evaluation, the others augmented by
            timm's training transform (or whatever is random about a data set of your own).
        classifier: Train the backbone's classifier too, from nothing, as the final exit's head (a linear probe).
            Nothing else of the backbone changes.
        cache: Folder for the taps, which stay there for the next training; True for a temporary one; False for none:
            the backbone then runs anew in every epoch, with the same result but for rounding.
        state: File of the training's state, written now and then; the same call continues from it. It stays when the
            training is finished, and the call then only loads the result.
        save_every: Seconds between two writings of `state`.
        log: JSON-lines file, one line an epoch; replaced.
        accelerator: Yours (device, processes, mixed precision, gradient accumulation, trackers), or one with defaults.

    Returns:
        One dict an epoch: epoch, loss, train_accuracy (one for each that is trained, while it is), seconds, and with
        `val` accuracy: one an exit, the backbone's own last.

    Raises:
        ValueError: Labels that are not the model's classes, classes without images, one class only, an image that
            cannot be read, a loss that is not finite; the heads are then as they were.
        OSError: The taps do not fit on the disk.
        LaunchError: A launch of several processes of which each believes to be alone.
    """
    if epochs < 1 or batch_size < 1 or views < 1:
        raise ValueError(f'epochs={epochs}, batch_size={batch_size}, views={views}: each is at least 1.')
    for data in (train, val):
        check_classes(data, model.num_classes, model.label_names) if data is not None else None
    check_training_classes(train)
    recipe = Recipe(epochs, batch_size, lr, weight_decay, seed)
    if accelerator is None:
        accelerator = create_accelerator()
    check_launch(accelerator)
    if accelerator.is_main_process:
        _logger.info(
            'training on %d process%s (%s)',
            accelerator.num_processes,
            'es' * (accelerator.num_processes > 1),
            accelerator.device,
        )
    training = model.training
    before = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    model.to(accelerator.device).eval()
    try:
        final = _check_classifier(model) if classifier else None
        wanted = [(train, view) for view in range(views)] + ([(val, 0)] if val is not None else [])
        sources, keys = _sources(
            [Taps(model, data, accelerator, view, seed, workers, classifier, batch_size) for data, view in wanted],
            cache,
            state is not None,
        )
        mean, variance = moments(sources[:views], accelerator, model.num_classes, least=0 if classifier else UNLABELLED)
        for head, m, v in zip(model.heads, mean, variance, strict=False):
            # standardised by the training set's own statistics, so that no step depends on how a batch is split
            if isinstance(norm := head.norm, nn.BatchNorm1d):
                norm.running_mean.copy_(m)  # type: ignore[union-attr]
                norm.running_var.copy_(v)  # type: ignore[union-attr]
        probe = None if final is None else Classifier(final, mean[-1], variance[-1])
        heads = Heads([*model.heads, *([] if probe is None else [probe])])
        trainer = Trainer(heads, sources[:views], accelerator, recipe, sources[views:], save_every)
        history = trainer.run(None if state is None else Path(state), keys, None if log is None else Path(log))
    except BaseException:
        model.heads.load_state_dict(before)
        raise
    finally:
        model.train(training)
    if probe is not None and final is not None:
        probe.write_to(final)
    model.forget_calibration()
    return history


def _check_classifier(model: CascadeModel) -> nn.Linear | nn.Conv2d:
    """The backbone's classifier, where it is a linear layer (or 1x1 convolution) on forward_head(..., pre_logits=True).

    Raises:
        ValueError: It is not.
    """
    found = model.get_classifier()
    advice = "Fine-tune the backbone with timm's train.py and bring its checkpoint (--checkpoint)."
    if not isinstance(found, nn.Linear) and not (isinstance(found, nn.Conv2d) and found.kernel_size == (1, 1)):
        raise ValueError(
            f'the classifier of {type(model.backbone).__name__} is {type(found).__name__}, not one linear '
            f'layer, and is not trained here. {advice}'
        )
    images = torch.randn(2, *input_size_of(model.backbone), generator=torch.Generator().manual_seed(0)).to(found.weight)
    with torch.no_grad():
        features, logits = model.forward_pooled(images, pre_logits=True)[1], model.backbone(images)
        ok = features.shape[1:] == (found.weight.shape[1],) and torch.allclose(
            F.linear(features, found.weight.flatten(1), found.bias),
            logits,
            rtol=1e-3,
            atol=1e-3 * float(logits.abs().max()),
        )
    if not ok:
        raise ValueError(
            f'{type(model.backbone).__name__} does more than its classifier to what forward_head(..., '
            f'pre_logits=True) gives, so it is not trained here. {advice}'
        )
    return found


def _sources(
    taps: list[Taps], cache: str | Path | bool, keyed: bool
) -> tuple[list[Taps] | list[StoredTaps], list[str]]:
    """Where batches come from, and the keys of what they hold (none where nobody needs them)."""
    keys = [t.key() for t in taps] if keyed or not isinstance(cache, bool) else []
    if cache is False:
        return taps, keys
    if not isinstance(cache, bool):
        return [store(t, Path(cache), key) for t, key in zip(taps, keys, strict=True)], keys
    accelerator = taps[0].accelerator
    with contextlib.ExitStack() as stack:
        folder = Path(
            on_main(
                accelerator,
                lambda: stack.enter_context(
                    tempfile.TemporaryDirectory(prefix='timm-cascade-taps-', ignore_cleanup_errors=True)
                ),
            )
        )
        stored = [store(t, folder, str(i), lasting=False) for i, t in enumerate(taps)]
        accelerator.wait_for_everyone()  # every process has mapped the files; their names are not needed any more
    return stored, keys
