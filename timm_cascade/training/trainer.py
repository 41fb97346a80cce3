"""The epochs of head training: batches of features in, trained heads out."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import UNLABELLED, check_labels
from ..heads import NORMS
from ..inference.batch import confidence
from ..thresholds import Samples, training_path
from ..thresholds.samples import FloatArray
from ..utils.distributed import share_gradients, share_values, sum_over_processes
from .features import Batch, FrozenFeatures, StoredFeatures
from .work_dir import WorkDir

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Classifier', 'Trainer', 'in_order', 'moments']

_logger = logging.getLogger(__name__)
EPSILON = 1e-4  # share of the mean variance that is added to each: features may be of any scale
TEMPERATURE = 4.0  # at which heads are compared with the network's answers

Source = FrozenFeatures | StoredFeatures


class Classifier(nn.Module):
    """A new classifier for the backbone: starts at zero, and trains on standardised features, of whatever scale."""

    mean: Tensor
    std: Tensor

    def __init__(self, layer: nn.Linear | nn.Conv2d, mean: Tensor, variance: Tensor) -> None:
        super().__init__()
        weight, bias = layer.weight.flatten(1).float(), layer.bias
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
        """Makes `layer` the same function of features that are not standardised."""
        weight = self.linear.weight / self.std
        layer.weight.copy_(weight.view_as(layer.weight))
        if layer.bias is not None:
            layer.bias.copy_(self.linear.bias - weight @ self.mean)


def _loss(logits: Tensor, labels: Tensor, final: Tensor) -> Tensor:
    """Loss of one head, summed over a batch.

    Args:
        logits: (N, C) of the head.
        labels: (N,), -1 where there is none: there the distance to the frozen network's logits counts.
        final: (N, C) logits of the frozen network.
    """
    loss = F.cross_entropy(logits, labels, reduction='sum', ignore_index=UNLABELLED)
    without = labels == UNLABELLED
    if without.any():
        mine, theirs = (F.log_softmax(x[without].float() / TEMPERATURE, 1) for x in (logits, final))
        # the square keeps gradients as large as those of labels (Hinton et al., arXiv 1503.02531)
        loss = loss + TEMPERATURE**2 * F.kl_div(mine, theirs, reduction='sum', log_target=True)
    return loss


def _correct(logits: Sequence[Tensor], labels: Tensor, final: Tensor) -> Tensor:
    """Number of correct answers of each head: the label counts, or else the network's own answer."""
    target = torch.where(labels == UNLABELLED, final.argmax(1), labels)
    return torch.stack([(x.argmax(1) == target).sum() for x in logits])


def in_order(source: Source, accelerator: Accelerator) -> Iterator[Batch]:
    """This process's share of all images."""
    n = len(source)
    plan = [np.arange(begin, min(begin + source.batch, n)) for begin in range(0, n, source.batch)]
    return source.batches(plan[accelerator.process_index :: accelerator.num_processes])


