"""Training exit heads on a frozen backbone, with Accelerate.

The backbone runs over the images once: the pooled features that heads classify are stored, and the epochs run on them.
"""

from __future__ import annotations

import contextlib
import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from ..backbone import input_size_of
from ..data import UNLABELLED, ImageData, Seen, check_training_classes, prepare_data, weak_backbone
from ..fronts import Front, check_names
from ..inference.request import unwrap
from ..inference.weights import dtype_of
from ..model import CascadeModel
from ..utils.distributed import check_launch, create_accelerator, on_main
from .features import FrozenFeatures, StoredFeatures, store
from .trainer import Classifier, Trainer, moments
from .work_dir import WorkDir

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['train_heads']

_logger = logging.getLogger(__name__)


class _Logits(nn.Module):
    """In place of a front, which is not trained: what is stored of an image are its logits."""

    def classify(self, logits: Tensor) -> Tensor:
        return logits


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
    work_dir: str | Path | None = None,
    cache: bool = True,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Trains the heads in place; the backbone stays in evaluation mode and is not changed.

    Cross-entropy summed over the exits, AdamW, cosine decay. A calibration made for the old heads is dropped. Heads
    train in float32, whatever the model's precision, and return to it. Fronts are run, and never trained.

    Args:
        model: The cascade.
        train: Images with labels 0..C-1: an ImageData, or any data set of (normalised tensor, label). From an image
            without a label (-1) the heads learn what the frozen network answers; with `classifier` every image needs
            a label.
        val: Images to report accuracy on (without labels: agreement with the network), never trained on.
        epochs: Passes over the stored features.
        batch_size: Images per batch, over all processes together; with gradient accumulation (the accelerator's) of
            each part of a step.
        lr: Learning rate of the first step.
        weight_decay: AdamW's, for weights and not for biases.
        seed: Seed of the order of images and of the augmentation.
        workers: Processes that decode images.
        views: Number of views of each image, one per epoch in turn: the first as in evaluation, the others augmented
            by timm's training transform (or whatever is random about a data set of your own).
        classifier: Train the backbone's classifier too, from nothing, as the final exit's head (a linear probe).
            Nothing else of the backbone changes.
        work_dir: Folder for the stored features, the state after each epoch (`heads.pt`) and a log with one line per
            epoch (`heads.jsonl`). The same call continues from there after an interruption, and only loads the result
            of a training that is finished. None stores the features in a temporary folder.
        cache: False stores no features: the backbone runs in every epoch, with the same result but for rounding.
        accelerator: Yours (device, processes, mixed precision, gradient accumulation, trackers), or one with defaults.

    Returns:
        One dict per epoch: epoch, loss, train_accuracy (of everything that is trained, while it is), seconds, and with
        `val` accuracy: one per exit, the backbone's own last.

    Raises:
        ValueError: Labels that are not the model's classes, classes without images, a single class, an image that
            cannot be read, a loss that is not finite, nothing to train; the heads are then as they were.
        OSError: The features do not fit on the disk.
        LaunchError: A launch of several processes in which each runs as if it were alone.

    Example:
        >>> model = timm.create_model('cascade_resnet18.a1_in1k', pretrained=True, num_classes=5)
        >>> train, val = load_data('flowers/', 'train'), load_data('flowers/', 'validation')
        >>> history = train_heads(model, train, val, classifier=True, work_dir='flowers-cascade')
    """
    if epochs < 1 or batch_size < 1 or views < 1:
        raise ValueError(f'epochs={epochs}, batch_size={batch_size}, views={views}: each must be at least 1.')
    model = unwrap(model, CascadeModel)
    check_training_classes(train)
    train = prepare_data(model, train, [] if classifier else None)  # a new classifier has the classes of its data
    names = getattr(train, 'class_names', None)
    names = names if names and len(names) == model.num_classes else model.label_names
    for front in model.fronts:
        check_names(front, names, 'the training data')
    fresh = nn.ModuleList([head for head in model.heads if not isinstance(head, Front)])
    if not len(fresh) and not classifier:
        raise ValueError(
            f'there is nothing to train: all exits of this cascade are fronts '
            f'({", ".join(f.name for f in model.fronts)}). Calibrate it (timm_cascade.calibrate), or create it with '
            f'exits=1 or more.'
        )
    val = None if val is None else prepare_data(model, val, names)
    seen = Seen(train)
    if val is not None:
        seen.warn_of(val)
    accelerator = accelerator or create_accelerator()
    check_launch(accelerator)
    if accelerator.is_main_process:
        _logger.info(
            'training on %d process%s (%s)',
            accelerator.num_processes,
            'es' * (accelerator.num_processes > 1),
            accelerator.device,
        )
    training = model.training
    before = {name: tensor.clone() for name, tensor in fresh.state_dict().items()}
    folder = None if work_dir is None else Path(work_dir)
    model.to(accelerator.device).eval()
    dtype, trainable = dtype_of(fresh), any(p.requires_grad for p in fresh.parameters())
    fresh.float().requires_grad_(True)  # small steps are lost in half precision
    try:
        final = _check_classifier(model) if classifier else None
        wanted = [(train, view) for view in range(views)] + ([(val, 0)] if val is not None else [])
        sources: list[Any] = [
            FrozenFeatures(model, data, accelerator, view, seed, workers, classifier, batch_size)
            for data, view in wanted
        ]
        keys = [] if folder is None else [source.key() for source in sources]
        if cache:
            sources = _stored(sources, folder, keys)
        mean, variance = moments(sources[:views], accelerator, model.num_classes, labelled=classifier)
        for head, m, v in zip(model.heads, mean, variance, strict=False):
            # standardised by the training set's own statistics, so that no step depends on how a batch is split
            if isinstance(norm := getattr(head, 'norm', None), (nn.BatchNorm1d, nn.SyncBatchNorm)):
                norm.running_mean.copy_(m)  # type: ignore[union-attr]
                norm.running_var.copy_(v)  # type: ignore[union-attr]
        probe = None if final is None else Classifier(final, mean[-1], variance[-1])
        answering = [_Logits() if isinstance(head, Front) else head for head in model.heads]
        heads = nn.ModuleList([*answering, *([] if probe is None else [probe])])
        recipe: dict[str, Any] = dict(epochs=epochs, batch_size=batch_size, lr=lr, weight_decay=weight_decay, seed=seed)
        trainer = Trainer(heads, sources[:views], (sources[views:] or [None])[0], accelerator, **recipe)
        settings = [recipe, keys, str(heads), trainer.step_size]
        history = trainer.run(WorkDir(folder, 'heads', accelerator, settings))
        path = trainer.path(model.stage_macs(), model.head_macs())
    except BaseException:
        fresh.load_state_dict(before)
        raise
    finally:
        fresh.to(dtype).requires_grad_(trainable)
        model.train(training)
    if probe is not None and final is not None:
        probe.write_to(final)
    model.forget_calibration()
    model.dial.path = path
    seen.keep(model)
    model.label_names = names  # later data are compared with them, and a release carries them
    if isinstance(val, ImageData) and (val.labels != UNLABELLED).all():
        if text := weak_backbone(history[-1]['accuracy'], len(val)):
            _logger.warning('%s', text)
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
            f'layer, and cannot be trained here. {advice}'
        )
    images = torch.randn(2, *input_size_of(model.backbone), generator=torch.Generator().manual_seed(0)).to(found.weight)
    tolerance = max(1e-3, 8 * torch.finfo(found.weight.dtype).eps)
    with torch.no_grad():
        features, logits = model.forward_pooled(images, pre_logits=True)[1], model.backbone(images)
        ok = features.shape[1:] == (found.weight.shape[1],) and torch.allclose(
            F.linear(features, found.weight.flatten(1), found.bias),
            logits,
            rtol=tolerance,
            atol=tolerance * float(logits.abs().max()),
        )
    if not ok:
        raise ValueError(
            f'{type(model.backbone).__name__} does more than its classifier to what forward_head(..., '
            f'pre_logits=True) gives, so it cannot be trained here. {advice}'
        )
    return found


def _stored(sources: list[FrozenFeatures], folder: Path | None, keys: list[str]) -> list[StoredFeatures]:
    """The features on disk: in the work_dir, or in files that are gone once they are mapped."""
    if folder is not None:
        return [store(s, folder / 'features' / f'{key}.npy') for s, key in zip(sources, keys, strict=True)]
    accelerator = sources[0].accelerator
    with contextlib.ExitStack() as stack:
        temporary = Path(
            on_main(
                accelerator,
                lambda: stack.enter_context(
                    tempfile.TemporaryDirectory(prefix='timm-cascade-features-', ignore_cleanup_errors=True)
                ),
            )
        )
        stored = [store(source, temporary / f'{i}.npy', lasting=False) for i, source in enumerate(sources)]
        accelerator.wait_for_everyone()  # every process has mapped the files; their names are not needed any more
    return stored
