"""Rebuilds a release from its recipe: backbone, heads, calibration, test, card.

    python scripts/releases/release.py hub/recipes/cascade_cifar_resnet20.fashion_mnist.yaml

Each step leaves its result in runs/NAME/ and is not repeated while the part of the recipe it came from is the same;
the backbone continues at the epoch where it was stopped. The log is runs/NAME/release.log. `backbone` in a recipe says
how to train one from nothing, with `finetune` how to fine-tune ImageNet weights (`efficientnet_lite`: which size), or
`published: true`, which takes timm's weights as they are. Where a recipe holds the figures of the paper (`paper`), they
are printed beside ours and written to runs/NAME/paper.md. `about` is text for the card.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import logging
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that scripts.* is found

import timm
import torch
import yaml
from accelerate.utils import set_seed

import timm_cascade
from scripts import ROOT
from scripts.datasets import elpv, emoji, fashion_mnist, han
from scripts.releases import efficientnet_lite
from scripts.releases.backbones import train_backbone
from scripts.releases.cards import write_card
from scripts.releases.pictures import plot_tradeoff
from timm_cascade import hub
from timm_cascade.measure.calibrate import record
from timm_cascade.measure.evaluate import every_exit_of, report_of
from timm_cascade.utils.files import replacing, write_text

_logger = logging.getLogger('release')
DATA = {'fashion_mnist': fashion_mnist.load, 'emoji': emoji.load, 'elpv': elpv.load, 'han': han.load}


def loader(recipe: dict[str, Any]) -> Callable[[str], timm_cascade.ImageData]:
    """What loads a split of the recipe's data: a script of this repository, or the Hub where `name` is `hub`."""
    data = recipe['data']
    if data['name'] != 'hub':
        return DATA[data['name']]
    return partial(timm_cascade.load_data, data['dataset'], label_column=data.get('label_column'))


