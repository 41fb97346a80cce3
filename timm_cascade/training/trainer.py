"""The epochs of head training: batches of taps in, trained heads out."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..data import UNLABELLED
from ..utils.distributed import on_main
from ..utils.files import replacing
from .features import Batch, StoredTaps, Taps

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Classifier', 'Heads', 'Recipe', 'Trainer', 'moments']

_logger = logging.getLogger(__name__)
EPSILON = 1e-4  # of the mean variance, added to each: features may be of any scale
TEMPERATURE = 4.0  # at which heads are compared with the network's answers


class Classifier(nn.Module):
    """A new classifier for the backbone: starts at zero, and trains on standardised features, of whatever scale."""

    mean: Tensor
    std: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        weight, bias = layer.weight.flatten(1), layer.bias
        self.register_buffer('mean', mean.to(weight) if bias is not None else torch.zeros_like(mean).to(weight))
        self.register_buffer('std', (variance + EPSILON * variance.mean() + 1e-30).sqrt().to(weight))
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None).to(weight)
        for parameter in self.linear.parameters():  # softmax regression is convex; a random start only costs time
            nn.init.zeros_(parameter)

    def classify(self, features: Tensor) -> Tensor:
        """(N, in_features) to logits (N, num_classes)."""
        return self.linear((features - self.mean) / self.std)

    @torch.no_grad()
    def write_to(self, layer: nn.Linear | nn.Conv2d) -> None:
        """Makes `layer` the same function, of the features as they are."""
        weight = self.linear.weight / self.std
        layer.weight.copy_(weight.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(self.linear.bias - weight @ self.mean)


class Heads(nn.Module):
    """All that is trained, as one module."""

    def __init__(self, heads: Sequence[nn.Module]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, pooled: list[Tensor]) -> list[Tensor]:
        """The logits of each head; of the M+1 arrays in `pooled` those beyond the heads are not used."""
        return [head.classify(p) for head, p in zip(self.heads, pooled, strict=False)]  # type: ignore[operator]


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters; see train_heads."""

    epochs: int
    batch_size: int
    lr: float
    weight_decay: float
    seed: int


def _loss(logits: Tensor, labels: Tensor, answer: Tensor) -> Tensor:
    """What one head loses, summed over a batch.

    Args:
        logits: (N, C) of the head.
        labels: (N,), -1 where there is none: there the distance to the frozen network's answer counts.
        answer: (N, C) logits of the frozen network.
    """
    loss = F.cross_entropy(logits, labels, reduction='sum', ignore_index=UNLABELLED)
    without = labels == UNLABELLED
    if without.any():
        mine, theirs = (F.log_softmax(x[without].float() / TEMPERATURE, 1) for x in (logits, answer))
        # the square keeps gradients as large as those of labels (Hinton et al., arXiv 1503.02531)
        loss = loss + TEMPERATURE**2 * F.kl_div(mine, theirs, reduction='sum', log_target=True)
    return loss


def _targets(labels: Tensor, answer: Tensor) -> Tensor:
    """What is right: the label, or else what the network answers."""
    return torch.where(labels == UNLABELLED, answer.argmax(1), labels)


