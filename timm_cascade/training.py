"""Training exit heads on a frozen backbone, with Accelerate.

The backbone runs over the images once: what the heads classify (the pooled taps) is kept, and the epochs run on it.
"""
from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .data import create_loader
from .heads import ExitHead
from .model import CascadeModel

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['train_heads']


class _Heads(nn.Module):
    """All heads as one module, so that one wrapper (DDP) serves them."""

    def __init__(self, heads: nn.ModuleList) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, pooled: list[Tensor]) -> list[Tensor]:
        return [head.classify(p) for head, p in zip(self.heads, pooled, strict=True)]  # type: ignore[operator]


@torch.no_grad()
def pooled_taps(
        model: CascadeModel,
        data: Dataset,
        accelerator: Accelerator,
        batch_size: int,
        workers: int,
        title: str,
) -> tuple[list[Tensor], Tensor]:
    """One pass of the backbone: for each exit (n, in_features) on the CPU, and the labels (n,), in order."""
    loader = accelerator.prepare_data_loader(create_loader(model, data, batch_size, workers))
    parts: list[list[Tensor]] = [[] for _ in model.exits]
    labels = []
    for images, target in tqdm(loader, desc=title, disable=not accelerator.is_main_process):
        with accelerator.autocast():
            pooled, _ = model.forward_pooled(images)
        *gathered, target = accelerator.gather_for_metrics((*pooled, target))
        for part, p in zip(parts, gathered, strict=True):
            part.append(p.float().cpu())
        labels.append(target.cpu())
    return [torch.cat(part) for part in parts], torch.cat(labels)


def _fit_norms(heads: nn.ModuleList, taps: list[Tensor]) -> None:
    """Standardises by the training set's own statistics, once, so that no step depends on how a batch is split."""
    for head, tap in zip(heads, taps, strict=True):
        assert isinstance(head, ExitHead)
        if isinstance(head.norm, nn.BatchNorm1d):
            variance, mean = torch.var_mean(tap, dim=0, correction=0)
            head.norm.running_mean.copy_(mean)  # type: ignore[union-attr]
            head.norm.running_var.copy_(variance)  # type: ignore[union-attr]


@torch.no_grad()
def _accuracies(heads: _Heads, taps: list[Tensor], labels: Tensor, device: torch.device) -> list[float]:
    right = torch.zeros(len(taps))
    for begin in range(0, len(labels), 4096):
        target = labels[begin:begin + 4096].to(device)
        logits = heads([t[begin:begin + 4096].to(device) for t in taps])
        right += torch.stack([(x.argmax(1) == target).sum() for x in logits]).cpu()
    return (right / len(labels)).tolist()


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
        log: str | Path | None = None,
        accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Trains the heads in place; the backbone stays in evaluation mode and is not changed.

    Cross-entropy summed over the exits, AdamW, cosine decay. A calibration made for the old heads is dropped.

    Args:
        model: The cascade.
        train: Images with labels 0..C-1: an ImageData, or any data set of (normalised tensor, label).
        val: Images to report accuracy on, never trained on.
        batch_size: Over all processes together.
        log: JSON-lines file, one line an epoch.
        accelerator: Yours, or one made with defaults.

    Returns:
        One dict an epoch: epoch, loss, accuracy (one an exit, on `val`), seconds.

    Raises:
        ValueError: Labels outside 0..C-1, or a loss that is not finite; the heads are then as they were.
    """
    from accelerate import Accelerator

    accelerator = accelerator or Accelerator()
    device = accelerator.device
    training = model.training
    before = {name: tensor.clone() for name, tensor in model.heads.state_dict().items()}
    model.to(device).eval()
    try:
        share = max(1, batch_size // accelerator.num_processes)
        taps, labels = pooled_taps(model, train, accelerator, share, workers, 'backbone, training images')
        held = pooled_taps(model, val, accelerator, share, workers, 'backbone, validation images') if val else None
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= model.num_classes:
            raise ValueError(f'labels go from {low} to {high}, the model has the classes 0..{model.num_classes - 1}; '
                             f'create it with num_classes={high + 1} or correct the labels.')
        _fit_norms(model.heads, taps)
        history = _fit(model, taps, labels, held, accelerator, epochs, batch_size, lr, weight_decay, seed, log)
    except BaseException:
        model.heads.load_state_dict(before)
        raise
    finally:
        model.train(training)
    model.forget_calibration()
    return history


def _fit(
        model: CascadeModel,
        taps: list[Tensor],
        labels: Tensor,
        held: tuple[list[Tensor], Tensor] | None,
        accelerator: Accelerator,
        epochs: int,
        batch_size: int,
        lr: float,
        weight_decay: float,
        seed: int,
        log: str | Path | None,
) -> list[dict[str, Any]]:
    heads = _Heads(model.heads)
    decayed = [p for p in heads.parameters() if p.ndim > 1]
    plain = [p for p in heads.parameters() if p.ndim <= 1]
    optimizer: Any = torch.optim.AdamW(
        [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.)], lr=lr)
    steps = -(-len(labels) // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    wrapped, optimizer = accelerator.prepare(heads, optimizer)
    rank, processes = accelerator.process_index, accelerator.num_processes
    history = []
    bar = tqdm(total=epochs * steps, desc='heads', disable=not accelerator.is_main_process)
    for epoch in range(1, epochs + 1):
        began = time.perf_counter()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed * 100_003 + epoch))
        total = torch.zeros((), device=accelerator.device)
        for begin in range(0, len(labels), batch_size):
            chosen = order[begin:begin + batch_size]
            mine = chosen[rank::processes]
            target = labels[mine].to(accelerator.device)
            with accelerator.autocast():
                logits = wrapped([t[mine].to(accelerator.device) for t in taps])
            # the sum over this process's share; DDP averages over processes, so scale to the mean over the batch
            loss = sum(F.cross_entropy(x.float(), target, reduction='sum') for x in logits)
            assert isinstance(loss, Tensor)
            loss = loss * (processes / len(chosen))
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()
            schedule.step()
            total += loss.detach() * len(chosen) / len(labels)
            bar.update()
        mean_loss = float(accelerator.reduce(total, 'mean'))
        if not torch.isfinite(torch.tensor(mean_loss)):
            raise ValueError(f'the loss is {mean_loss} in epoch {epoch}; the heads were left as they were. '
                             f'Try a smaller lr than {lr}.')
        line: dict[str, Any] = dict(epoch=epoch, loss=round(mean_loss, 5),
                                    seconds=round(time.perf_counter() - began, 2))
        if held is not None:
            line['accuracy'] = [round(a, 4) for a in _accuracies(heads, *held, accelerator.device)]
            bar.set_postfix_str(' '.join(f'{a:.1%}' for a in line['accuracy']))
        history.append(line)
        if log is not None and accelerator.is_main_process:
            Path(log).parent.mkdir(parents=True, exist_ok=True)
            with open(log, 'a', encoding='utf-8') as f:
                f.write(json.dumps(line) + '\n')
    bar.close()
    return history
