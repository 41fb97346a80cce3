"""The path of thresholds that is stored with trained heads: what a calibration tests, proposed by the training data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..inference.batch import confidence
from ..model import CascadeModel
from ..thresholds import Samples, training_path
from ..thresholds.samples import FloatArray

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['path_from_features']


@torch.no_grad()
def path_from_features(
    model: CascadeModel, heads: nn.ModuleList, batches: Iterable[tuple[list[Tensor], Tensor]], accelerator: Accelerator
) -> FloatArray:
    """Thresholds (K, M) in the order in which exits disagree with the full network on the training data.

    The heads' losses there are far too small to believe, but only the order is used: the held-out images of a
    calibration test it, all of them, as none has to propose it.

    Args:
        heads: Classify the features of the M exits, and of the final one where it is trained too.
        batches: This process's share of the training features, with labels, which are not looked at.
    """
    from accelerate.utils import gather_object

    training = heads.training
    heads.eval()
    found: list[tuple[np.ndarray, np.ndarray]] = []
    try:
        for arrays, _ in batches:
            arrays = [a.to(accelerator.device) for a in arrays]
            with accelerator.autocast():
                logits = [head.classify(a) for head, a in zip(heads, arrays, strict=False)]  # type: ignore[operator]
            logits = [*logits, *arrays[len(logits) :]]
            answer = torch.stack([x.argmax(1) for x in logits], 1)
            confident = torch.stack([confidence(x) for x in logits], 1)
            found.append((confident.cpu().numpy(), (answer == answer[:, -1:]).cpu().numpy()))
    finally:
        heads.train(training)
    if accelerator.num_processes > 1:
        found = gather_object(found)
    columns = [np.concatenate(x) for x in zip(*found, strict=True)]
    return training_path(Samples(columns[0], columns[1], model.stage_macs(), model.head_macs()))
