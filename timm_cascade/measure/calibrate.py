"""One full pass over held-out images: confidence and correctness of every exit."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import timm
import torch
from torch.utils.data import Dataset

from ..backbone import evaluating
from ..data import UNLABELLED, check_labels, create_loader, prepare_data, weak_backbone
from ..inference.batch import confidence
from ..inference.request import unwrap
from ..model import CascadeModel
from ..thresholds import Calibration
from ..utils.distributed import create_accelerator
from ..utils.progress import progress
from ..version import __version__

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Observed', 'calibrate', 'calibration_of', 'observe', 'record']

_logger = logging.getLogger(__name__)


class Observed(NamedTuple):
    """What k classifiers say about n images.

    Attributes:
        confidence: (n, k) float32, max softmax.
        answer: (n, k) int64, the class.
        label: (n,) int64, UNLABELLED where there is none.
        digest: (n,) int64, equal for images that are exact copies of each other after the transform.
    """

    confidence: np.ndarray
    answer: np.ndarray
    label: np.ndarray
    digest: np.ndarray


@torch.no_grad()
def observe(
    model: CascadeModel,
    forward: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    data: Dataset,
    batch_size: int,
    workers: int,
    accelerator: Accelerator,
    what: str,
) -> Observed:
    """Runs `forward` (images as the model reads them to k logits) once over a data set, in its order.

    Args:
        model: The cascade whose transform, device and dtype the images get; in evaluation mode meanwhile.
        forward: Images (N, C, H, W) to k of (N, num_classes).
        batch_size: Images per batch, over all processes together.
        what: Name of the progress bar.

    Raises:
        ValueError: Labels that are not classes of the model.
    """
    model.to(accelerator.device)
    parts: list[tuple[torch.Tensor, ...]] = []
    with evaluating(model):
        share = max(1, batch_size // accelerator.num_processes)
        loader = accelerator.prepare_data_loader(create_loader(model, data, share, workers))
        for images, target in progress(loader, what, accelerator.is_main_process):
            with accelerator.autocast():
                logits = forward(model.as_images(images))
            confident = torch.stack([confidence(x) for x in logits], 1)
            answer = torch.stack([x.argmax(1) for x in logits], 1)
            parts.append(accelerator.gather_for_metrics((confident, answer, target, _digests(images))))
    observed = Observed(*(torch.cat(p).cpu().numpy() for p in zip(*parts, strict=True)))
    check_labels(observed.label, model.num_classes, needed=False)
    return observed


def record(
    model: CascadeModel, data: Dataset, batch_size: int = 256, workers: int = 0, accelerator: Accelerator | None = None
) -> dict[str, np.ndarray]:
    """What every exit says about the images of a data set, in the data's order.

    Returns:
        confidence: (n, M+1) float32.
        agreement: (n, M+1) bool, whether each exit's answer is the full network's.
        correct: (n, M+1) bool, whether it is the label; `agreement` for images without one. Absent without any label.
        labelled: (n,) bool. Absent where all images have a label, or none has.
        digest: (n,) int64, equal for images that are exact copies of each other after the transform.
    """
    model = unwrap(model, CascadeModel)
    return _record(model, prepare_data(model, data), batch_size, workers, accelerator or create_accelerator())


def _record(
    model: CascadeModel, data: Dataset, batch_size: int, workers: int, accelerator: Accelerator
) -> dict[str, np.ndarray]:
    found = observe(model, model.forward_exits, data, batch_size, workers, accelerator, 'every exit')
    agreement = found.answer == found.answer[:, -1:]
    labelled = found.label != UNLABELLED
    seen = dict(confidence=found.confidence, agreement=agreement, digest=found.digest)
    if not labelled.any():
        return seen
    seen['correct'] = np.where(labelled[:, None], found.answer == found.label[:, None], agreement)
    if not labelled.all():
        seen['labelled'] = labelled
    return seen


def _digests(images: torch.Tensor) -> torch.Tensor:
    """(N,) int64, a hash of each image."""
    rows = images.detach().cpu().float().contiguous().numpy()
    found = [hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in rows]
    return torch.tensor([int.from_bytes(d, 'little', signed=True) for d in found], device=images.device)


def calibrate(
    model: CascadeModel,
    held_out: Dataset,
    unlabelled: Dataset | None = None,
    *,
    batch_size: int = 256,
    workers: int = 0,
    accelerator: Accelerator | None = None,
) -> Calibration:
    """Measures every exit on images that neither backbone nor heads were trained on.

    The result is returned, and kept as `model.calibration`; a table of operating points goes to `model.table`.
    The active thresholds stay as they are: choose them with `model.set_max_drop`.

    Example:
        >>> calibration = timm_cascade.calibrate(model, held_out)
        >>> print(model.set_max_drop(0.01))

    Args:
        model: The cascade.
        held_out: An ImageData, or any data set of (image, label); classes are compared by name with those that the
            heads were trained on. Images without a label (-1) count as
            far as they need none, see `Calibration.to_label`; where none has a label, the dial counts agreement with
            the full network instead of correctness.
        unlabelled: Further images from the same source, whose labels are not looked at. They only test how often
            exits disagree with the full network, which bounds the loss.
        batch_size: Images per batch, over all processes together.
        workers: Processes that decode.
        accelerator: Yours, or one with defaults.

    Warns:
        UserWarning: Images that are exact copies of others: they make the guarantee void.
    """
    model = unwrap(model, CascadeModel)
    held_out = prepare_data(model, held_out)
    if seen_in_training := vars(model).get('trained_on'):
        seen_in_training.warn_of(held_out)
    accelerator = accelerator or create_accelerator()
    arrays = _record(model, held_out, batch_size, workers, accelerator)
    digests = [arrays.pop('digest')]
    if unlabelled is not None:
        pool = record(model, unlabelled, batch_size, workers, accelerator)
        digests.append(pool['digest'])
        arrays.update(pool_confidence=pool['confidence'], pool_agreement=pool['agreement'])
    seen = np.concatenate(digests)
    copies = int(len(seen) - len(np.unique(seen)))
    if copies:
        warnings.warn(
            f'{copies:,} of {len(seen):,} calibration images are exact copies of others. What is certified assumes '
            f'independent images and does not hold with copies among them: remove them, and calibrate again.',
            UserWarning,
            stacklevel=2,
        )
    has_labels = 'correct' in arrays
    if has_labels and 'labelled' not in arrays:
        if text := weak_backbone(arrays['correct'].mean(0).tolist(), len(arrays['correct'])):
            _logger.warning('%s', text)
    arrays.setdefault('correct', arrays['agreement'])  # without labels the full network is taken to be right
    provenance = dict(
        data=getattr(held_out, 'name', type(held_out).__name__),
        split=getattr(held_out, 'split', ''),
        labelled=has_labels,
        duplicates=copies,
        versions=dict(timm_cascade=__version__, timm=timm.__version__, torch=torch.__version__),
    )
    calibration = calibration_of(model, provenance, **arrays, path=model.dial.path)
    table = calibration.table(reference='labels' if has_labels else 'backbone')
    model.calibration, model.table = calibration, table
    return calibration


def calibration_of(model: CascadeModel, provenance: Mapping[str, Any], **arrays: Any) -> Calibration:
    """A calibration from what was seen of this model, with its costs and all that identifies it."""
    return Calibration(
        stage_cost=model.stage_macs(),
        head_cost=model.head_macs(),
        backbone_cost=float(model.exits[-1].total),
        exits=tuple(p.module for p in model.exits),
        num_classes=model.num_classes,
        heads_hash=model.heads_hash(),
        provenance={**provenance, **model.provenance()},
        **arrays,
    )
