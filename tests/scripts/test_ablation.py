"""The ablation on a tiny pair: the base row is the library's training, and every switch does what it says."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from helpers import near_weights

import timm_cascade
from scripts.experiments.ablation import compare as ablation
from scripts.experiments.ablation import features as ablation_features
from scripts.experiments.ablation import heads as ablation_heads
from scripts.experiments.ablation import page as ablation_page
from scripts.experiments.ablation.heads import CarryHead, Heads, Row, fit, fit_weights
from scripts.releases import release
from timm_cascade.backbone.exits import resolve_exits
from timm_cascade.data import create_loader
from timm_cascade.heads import head_configs

SHAPES = [dict(channels=3, size=(4, 4)), dict(channels=5, size=(2, 2)), dict(channels=6, size=(2, 2))]
POINTS = [SimpleNamespace(**s, prefix_tokens=0, total=10**6) for s in SHAPES]
WIDTHS = [48, 20, 24]


@pytest.fixture
def pooled():
    """Three exits' pooled taps of 64 samples of 4 classes, ever easier, and labels."""
    labels = torch.arange(64) % 4
    taps = [torch.randn(64, w) for w in WIDTHS]
    for strength, tap in enumerate(taps, start=1):
        tap[:, :4] += strength * F.one_hot(labels, 4)
    return taps, labels


def make(row: Row) -> Heads:
    torch.manual_seed(0)
    return Heads(SHAPES, head_configs(dict(grid=4), POINTS, 4), 4, row)


def test_the_base_row_is_what_train_heads_does(small, images):
    loader = create_loader(small, images)
    with torch.no_grad():
        parts = [small.forward_pooled(x)[0] for x, _ in loader]
    taps = [torch.cat(p) for p in zip(*parts, strict=True)]
    labels, base = torch.as_tensor(images.labels), Row('base')
    heads = Heads([dict(channels=p.channels, size=p.size) for p in small.exits], small._head_configs, 4, base)
    heads.heads.load_state_dict(small.heads.state_dict())
    fit(heads, base, taps, labels, torch.zeros(96, 4), seed=3)
    start = copy.deepcopy(small.heads.state_dict())
    timm_cascade.train_heads(small, images, seed=3)
    ours, theirs = (dict(h.named_parameters()) for h in (heads.heads, small.heads))
    assert near_weights(ours, theirs, start)
    assert heads.macs() == small.head_macs().tolist()


def test_carried_logits_are_read_and_learn_nothing(pooled):
    taps, _ = pooled
    heads = make(Row('carry', carry=True))
    assert [type(h) is CarryHead for h in heads.heads] == [False, True, True]
    logits = heads(taps)
    changed = heads([10 * taps[0], *taps[1:]])
    assert not torch.equal(logits[2], changed[2])  # by way of exit 1
    logits[1].sum().backward()
    assert heads.heads[0].fc.weight.grad is None and heads.heads[1].fc.weight.grad is not None
    plain = make(Row('base'))
    assert [a - b for a, b in zip(heads.macs(), plain.macs(), strict=True)] == [0, 4 * 64, 4 * 64]


def test_combined_answers_start_as_the_average_and_learn(pooled):
    taps, labels = pooled
    row = Row('learned', combine='learned')
    heads = make(row)
    fit(heads, row, taps, labels, torch.zeros(64, 4), seed=0)
    logits = [x.detach() for x in heads(taps)]
    answers = heads.answers(logits)
    sure = [F.log_softmax(x, 1) for x in logits]
    torch.testing.assert_close(answers[2], torch.stack(sure).mean(0))
    before = copy.deepcopy(heads.heads.state_dict())
    losses = sum(F.cross_entropy(x, labels) for x in answers)
    fit_weights(heads, logits, labels)
    assert sum(F.cross_entropy(x, labels) for x in heads.answers(logits)) < losses
    assert all(torch.equal(before[k], v) for k, v in heads.heads.state_dict().items())
    heads.combine = ''
    assert heads.answers(logits) is logits


def test_samples_that_a_sure_exit_has_answered_count_less():
    logits = [torch.tensor([[9.0, 0], [0, 0], [0, 0]]), torch.tensor([[0.0, 0], [9, 0], [0, 0]]), torch.zeros(3, 2)]
    first, second, third = ablation_heads._weights(logits, Row('weigh', weigh=True))
    assert first.tolist() == [1, 1, 1]
    assert second[0] < 0.5 < second[1] == second[2]
    assert third[0] == pytest.approx(float(third[1]), abs=0.01) and third[2] > 2
    assert float(third.mean()) == pytest.approx(1)


