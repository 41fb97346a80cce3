"""scripts/releases/release.py on a tiny recipe: whole path, interruption, resumption, card."""

from __future__ import annotations

import pytest
import timm
import torch
import yaml

import timm_cascade
from scripts.releases import backbones, release


@pytest.fixture
def recipe(images, monkeypatch):
    monkeypatch.setitem(release.DATA, 'quarters', lambda split: images)
    return dict(
        name='cascade_cifar_resnet20.quarters',
        data=dict(name='quarters', dataset='me/quarters', licence='mit', train='a', calibration='b', test='c'),
        model=dict(
            base='cifar_resnet20',
            licence='apache-2.0',
            exits=['layer1', 'layer2'],
            head=dict(grid=2, hidden=8, norm=True),
            create=dict(
                depth=1,
                in_chans=1,
                num_classes=4,
                pretrained_cfg_overlay=dict(input_size=[1, 16, 16], mean=[0.5], std=[0.25]),
            ),
        ),
        backbone=dict(
            epochs=3, batch_size=32, lr=0.05, weight_decay=5e-4, seed=0, pad=1, flip=False, mixed_precision='no'
        ),
        heads=dict(epochs=2, batch_size=32, lr=1e-2, weight_decay=0.05, seed=0),
        dial=dict(rule='joint', max_drop=0.05, table=[0, 0.05, 0.2]),
    )


def run(recipe, tmp_path, monkeypatch, name):
    path = tmp_path / 'recipe.yaml'
    path.write_text(yaml.safe_dump(recipe))
    monkeypatch.setattr(
        'sys.argv', ['release.py', str(path), '--out', str(tmp_path / name), '--work', str(tmp_path / f'{name}-work')]
    )
    release.main()
    return tmp_path / name / recipe['name']


def test_an_interrupted_release_continues_to_the_same_weights(recipe, tmp_path, monkeypatch):
    whole = run(recipe, tmp_path, monkeypatch, 'whole')
    assert {p.name for p in whole.iterdir()} == {
        'config.json',
        'model.safetensors',
        'thresholds.json',
        'calibration.safetensors',
        'README.md',
        'path.json',
        'tradeoff.png',
    }

    accuracy, calls = backbones.accuracy, []

    def dies_after_two_epochs(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return accuracy(*args)

    monkeypatch.setattr(backbones, 'accuracy', dies_after_two_epochs)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, tmp_path, monkeypatch, 'cut')
    cut = run(recipe, tmp_path, monkeypatch, 'cut')
    assert len(calls) == 3  # the two epochs that were done are not done again
    for file in ('model.safetensors', 'thresholds.json', 'config.json'):
        assert (cut / file).read_bytes() == (whole / file).read_bytes(), file

    model = timm.create_model(f'local-dir:{cut}', pretrained=True)
    assert model.label_names == ['a', 'b', 'c', 'd'] and model.calibration is not None
    card = (cut / 'README.md').read_text()
    assert card.startswith('---\n') and 'model-index' in card and '| joint | 5 %' in card
    assert 'layer2' in card and '{{' not in card

    trained = (tmp_path / 'cut-work' / recipe['name'] / 'heads.jsonl').read_text()
    recipe['dial']['table'] = [0.1]
    recipe['dial']['max_drop'] = 0.1
    again = run(recipe, tmp_path, monkeypatch, 'cut')
    assert (tmp_path / 'cut-work' / recipe['name'] / 'heads.jsonl').read_text() == trained  # only the dial was redone
    assert timm_cascade.load(again).table.point(0.1, rule='joint').max_drop == 0.1


def test_a_backbone_is_fine_tuned_where_the_recipe_says_so(recipe, tmp_path, monkeypatch):
    recipe['data']['validation'] = 'd'
    recipe['backbone'] = dict(finetune=dict(epochs=2, batch_size=32, lr=5e-3), seed=0)
    recipe['about'] = 'The weights are from elsewhere.\n'
    del recipe['model']['exits'], recipe['model']['head'], recipe['model']['create']['depth']
    folder = run(recipe, tmp_path, monkeypatch, 'tuned')
    model, work = timm_cascade.load(folder), tmp_path / 'tuned-work' / recipe['name']
    assert len((work / 'backbone.jsonl').read_text().splitlines()) == 2 and len(model.exits) == 5
    tuned = torch.load(work / 'finetuned.pt', weights_only=True)['model']
    assert all(torch.equal(t, tuned[name]) for name, t in model.backbone.state_dict().items())
    card = (folder / 'README.md').read_text()
    assert (
        'backbone fine-tuned on\nme/quarters a' in card and 'calibrated on b. The weights are from elsewhere.\n' in card
    )
    fresh = release.create_backbone(recipe).state_dict()
    assert not torch.equal(tuned['fc.weight'], fresh['fc.weight'])


def test_a_state_of_another_recipe_is_refused(recipe, tmp_path, images):
    model = release.create_backbone(recipe)
    backbones.train_backbone(model, images, images, tmp_path / 'b.pt', recipe['backbone'] | dict(epochs=1))
    with pytest.raises(ValueError, match='move it away'):
        backbones.train_backbone(model, images, images, tmp_path / 'b.pt', recipe['backbone'])


def test_augmentation_moves_pixels_and_invents_none():
    images = torch.rand(8, 2, 6, 6)
    same = backbones.augment(images, 0, False, torch.Generator().manual_seed(0))
    assert torch.equal(same, images)
    moved = backbones.augment(images, 2, True, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and not torch.equal(moved, images)
    for before, after in zip(images, moved, strict=True):
        assert set(after[0].flatten().tolist()) <= set(before[0].flatten().tolist())