def _in_order(taps: Taps | StoredTaps, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's share of all images."""
    n = len(taps)
    plan = [np.arange(begin, min(begin + taps.batch, n)) for begin in range(0, n, taps.batch)]
    return taps.batches(plan[accelerator.process_index :: accelerator.num_processes])


def _sum(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """Over all processes."""
    if accelerator.num_processes == 1:
        return tensor
    return accelerator.reduce(tensor.to(accelerator.device), 'sum').to(tensor.device)


def moments(
    views: Sequence[Taps | StoredTaps], accelerator: Accelerator, num_classes: int, least: int = 0
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of each of the M+1 arrays, over all views; float64 sums, one batch in memory at a time.

    Raises:
        ValueError: A label outside least..num_classes-1.
    """
    widths = views[0].widths
    sums = torch.zeros(2, sum(widths), dtype=torch.float64)
    for view in views:
        for arrays, labels in _in_order(view, accelerator):
            values = torch.cat(arrays, 1).cpu().double()
            sums += torch.stack([values.sum(0), values.square().sum(0)])
            if len(labels) and (labels.min() < least or labels.max() >= num_classes):
                raise ValueError(
                    f'labels go from {int(labels.min())} to {int(labels.max())}, the model has the '
                    f'classes 0..{num_classes - 1}; create it with num_classes={int(labels.max()) + 1} '
                    f'or correct the labels.'
                )
    mean, square = _sum(accelerator, sums) / sum(map(len, views))
    return list(mean.split(widths)), list((square - mean.square()).clamp(min=0).split(widths))


class Trainer:
    """The epochs: which batches, what is reported, what is written down."""

    def __init__(
        self,
        heads: Heads,
        views: Sequence[Taps | StoredTaps],
        accelerator: Accelerator,
        recipe: Recipe,
        held: Sequence[Taps | StoredTaps],
        save_every: float,
    ) -> None:
        self.heads, self.views, self.held = heads, views, held
        self.accelerator, self.recipe, self.save_every = accelerator, recipe, save_every
        self.n = len(views[0])
        self.step_size = recipe.batch_size * accelerator.gradient_accumulation_steps
        self.steps = -(-self.n // self.step_size)
        decayed = [p for p in heads.parameters() if p.ndim > 1]
        plain = [p for p in heads.parameters() if p.ndim <= 1]
        optimizer: Any = torch.optim.AdamW(
            [dict(params=decayed, weight_decay=recipe.weight_decay), dict(params=plain, weight_decay=0.0)], lr=recipe.lr
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, recipe.epochs * self.steps)
        self.optimizer = accelerator.prepare(optimizer)
        if accelerator.num_processes > 1:  # all start from the main process's heads
            from accelerate.utils import broadcast

            with torch.no_grad():
                for tensor in heads.state_dict().values():
                    tensor.copy_(broadcast(tensor.clone()))
        self.history: list[dict[str, Any]] = []
        self.epoch, self.step = 0, 0  # the next ones
        self.totals = torch.zeros(1 + len(heads.heads))  # of this epoch: loss, right answers of each head
        self.saved = time.monotonic()

    def run(self, state: Path | None, keys: list[str], log: Path | None) -> list[dict[str, Any]]:
        recipe, accelerator = self.recipe, self.accelerator
        key = hashlib.sha256(
            json.dumps(
                [
                    asdict(recipe),
                    keys,
                    str(self.heads),
                    self.step_size,
                    accelerator.num_processes,
                    str(accelerator.mixed_precision),
                ]
            ).encode()
        ).hexdigest()
        self._load(state, key)
        if accelerator.is_main_process and log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            log.write_text(''.join(json.dumps(line) + '\n' for line in self.history), encoding='utf-8')
        with tqdm(
            total=recipe.epochs * self.steps,
            initial=self.epoch * self.steps + self.step,
            desc='heads',
            disable=not accelerator.is_main_process,
        ) as bar:
            while self.epoch < recipe.epochs:
                line = self._run_epoch(bar, state, key)
                accelerator.log({k: v for k, v in _flat(line).items()}, step=line['epoch'])
                if log is not None and accelerator.is_main_process:
                    with open(log, 'a', encoding='utf-8') as f:
                        f.write(json.dumps(line) + '\n')
                bar.set_postfix_str(_summary(line))
        self._save(state, key)
        return self.history

    def _run_epoch(self, bar: Any, state: Path | None, key: str) -> dict[str, Any]:
        accelerator, recipe = self.accelerator, self.recipe
        rank, processes = accelerator.process_index, accelerator.num_processes
        generator = torch.Generator().manual_seed(recipe.seed * 100_003 + self.epoch + 1)
        order = torch.randperm(self.n, generator=generator).numpy()
        chosen = [order[i : i + self.step_size] for i in range(self.step * self.step_size, self.n, self.step_size)]
        parts = [[c[i : i + recipe.batch_size] for i in range(0, len(c), recipe.batch_size)] for c in chosen]
        batches = self.views[self.epoch % len(self.views)].batches(
            [part[rank::processes] for step in parts for part in step]
        )
        began = time.monotonic()
        for images, step in zip(map(len, chosen), parts, strict=True):
            for _ in step:
                self._backward(*next(batches), images)
            self._share_gradients()
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            self.step += 1
            bar.update()
            if time.monotonic() - self.saved > self.save_every:
                bar.set_postfix_str(f'loss {float(self.totals[0]) / min(self.n, self.step * self.step_size):.3f}')
                self._save(state, key)
        loss, *right = (self.totals / self.n).tolist()
        if not np.isfinite(loss):
            raise ValueError(
                f'the loss is {loss} in epoch {self.epoch + 1}; the heads were left as they were. '
                f'Try a smaller lr than {recipe.lr}.'
            )
        line: dict[str, Any] = dict(
            epoch=self.epoch + 1, loss=round(loss, 5), train_accuracy=[round(r, 4) for r in right]
        )
        if self.held:
            line['accuracy'] = [round(a, 4) for a in self._accuracies()]
        line['seconds'] = round(time.monotonic() - began, 2)
        self.history.append(line)
        self.epoch, self.step = self.epoch + 1, 0
        self.totals.zero_()
        return line

    def _backward(self, arrays: list[Tensor], labels: Tensor, images: int) -> None:
        """Gradients of this process's part of a step of `images` images."""
        accelerator = self.accelerator
        arrays, labels = [a.to(accelerator.device) for a in arrays], labels.to(accelerator.device)
        with accelerator.autocast():
            logits = self.heads(arrays)
        loss = torch.stack([_loss(x.float(), labels, arrays[-1]) for x in logits]).sum()
        # gradients add up to those of the mean over the step's images; Accelerate divides by the number of parts
        accelerator.backward(loss * (accelerator.gradient_accumulation_steps / images))
        target = _targets(labels, arrays[-1])
        right = torch.stack([(x.argmax(1) == target).sum() for x in logits])
        self.totals = self.totals.to(loss) + _sum(accelerator, torch.cat([loss.detach()[None], right]))

    def _share_gradients(self) -> None:
        """Sums them over the processes, all in one piece.

        DistributedDataParallel would cut them up anew after its first step, and so add in another order in a training
        that is continued.
        """
        if self.accelerator.num_processes == 1:
            return
        gradients = [p.grad for p in self.heads.parameters() if p.grad is not None]
        total = self.accelerator.reduce(torch.cat([g.flatten() for g in gradients]), 'sum')
        for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(part.view_as(gradient))

    @torch.no_grad()
    def _accuracies(self) -> list[float]:
        """Of each exit on the validation images, the backbone's own last."""
        (taps,), device = self.held, self.accelerator.device
        right = torch.zeros(len(taps.widths))
        for arrays, labels in _in_order(taps, self.accelerator):
            logits = self.heads([a.to(device) for a in arrays])
            logits += [a.to(device) for a in arrays[len(logits) :]]  # a classifier that is not trained
            target = _targets(labels.to(device), logits[-1])
            right += torch.stack([(x.argmax(1) == target).sum() for x in logits]).cpu()
        return (_sum(self.accelerator, right) / len(taps)).tolist()

    def _save(self, state: Path | None, key: str) -> None:
        """One process writes; all of them have the same weights, and the totals are over all."""
        self.saved = time.monotonic()
        if state is None or not self.accelerator.is_main_process or not torch.isfinite(self.totals).all():
            return
        scaler = self.accelerator.scaler
        with replacing(state) as temporary:
            torch.save(
                dict(
                    key=key,
                    epoch=self.epoch,
                    step=self.step,
                    totals=self.totals.cpu(),
                    heads=self.heads.state_dict(),
                    optimizer=self.optimizer.state_dict(),
                    schedule=self.schedule.state_dict(),
                    scaler=scaler.state_dict() if scaler else None,
                    history=self.history,
                ),
                temporary,
            )

    def _load(self, state: Path | None, key: str) -> None:
        if state is None:
            return

        def found() -> bool:
            for file in state.parent.glob(f'.{state.name}.*.tmp'):  # of one that was killed while it wrote
                file.unlink()
            return state.is_file()

        if not on_main(self.accelerator, found):
            return
        saved = torch.load(state, map_location='cpu', weights_only=True)
        if saved['key'] != key:
            if self.accelerator.is_main_process:
                _logger.warning('%s is of a training with other settings, data or processes; starting anew', state)
            return
        self.heads.load_state_dict(saved['heads'])
        self.optimizer.load_state_dict(saved['optimizer'])
        self.schedule.load_state_dict(saved['schedule'])
        if self.accelerator.scaler and saved['scaler']:
            self.accelerator.scaler.load_state_dict(saved['scaler'])
        self.epoch, self.step, self.totals = saved['epoch'], saved['step'], saved['totals']
        self.history = saved['history']
        if self.accelerator.is_main_process:
            _logger.info('continuing after epoch %d, step %d of %d', self.epoch, self.step, self.steps)


def _flat(line: dict[str, Any]) -> dict[str, float]:
    """One number a name, as trackers take them."""
    lists = {
        f'{name}/exit_{i}': v for name, values in line.items() if isinstance(values, list) for i, v in enumerate(values)
    }
    return {**{k: v for k, v in line.items() if not isinstance(v, list)}, **lists}


def _summary(line: dict[str, Any]) -> str:
    shown = line.get('accuracy', line['train_accuracy'])
    return f'loss {line["loss"]:.3f}, accuracy {" ".join(f"{a:.1%}" for a in shown)}'
