import copy
import pickle
from types import SimpleNamespace

import pytest
import timm
import torch
from helpers import near
from torch import nn
from torch.nn.utils import prune

import timm_cascade
from timm_cascade.heads import MAX_SHARE, NARROW_SHARE, NARROWEST, ExitHead, create_heads, head_configs


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
    assert near(head(features), head.classify(head.pool(features)))
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
    three, one = points(8, 8, 8, total=10**7), points(8)
    assert [c['hidden'] for c in head_configs('linear', three, 5)] == [0, 0, 0]
    assert [c['grid'] for c in head_configs('paper', three, 5)] == [4, 2, 2]
    # what releases of version 0.1 say means what it meant then
    assert head_configs(dict(grid=2), one, 5) == [
        dict(grid=2, hidden=64, norm=True, mean=False, tokens=False, hidden_norm=False)
    ]
    with pytest.raises(ValueError, match='2 head descriptions for 1'):
        head_configs([dict(grid=4), dict(grid=2)], one, 5)
    for wrong in (dict(grid=0), dict(hidden=-1), dict(grid=(1, 0)), dict(grid=[2]), dict(grid=(1, 2, 3))):
        with pytest.raises(ValueError, match='at least 1'):
            head_configs(wrong, one, 5)
    with pytest.raises(ValueError, match='expected grid, hidden, norm, mean, tokens, hidden_norm'):
        head_configs(dict(grids=4), one, 5)


def test_the_paper_has_other_heads_for_networks_of_imagenet_s_size():
    resnet50 = points(512, 1024, total=4_089_184_256, size=(14, 14))  # 0.13 % of it, for a thousand classes
    large = head_configs('paper', resnet50, 1000)
    rest = dict(hidden=1024, norm=True, hidden_norm=True, mean=False, tokens=False)
    assert large == [dict(grid=(2, 2), **rest), dict(grid=(1, 2), **rest)]
    heads = create_heads([SimpleNamespace(**vars(p), layout='NCHW') for p in resnet50], 1000, large)
    assert [h.in_features for h in heads] == [2048, 2048]
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
    assert all([type(m) for m in h.hidden] == kinds and isinstance(h.norm, nn.BatchNorm1d) for h in heads)
    # one per cent of the backbone for all of them together decides
    cost = 2 * (2048 + 1000) * 1024
    for total, hidden in ((100 * cost, 1024), (100 * cost - 100, 64)):
        assert {c['hidden'] for c in head_configs('paper', points(512, 1024, total=total), 1000)} == {hidden}
    wide = points(16, 768, 4096, total=10**12, size=(28, 28))
    assert [c['grid'] for c in head_configs('paper', wide, 10)] == [(8, 16), (1, 2), (1, 1)]


def test_a_network_of_cifar_s_size_keeps_the_paper_s_small_heads():
    model = timm.create_model('cascade_cifar_resnet110', exits=['layer1', 'layer2'], head='paper', num_classes=10)
    assert [(c['grid'], c['hidden'], c['norm']) for c in model._model_args['head']] == [(4, 64, False), (2, 64, False)]


def test_a_grid_has_rows_and_columns():
    features = torch.randn(2, 3, 6, 6)
    head = ExitHead(3, (6, 6), 5, grid=(1, 2))
    assert near(head.pool(features), features.unflatten(3, (2, 3)).mean((2, 4)).flatten(1))
    assert head_configs(dict(grid=[1, 2]), points(8), 5)[0]['grid'] == (1, 2)  # as JSON has it


def test_the_paper_s_heads_train_and_travel(images, tmp_path):
    head = dict(grid=(1, 2), hidden=8, hidden_norm=True)
    create = dict(num_classes=4, pretrained_cfg_overlay=dict(input_size=[1, 32, 32], mean=[0.5], std=[0.25]))
    model = timm.create_model('cascade_test_resnet', in_chans=1, exits=['layer1', 'layer2'], head=head, **create).eval()
    inner = [h.hidden[1] for h in model.heads]
    timm_cascade.train_heads(model, images, epochs=2, batch_size=95)  # the last batch of an epoch is a single image
    assert all(n.num_batches_tracked == 2 and not n.training and n.running_mean.any() for n in inner)
    timm_cascade.save(model, tmp_path / 'release')
    loaded, x = timm_cascade.load(tmp_path / 'release').eval(), torch.randn(3, 1, 32, 32)
    assert loaded._model_args['head'] == model._model_args['head'] and loaded._model_args['head'][0]['grid'] == (1, 2)
    with torch.no_grad():
        assert all(near(a, b) for a, b in zip(loaded.forward_exits(x), model.forward_exits(x), strict=True))


