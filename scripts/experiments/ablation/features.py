"""The frozen side of the ablation: backbones, trained once, and what heads read of them, computed once.

    python scripts/experiments/ablation --only-features [--pairs PAIR ...]

Everything is kept in runs/ablation/PAIR/ and not made again; a backbone continues at the epoch where it was stopped.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import yaml
from torch import Tensor

import timm_cascade
from scripts import ROOT
from scripts.releases.backbones import augment, train_backbone
from scripts.releases.release import DATA, create_backbone
from timm_cascade.backbone.exits import resolve_exits
from timm_cascade.data import create_loader
from timm_cascade.heads import ExitHead
from timm_cascade.utils.files import replacing, write_text

_logger = logging.getLogger('ablation')
PAIRS: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name('pairs.yaml').read_text(encoding='utf-8'))
SPLITS = ('train', 'calibration', 'test')
GRIDS = (4, 2, 1)


@dataclass
class Features:
    """One pair's frozen side.

    Attributes:
        pooled: One array per split, exit and grid: (n, C, g * g) float16, mapped from disk;
            `tokens` instead of a grid for the prefix tokens (n, C, tokens), where there are any.
        logits: For each split, the backbone's (n, num_classes) float32.
        labels: For each split (n,).
        shapes: For each exit the arguments of ExitHead that describe its features.
        macs: For each exit, MACs of the backbone up to it.
        total: MACs of the backbone.
        defaults: The exits that the library chooses where it is told nothing.
    """

    pooled: dict[tuple[str, str, int | str], np.ndarray]
    logits: dict[str, Tensor]
    labels: dict[str, Tensor]
    shapes: dict[str, dict[str, Any]]
    macs: dict[str, int]
    total: int
    defaults: list[str]

    def of(self, split: str, module: str, config: dict[str, Any], few: slice = slice(None)) -> np.ndarray:
        """What a head of this description reads at an exit, (n, in_features); see ExitHead."""
        head = ExitHead(num_classes=0, **self.shapes[module], **config)
        which: list[int | str] = [config['grid'], *[1] * head.mean, *['tokens'] * bool(head.tokens)]
        parts = [self.pooled[split, module, each][few] for each in which]
        return np.concatenate(parts, 2).reshape(len(parts[0]), -1)


class _AllGrids(ExitHead):
    """Pools to every grid at once, and hands on the prefix tokens."""

    def pool(self, features: Tensor) -> Tensor:
        parts = []
        for side in GRIDS:
            self.grid = (min(side, self.size[0]), min(side, self.size[1]))
            parts.append(super().pool(features).unflatten(1, (-1, self.grid[0] * self.grid[1])))
        if self.prefix_tokens:
            parts.append(features[:, : self.prefix_tokens].transpose(1, 2))
        return torch.cat(parts, 2)


def recipe_of(pair: dict[str, Any]) -> dict[str, Any]:
    """The pair's recipe with what the pair changes in it."""
    recipe = yaml.safe_load((ROOT / pair['recipe']).read_text(encoding='utf-8'))
    recipe['model']['base'] = pair.get('base', recipe['model']['base'])
    recipe['data']['train'] = pair.get('train', recipe['data']['train'])
    overlay = recipe['model']['create']['pretrained_cfg_overlay']
    overlay['input_size'] = pair.get('input_size', overlay['input_size'])
    recipe['backbone'] |= pair.get('backbone', {})
    return recipe


def cascade(pair: dict[str, Any], work: Path) -> timm_cascade.CascadeModel:
    """The pair's trained backbone with untrained heads at all its exits."""
    recipe = recipe_of(pair)
    model = timm.create_model(f'cascade_{recipe["model"]["base"]}', exits=pair['exits'], **recipe['model']['create'])
    if 'release' in pair:
        model.backbone.load_state_dict(timm_cascade.load(ROOT / pair['release']).backbone.state_dict())
        return model.eval()
    if pair.get('finetuned'):
        weights = ROOT / 'runs' / recipe['name'] / 'finetuned.pt'
        if not weights.is_file():
            raise FileNotFoundError(
                f'{weights} is not there; run python scripts/releases/release.py {pair["recipe"]} first.'
            )
        model.backbone.load_state_dict(torch.load(weights, map_location='cpu', weights_only=True)['model'])
        return model.eval()
    train, watch = (DATA[recipe['data']['name']](recipe['data'][split]) for split in ('train', 'calibration'))
    backbone = train_backbone(create_backbone(recipe), train, watch, work / 'backbone.pt', recipe['backbone'])
    model.backbone.load_state_dict(backbone.state_dict())
    return model.eval()


