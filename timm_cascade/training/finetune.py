"""Fine-tuning the backbone on one's own images, before heads are trained on it; with timm's own pieces."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..data import Seen, View, check_labels, check_training_classes, prepare_data
from ..model import CascadeModel
from ..utils.distributed import check_launch, create_accelerator, share_gradients, share_values, sum_over_processes
from .work_dir import WorkDir

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['finetune']

_logger = logging.getLogger(__name__)


def finetune(
    model: CascadeModel,
    train: Dataset,
    val: Dataset,
    *,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 5e-4,
    weight_decay: float = 0.05,
    layer_decay: float = 0.75,
    smoothing: float = 0.1,
    ema_decay: float = 0.0,
    seed: int = 0,
    workers: int = 0,
    work_dir: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> list[dict[str, Any]]:
    """Trains the whole backbone in place and keeps the epoch that is best on `val`; the heads are not touched.

    AdamW with timm's layer decay, one warm-up epoch, cosine decay, timm's training transform with another random view
    of each image in every epoch. Of epochs that are equally good on `val` the last is kept: few images tie often, and
    its learning rate was the smallest. Heads that were trained before no longer fit: call `train_heads` afterwards. A
    calibration is dropped.

    Args:
        model: The cascade.
        train: Labelled images: an ImageData, or any data set of (normalised tensor, label).
        val: Labelled images that choose the epoch. They may serve `train_heads(val=)` too, but neither calibration nor
            test: the choice has seen them.
        epochs: Passes over `train`.
        batch_size: Images per batch, over all processes together; with gradient accumulation (the accelerator's) of
            each part of a step.
        lr: Learning rate of the last layers after the warm-up.
        weight_decay: Weight decay of weights; biases, norms and what the backbone exempts have none.
        layer_decay: Factor on the learning rate from each group of layers to the one before; 1 for none.
        smoothing: Label smoothing.
        ema_decay: Decay of an exponential moving average of the weights, which is then what is validated and kept;
            0 for none.
        seed: Seed of the order of images, of the augmentation and of dropout.
        workers: Processes that decode images.
        work_dir: Folder for the state after each epoch (`backbone.pt`) and a log (`backbone.jsonl`). The same call
            continues from there after an interruption, and only loads the result of a training that is finished.
        accelerator: Yours (device, processes, mixed precision, gradient accumulation, trackers), or one with defaults.

    Returns:
        One dict per epoch: epoch, loss, accuracy (on `val`, a fraction), best (none before is better), seconds.

    Raises:
        ValueError: Labels that are not the model's classes or are missing, classes without images, settings out of
            range, a loss that is not finite; the backbone is then as it was.
        LaunchError: A launch of several processes in which each runs as if it were alone.

    Example:
        >>> model = timm.create_model('cascade_tf_efficientnet_lite0.in1k', pretrained=True, num_classes=5)
        >>> finetune(model, train, val, epochs=10, work_dir='flowers-cascade')
        >>> train_heads(model, train, val, work_dir='flowers-cascade')
    """
    if epochs < 1 or batch_size < 1 or not 0 < layer_decay <= 1 or not 0 <= ema_decay < 1:
        raise ValueError(
            f'epochs={epochs}, batch_size={batch_size}, layer_decay={layer_decay}, ema_decay={ema_decay}: expected at '
            f'least 1, at least 1, more than 0 and at most 1, at least 0 and less than 1.'
        )
    check_training_classes(train)
    train = prepare_data(model, train)
    names = getattr(train, 'class_names', None)
    val = prepare_data(model, val, names if names and len(names) == model.num_classes else None)
    Seen(train).warn_of(val)
    accelerator = accelerator or create_accelerator()
    check_launch(accelerator)
    tuner = _Finetuner(
        model,
        train,
        accelerator,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        layer_decay=layer_decay,
        smoothing=smoothing,
        ema_decay=ema_decay,
        seed=seed,
        workers=workers,
        epochs=epochs,
    )
    backbone, training, dtype = model.backbone, model.training, next(model.backbone.parameters()).dtype
    before = {name: tensor.cpu().clone() for name, tensor in backbone.state_dict().items()}
    try:
        history = tuner.run(val, None if work_dir is None else Path(work_dir))
    except BaseException:
        backbone.load_state_dict(before)
        raise
    finally:
        backbone.to(dtype)
        model.train(training)
    model.published = None  # these are no longer the weights of a published checkpoint
    model.forget_calibration()
    return history


class _Finetuner:
    """The epochs: a step's gradients are those of the mean over its images, on any number of processes."""

    def __init__(self, model: CascadeModel, train: Dataset, accelerator: Accelerator, **settings: Any) -> None:
        self.model, self.train, self.accelerator, self.settings = model, train, accelerator, settings
        self.backbone: nn.Module = model.backbone
        self.batch_size, self.seed, self.epochs = settings['batch_size'], settings['seed'], settings['epochs']
        self.n = len(train)  # type: ignore[arg-type]
        self.step_size = self.batch_size * accelerator.gradient_accumulation_steps
        self.steps = -(-self.n // self.step_size)
        self.history: list[dict[str, Any]] = []
        self.ema: ModelEmaV3 | None = None
        self.best: dict[str, Tensor] = {}

    def run(self, val: Dataset, folder: Path | None) -> list[dict[str, Any]]:
        """Trains the epochs that the folder does not have yet, and loads the best one into the backbone."""
        accelerator, settings = self.accelerator, self.settings
        self.model.to(accelerator.device)
        self.backbone.float()  # small steps are lost in half precision
        layer_decay = settings['layer_decay'] if hasattr(self.backbone, 'group_matcher') else 1.0
        optimizer: Any = create_optimizer_v2(
            self.backbone,
            opt='adamw',
            lr=settings['lr'],
            weight_decay=settings['weight_decay'],
            layer_decay=None if layer_decay == 1 else layer_decay,
        )
        schedule, _ = create_scheduler_v2(
            optimizer,
            sched='cosine',
            num_epochs=self.epochs,
            warmup_epochs=1 if self.epochs > 1 else 0,
            warmup_lr=settings['lr'] / 100,
            warmup_prefix=True,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
        )
        optimizer = accelerator.prepare(optimizer)
        fingerprints = [str(getattr(data, 'fingerprint', len(data))) for data in (self.train, val)]  # type: ignore[arg-type]
        decisive = {name: value for name, value in settings.items() if name != 'workers'}
        shapes = str({name: tuple(t.shape) for name, t in self.backbone.state_dict().items()})
        work_dir = WorkDir(folder, 'backbone', accelerator, [decisive, fingerprints, shapes, self.step_size])
        self._continue(work_dir.load(), optimizer)

        def epoch(bar: Any) -> dict[str, Any]:
            number, loss = len(self.history) + 1, self._run_epoch(optimizer, schedule, bar)
            accuracy = self._accuracy(val)
            best = accuracy >= max((line['accuracy'] for line in self.history), default=-1.0)
            if best:
                self.best = {name: t.cpu().clone() for name, t in self._kept().state_dict().items()}
            return dict(epoch=number, loss=round(loss, 5), accuracy=accuracy, best=best)

        def state() -> dict[str, Any]:
            ema = {} if self.ema is None else self.ema.module.state_dict()
            parts = dict(backbone=self.backbone.state_dict(), best=self.best, ema=ema)
            return dict(parts, optimizer=optimizer.state_dict())

        work_dir.run(self.history, self.epochs, self.steps, epoch, state)
        self.backbone.load_state_dict(self.best)
        return self.history

    def _kept(self) -> nn.Module:
        """The network whose weights are validated and kept: the average, where there is one."""
        return self.backbone if self.ema is None else self.ema.module

    def _continue(self, saved: dict[str, Any] | None, optimizer: Any) -> None:
        if self.settings['ema_decay']:
            self.ema = ModelEmaV3(self.backbone, self.settings['ema_decay'])
        if saved is not None:
            self.backbone.load_state_dict(saved['backbone'])
            optimizer.load_state_dict(saved['optimizer'])
            self.history, self.best = saved['history'], saved['best']
            if self.ema is not None:
                self.ema.module.load_state_dict(saved['ema'])

    def _run_epoch(self, optimizer: Any, schedule: Any, bar: Any) -> float:
        """Trains one epoch; returns the mean loss."""
        accelerator, epoch = self.accelerator, len(self.history)
        rank, processes = accelerator.process_index, accelerator.num_processes
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n)
        parts = [order[i : i + self.batch_size] for i in range(0, self.n, self.batch_size)]
        if len(parts) > 1 and len(parts[-1]) < 2 * processes:
            parts.pop()  # batch norm cannot standardise one image; it comes with another batch in another epoch
        view = View(self.model, self.train, epoch + 1, self.seed)
        plan = [part[rank::processes].tolist() for part in parts]
        cuda = accelerator.device.type == 'cuda'
        loader = DataLoader(view, batch_sampler=plan, num_workers=self.settings['workers'], pin_memory=cuda)
        self.backbone.train()
        total = torch.zeros((), device=accelerator.device)
        updates = epoch * self.steps
        with torch.random.fork_rng():  # dropout repeats when an epoch is trained again after an interruption
            torch.manual_seed(int(np.random.SeedSequence([self.seed, epoch, rank]).generate_state(1)[0]))
            for i, (images, labels) in enumerate(loader):
                first = i - i % accelerator.gradient_accumulation_steps
                last = min(first + accelerator.gradient_accumulation_steps, len(parts))
                count = sum(len(part) for part in parts[first:last])  # images of this step
                if i == first:
                    schedule.step_update(updates)
                total += self._backward(images, labels, count)
                if i + 1 == last:
                    share_gradients(accelerator, self.backbone)
                    optimizer.step()
                    optimizer.zero_grad()
                    updates += 1
                    if self.ema is not None:
                        self.ema.update(self.backbone)
                    bar.update()
        bar.update((epoch + 1) * self.steps - updates)
        share_values(accelerator, self.backbone.buffers())  # running statistics
        loss = float(sum_over_processes(accelerator, total)) / sum(map(len, parts))
        if not np.isfinite(loss):
            raise ValueError(
                f'the loss is {loss} in epoch {epoch + 1}; the backbone was left as it was. '
                f'Try a smaller lr than {self.settings["lr"]}.'
            )
        return loss

    def _backward(self, images: Tensor, labels: Tensor, count: int) -> Tensor:
        """Gradients of a part of a step of `count` images; returns the sum of its losses."""
        accelerator = self.accelerator
        check_labels(labels, self.model.num_classes)
        images, labels = images.to(accelerator.device).float(), labels.to(accelerator.device)
        with accelerator.autocast():
            logits = self.backbone(images)
        loss = F.cross_entropy(logits.float(), labels, reduction='sum', label_smoothing=self.settings['smoothing'])
        accelerator.backward(loss * (accelerator.gradient_accumulation_steps / count))
        return loss.detach()

    @torch.no_grad()
    def _accuracy(self, val: Dataset) -> float:
        """Top-1 of the weights that would be kept, on all images of `val`."""
        accelerator = self.accelerator
        network = self._kept().eval()
        view = View(self.model, val)
        parts = np.array_split(np.arange(len(view)), -(-len(view) // self.batch_size))
        plan = [part.tolist() for part in parts[accelerator.process_index :: accelerator.num_processes]]
        correct = torch.zeros((), device=accelerator.device)
        for images, labels in DataLoader(view, batch_sampler=plan, num_workers=self.settings['workers']):
            with accelerator.autocast():
                logits = network(images.to(accelerator.device).float())
            correct += (logits.argmax(1) == labels.to(accelerator.device)).sum()
        return round(float(sum_over_processes(accelerator, correct)) / len(view), 5)
