"""The networks of one data set, what each says about every image, and the cascades that they make."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import nn

from scripts import ROOT
from scripts.experiments.benchmark import static_networks
from scripts.experiments.equal_accuracy import Setting, cheapest
from scripts.releases.release import loader
from timm_cascade import CascadeModel, ImageData
from timm_cascade.backbone import backbone_macs, input_size_of
from timm_cascade.data import fingerprint_of
from timm_cascade.measure.calibrate import record
from timm_cascade.thresholds import Samples
from timm_cascade.utils.files import replacing

_logger = logging.getLogger('fronts')


@dataclass
class Members:
    """Trained networks of one data set, cheapest first; the last is the large one.

    Attributes:
        name: The data set's, as in the recipes' names.
        networks: The networks by their labels, in evaluation mode and channels-last.
        macs: MACs that each network takes for one image.
        calibration, test: The images that settings are chosen on, and those that they are judged on.
        seen: What all networks say about the two (`record`): a column per network.
    """

    name: str
    networks: dict[str, nn.Module]
    macs: list[int]
    calibration: ImageData
    test: ImageData
    seen: dict[str, dict[str, np.ndarray]]

    @property
    def labels(self) -> list[str]:
        return list(self.networks)

    def subsets(self) -> list[tuple[int, ...]]:
        """Networks that may stand in front together, by number: each alone, and each pair."""
        smaller = range(len(self.networks) - 1)
        return [s for k in (1, 2) for s in combinations(smaller, k)]

    def cascade(self, subset: tuple[int, ...]) -> CascadeModel:
        """The cascade with these in front of the large network."""
        networks = list(self.networks.values())
        return CascadeModel(networks[-1], 0, front=[networks[i] for i in subset]).eval()

    def samples(self, subset: tuple[int, ...], split: str, cost: list[float]) -> Samples:
        """What the cascade with these in front does to a split, by the cost of each network for one image."""
        columns, seen = [*subset, -1], self.seen[split]
        heads = [cost[i] for i in subset]
        return Samples(
            seen['confidence'][:, columns], seen['correct'][:, columns], np.array([*heads, cost[-1]]), np.array(heads)
        )

    def accuracy(self, split: str) -> list[float]:
        """Of each network."""
        return self.seen[split]['correct'].mean(0).tolist()


def load_members(name: str, runs: Path, epochs: int) -> Members:
    """The trained networks of the EfficientNet-Lite recipes of a data set, or of its ResNet-20, and their answers.

    Args:
        name: Data set, as in the recipes' names.
        runs: Folder that `scripts/releases/release.py` worked in.
        epochs: Epochs of static networks that were not trained for as many as the recipe has.

    Raises:
        FileNotFoundError: Fewer than two of them are trained; the message says what to run.
    """
    folder = ROOT / 'hub' / 'recipes'
    files = sorted(folder.glob(f'cascade_tf_efficientnet_lite*.{name}.yaml'))
    files = files or sorted(folder.glob(f'cascade_cifar_resnet20.{name}.yaml'))
    recipes = [yaml.safe_load(file.read_text(encoding='utf-8')) for file in files]
    found: dict[str, nn.Module] = {}
    for recipe in recipes:
        found |= _networks_of(recipe, runs, epochs)
    if len(found) < 2:
        raise FileNotFoundError(
            f'{name}: {len(found)} trained networks, expected two or more. Run python scripts/releases/release.py '
            f'hub/recipes/NAME.yaml for {", ".join(r["name"] for r in recipes) or "recipes that do not exist yet"}; '
            f'for ResNet-20 also python scripts/experiments/benchmark static-networks.'
        )
    macs = {label: backbone_macs(n, input_size_of(n)) for label, n in found.items()}
    networks = {
        label: found[label].eval().to(memory_format=torch.channels_last)
        for label in sorted(found, key=macs.__getitem__)
    }
    load = loader(recipes[0])
    splits = {part: load(recipes[0]['data'][part]) for part in ('calibration', 'test')}
    members = Members(name, networks, sorted(macs.values()), splits['calibration'], splits['test'], {})
    everyone = members.cascade(tuple(range(len(networks) - 1)))
    members.seen = {part: _record(everyone, data, runs / 'fronts') for part, data in splits.items()}
    return members


def _record(model: CascadeModel, data: ImageData, folder: Path) -> dict[str, np.ndarray]:
    """What `calibrate.record` says, kept for the next run."""
    identity = [fingerprint_of(data), model.heads_hash(), model.provenance()]
    path = folder / f'{hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]}.npz'
    if not path.exists():
        seen = record(model, data)
        with replacing(path) as temporary, open(temporary, 'wb') as file:
            np.savez(file, confidence=seen['confidence'], correct=seen['correct'])
    with np.load(path) as arrays:
        return dict(arrays)


def _networks_of(recipe: dict[str, Any], runs: Path, epochs: int) -> dict[str, nn.Module]:
    base = recipe['model']['base']
    own, others = ('ResNet-20', static_networks.names_for(recipe)) if base == 'cifar_resnet20' else (base, [])
    found = {}
    for label in (own, *others):
        try:
            if label == own:
                found[label] = static_networks.backbone_of(recipe, runs)
            else:
                found[label], _ = static_networks.load(recipe, label, epochs)
        except FileNotFoundError as e:
            _logger.warning('%s', e)
    return found


def cheapest_front(members: Members, accuracy: float, cost: list[float]) -> tuple[tuple[int, ...], Setting] | None:
    """The networks in front, by number, and the setting, that are expected to cost the least at this accuracy.

    Args:
        members: The networks; their calibration images choose.
        accuracy: Fraction to reach.
        cost: What one image costs each network, in any unit.
    """
    found = [(s, cheapest(members.samples(s, 'calibration', cost), accuracy)) for s in members.subsets()]
    known = [(subset, setting) for subset, setting in found if setting is not None]
    return min(known, key=lambda pair: pair[1].cost, default=None)
