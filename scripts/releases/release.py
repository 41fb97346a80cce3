"""Rebuilds a release from its recipe: backbone, heads, calibration, test, card.

    python scripts/releases/release.py hub/recipes/cascade_cifar_resnet20.fashion_mnist.yaml

Each step leaves its result in runs/NAME/ and is not repeated while the part of the recipe it came from is the same;
the backbone continues at the epoch where it was stopped. The log is runs/NAME/release.log.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that scripts.* is found

import timm
import torch
import yaml
from accelerate.utils import set_seed

import timm_cascade
from scripts import ROOT
from scripts.datasets import emoji, fashion_mnist
from scripts.releases.backbones import train_backbone
from scripts.releases.cards import write_card
from scripts.releases.pictures import plot_tradeoff
from timm_cascade import hub
from timm_cascade.utils.files import write_text

_logger = logging.getLogger('release')
DATA = {'fashion_mnist': fashion_mnist.load, 'emoji': emoji.load}


class Steps:
    """Which steps are done, and from which part of the recipe."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        self.before = ''

    def due(self, name: str, *parts: Any) -> bool:
        """Whether `name` must run: its parts of the recipe, or a step before it, have changed."""
        self.before = hashlib.sha256(json.dumps([self.before, name, parts], sort_keys=True).encode()).hexdigest()[:16]
        due = self.done.get(name) != self.before
        _logger.info('%s: %s', name, 'running' if due else 'done before')
        return due

    def finish(self, name: str) -> None:
        self.done[name] = self.before
        write_text(self.file, json.dumps(self.done, indent=1))


def create_backbone(recipe: dict[str, Any]) -> torch.nn.Module:
    set_seed(recipe['backbone']['seed'])
    return timm.create_model(recipe['model']['base'], **recipe['model']['create'])


def build(recipe: dict[str, Any], work: Path) -> dict[str, Any]:
    """Runs what is due; returns the report that the card shows."""
    load = DATA[recipe['data']['name']]
    train, calibration = load(recipe['data']['train']), load(recipe['data']['calibration'])
    steps, staged = Steps(work / 'steps.json'), work / 'release'
    model_parts = (recipe['model'], recipe['data'])

    if steps.due('backbone', recipe['model']['base'], recipe['model']['create'], recipe['data'], recipe['backbone']):
        train_backbone(create_backbone(recipe), train, calibration, work / 'backbone.pt', recipe['backbone'])
        steps.finish('backbone')

    if steps.due('heads', *model_parts, recipe['heads']):
        set_seed(recipe['heads']['seed'])
        model = timm.create_model(
            f'cascade_{recipe["model"]["base"]}',
            exits=recipe['model']['exits'],
            head=recipe['model']['head'],
            **recipe['model']['create'],
        )
        model.load_state_dict(torch.load(work / 'backbone.pt', map_location='cpu', weights_only=True)['model'])
        model.pretrained_cfg.update(license=recipe['model']['licence'])
        model.label_names = train.class_names
        timm_cascade.train_heads(model, train, calibration, **recipe['heads'], work_dir=work)
        hub.save(model, staged)
        steps.finish('heads')

    dial = recipe['dial']
    if steps.due('calibration', dial):
        model = hub.load(staged)
        calibration_record = timm_cascade.calibrate(model, calibration)
        model.table = calibration_record.table(max_drops=dial['table'])
        model.set_max_drop(dial['max_drop'], rule=dial['rule'])
        hub.save(model, staged)
        steps.finish('calibration')

    if steps.due('test'):
        report = test(hub.load(staged), load(recipe['data']['test']), dial)
        write_text(work / 'report.json', json.dumps(report, indent=1))
        steps.finish('test')
    return json.loads((work / 'report.json').read_text())


def test(model: timm_cascade.CascadeModel, data: timm_cascade.data.ImageData, dial: dict[str, Any]) -> dict[str, Any]:
    """Every rule at every max_drop of the table, on images nothing was chosen by."""
    rows = []
    for rule in ('per_exit', 'joint', 'certified'):
        for max_drop in dial['table']:
            point = model.set_max_drop(max_drop, rule=rule)
            report = timm_cascade.evaluate(model, data, title=f'{rule} {max_drop:.2%}')
            rows.append(dict(rule=rule, max_drop=max_drop, certified=point.certified, **report.to_dict()))
            _logger.info(
                '%s asked %.2f %%: change %+.2f points, %.1f %% of the MACs',
                rule,
                100 * max_drop,
                100 * report.change,
                100 * report.macs_share,
            )
    exits = timm_cascade.evaluate(model, data, title='every exit', every_exit=True).every_exit
    return dict(rows=rows, n=len(data), split=data.split, every_exit=dataclasses.asdict(exits))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', type=Path)
    parser.add_argument('--out', type=Path, default=ROOT / 'hub' / 'releases', help='where releases are staged')
    parser.add_argument('--work', type=Path, default=ROOT / 'runs', help='where unfinished work is kept')
    args = parser.parse_args()
    recipe = yaml.safe_load(args.recipe.read_text(encoding='utf-8'))
    work = args.work / recipe['name']
    work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format='%(asctime)s %(message)s',
        handlers=[logging.StreamHandler(), logging.FileHandler(work / 'release.log')],
    )

    report = build(recipe, work)
    staged, target = work / 'release', args.out / recipe['name']
    plot_tradeoff(report, staged / 'tradeoff.png', recipe['name'])
    write_card(hub.load(staged), recipe, report, staged / hub.CARD)
    shutil.copytree(staged, target, dirs_exist_ok=True)
    _logger.info('%s is ready', target)


if __name__ == '__main__':
    main()
