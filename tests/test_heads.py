from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import near

import timm_cascade  # noqa: F401  registers the models
from timm_cascade.heads import MAX_SHARE, ExitHead, head_configs


@pytest.mark.parametrize('grid', [1, 2, 4])
def test_the_layouts_are_the_same_picture(grid):
    features = torch.randn(3, 8, 6, 6)
    tokens = torch.cat([torch.randn(3, 2, 8), features.flatten(2).transpose(1, 2)], 1)
    pooled = [
        ExitHead(8, (6, 6), 5, 'NCHW', grid=grid).pool(features),
        ExitHead(8, (6, 6), 5, 'NHWC', grid=grid).pool(features.permute(0, 2, 3, 1)),
        ExitHead(8, (6, 6), 5, 'NLC', prefix_tokens=2, grid=grid).pool(tokens),
    ]
    assert pooled[0].shape == (3, 8 * grid * grid)
    assert all(near(p, pooled[0]) for p in pooled)


def test_a_grid_is_at_most_the_features_own_and_tokens_without_a_grid_are_averaged():
    assert ExitHead(8, (2, 3), 5, grid=4).in_features == 8 * 6
    head = ExitHead(8, (1, 7), 5, 'NLC', grid=1)
    features = torch.randn(2, 7, 8)
    assert near(head.pool(features), features.mean(1))


def test_forward_is_pool_then_classify():
    head = ExitHead(8, (6, 6), 5).eval()
    features = torch.randn(3, 8, 6, 6)
    assert torch.equal(head(features), head.classify(head.pool(features)))
    assert head(features).shape == (3, 5)


@pytest.mark.parametrize('grid', [1, 3, 4])
@pytest.mark.parametrize('size', [(6, 6), (1, 1)])
def test_columns_are_the_grid_then_the_mean_then_the_prefix_tokens(grid, size):
    prefix, patches = torch.randn(3, 2, 8), torch.randn(3, size[0] * size[1], 8)
    head = ExitHead(8, size, 5, 'NLC', prefix_tokens=2, grid=grid, mean=True, tokens=True)
    columns = head.pool(torch.cat([prefix, patches], 1)).unflatten(1, (8, -1))
    want = [ExitHead(8, size, 5, 'NLC', grid=grid).pool(patches).unflatten(1, (8, -1))]
    if grid > 1 and size != (1, 1):  # else it would stand there twice
        want.append(patches.mean(1)[..., None])
    assert near(columns, torch.cat([*want, prefix.transpose(1, 2)], 2))
    assert head.columns == columns.shape[2] and head.in_features == 8 * head.columns


def test_an_exit_without_prefix_tokens_reads_none():
    head = ExitHead(8, (6, 6), 5, 'NHWC', grid=2, tokens=True)
    assert head.columns == 4 and head(torch.randn(3, 6, 6, 8)).shape == (3, 5)


def points(*channels, total=10**9, size=(7, 7), prefix_tokens=0):
    return [SimpleNamespace(channels=c, size=size, prefix_tokens=prefix_tokens, total=total) for c in channels]


def test_descriptions():
    three, one = points(8, 8, 8), points(8)
    assert [c['hidden'] for c in head_configs('linear', three, 5)] == [0, 0, 0]
    assert [c['grid'] for c in head_configs('paper', three, 5)] == [4, 2, 2]
    # what releases of version 0.1 say means what it meant then
    assert head_configs(dict(grid=2), one, 5) == [dict(grid=2, hidden=64, norm=True, mean=False, tokens=False)]
    with pytest.raises(ValueError, match='2 head descriptions for 1'):
        head_configs([dict(grid=4), dict(grid=2)], one, 5)
    for wrong in (dict(grid=0), dict(hidden=-1)):
        with pytest.raises(ValueError, match='at least 1'):
            head_configs(wrong, one, 5)
    with pytest.raises(ValueError, match='expected grid, hidden, norm, mean, tokens'):
        head_configs(dict(grids=4), one, 5)


@pytest.mark.parametrize('classes, hidden', [(0, 64), (10, 64), (100, 96), (1000, 512)])
def test_the_width_follows_the_number_of_classes(classes, hidden):
    assert [c['hidden'] for c in head_configs('enhanced', points(16, 32), classes)] == [hidden] * 2


def test_the_width_follows_the_cost_of_the_backbone():
    small = head_configs('enhanced', points(16, 32, total=10**7), 1000)  # 1 % are 100,000
    cost = [c['hidden'] * (p * 17 + 1000) for c, p in zip(small, (16, 32), strict=True)]
    assert small[0]['hidden'] == small[1]['hidden'] == 32 and 0.8e5 < sum(cost) <= 1e5
    assert head_configs('enhanced', points(16, total=10), 1000)[0]['hidden'] == 1  # never none
    given = head_configs([dict(hidden=7), dict(hidden=None)], points(16, 32, total=10**7), 10)
    assert given[0]['hidden'] == 7 and given[1]['hidden'] == 64


def test_many_channels_are_pooled_to_a_coarser_grid():
    assert [c['grid'] for c in head_configs('enhanced', points(256, 257, 1024, 1025, 9999), 5)] == [4, 2, 2, 1, 1]
    assert head_configs('enhanced', points(4096, size=(1, 1)), 5)[0]['grid'] == 4  # the features' own grid is no larger


@pytest.mark.parametrize(
    'name, classes, hidden',
    [
        ('tinynet_e', 1000, 16),
        ('test_vit', 1000, 32),
        ('test_resnet', 1000, 128),
        ('cifar_resnet20', 10, 64),
        ('resnet18', 10, 64),
        ('resnet18', 1000, 512),
    ],
)
def test_default_heads_cost_less_than_one_percent(name, classes, hidden):
    model = timm.create_model(f'cascade_{name}', num_classes=classes)
    assert model.head_macs().sum() < MAX_SHARE * model.exits[-1].total
    assert {c['hidden'] for c in model._model_args['head']} == {hidden}


def test_a_new_number_of_classes_brings_heads_of_its_width():
    model = timm.create_model('cascade_resnet18', num_classes=10)
    model.reset_classifier(100)
    fresh = timm.create_model('cascade_resnet18', num_classes=100)
    assert model._model_args['head'] == fresh._model_args['head'] and model._model_args['head'][0]['hidden'] == 96
    described = timm.create_model('cascade_resnet18', num_classes=10, head=dict(hidden=8))
    described.reset_classifier(100)
    assert described._model_args['head'][0]['hidden'] == 8


def test_an_explicit_description_is_used_unchanged():
    model = timm.create_model('cascade_tinynet_e', head=dict(grid=4, hidden=64))
    assert {c['hidden'] for c in model._model_args['head']} == {64}