@pytest.mark.parametrize('classes, hidden', [(0, 64), (10, 64), (100, 96), (1000, 512)])
def test_the_width_follows_the_number_of_classes(classes, hidden):
    assert [c['hidden'] for c in head_configs('enhanced', points(16, 32), classes)] == [hidden] * 2


def test_the_width_follows_the_cost_of_the_backbone():
    for total, hidden, least, most in ((3 * 10**7, 104, 0.9e-2, 1e-2), (10**7, 64, 1e-2, 3e-2), (10**6, 8, 2e-2, 3e-2)):
        small = head_configs('enhanced', points(16, 32, total=total), 1000)
        cost = [c['hidden'] * (p * 17 + 1000) for c, p in zip(small, (16, 32), strict=True)]
        assert small[0]['hidden'] == small[1]['hidden'] == hidden and least < sum(cost) / total <= most
    assert head_configs('enhanced', points(16, total=10), 1000)[0]['hidden'] == 1  # never none
    given = head_configs([dict(hidden=7), dict(hidden=None)], points(16, 32, total=10**7), 10)
    assert given[0]['hidden'] == 7 and given[1]['hidden'] == 64


def test_many_channels_are_pooled_to_a_coarser_grid():
    assert [c['grid'] for c in head_configs('enhanced', points(256, 257, 1024, 1025, 9999), 5)] == [4, 2, 2, 1, 1]
    assert head_configs('enhanced', points(4096, size=(1, 1)), 5)[0]['grid'] == 4  # the features' own grid is no larger


@pytest.mark.parametrize(
    'name, classes, hidden',
    [
        ('tinynet_e', 1000, 64),
        ('test_vit', 1000, 64),
        ('test_resnet', 1000, 128),
        ('cifar_resnet20', 10, 64),
        ('resnet18', 10, 64),
        ('resnet18', 1000, 512),
    ],
)
def test_default_heads_cost_less_than_one_percent_or_are_narrow(name, classes, hidden):
    model = timm.create_model(f'cascade_{name}', num_classes=classes)
    assert model.head_macs().sum() < (NARROW_SHARE if hidden <= NARROWEST else MAX_SHARE) * model.exits[-1].total
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


def used(**kwargs):
    """A head whose norm has statistics far from 0 and 1, and features for it."""
    head = ExitHead(8, (6, 6), 5, **kwargs).eval().requires_grad_(False)
    for norm in (m for m in head.modules() if isinstance(m, nn.BatchNorm1d)):
        for tensor in (norm.running_mean, norm.bias):
            tensor.normal_(std=3)
        for tensor in (norm.running_var, norm.weight):
            tensor.uniform_(0.3, 3)
    return head, 2 + torch.randn(9, 8, 6, 6)


def as_trained(head, features):
    """Every layer run by itself."""
    return head.fc(head.hidden(head.norm(head.pool(features))))