class Steps:
    """Which steps are done, and from which part of the recipe."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.done: dict[str, str] = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
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


def finetune_backbone(recipe: dict[str, Any], train: Any, work: Path, workers: int) -> None:
    """Fine-tunes published weights on `train`; the validation images of the recipe choose the epoch."""
    create, settings = dict(recipe['model']['create']), dict(recipe['backbone'])
    size = settings.pop('efficientnet_lite', None)
    if size is not None:
        weights = efficientnet_lite.write(size, work.parent / f'tf_efficientnet_lite{size}.safetensors')
        create['pretrained_cfg_overlay'] = {**create.get('pretrained_cfg_overlay', {}), 'file': str(weights)}
    set_seed(settings['seed'])
    backbone = timm.create_model(recipe['model']['base'], pretrained=size is not None, **create)
    backbone.reset_classifier(backbone.num_classes)  # that of ImageNet means nothing here, even to a thousand classes
    backbone.to(memory_format=torch.channels_last)  # a CPU then trains faster
    model = timm_cascade.CascadeModel(backbone)
    validation = loader(recipe)(recipe['data']['validation'])
    timm_cascade.finetune(
        model, train, validation, **settings.pop('finetune'), seed=settings['seed'], workers=workers, work_dir=work
    )
    with replacing(work / 'finetuned.pt') as temporary:
        torch.save(dict(model=backbone.state_dict()), temporary)


def build(recipe: dict[str, Any], work: Path, workers: int = 0, timed: bool = True) -> dict[str, Any]:
    """Runs what is due; returns the report that the card shows."""
    load = loader(recipe)
    # the test images too: a split without labels is an error now, not after the training
    train, calibration, tested = (load(recipe['data'][part]) for part in ('train', 'calibration', 'test'))
    steps, staged = Steps(work / 'steps.json'), work / 'release'
    model_parts = (recipe['model'], recipe['data'])

    if steps.due('backbone', recipe['model']['base'], recipe['model']['create'], recipe['data'], recipe['backbone']):
        if 'finetune' in recipe['backbone']:
            finetune_backbone(recipe, train, work, workers)
        elif not recipe['backbone'].get('published'):
            train_backbone(create_backbone(recipe), train, calibration, work / 'backbone.pt', recipe['backbone'])
        steps.finish('backbone')

    if steps.due('heads', *model_parts, recipe['heads']):
        set_seed(recipe['heads']['seed'])
        model = timm.create_model(
            f'cascade_{recipe["model"]["base"]}',
            exits=recipe['model'].get('exits'),
            head=recipe['model'].get('head', 'enhanced'),
            pretrained=recipe['backbone'].get('published', False),
            **recipe['model']['create'],
        )
        if not recipe['backbone'].get('published'):
            weights = work / ('finetuned.pt' if 'finetune' in recipe['backbone'] else 'backbone.pt')
            model.load_state_dict(torch.load(weights, map_location='cpu', weights_only=True)['model'])
        model.pretrained_cfg.update(license=recipe['model']['licence'])
        model.label_names = train.class_names
        timm_cascade.train_heads(model, train, calibration, **recipe['heads'], workers=workers, work_dir=work)
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
        report = test(hub.load(staged), tested, dial, timed)
        write_text(work / 'report.json', json.dumps(report, indent=1))
        steps.finish('test')
    return json.loads((work / 'report.json').read_text(encoding='utf-8'))


def test(
    model: timm_cascade.CascadeModel, data: timm_cascade.data.ImageData, dial: dict[str, Any], timed: bool
) -> dict[str, Any]:
    """Every rule at every max_drop of the table, on images nothing was chosen by.

    All exits run once over the images; with `timed` the setting that the release loads with is run by itself too.
    """
    rows, seen = [], record(model, data)
    for rule in ('per_exit', 'joint', 'certified'):
        for max_drop in dial['table']:
            point = model.set_max_drop(max_drop, rule=rule)
            loaded = timed and (rule, max_drop) == (dial['rule'], dial['max_drop'])
            report = timm_cascade.evaluate(model, data) if loaded else report_of(model, seen)
            rows.append(dict(rule=rule, max_drop=max_drop, certified=point.certified, **report.to_dict()))
            _logger.info(
                '%s asked %.2f %%: change %+.2f points, %.1f %% of the MACs',
                rule,
                100 * max_drop,
                100 * report.change,
                100 * report.macs_share,
            )
    every_exit = dataclasses.asdict(every_exit_of(model, seen))
    return dict(rows=rows, n=len(data), split=data.split, every_exit=every_exit)


def beside_paper(recipe: dict[str, Any], report: dict[str, Any]) -> str:
    """A table of the paper's figures for this network and data, and of ours, in per cent."""
    paper = recipe['paper']

    def accuracies(values: list[float]) -> str:
        return ' / '.join(f'{v:.1f}' for v in values)

    lines = [
        f'Correct at each exit: the paper {accuracies(paper["exits"])}; ours '
        f'{accuracies([100 * a for a in report["every_exit"]["accuracy"]])} ({report["n"]:,} images of '
        f'`{report["split"]}`). An exit of ours need not stand where one of the paper stands.',
        '',
        '| who | allowed, points | change of accuracy, points | MACs saved, % |',
        '| --- | --- | --- | --- |',
        *(f'| the paper | | {change:+.2f} | {saved:.1f} |' for saved, change in paper['saved']),
    ]
    for row in report['rows']:
        change = 100 * (row['accuracy'] - row['full_accuracy'])
        saved = 100 * (1 - row['macs_share'])
        lines.append(f'| ours, {row["rule"]} | {100 * row["max_drop"]:g} | {change:+.2f} | {saved:.1f} |')
    return '\n'.join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('recipe', type=Path)
    parser.add_argument('--out', type=Path, default=ROOT / 'hub' / 'releases', help='where releases are staged')
    parser.add_argument('--work', type=Path, default=ROOT / 'runs', help='where unfinished work is kept')
    parser.add_argument('--workers', type=int, default=0, help='processes that decode images')
    parser.add_argument('--no-time', action='store_true', help='measure no time, on a machine with other work to do')
    args = parser.parse_args()
    recipe = yaml.safe_load(args.recipe.read_text(encoding='utf-8'))
    work = args.work / recipe['name']
    work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(
        level=logging.INFO,
        format='%(asctime)s %(message)s',
        handlers=[logging.StreamHandler(), logging.FileHandler(work / 'release.log')],
    )

    report = build(recipe, work, args.workers, not args.no_time)
    staged, target = work / 'release', args.out / recipe['name']
    if 'paper' in recipe:
        write_text(work / 'paper.md', beside_paper(recipe, report) + '\n')
        print(beside_paper(recipe, report))
    plot_tradeoff(report, staged / 'tradeoff.png', recipe['name'])
    write_card(hub.load(staged), recipe, report, staged / hub.CARD)
    shutil.copytree(staged, target, dirs_exist_ok=True)
    _logger.info('%s is ready', target)


if __name__ == '__main__':
    main()