def test_distillation_alone_needs_no_labels(pooled, monkeypatch):
    taps, labels = pooled
    teacher, wrong = 5 * F.one_hot((labels + 1) % 4, 4).float(), torch.full_like(labels, 3)
    monkeypatch.setattr(ablation_heads, 'BATCH', 8)
    heads = make(Row('distil', distil=1.0))
    fit(heads, Row('distil', distil=1.0), taps, wrong, teacher, seed=0)
    assert (heads(taps)[2].argmax(1) == (labels + 1) % 4).float().mean() > 0.9


def test_savings_are_read_where_the_realised_loss_is_what_was_said():
    """One exit at a tenth of the cost, right on all but the least sure samples: 0.5 of 200 are lost a hundredth."""
    confidence = np.stack([np.linspace(0.5, 1, 1000), np.ones(1000)], 1)
    correct = np.stack([np.arange(1000) >= 200, np.ones(1000, bool)], 1)
    samples = confidence, correct
    found = ablation.measure(samples, samples, np.array([10.0, 90.0]), np.array([1.0]), 99.0, 2)
    # those who stay pay head and backbone; the grid of thresholds is 256 wide
    for drop, lost in ((0.0025, 2.5), (0.005, 5), (0.01, 10)):
        leave = 0.8 + lost / 1000
        assert found[f'saved_{drop:g}'] == pytest.approx(1 - (10 + 90 * (1 - leave)) / 99, abs=0.006)
    assert 0.8 < found['area'] < 1
    pairs = list(ablation.halvings(samples, samples))
    assert len(pairs) == 14 and all(len(a[0]) == len(b[0]) == 1000 for a, b in pairs)


@pytest.fixture
def recipe(images, tmp_path, monkeypatch):
    """A recipe for tiny pairs, in a folder that takes the place of the repository."""
    recipe = dict(
        name='cascade_cifar_resnet20.quarters',
        data=dict(name='quarters', train='a', calibration='b', test='c'),
        model=dict(
            base='cifar_resnet20',
            create=dict(
                in_chans=1, num_classes=4, pretrained_cfg_overlay=dict(input_size=[1, 32, 32], mean=[0.5], std=[0.25])
            ),
        ),
        backbone=dict(
            epochs=1, batch_size=32, lr=0.05, weight_decay=5e-4, seed=0, pad=1, flip=False, mixed_precision='no'
        ),
    )
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    for module in (ablation, ablation_features):
        monkeypatch.setattr(module, 'ROOT', tmp_path)
    monkeypatch.setitem(ablation_features.DATA, 'quarters', lambda split: images)
    monkeypatch.setattr(ablation_heads, 'EPOCHS', 2)
    monkeypatch.setattr(ablation_page, 'SEEDS', (0, 1))
    monkeypatch.setattr(ablation_features.load_features, '__defaults__', (tmp_path / 'runs' / 'ablation',))
    return recipe


def run(monkeypatch, tmp_path, name):
    """The page that the experiment writes for one pair."""
    monkeypatch.setattr('sys.argv', ['ablation.py', '--pairs', name, '--out', str(tmp_path / 'docs')])
    ablation.main()
    return (tmp_path / 'docs' / 'pages' / 'evidence' / 'ablation.md').read_text()


def test_a_fine_tuned_pair_compares_the_default_with_one_change_at_a_time(recipe, tmp_path, monkeypatch):
    recipe['backbone'] = dict(finetune=dict(epochs=3), seed=0)
    recipe['model']['create']['num_classes'] = 4
    (tmp_path / 'recipe.yaml').write_text(yaml.safe_dump(recipe))
    places = ['layer1.0', 'layer1.1', 'layer1', 'layer2.0', 'layer2.1', 'layer2', 'layer3.0', 'layer3.1']
    pair = dict(recipe='recipe.yaml', finetuned=True, seeds=1, exits=places, stages=['layer1', 'layer2'])
    monkeypatch.setitem(ablation_features.PAIRS, 'tuned', pair)
    with pytest.raises(FileNotFoundError, match=r'release.py recipe.yaml first'):
        run(monkeypatch, tmp_path, 'tuned')
    weights = tmp_path / 'runs' / recipe['name'] / 'finetuned.pt'
    weights.parent.mkdir(parents=True)
    backbone = release.create_backbone(recipe)
    torch.save(dict(model=backbone.state_dict()), weights)
    page = run(monkeypatch, tmp_path, 'tuned')
    features = ablation_features.load_features('tuned')
    exits = [p.module for p in resolve_exits(backbone)]
    rows = {r.name: r for r in ablation.DEFAULT_ROWS}
    assert ablation.exits_of(rows[ablation_page.NEW], 'tuned', features) == features.defaults == exits
    old = rows[ablation_page.OLD]
    three = ablation.exits_of(old, 'tuned', features)
    former = ablation.configs_of(old, three, features)
    assert len(three) == 3 and not any(c['mean'] for c in former)
    text, detail = page.split('## tuned')
    assert f'| {ablation_page.NEW} |' in text and '| expected | ' in text and 'Which switch pays' not in text
    assert 'fine-tuned for 3 epochs' in detail and '1 seed' in detail and '±' not in detail and exits[-1] in detail