@pytest.mark.parametrize(
    'description',
    [
        dict(),
        dict(hidden=0),
        dict(norm=False),
        dict(grid=1, hidden=0),
        dict(hidden=0, norm=False),
        dict(hidden_norm=True),
        dict(hidden_norm=True, norm=False),
    ],
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_the_inference_form_is_the_trained_head_within_rounding(description, dtype):
    head, features = used(**description)
    head, features = head.to(dtype), features.to(dtype)
    exact = as_trained(copy.deepcopy(head).double(), features.double())
    error = (as_trained(head, features) - exact).abs().max()  # of the layers one by one, in this precision
    assert head.inference_layers() is not None
    rounded = torch.finfo(dtype).eps * exact.abs().max()
    assert (head(features) - exact).abs().max() <= 10 * max(error, rounded)
    assert torch.equal(head(features), head(features))


def change_in_place(head):
    head.fc.weight.mul_(3)


def change_statistics(head):
    head.norm.running_mean.add_(5)


def change_inner_statistics(head):
    head.hidden.insert(1, nn.BatchNorm1d(64).eval())
    head(torch.randn(2, 8, 6, 6))
    head.hidden[1].running_mean.add_(5)


def load_in_place(head):
    head.load_state_dict(used()[0].state_dict())


def load_by_assigning(head):
    head.load_state_dict(used()[0].state_dict(), assign=True)


def replace_a_layer(head):
    head.fc = nn.Linear(64, 5)


def replace_by_another_kind(head):
    head.fc = nn.Sequential(nn.Linear(64, 3), nn.Tanh(), nn.Linear(3, 5))


def prune_weights(head):
    prune.random_unstructured(head.fc, 'weight', 0.9)


def add_a_hook(head):
    head.fc.register_forward_hook(lambda module, args, out: 2 * out)
    head.fc.bias.add_(1)  # a hook alone leaves no trace


def train_a_step(head):
    head.train().requires_grad_(True)
    optimizer = torch.optim.SGD(head.parameters(), 0.5)
    with torch.enable_grad():
        head(torch.randn(9, 8, 6, 6)).square().sum().backward()
    optimizer.step()
    head.eval().requires_grad_(False)


def train_a_fused_step_in_evaluation_mode(head):
    head.requires_grad_(True)
    optimizer = torch.optim.AdamW(head.parameters(), 0.5, fused=True)
    with torch.enable_grad():
        head(torch.randn(9, 8, 6, 6)).square().sum().backward()
    optimizer.step()
    head.requires_grad_(False)


@torch.no_grad()
@pytest.mark.parametrize(
    'change',
    [
        change_in_place,
        change_statistics,
        change_inner_statistics,
        load_in_place,
        load_by_assigning,
        replace_a_layer,
        replace_by_another_kind,
        prune_weights,
        add_a_hook,
        train_a_step,
        train_a_fused_step_in_evaluation_mode,
        lambda head: head.double().float(),
    ],
)
@pytest.mark.parametrize('inference_mode', [False, True])
def test_the_inference_form_follows_the_weights(change, inference_mode):
    head, features = used()
    with torch.inference_mode(inference_mode):
        head(features)
    change(head)
    with torch.inference_mode(inference_mode):
        assert near(head(features), as_trained(head, features))


@torch.no_grad()
@pytest.mark.parametrize('side', [8, 6])  # cells of one size, and cells that overlap
@pytest.mark.parametrize('layout, prefix', [('NCHW', 0), ('NHWC', 0), ('NLC', 2)])
@pytest.mark.parametrize('hidden', [0, 5])
@pytest.mark.parametrize('mean', [True, False])
def test_features_of_every_layout_and_size_are_pooled_as_in_training(side, layout, prefix, hidden, mean):
    head = ExitHead(3, (side, side), 9, layout, prefix, hidden=hidden, mean=mean, tokens=prefix > 0).eval()
    head.norm.running_mean.normal_(), head.norm.running_var.uniform_(0.5, 2)
    for own in (side, 8, 6, 9):  # of other sizes too: images may have another size than the model was made for
        features = torch.randn(7, 3, prefix + own * own) + torch.arange(3)[:, None]
        if layout != 'NLC':
            features = features.unflatten(2, (own, own))
        features = {'NCHW': features, 'NHWC': features.movedim(1, -1), 'NLC': features.mT}[layout]
        assert near(head(features), as_trained(head, features))
        head.norm.running_mean.add_(1)  # noticed in every form
        assert near(head(features), as_trained(head, features))


@torch.inference_mode()
def test_weights_made_in_inference_mode_have_no_version_and_are_read_every_time():
    head, features = used()
    before = head(features)
    head.fc.weight.mul_(3)
    assert near(head(features), as_trained(head, features)) and not near(head(features), before)


def test_gradients_come_from_the_layers_that_are_trained():
    head, features = used()
    head(features)
    head.requires_grad_(True)
    head(features).sum().backward()
    assert head.norm.weight.grad.abs().max() > 0 and head.hidden[0].weight.grad.abs().max() > 0
    head.requires_grad_(False)
    features.requires_grad_(True)
    (got,) = torch.autograd.grad(head(features).square().sum(), features)
    (want,) = torch.autograd.grad(as_trained(head, features).square().sum(), features)
    assert near(got, want)


def test_the_inference_form_is_not_copied_or_stored():
    head, features = used()
    head(features)
    state = head.state_dict()
    for other in (copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert '_watched' not in vars(other) and torch.equal(other(features), head(features))
        other.fc.weight.data.zero_()
        other.fc.bias.zero_()
        assert not other(features).any() and head(features).any()
    assert head.state_dict().keys() == state.keys() == ExitHead(8, (6, 6), 5).state_dict().keys()


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_keeps_the_norm(dtype):
    head, features = used()
    head, features = head.to(dtype), features.to(dtype)
    assert head.inference_layers() is None and torch.equal(head(features), as_trained(head, features))
