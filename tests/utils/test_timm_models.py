"""What timm does not keep before 1.0.31 is read from the models; here with any version, against its own answers."""

import pytest
import timm
import torch

import timm_cascade
from timm_cascade.utils import timm_models

KEPT = [
    ('test_resnet', dict(in_chans=1, num_classes=7)),
    ('test_vit', dict(img_size=64, in_chans=4)),
    ('test_vit', dict(dynamic_img_size=True, drop_path_rate=0.1)),
    ('test_byobnet', dict(global_pool='max')),
    ('test_efficientnet', dict(act_layer='gelu')),
    ('swin_tiny_patch4_window7_224', dict(img_size=192)),
    ('xcit_nano_12_p16_384', {}),
    ('tresnet_m', dict(in_chans=1)),
]


@pytest.fixture
def older(monkeypatch):
    """As if timm kept nothing."""
    monkeypatch.setattr(timm_models, 'newer', None)


@pytest.mark.parametrize('name, args', KEPT, ids=lambda v: v if isinstance(v, str) else '-'.join(v))
def test_what_is_read_is_what_timm_keeps(monkeypatch, name, args):
    own = timm_models.newer
    if own is None:
        pytest.skip('timm keeps what a model was built with from 1.0.31 on')
    with timm_models.on_meta():
        model = timm.create_model(name, **args)
    want = timm_models.input_size_of(model), timm_models.resolve_input_data_config(model)
    want_args = timm_models.model_args_of(model)
    monkeypatch.setattr(timm_models, 'newer', None)
    assert timm_models.model_args_of(model) == want_args
    assert (timm_models.input_size_of(model), timm_models.resolve_input_data_config(model)) == want
    if not {'dynamic_img_size', 'act_layer'} & set(args):  # what no layer shows
        del model._model_args
        assert (timm_models.input_size_of(model), timm_models.resolve_input_data_config(model)) == want
        read = timm_models.model_args_of(model)
        assert {k: want_args.get(k) for k in read} == read


def test_a_model_whose_arguments_are_not_known_is_not_described_as_another(older, tmp_path):
    backbone = timm.create_model('test_resnet', act_layer='gelu', num_classes=4)
    if hasattr(backbone, '_model_args'):
        del backbone._model_args
    model = timm_cascade.CascadeModel(backbone)
    with pytest.raises(
        timm_cascade.ReleaseError, match=r'test_resnet with .* not this model \(GELU.* not ReLU.*Upgrade'
    ):
        timm_cascade.save(model, tmp_path / 'release')
    assert not (tmp_path / 'release').exists()
    backbone._model_args = dict(act_layer='gelu')
    again = timm_cascade.load(timm_cascade.save(model.eval(), tmp_path / 'release')).eval()
    x = torch.randn(2, 3, 160, 160)
    assert torch.equal(again.backbone(x), backbone(x))


def test_a_network_that_older_versions_compute_wrongly_is_refused(older):
    with timm_models.on_meta(), pytest.raises(timm_cascade.BackboneError, match=r'gcvit_xxtiny .* 1\.0\.31 .* Upgrade'):
        timm.create_model('cascade_gcvit_xxtiny', img_size=64, embed_dim=16)


@pytest.mark.parametrize(
    'name, args',
    [
        ('test_resnet', dict(in_chans=4, num_classes=5, act_layer='gelu')),
        ('test_vit', dict(in_chans=2, img_size=64, num_classes=5)),
        ('test_convnext', dict(num_classes=5, drop_path_rate=0.1, global_pool='max')),
    ],
    ids=lambda v: v if isinstance(v, str) else '',
)
@torch.no_grad()
def test_saved_and_loaded(older, tmp_path, name, args):
    model = timm.create_model(f'cascade_{name}', **args).eval()
    folder = timm_cascade.save(model, tmp_path)
    loaded = timm_cascade.load(folder).eval()
    x = torch.randn(3, *timm_models.input_size_of(model.backbone))
    assert all(torch.equal(a, b) for a, b in zip(model.forward_exits(x), loaded.forward_exits(x), strict=True))
    assert timm_models.resolve_input_data_config(loaded) == timm_models.resolve_input_data_config(model)
    assert (
        timm_cascade.save(loaded, tmp_path / 'again').joinpath('config.json').read_text()
        == (folder / 'config.json').read_text()
    )


@pytest.mark.parametrize('before, after', [(1, 3), (4, 1), (4, 6), (3, 1)])
@pytest.mark.filterwarnings('ignore:.*thresholds do not apply')
def test_other_channels_make_the_same_convolution_as_timm(monkeypatch, tmp_path, before, after):
    folder = timm_cascade.save(timm.create_model('cascade_test_resnet', in_chans=before), tmp_path)
    adapted = []
    for newer in [None, *filter(None, [timm_models.newer])]:
        monkeypatch.setattr(timm_models, 'newer', newer)
        adapted.append(timm_cascade.load(folder, in_chans=after).backbone)
    want = adapted[0].get_submodule('conv1.0').weight
    assert want.shape[1] == after and adapted[0].pretrained_cfg['first_conv'] == 'conv1.0'
    assert all(torch.allclose(other.get_submodule('conv1.0').weight, want) for other in adapted)