def _write(pair: dict[str, Any], work: Path) -> None:
    model, recipe = cascade(pair, work).to(memory_format=torch.channels_last), recipe_of(pair)
    for i, point in enumerate(model.exits):
        model.heads[i] = _AllGrids(point.channels, point.size, 0, point.layout, point.prefix_tokens)
    for split in _splits(pair):
        if (work / f'{split}.npz').is_file():
            continue
        generator = torch.Generator().manual_seed(int(split[4:])) if split.startswith('view') else None
        data = DATA[recipe['data']['name']](recipe['data']['train' if generator else split])
        began, parts, logits = time.time(), [[] for _ in model.exits], []
        for images, _ in create_loader(model, data, 64):  # larger batches leave the processor's cache
            images = images.contiguous(memory_format=torch.channels_last)
            if generator:
                images = augment(images, recipe['backbone']['pad'], recipe['backbone']['flip'], generator)
            with torch.inference_mode():
                pooled, final = model.forward_pooled(images)
            logits.append(final)
            for part, p in zip(parts, pooled, strict=True):
                part.append(p.half().numpy())
        for point, part in zip(model.exits, parts, strict=True):
            sides = [min(g, point.size[0]) * min(g, point.size[1]) for g in GRIDS]
            each = np.split(np.concatenate(part), np.cumsum(sides), axis=2)
            for grid, array in zip((*GRIDS, 'tokens'), each, strict=True):
                np.save(work / f'{split}.{point.module}.{grid}.npy', array)
        correct = float((torch.cat(logits).argmax(1).numpy() == data.labels).mean())
        _logger.info('%s: %d images, backbone %.2f %%, %.0f s', split, len(data), 100 * correct, time.time() - began)
        with replacing(work / f'{split}.npz') as temporary, open(temporary, 'wb') as f:  # last: then the split is done
            np.savez(f, logits=torch.cat(logits).numpy(), labels=data.labels)
    points = {
        p.module: dict(
            shape=dict(channels=p.channels, size=p.size, layout=p.layout, prefix_tokens=p.prefix_tokens),
            macs=p.macs,
            total=p.total,
        )
        for p in model.exits
    }
    write_text(work / 'points.json', json.dumps(points, indent=1))


def default_exits(pair: dict[str, Any]) -> list[str]:
    """Modules of the exits that the pair's backbone has where nothing is asked for."""
    return [p.module for p in resolve_exits(create_backbone(recipe_of(pair)))]


def _splits(pair: dict[str, Any]) -> list[str]:
    """Names of the splits: those of the data, and augmented views of the training images."""
    return [*SPLITS, *(f'view{i}' for i in range(pair.get('views', 0)))]


def load_features(name: str, runs: Path = ROOT / 'runs' / 'ablation') -> Features:
    """The features of a pair, made first where they are not there."""
    work, pair = runs / name, PAIRS[name]
    work.mkdir(parents=True, exist_ok=True)
    if not all((work / file).is_file() for file in ('points.json', *(f'{s}.npz' for s in _splits(pair)))):
        _write(pair, work)
    points = json.loads((work / 'points.json').read_text(encoding='utf-8'))
    rest = {split: np.load(work / f'{split}.npz') for split in _splits(pair)}
    return Features(
        pooled={
            (split, e, g): np.load(work / f'{split}.{e}.{g}.npy', mmap_mode='r')
            for split in _splits(pair)
            for e in points
            for g in (*GRIDS, 'tokens')
        },
        logits={s: torch.from_numpy(z['logits']) for s, z in rest.items()},
        labels={s: torch.from_numpy(z['labels']) for s, z in rest.items()},
        shapes={e: p['shape'] for e, p in points.items()},
        macs={e: p['macs'] for e, p in points.items()},
        total=next(iter(points.values()))['total'],
        defaults=default_exits(pair),
    )