def test_the_heads_of_version_0_1_are_halved_until_they_cost_one_percent():
    cost = 64 * (48 + 20 + 24 + 3 * 10)  # of 64 hidden units in each of three heads, before ten classes
    for total, hidden in ((100 * cost, 64), (100 * cost - 100, 32), (26 * cost, 16), (1, 1)):
        points = [SimpleNamespace(**s, prefix_tokens=0, total=total) for s in SHAPES]
        configs = ablation.former_configs(points, 10)
        assert {c['hidden'] for c in configs} == {hidden} and not any(c['mean'] for c in configs)


def test_a_tiny_pair_from_backbone_to_page(recipe, images, tmp_path, monkeypatch):
    pair = dict(
        recipe=str(tmp_path / 'recipe.yaml'),
        input_size=[1, 16, 16],
        views=1,
        images=64,
        exits=['layer1.0', 'layer1', 'layer2', 'layer3.0'],
        stages=['layer1', 'layer2'],
    )
    monkeypatch.setitem(ablation_features.PAIRS, 'tiny', pair)
    names = ablation_page.PAPER, ablation_page.BASE, ablation_page.THREE
    rows = [r for r in ablation.ROWS if r.name in names or r.combine]
    monkeypatch.setattr(ablation, 'ROWS', [*rows, Row('views', views=1), Row('more views', views=2)])
    page = run(monkeypatch, tmp_path, 'tiny')
    log = tmp_path / 'runs' / 'ablation' / 'results.jsonl'
    first = log.read_text()
    with open(log, 'a', encoding='utf-8') as f:
        f.write('{"pair": "ti')  # a kill in the middle of a line
    ablation.main()
    assert log.read_text().startswith(first) and log.read_text().count('\n') == first.count('\n')
    assert (tmp_path / 'docs' / 'pages' / 'evidence' / 'ablation.md').read_text() == page

    monkeypatch.setitem(ablation_features.PAIRS, 'measured elsewhere', pair)
    written = tmp_path / 'docs' / 'results' / 'ablation.json'
    elsewhere = [dict(x, pair='measured elsewhere') for x in json.loads(written.read_text())['rows']]
    written.write_text(json.dumps(dict(rows=elsewhere)))
    ablation.main()
    both = (tmp_path / 'docs' / 'pages' / 'evidence' / 'ablation.md').read_text()
    assert both.endswith(page.split('## tiny')[1].replace('tiny', 'measured elsewhere')) and '## tiny' in both
    written.unlink()
    ablation.main()

    taps = ablation_features.load_features('tiny')
    assert taps.pooled['train', 'layer1', 4].shape == (96, 16, 16)
    config = dict(grid=4, hidden=0, norm=True, mean=True, tokens=True)
    assert taps.of('train', 'layer1', config, slice(7)).shape == (7, 16 * 17)
    fine, coarse = (taps.pooled['test', 'layer2', grid].astype(np.float64) for grid in (4, 2))
    from_fine = fine.reshape(96, 32, 2, 2, 2, 2).mean((3, 5)).reshape(96, 32, 4)
    # every grid is pooled from the tap itself; 8 divides into all of them, so that they differ by their rounding alone
    rounding = np.finfo(np.float16).eps * max(np.abs(fine).max(), np.abs(coarse).max())
    assert np.abs(from_fine - coarse).max() <= rounding < np.abs(coarse).std()
    assert not np.array_equal(taps.pooled['train', 'layer1', 4], taps.pooled['view0', 'layer1', 4])
    assert ablation.exits_of(ablation.ROWS[0], 'tiny', taps) == ['layer1', 'layer2']
    table = json.loads((tmp_path / 'docs' / 'results' / 'ablation.json').read_text())['rows']
    assert {x['row'] for x in table} == {r.name for r in ablation.ROWS} - {'more views'}
    assert all(x['seeds'] == 2 and 0 <= x['saved_0.005']['mean'] < 1 for x in table)
    assert f'| {ablation_page.PAPER} |' in page and 'more views' not in page.split('## tiny')[1]
