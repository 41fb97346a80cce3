"""Selects and concatenates the rows that belong to samples, and keeps the memory order of the tensors.

Convolutions run on channels-last memory, and an exported graph holds views of the memory it was exported with, so the
order of the memory must not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ['merge_rows', 'select_rows']


def select_rows(tensor: Tensor, keep: Tensor, rows: int = 1) -> Tensor:
    """The rows of samples `keep` (indices), `rows` consecutive ones each; 0 for a tensor that all samples share."""
    if rows == 0:
        return tensor
    if rows > 1:
        keep = (keep[:, None] * rows + torch.arange(rows, device=keep.device)).flatten()
    return _in_memory_order([tensor], lambda ordered, axis: ordered[0].index_select(axis, keep))


def merge_rows(tensors: Sequence[Tensor], rows: int = 1) -> Tensor:
    """Concatenates the samples of several tensors; the first tensor where `rows` is 0."""
    if len(tensors) == 1 or rows == 0:
        return tensors[0]
    return _in_memory_order(tensors, torch.cat)


def _in_memory_order(tensors: Sequence[Tensor], change: Callable[[list[Tensor], int], Tensor]) -> Tensor:
    """`change(tensors, axis of the samples)` with dimensions in the order that the first one's memory has."""
    strides = tensors[0].stride()
    if tensors[0].is_contiguous() or 0 in strides:  # an expanded tensor has no order of its own
        return change(list(tensors), 0)
    order = sorted(range(len(strides)), key=strides.__getitem__, reverse=True)
    back = sorted(range(len(order)), key=order.__getitem__)
    return change([t.permute(order) for t in tensors], order.index(0)).permute(back)
