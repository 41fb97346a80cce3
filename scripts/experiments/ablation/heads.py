"""The heads that the ablation compares, those that earned no place in the library included, and how they train.

Every row trains from pooled features, all exits together, as `timm_cascade.train_heads` does; a test checks that
the base row is the library's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from timm_cascade.heads import ExitHead, HeadSpec

EPOCHS, BATCH = 20, 256
FORMER = 'version 0.1'  # its default heads: a 4x4 grid, 64 hidden units, halved until all heads cost 1 %
NARROW = 'narrow'  # today's default heads without a least width: as wide as 1 % of the MACs for all of them allows


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: What the table calls it.
        exits: `all`, how many of them (spread over the cost), `paper` (the two of the paper's recipe), or `default`
            (the library's own choice).
        head: What the library takes as `head=`, or FORMER, or NARROW.
        recipe: `paper` (SGD) or `ours` (AdamW, as `train_heads`).
        distil: Share of the loss that is the distance to the frozen network's answer; the labels have the rest.
        temperature: Softmax temperature of that distance.
        carry: Each head also reads the logits of the exit before it, which learns nothing from that.
        combine: `mean` (an exit answers with the average of the log-probabilities so far), or `learned` (with
            weights and biases trained on top of the finished heads, as in Zero Time Waste).
        weigh: Samples count at an exit by the chance that they get that far.
        views: Augmented views of each training image beside the plain one.
    """

    name: str
    exits: str | int = 'all'
    head: HeadSpec = 'enhanced'
    recipe: str = 'ours'
    distil: float = 0.0
    temperature: float = 1.0
    carry: bool = False
    combine: str = ''
    weigh: bool = False
    views: int = 0

    @property
    def trained_as(self) -> str:
        """What the training depends on: rows that only differ in what is done with finished heads share them."""
        return repr(
            (self.exits, self.head, self.recipe, self.distil, self.temperature, self.carry, self.weigh, self.views)
        )

    @property
    def key(self) -> str:
        """What the result depends on."""
        return f'{self.trained_as} {self.combine}'


class CarryHead(ExitHead):
    """A head that reads the log-probabilities of the exit before beside its pooled features."""

    def __init__(self, channels: int, size: tuple[int, int], num_classes: int, **kwargs: Any) -> None:
        super().__init__(channels, size, num_classes, **kwargs)
        first = nn.Linear(self.in_features + num_classes, kwargs['hidden'] or num_classes)
        if kwargs['hidden']:
            self.hidden[0] = first
        else:
            self.fc = first

    def classify(self, pooled: Tensor, before: Tensor | None = None) -> Tensor:
        assert before is not None
        carried = F.log_softmax(before.detach().float(), 1).clamp(min=-10)
        return self.fc(self.hidden(torch.cat([self.norm(pooled), carried], 1)))


