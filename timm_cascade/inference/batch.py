"""Decides which samples exit early, once per exit, and collects the results in input order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import RoutingError
from .engine import Answer
from .request import Thresholds

__all__ = ['ActiveBatch', 'CascadeOutput', 'Exited', 'OnAnswer', 'confidence', 'empty_output', 'open_exits']


EMPTY = torch.empty(0, dtype=torch.int64)


class CascadeOutput(NamedTuple):
    """Results of a cascade for a batch, in input order.

    Attributes:
        logits: (N, C)
        exit: (N,) int64, the exit of each sample, M for the backbone's own classifier.
        confidence: (N,) float32, max softmax of `logits`.
    """

    logits: Tensor
    exit: Tensor
    confidence: Tensor


class Exited(NamedTuple):
    """Samples that exited at one exit: ids (K,), logits (K, C), confidence (K,), and the number of the exit."""

    ids: Tensor
    logits: Tensor
    confidence: Tensor
    exit: int


OnAnswer = Callable[[Exited], None]


def confidence(logits: Tensor) -> Tensor:
    """Max softmax (N,) of logits (N, C), in float32 whatever the logits' dtype."""
    return logits.softmax(-1, torch.float32).amax(-1)  # logsumexp would take several times as long


def empty_output(images: Tensor, num_classes: int) -> CascadeOutput:
    """The results of no images."""
    empty = images.new_empty(0, dtype=torch.float32)
    return CascadeOutput(images.new_empty(0, num_classes), empty.long(), empty)


def open_exits(thresholds: Sequence[float]) -> Callable[[int], bool]:
    """Says of an exit whether its threshold is finite."""
    return lambda index: thresholds[index] != math.inf


class ActiveBatch:
    """The remaining samples of a batch. The one place that decides which of them exit.

    Shrinking a batch copies all that remains, so it must save more than that. With `min_leave` > 0 a batch goes on
    whole until at least this share of its rows has exited; rows that have exited are ignored from then on. Each sample
    gets the same result either way.

    Args:
        ids: (N,) int64, identifies the samples in the results.
        heads: One per exit.
        thresholds: M numbers, or a row per sample (N, M); infinity closes an exit. A NaN confidence never exits.
        min_leave: Share of the rows, in 0..1.
        on_answer: Called with the samples that exit, at once: before the others go on.
    """

    def __init__(
        self,
        ids: Tensor,
        heads: Sequence[Callable[[Tensor], Tensor]],
        thresholds: Thresholds,
        min_leave: float = 0.0,
        on_answer: OnAnswer | None = None,
    ) -> None:
        self.ids = ids  # of the rows that the backbone works on
        self.heads = heads
        self.limits: Tensor | None = None  # (rows, M), where samples have thresholds of their own
        self.thresholds: Sequence[float] = ()  # of every exit the lowest
        self._set_thresholds(thresholds)
        self.min_leave = min_leave
        self.on_answer = on_answer
        self.exited: list[Exited] = []
        self.first: list[Tensor] | None = None  # takes the confidences (N,) of the first open exit
        self._done: Tensor | None = None  # (rows,) bool: has exited, but is still among the rows
        self._open = ids.numel()  # rows that have not exited

    def is_open(self, index: int) -> bool:
        """Whether a remaining sample may exit at exit `index`."""
        return self.thresholds[index] != math.inf

    def exit_confident(self, index: int, features: Tensor, answer: Answer | None = None) -> Tensor | None:
        """Takes out the samples whose confidence at exit `index` reaches its threshold.

        Args:
            index: The exit.
            features: What its head reads, one row per remaining sample.
            answer: What its head says of them, where that is known.

        Returns:
            Indices of the rows that remain, if the batch is to shrink (empty if none remains); None if all go on.

        Raises:
            RoutingError: The features do not have one row per remaining sample.
        """
        if self.thresholds[index] == math.inf:
            return None
        rows = self.ids.numel()  # not len(), which goes through Python: that would cost single images time
        if features.shape[0] != rows:
            raise RoutingError(f'{rows} samples reached exit {index}, but its features have {len(features)} rows.')
        if answer is None:
            logits = self.heads[index](features)
            found = confidence(logits)
        else:
            logits, found = answer
        if self.first is not None and not self.first:
            self.first.append(found)
        if rows == 1:  # a single image needs no selection of rows
            if not found.item() >= (self.thresholds[index] if self.limits is None else self.limits[0, index].item()):
                return None
            self._open = 0
            self._answer(Exited(self.ids, logits, found, index))
            return EMPTY
        passes = found >= (self.thresholds[index] if self.limits is None else self.limits[:, index])
        if self._done is not None:
            passes &= ~self._done
        exiting = passes.nonzero().squeeze(1)  # the one synchronisation of this exit
        if not len(exiting):
            return None
        self._open -= len(exiting)
        whole = len(exiting) == rows
        self._answer(
            Exited(self.ids, logits, found, index)
            if whole
            else Exited(self.ids[exiting], logits[exiting], found[exiting], index)
        )
        done = passes if self._done is None else passes | self._done
        if self._open and rows - self._open < self.min_leave * rows:
            self._done = done
            return None
        keep = self._remaining(done)
        self.ids, self._done = self.ids[keep], None
        if self.limits is not None:
            self.limits = self.limits[keep]
        return keep

    def replace(self, ids: Tensor, thresholds: Tensor | None = None) -> None:
        """Replaces the remaining samples, and their thresholds where each has its own (used by `stream`)."""
        self.ids, self._done, self._open = ids, None, ids.numel()
        if thresholds is not None:
            self._set_thresholds(thresholds)

    def _set_thresholds(self, thresholds: Thresholds) -> None:
        if isinstance(thresholds, Tensor):
            self.limits = thresholds.to(self.ids.device)
            self.thresholds = thresholds.amin(0).tolist() if len(thresholds) else [math.inf] * thresholds.shape[1]
        else:
            self.thresholds = thresholds

    def finish(self, logits: Tensor) -> None:
        """Assigns the backbone's logits to the remaining samples.

        Raises:
            RoutingError: Logits of another number of samples.
        """
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != self.ids.numel():
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RoutingError(f'{len(self.ids)} samples reached the end, but the backbone returned {found}.')
        if self._done is not None:
            keep = self._remaining(self._done)
            self.ids, self._done, logits = self.ids[keep], None, logits[keep]
        self._answer(Exited(self.ids, logits, confidence(logits), len(self.thresholds)))

    def output(self) -> CascadeOutput:
        """The results of all samples in the order of `ids`, which must be 0..N-1."""
        if len(self.exited) == 1:  # samples keep their order
            ((ids, logits, found, index),) = self.exited
            return CascadeOutput(logits, torch.full_like(ids, index), found)
        ids = torch.cat([e.ids for e in self.exited])
        order = torch.empty_like(ids)
        order[ids] = torch.arange(len(ids), device=ids.device)
        exits = torch.cat([torch.full_like(e.ids, e.exit) for e in self.exited])
        return CascadeOutput(
            torch.cat([e.logits for e in self.exited])[order],
            exits[order],
            torch.cat([e.confidence for e in self.exited])[order],
        )

    def _answer(self, exited: Exited) -> None:
        self.exited.append(exited)
        if self.on_answer is not None:
            self.on_answer(exited)

    def _remaining(self, done: Tensor) -> Tensor:
        # their number is known, so sorting finds them without another synchronisation
        return done.to(torch.uint8).argsort(stable=True)[: self._open]
