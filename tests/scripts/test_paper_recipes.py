"""The recipes of the paper's tables, end to end at toy size, on data sets with the Hub's names, columns and splits."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import timm
import yaml
from helpers import ROOT
from PIL import Image
from safetensors.torch import save_file

from scripts.releases import release

COLUMNS = {  # recipe: name on the Hub, its configuration, image column, label columns, splits
    'cascade_cifar_resnet110.cifar10': ('uoft-cs/cifar10', None, 'img', ['label'], ['train', 'test']),
    'cascade_cifar_resnet110.cifar100': (
        'uoft-cs/cifar100', None, 'img', ['fine_label', 'coarse_label'], ['train', 'test'],
    ),
    'cascade_cifar_resnet110.svhn': (
        'ufldl-stanford/svhn', 'cropped_digits', 'image', ['label'], ['train', 'test', 'extra'],
    ),
    'cascade_resnet50.imagenet': (
        'ILSVRC/imagenet-1k', None, 'image', ['label'], ['train', 'validation', 'test'],
    ),
}  # fmt: skip


def split(seed: int, image: str, labels: list[str], unlabelled: bool) -> datasets.Dataset:
    """80 pictures of 4 classes, a bright quarter on noise."""
    random, classes = np.random.default_rng(seed), np.arange(80) % 4
    pictures = random.integers(0, 120, (80, 32, 32, 3), dtype=np.uint8)
    for picture, label in zip(pictures, classes, strict=True):
        y, x = 16 * (label // 2), 16 * (label % 2)
        picture[y : y + 16, x : x + 16] += 100
    features = {image: datasets.Image(), **{name: datasets.ClassLabel(names=list('abcd')) for name in labels}}
    columns = {image: [Image.fromarray(p) for p in pictures]}
    columns |= {name: [-1] * 80 if unlabelled else classes.tolist() for name in labels}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


@pytest.mark.parametrize('name', COLUMNS)
def test_a_recipe_runs_and_prints_the_paper_s_rows_beside_ours(name, tmp_path, monkeypatch, capsys):
    hub_id, configuration, image, labels, splits = COLUMNS[name]
    table = datasets.DatasetDict(
        {s: split(i, image, labels, s == 'test' and 'validation' in splits) for i, s in enumerate(splits)}
    )

    def load(path, config=None, split=None):
        assert (path, config) == (hub_id, configuration)
        return table if split is None else table[split]

    monkeypatch.setattr(datasets, 'load_dataset', load)
    recipe = yaml.safe_load((ROOT / 'hub' / 'recipes' / f'{name}.yaml').read_text(encoding='utf-8'))
    recipe['heads'] |= dict(epochs=1, batch_size=32)
    recipe['dial']['table'] = [recipe['dial']['max_drop'], 0.08]
    if recipe['backbone'].get('published'):
        weights = tmp_path / 'weights.safetensors'
        save_file(timm.create_model('test_resnet').state_dict(), weights)
        overlay = dict(file=str(weights), input_size=[3, 32, 32])
        recipe['model'] |= dict(
            base='test_resnet.r160_in1k', create=dict(num_classes=4, pretrained_cfg_overlay=overlay)
        )
        recipe['model']['exits'] = ['layer1', 'layer2']
    else:
        recipe['model']['base'] = 'cifar_resnet20'
        recipe['model']['create'] |= dict(num_classes=4, depth=1)
        recipe['backbone'] |= dict(epochs=1, batch_size=32, mixed_precision='no')
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    argv = ['release.py', tmp_path / 'recipe.yaml', '--out', tmp_path / 'out', '--work', tmp_path / 'work']
    monkeypatch.setattr('sys.argv', [*map(str, argv)])
    release.main()
    printed = capsys.readouterr().out
    assert printed.strip() == (tmp_path / 'work' / name / 'paper.md').read_text().strip()
    for saved, change in recipe['paper']['saved']:
        assert f'| the paper | | {change:+.2f} | {saved:.1f} |' in printed
    for rule in ('per_exit', 'certified'):
        assert all(f'| ours, {rule} | {100 * drop:g} |' in printed for drop in recipe['dial']['table'])
    assert (tmp_path / 'out' / name / 'README.md').is_file()


def test_test_images_without_labels_are_refused_before_the_training(tmp_path, monkeypatch):
    table = datasets.DatasetDict({s: split(i, 'img', ['label'], s == 'test') for i, s in enumerate(('train', 'test'))})
    monkeypatch.setattr(datasets, 'load_dataset', lambda path, config=None, split=None: table)
    recipe = yaml.safe_load((ROOT / 'hub' / 'recipes' / 'cascade_cifar_resnet110.cifar10.yaml').read_text())
    with pytest.raises(ValueError, match='every label'):
        release.build(recipe, tmp_path)
    assert not list(tmp_path.iterdir())