def moments(
    views: Sequence[Source], accelerator: Accelerator, num_classes: int, labelled: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Mean and variance of each of the M+1 arrays, over all views; float64 sums, one batch in memory at a time.

    Raises:
        ValueError: A label that is not a class, or with `labelled` one that is missing.
    """
    widths = views[0].widths
    sums = torch.zeros(2, sum(widths), dtype=torch.float64)
    for view in views:
        for arrays, labels in in_order(view, accelerator):
            values = torch.cat(arrays, 1).cpu().double()
            sums += torch.stack([values.sum(0), values.square().sum(0)])
            check_labels(labels, num_classes, labelled)
    mean, square = sum_over_processes(accelerator, sums) / sum(map(len, views))
    return list(mean.split(widths)), list((square - mean.square()).clamp(min=0).split(widths))


class Trainer:
    """Trains heads on features: AdamW, cosine decay, one view per epoch in turn.

    Args:
        heads: What is trained, each with `classify`; in the order of the arrays of a batch.
        views: Where batches come from.
        held: What accuracy is reported on; None reports none.
        accelerator: Device, processes, precision, gradient accumulation and trackers.
        epochs, batch_size, lr, weight_decay, seed: See train_heads.
    """

    def __init__(
        self,
        heads: nn.ModuleList,
        views: Sequence[Source],
        held: Source | None,
        accelerator: Accelerator,
        *,
        epochs: int,
        batch_size: int,
        lr: float,
        weight_decay: float,
        seed: int,
    ) -> None:
        self.heads, self.views, self.held, self.accelerator = heads, views, held, accelerator
        self.epochs, self.batch_size, self.lr, self.seed = epochs, batch_size, lr, seed
        hidden = [getattr(head, 'hidden', nn.Identity()) for head in heads]
        self.norms: list[Any] = [m for layers in hidden for m in layers.modules() if type(m) in NORMS]
        self.n = len(views[0])
        self.step_size = batch_size * accelerator.gradient_accumulation_steps
        self.steps = -(-self.n // self.step_size)
        decayed = [p for p in heads.parameters() if p.ndim > 1]
        plain = [p for p in heads.parameters() if p.ndim <= 1]
        optimizer: Any = torch.optim.AdamW(
            [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)], lr=lr
        )
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * self.steps)
        self.optimizer = accelerator.prepare(optimizer)
        share_values(accelerator, heads.state_dict().values())
        self.history: list[dict[str, Any]] = []

    def run(self, work_dir: WorkDir) -> list[dict[str, Any]]:
        """Trains the epochs that `work_dir` does not have yet; one dict per epoch."""
        self._continue(work_dir.load())
        work_dir.run(self.history, self.epochs, self.steps, self._run_epoch, self._state)
        return self.history

    def _state(self) -> dict[str, Any]:
        return {name: getattr(self, name).state_dict() for name in ('heads', 'optimizer', 'schedule')}

    def _continue(self, saved: dict[str, Any] | None) -> None:
        if saved is None:
            return
        for name in ('heads', 'optimizer', 'schedule'):
            getattr(self, name).load_state_dict(saved[name])
        self.history = saved['history']

    def _run_epoch(self, bar: Any) -> dict[str, Any]:
        accelerator, epoch = self.accelerator, len(self.history)
        rank, processes = accelerator.process_index, accelerator.num_processes
        generator = torch.Generator().manual_seed(self.seed * 100_003 + epoch + 1)
        order = torch.randperm(self.n, generator=generator).numpy()
        chosen = [order[i : i + self.step_size] for i in range(0, self.n, self.step_size)]
        parts = [[c[i : i + self.batch_size] for i in range(0, len(c), self.batch_size)] for c in chosen]
        batches = self.views[epoch % len(self.views)].batches(
            [part[rank::processes] for step in parts for part in step]
        )
        totals = torch.zeros(1 + len(self.heads), device=accelerator.device)  # loss, correct answers of each head
        for images, step in zip(map(len, chosen), parts, strict=True):
            for _ in step:
                totals += self._backward(*next(batches), images)
            share_gradients(accelerator, self.heads)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            bar.update()
        for norm in self.norms:  # each process saw its own part of the batches
            for statistic in (norm.running_mean, norm.running_var):
                statistic.copy_(sum_over_processes(accelerator, statistic) / processes)
        loss, *correct = (sum_over_processes(accelerator, totals) / self.n).tolist()
        if not np.isfinite(loss):
            raise ValueError(
                f'the loss is {loss} in epoch {epoch + 1}; the heads were left as they were. '
                f'Try a smaller lr than {self.lr}.'
            )
        line: dict[str, Any] = dict(epoch=epoch + 1, loss=round(loss, 5), train_accuracy=[round(c, 4) for c in correct])
        if self.held is not None:
            line['accuracy'] = [round(a, 4) for a in self._accuracies(self.held)]
        return line

    def _backward(self, arrays: list[Tensor], labels: Tensor, images: int) -> Tensor:
        """Gradients of this process's part of a step of `images` images; returns loss and correct answers."""
        accelerator = self.accelerator
        arrays, labels = [a.to(accelerator.device) for a in arrays], labels.to(accelerator.device)
        for norm in self.norms:
            norm.train(len(labels) > 1)  # a single sample has no variance
        with accelerator.autocast():
            logits = self._logits(arrays)
        for norm in self.norms:
            norm.eval()
        loss = torch.stack([_loss(x.float(), labels, arrays[-1]) for x in logits if x.requires_grad]).sum()
        # gradients add up to those of the mean over the step's images; Accelerate divides by the number of parts
        accelerator.backward(loss * (accelerator.gradient_accumulation_steps / images))
        return torch.cat([loss.detach()[None], _correct(logits, labels, arrays[-1])])

    @torch.no_grad()
    def path(self, stage_cost: np.ndarray, head_cost: np.ndarray) -> FloatArray:
        """Thresholds (K, M) in the order in which exits disagree with the full network on the training data.

        The heads' losses there are far too small to believe, but only the order is used: the held-out images of a
        calibration test it, all of them, as none has to propose it.

        Args:
            stage_cost, head_cost: See `thresholds.Samples`.
        """
        from accelerate.utils import gather_object

        self.heads.eval()
        found: list[tuple[np.ndarray, np.ndarray]] = []
        for arrays, _ in in_order(self.views[0], self.accelerator):
            arrays = [a.to(self.accelerator.device) for a in arrays]
            with self.accelerator.autocast():
                logits = self._logits(arrays)
            logits += arrays[len(logits) :]  # a classifier that is not trained
            answer = torch.stack([x.argmax(1) for x in logits], 1)
            confident = torch.stack([confidence(x) for x in logits], 1)
            found.append((confident.cpu().numpy(), (answer == answer[:, -1:]).cpu().numpy()))
        if self.accelerator.num_processes > 1:
            found = gather_object(found)
        columns = [np.concatenate(x) for x in zip(*found, strict=True)]
        return training_path(Samples(columns[0], columns[1], stage_cost, head_cost))

    def _logits(self, arrays: list[Tensor]) -> list[Tensor]:
        """Logits of each head; arrays beyond the heads are not used."""
        return [head.classify(a) for head, a in zip(self.heads, arrays, strict=False)]  # type: ignore[operator]

    @torch.no_grad()
    def _accuracies(self, held: Source) -> list[float]:
        """Accuracy of each exit on the validation images, the backbone's own last."""
        device = self.accelerator.device
        correct = torch.zeros(len(held.widths))
        for arrays, labels in in_order(held, self.accelerator):
            arrays = [a.to(device) for a in arrays]
            logits = self._logits(arrays)
            logits += arrays[len(logits) :]  # a classifier that is not trained
            correct += _correct(logits, labels.to(device), logits[-1]).cpu()
        return (sum_over_processes(self.accelerator, correct) / len(held)).tolist()
