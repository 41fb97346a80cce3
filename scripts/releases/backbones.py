"""Trains a backbone from nothing on images that fit in memory; resumable, one file of state.

Used by release.py; no part of the library: heads train on a backbone that is already there.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn

from timm_cascade.data import ImageData, create_loader
from timm_cascade.utils.files import replacing

_logger = logging.getLogger(__name__)


def decode(model: nn.Module, data: ImageData) -> tuple[Tensor, Tensor]:
    """Every image through the model's evaluation transform, once: (n, C, H, W) and (n,)."""
    batches = list(create_loader(model, data, batch_size=1000))
    return torch.cat([b[0] for b in batches]), torch.cat([b[1] for b in batches])


def augment(images: Tensor, pad: int, flip: bool, generator: torch.Generator) -> Tensor:
    """Random shift by up to `pad` pixels and random mirror, each image its own."""
    n, c, h, w = images.shape
    if flip:
        mirror = torch.rand(n, generator=generator) < 0.5
        images = torch.where(mirror[:, None, None, None], images.flip(3), images)
    if pad:
        padded = F.pad(images, (pad, pad, pad, pad), mode='replicate')
        dy, dx = torch.randint(0, 2 * pad + 1, (2, n), generator=generator)
        rows = (dy[:, None] + torch.arange(h))[:, None, :, None]
        cols = (dx[:, None] + torch.arange(w))[:, None, None, :]
        images = padded[torch.arange(n)[:, None, None, None], torch.arange(c)[None, :, None, None], rows, cols]
    return images


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, device: torch.device) -> float:
    model.eval()
    correct = sum(
        int((model(x.to(device)).argmax(1).cpu() == y).sum())
        for x, y in zip(images.split(1000), labels.split(1000), strict=True)
    )
    return correct / len(labels)


def train_backbone(model: nn.Module, train: ImageData, watch: ImageData, state_file: Path, recipe: dict[str, Any]):
    """Cross-entropy, cosine decay. Continues from `state_file` where that is there.

    Args:
        model: Any timm classifier; trained in place.
        watch: Images to report accuracy on while training; nothing is chosen by it.
        recipe: epochs, batch_size, lr, weight_decay, seed, pad, flip, mixed_precision (bf16 or no; a CPU calculates in
            float32, as many of them multiply bfloat16 far more slowly); optimizer is SGD with momentum where
            none is named.
    """
    device = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
    half = recipe['mixed_precision'] == 'bf16' and device.type != 'cpu'
    model.to(device, memory_format=torch.channels_last)
    images, labels = decode(model, train)
    watch_images, watch_labels = decode(model, watch)
    batch = recipe['batch_size']
    steps = len(images) // batch
    optimizer = create_optimizer_v2(
        model, recipe.get('optimizer', 'sgd'), lr=recipe['lr'], weight_decay=recipe['weight_decay'], momentum=0.9
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        'cosine',
        num_epochs=recipe['epochs'],
        warmup_epochs=1,
        warmup_lr=1e-3,
        min_lr=0,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    start = 0
    if state_file.exists():
        state = torch.load(state_file, map_location='cpu', weights_only=True)
        if state['recipe'] != recipe:
            raise ValueError(
                f'{state_file} was made by {state["recipe"]}, asked is {recipe}; move it away to start again.'
            )
        model.load_state_dict(state['model'])
        optimizer.load_state_dict(state['optimizer'])
        start = state['epoch']
        _logger.info('continuing after epoch %d of %d', start, recipe['epochs'])
    for epoch in range(start, recipe['epochs']):
        began = time.time()
        generator = torch.Generator().manual_seed(recipe['seed'] * 10_000 + epoch)
        order = torch.randperm(len(images), generator=generator)
        model.train()
        total = torch.zeros((), device=device)
        for step in range(steps):
            scheduler.step_update(epoch * steps + step)
            chosen = order[step * batch : (step + 1) * batch]
            x = augment(images[chosen], recipe['pad'], recipe['flip'], generator)
            x = x.to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels[chosen].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        with replacing(state_file) as temporary:
            torch.save(
                dict(model=model.state_dict(), optimizer=optimizer.state_dict(), epoch=epoch + 1, recipe=recipe),
                temporary,
            )
        line = dict(
            epoch=epoch + 1,
            loss=round(float(total) / steps, 4),
            watch=round(accuracy(model, watch_images, watch_labels, device), 4),
            seconds=round(time.time() - began, 1),
        )
        with open(state_file.with_suffix('.jsonl'), 'a', encoding='utf-8') as log:
            log.write(json.dumps(line) + '\n')
        _logger.info('backbone %s', line)
    return model.eval().cpu()
