import pytest
import torch

from timm_cascade.heads import ExitHead, head_configs


@pytest.mark.parametrize('grid', [1, 2, 4])
def test_the_layouts_are_the_same_picture(grid):
    tap = torch.randn(3, 8, 6, 6)
    tokens = torch.cat([torch.randn(3, 2, 8), tap.flatten(2).transpose(1, 2)], 1)
    pooled = [
        ExitHead(8, (6, 6), 5, 'NCHW', grid=grid).pool(tap),
        ExitHead(8, (6, 6), 5, 'NHWC', grid=grid).pool(tap.permute(0, 2, 3, 1)),
        ExitHead(8, (6, 6), 5, 'NLC', prefix_tokens=2, grid=grid).pool(tokens),
    ]
    assert pooled[0].shape == (3, 8 * grid * grid)
    assert all(torch.allclose(p, pooled[0], atol=1e-6) for p in pooled)


def test_a_grid_is_at_most_the_tap_s_and_tokens_without_a_grid_are_averaged():
    assert ExitHead(8, (2, 3), 5, grid=4).in_features == 8 * 6
    head = ExitHead(8, (1, 7), 5, 'NLC', grid=1)
    tap = torch.randn(2, 7, 8)
    assert torch.allclose(head.pool(tap), tap.mean(1), atol=1e-6)


def test_forward_is_pool_then_classify():
    head = ExitHead(8, (6, 6), 5).eval()
    tap = torch.randn(3, 8, 6, 6)
    assert torch.equal(head(tap), head.classify(head.pool(tap)))
    assert head(tap).shape == (3, 5)


def test_descriptions():
    assert [c['hidden'] for c in head_configs('linear', 3)] == [0, 0, 0]
    assert [c['grid'] for c in head_configs('paper', 3)] == [4, 2, 2]
    assert head_configs(dict(grid=2), 1) == [dict(grid=2, hidden=64, norm=True)]
    with pytest.raises(ValueError, match='2 head descriptions for 1'):
        head_configs([dict(grid=4), dict(grid=2)], 1)
    with pytest.raises(ValueError, match='at least 1'):
        head_configs(dict(grid=0), 1)