class Heads(nn.Module):
    """The heads of one row.

    Args:
        shapes: For each exit the arguments of ExitHead that describe its features.
        configs: For each exit those that describe its head.
        num_classes: Number of classes.
        row: What the heads do besides.
    """

    def __init__(
        self, shapes: Sequence[dict[str, Any]], configs: Sequence[dict[str, Any]], num_classes: int, row: Row
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.combine = row.combine
        self.heads = nn.ModuleList(
            (CarryHead if row.carry and i else ExitHead)(num_classes=num_classes, **shape, **config)
            for i, (shape, config) in enumerate(zip(shapes, configs, strict=True))
        )
        # row m of the weights says what exit m's answer is made of; it starts as the average of those so far
        count = len(shapes)
        self.weights = nn.Parameter(torch.tril(torch.ones(count, count)) / torch.arange(1, count + 1)[:, None])
        self.biases = nn.Parameter(torch.zeros(count, num_classes))

    def forward(self, pooled: Sequence[Tensor]) -> list[Tensor]:
        """(n, in_features) of each exit to its own logits (n, C)."""
        logits: list[Tensor] = []
        for head, p in zip(self.heads, pooled, strict=True):
            logits.append(head.classify(p, logits[-1]) if isinstance(head, CarryHead) else head.classify(p))
        return logits

    def answers(self, logits: list[Tensor]) -> list[Tensor]:
        """What the exits answer, given their own logits."""
        if not self.combine:
            return logits
        log_probabilities = torch.stack([F.log_softmax(x, 1) for x in logits])
        mixed = torch.einsum('mk,knc->mnc', torch.tril(self.weights), log_probabilities) + self.biases[:, None]
        return list(mixed)

    def macs(self) -> list[int]:
        """MACs of each head; those of combining included."""
        linear = [
            sum(m.in_features * m.out_features for m in head.modules() if isinstance(m, nn.Linear))
            for head in self.heads
        ]
        return [macs + bool(self.combine) * self.num_classes * (i + 1) for i, macs in enumerate(linear)]


def fit(heads: Heads, row: Row, features: list[Tensor], labels: Tensor, teacher: Tensor, seed: int) -> None:
    """Trains in place.

    Args:
        features: For each exit (n, in_features), any float dtype; the views of all images follow one another.
        labels: (n,).
        teacher: (n, C) logits of the frozen network.
        seed: Seed of the order of the samples.
    """
    views = row.views + 1
    images = len(labels) // views
    for head, pooled in zip(heads.heads, features, strict=True):
        if isinstance(head.norm, nn.BatchNorm1d):
            variance, mean = torch.var_mean(pooled.float(), dim=0, correction=0)
            head.norm.running_mean.copy_(mean)
            head.norm.running_var.copy_(variance)
    heads.eval()  # norms stay as fitted
    steps = -(-images // BATCH)
    parameters = list(heads.heads.parameters())
    optimizer: torch.optim.Optimizer
    if row.recipe == 'paper':
        optimizer = torch.optim.SGD(parameters, lr=0.01 * BATCH / 256, momentum=0.9, weight_decay=1e-4)
        schedule: Any = torch.optim.lr_scheduler.MultiStepLR(optimizer, [EPOCHS // 2 * steps], gamma=0.1)
    else:
        optimizer = torch.optim.AdamW(
            [
                dict(params=[p for p in parameters if p.ndim > 1], weight_decay=0.05),
                dict(params=[p for p in parameters if p.ndim <= 1], weight_decay=0.0),
            ],
            lr=2e-3,
            fused=True,
        )
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS * steps)
    for epoch in range(1, EPOCHS + 1):
        generator = torch.Generator().manual_seed(seed * 100_003 + epoch)
        order = torch.randperm(images, generator=generator)
        if row.views:  # each image in one of its views
            order += images * torch.randint(views, (images,), generator=generator)
        for chosen in order.split(BATCH):
            logits = heads([pooled[chosen].float() for pooled in features])
            loss = torch.stack(
                [
                    (each * w).sum()
                    for each, w in zip(
                        _losses(logits, labels[chosen], teacher[chosen], row), _weights(logits, row), strict=True
                    )
                ]
            ).sum() / len(chosen)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def _losses(logits: list[Tensor], labels: Tensor, teacher: Tensor, row: Row) -> list[Tensor]:
    """Of each exit (n,)."""
    losses = []
    soft = F.softmax(teacher / row.temperature, 1)
    for x in logits:
        loss = F.cross_entropy(x, labels, reduction='none') if row.distil < 1 else x.new_zeros(len(x))
        if row.distil:
            distance = F.cross_entropy(x / row.temperature, soft, reduction='none') * row.temperature**2
            loss = (1 - row.distil) * loss + row.distil * distance
        losses.append(loss)
    return losses


@torch.no_grad()
def _weights(logits: list[Tensor], row: Row) -> list[Tensor]:
    """For each exit (n,), 1 on average: how uncertain the most confident exit before was, plus a tenth."""
    ones = torch.ones(len(logits[0]))
    if not row.weigh:
        return [ones] * len(logits)
    weights, reach = [ones], ones
    for x in logits[:-1]:
        reach = torch.minimum(reach, 1 - F.softmax(x, 1).amax(1))
        w = reach + 0.1
        weights.append(w / w.mean())
    return weights


def fit_weights(heads: Heads, logits: list[Tensor], labels: Tensor) -> None:
    """`learned`: cross-entropy of all exits' combined answers; the heads themselves stay as they are."""
    optimizer = torch.optim.Adam([heads.weights, heads.biases], lr=1e-2)
    for _ in range(5):
        for chosen in torch.randperm(len(labels), generator=torch.Generator().manual_seed(0)).split(1024):
            answers = heads.answers([x[chosen] for x in logits])
            loss = torch.stack([F.cross_entropy(x, labels[chosen]) for x in answers]).sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
