"""Who leaves: one decision an exit for the whole batch, and the answers in input order."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ['Answers', 'CascadeOutput', 'Flight', 'RoutingError', 'confidence']


NOBODY = torch.empty(0, dtype=torch.int64)


class RoutingError(RuntimeError):
    """The backbone did not do with a cut batch what it must; nothing was answered."""


class CascadeOutput(NamedTuple):
    """What a cascade answers for a batch, in input order.

    Attributes:
        logits: (N, C)
        exit: (N,) int64, the exit that answered, M for the backbone's own classifier.
        confidence: (N,) float32, max softmax of `logits`.
    """
    logits: Tensor
    exit: Tensor
    confidence: Tensor


class Answers(NamedTuple):
    """What one exit answers: whose (K,), logits (K, C), confidence (K,), and which exit it is."""
    ids: Tensor
    logits: Tensor
    confidence: Tensor
    exit: int


def confidence(logits: Tensor) -> Tensor:
    """Max softmax (N,) of logits (N, C), in float32 whatever the logits' dtype."""
    return logits.float().softmax(-1).amax(-1)


class Flight:
    """The samples of a batch on their way through the backbone. The one place that decides who leaves.

    Cutting a batch copies all that goes on, so it must save more than that. With `min_leave` > 0 a batch goes on uncut
    until at least this share of its rows has been answered; answered rows still in flight are ignored from then on.
    What each sample gets is the same either way.

    Args:
        ids: (N,) int64, what to call the samples in the answers.
        heads: One an exit.
        thresholds: M numbers. A confidence that is not a number never passes.
        min_leave: Share in 0..1.
    """

    def __init__(
            self,
            ids: Tensor,
            heads: Sequence[Callable[[Tensor], Tensor]],
            thresholds: Sequence[float],
            min_leave: float = 0.,
    ) -> None:
        self.ids = ids  # of the rows in flight
        self.heads = heads
        self.thresholds = thresholds
        self.min_leave = min_leave
        self.answers: list[Answers] = []
        self._done: Tensor | None = None  # (rows,) bool: answered, but still in flight
        self._open = ids.numel()  # rows that are not answered

    def at_exit(self, index: int, tap: Tensor) -> Tensor | None:
        """Lets leave who is sure at this exit.

        Returns:
            The rows that go on, if the batch is to be cut (none if nobody is left); None if all go on.
        """
        if math.isinf(self.thresholds[index]):
            return None
        rows = self.ids.numel()  # and not len(), which takes a Tensor through Python: single images feel that too
        if tap.shape[0] != rows:
            raise RoutingError(f'{rows} samples came to exit {index}, but its tap has {len(tap)} rows.')
        logits = self.heads[index](tap)
        sure = confidence(logits)
        if rows == 1:  # a single image has no rows to sort out, and feels every operation
            if not sure.item() >= self.thresholds[index]:
                return None
            self.answers.append(Answers(self.ids, logits, sure, index))
            self._open = 0
            return NOBODY
        leaves = sure >= self.thresholds[index]
        if self._done is not None:
            leaves &= ~self._done
        gone = leaves.nonzero().squeeze(1)  # the one synchronisation of this exit
        if not len(gone):
            return None
        self._open -= len(gone)
        whole = len(gone) == rows
        self.answers.append(Answers(self.ids, logits, sure, index) if whole else
                            Answers(self.ids[gone], logits[gone], sure[gone], index))
        done = leaves if self._done is None else leaves | self._done
        if self._open and rows - self._open < self.min_leave * rows:
            self._done = done
            return None
        keep = self._rows_left(done)
        self.ids, self._done = self.ids[keep], None
        return keep

    def board(self, ids: Tensor) -> None:
        """Other samples fly on instead of those who came."""
        self.ids, self._done, self._open = ids, None, ids.numel()

    def at_end(self, logits: Tensor) -> None:
        """Answers the others with the backbone's own logits."""
        if not isinstance(logits, Tensor) or logits.ndim != 2 or logits.shape[0] != self.ids.numel():
            found = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise RoutingError(f'{len(self.ids)} samples went to the end, but the backbone returned {found}.')
        if self._done is not None:
            keep = self._rows_left(self._done)
            self.ids, self._done, logits = self.ids[keep], None, logits[keep]
        self.answers.append(Answers(self.ids, logits, confidence(logits), len(self.thresholds)))

    def output(self) -> CascadeOutput:
        """The answers by `ids`, which must be 0..N-1."""
        if len(self.answers) == 1:  # samples keep their order on the way
            ((ids, logits, sure, index),) = self.answers
            return CascadeOutput(logits, torch.full_like(ids, index), sure)
        who = torch.cat([a.ids for a in self.answers])
        order = torch.empty_like(who)
        order[who] = torch.arange(len(who), device=who.device)
        exits = torch.cat([torch.full_like(a.ids, a.exit) for a in self.answers])
        return CascadeOutput(torch.cat([a.logits for a in self.answers])[order], exits[order],
                             torch.cat([a.confidence for a in self.answers])[order])

    def _rows_left(self, done: Tensor) -> Tensor:
        # how many there are is known, so sorting finds them without asking the device again
        return done.to(torch.uint8).argsort(stable=True)[:self._open]
