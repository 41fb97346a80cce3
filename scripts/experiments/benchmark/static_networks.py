"""The smaller static networks that a cascade has to beat, and the training of those that are no release's backbone.

    python scripts/experiments/benchmark static-networks hub/recipes/cascade_cifar_resnet20.emoji.yaml

They are shallower or narrower than ResNet-20, on the same data by the same recipe; beside EfficientNet-Lites it is
EfficientNet-Lite0, which has a recipe of its own. Each trained network's state is runs/static/RECIPE/NETWORK.EPOCHS.pt,
continued at the epoch where it was stopped; the images of `calibration` are watched while it trains, nothing is chosen
by them, and the benchmark tests it on `test`.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

import timm
import torch
import yaml
from accelerate.utils import set_seed
from torch import nn

from scripts import ROOT
from scripts.releases.backbones import train_backbone
from scripts.releases.release import DATA, create_backbone
from timm_cascade import hub

# name: arguments of cifar_resnet20 that make it
NETWORKS: dict[str, dict[str, int]] = {
    'ResNet-8': dict(depth=1),
    'ResNet-14': dict(depth=2),
    'ResNet-20, half width': dict(width=8),
    'ResNet-20': {},  # the cascade's own backbone: what a shorter training costs it
}

SMALLER = [name for name, arguments in NETWORKS.items() if arguments]
LITE = 'tf_efficientnet_lite0'
RECIPES = ROOT / 'hub' / 'recipes'
RELEASES = (ROOT / 'hub' / 'releases', ROOT / 'runs' / 'releases')


def names_for(recipe: dict[str, Any]) -> list[str]:
    """Networks that the recipe's cascade is compared with."""
    return SMALLER if recipe['model']['base'] == 'cifar_resnet20' else [LITE]


def backbone_of(recipe: dict[str, Any], runs: Path = ROOT / 'runs') -> nn.Module:
    """The trained backbone of a recipe: what `scripts/releases/release.py` worked on in `runs`, or a release's.

    Raises:
        FileNotFoundError: There is neither.
    """
    work = runs / recipe['name']
    for file in (work / 'finetuned.pt', work / 'backbone.pt'):
        if file.exists():
            network = create_backbone(recipe)
            network.load_state_dict(torch.load(file, map_location='cpu', weights_only=True)['model'])
            return network.eval()
    for folder in (work / 'release', *(place / recipe['name'] for place in RELEASES)):
        if (folder / 'config.json').exists():
            return hub.load(folder).backbone.eval()
    raise FileNotFoundError(
        f'{recipe["name"]} is not trained: there is no {work / "finetuned.pt"}; run python '
        f'scripts/releases/release.py hub/recipes/{recipe["name"]}.yaml --out runs/releases first.'
    )


def state_file(recipe: dict[str, Any], name: str, epochs: int) -> Path:
    slug = name.lower().replace(', ', '_').replace(' ', '_')
    return ROOT / 'runs' / 'static' / recipe['name'] / f'{slug}.{epochs}.pt'


def create(recipe: dict[str, Any], name: str) -> nn.Module:
    """One of NETWORKS, untrained, for the recipe's images and classes."""
    set_seed(recipe['backbone']['seed'])
    return timm.create_model(recipe['model']['base'], **recipe['model']['create'], **NETWORKS[name])


def load(recipe: dict[str, Any], name: str, epochs: int) -> tuple[nn.Module, int]:
    """The network, trained for the recipe's epochs or else for `epochs`, and for how many it was.

    Raises:
        FileNotFoundError: Neither is trained to its end.
    """
    if name == LITE:
        data = recipe['name'].removeprefix(f'cascade_{recipe["model"]["base"]}.')
        own = yaml.safe_load((RECIPES / f'cascade_{name}.{data}.yaml').read_text(encoding='utf-8'))
        return backbone_of(own), own['backbone']['finetune']['epochs']
    states = [
        torch.load(f, map_location='cpu', weights_only=True)
        for n in (recipe['backbone']['epochs'], epochs)
        if (f := state_file(recipe, name, n)).exists()
    ]
    done = [s for s in states if s['epoch'] == s['recipe']['epochs']]
    if not done:
        so_far = ', '.join(f'{s["epoch"]} of {s["recipe"]["epochs"]} epochs done' for s in states) or 'not begun'
        raise FileNotFoundError(
            f'{recipe["name"]}: {name} is not trained ({so_far}); run python '
            f'scripts/experiments/benchmark static-networks hub/recipes/{recipe["name"]}.yaml first.'
        )
    state = done[0]
    model = create(recipe, name)
    model.load_state_dict(state['model'])
    return model.eval(), state['epoch']


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', type=Path)
    parser.add_argument('--networks', nargs='+', choices=list(NETWORKS), default=SMALLER)
    parser.add_argument('--epochs', type=int, help='a shorter recipe than the release has; the page then says so')
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    recipe = yaml.safe_load(args.recipe.read_text(encoding='utf-8'))
    if args.epochs:
        recipe['backbone']['epochs'] = args.epochs
    load_split = DATA[recipe['data']['name']]
    train, watch = load_split(recipe['data']['train']), load_split(recipe['data']['calibration'])
    for name in args.networks:
        logging.info('%s, %s', recipe['name'], name)
        file = state_file(recipe, name, recipe['backbone']['epochs'])
        file.parent.mkdir(parents=True, exist_ok=True)
        train_backbone(create(recipe, name), train, watch, file, recipe['backbone'])
