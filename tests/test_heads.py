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


def test_descriptions():
    assert [c['hidden'] for c in head_configs('linear', 3)] == [0, 0, 0]
    assert [c['grid'] for c in head_configs('paper', 3)] == [4, 2, 2]
    assert head_configs(dict(grid=2), 1) == [dict(grid=2, hidden=64, norm=True)]
    with pytest.raises(ValueError, match='2 head descriptions for 1'):
        head_configs([dict(grid=4), dict(grid=2)], 1)
    with pytest.raises(ValueError, match='at least 1'):
        head_configs(dict(grid=0), 1)


@pytest.mark.parametrize(
    'name, hidden',
    [
        ('tinynet_e', 32),
        ('lcnet_035', 32),
        ('mobilenetv3_small_050', 32),
        ('test_byobnet', 32),
        ('test_vit', 32),
        ('test_resnet', 64),
        ('cifar_resnet20', 64),
        ('resnet18', 64),
    ],
)
def test_default_heads_cost_less_than_one_percent(name, hidden):
    """The cheapest models of the sweep, where 64 hidden units would cost up to 1.5 %, and usual ones."""
    model = timm.create_model(f'cascade_{name}')
    assert model.head_macs().sum() < MAX_SHARE * model.exits[-1].total
    assert {c['hidden'] for c in model._model_args['head']} == {hidden}


def test_an_explicit_description_is_used_unchanged():
    model = timm.create_model('cascade_tinynet_e', head=dict(grid=4, hidden=64))
    assert {c['hidden'] for c in model._model_args['head']} == {64}
