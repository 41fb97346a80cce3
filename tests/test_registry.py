import importlib
import subprocess
import sys
import textwrap
import warnings

import pytest
import timm

import timm_cascade
from timm_cascade import registry
from timm_cascade.backbone import ExitError


def test_every_model_and_every_tag_has_its_cascade():
    names = [n for n in timm.list_models() if not n.startswith('cascade_')]
    assert {f'cascade_{n}' for n in names} == set(timm.list_models('cascade_*'))
    tags = timm.list_models('resnet50', include_tags=True)
    assert [f'cascade_{t}' for t in tags] == timm.list_models('cascade_resnet50', include_tags=True)
    assert timm.is_model('cascade_resnet50.a1_in1k')
    assert len(names) > 1200


def test_only_what_has_trained_heads_is_pretrained():
    assert timm.list_pretrained('cascade_*') == []
    assert timm.is_model_pretrained('resnet50.a1_in1k')  # and timm's own are as they were
    assert timm.get_pretrained_cfg('resnet50.a1_in1k').hf_hub_id == 'timm/resnet50.a1_in1k'


def test_the_tag_s_preprocessing_is_the_backbone_s():
    ours, theirs = (timm.get_pretrained_cfg(f'{p}resnet50.a1_in1k') for p in ('cascade_', ''))
    assert (ours.mean, ours.test_crop_pct, ours.input_size) == (theirs.mean, theirs.test_crop_pct, theirs.input_size)
    assert not ours.has_weights


def test_a_second_import_and_a_name_clash_do_no_harm():
    before = timm.model_entrypoint('cascade_resnet18')
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        importlib.reload(registry)
    assert timm.model_entrypoint('cascade_resnet18') is before


def test_a_name_that_is_taken_stays_what_it_is(interpreter, tmp_path):
    code = textwrap.dedent("""
        import sys, types, timm
        from timm.models import register_model
        def cascade_resnet18(pretrained=False, **kwargs): return "mine"
        register_model(cascade_resnet18)
        import timm_cascade
        assert timm.model_entrypoint("cascade_resnet18")() == "mine"
        assert timm.is_model("cascade_resnet34")
    """)
    done = interpreter.run(code, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    'kwargs, error, message',
    [
        (dict(features_only=True), ValueError, 'features_only'),
        (dict(exits=['blocks.99']), ExitError, r'blocks\.1 \('),
        (dict(exits=['blocks.0', 'blocks.0']), ExitError, 'twice'),
        (dict(exits=0), ExitError, 'at least one'),
        (dict(exits=[0.5, 1.0]), ExitError, 'between 0 and 1'),
        (dict(exits=50), ExitError, 'found'),
        (dict(head='huge'), ValueError, 'linear'),
        (dict(head=dict(depth=3)), ValueError, 'depth'),
    ],
)
def test_wrong_requests_say_what_would_be_right(kwargs, error, message):
    with pytest.raises(error, match=message):
        timm.create_model('cascade_test_vit', **kwargs)


def test_a_wrong_tag_is_timm_s_error():
    with pytest.raises(RuntimeError, match='Invalid pretrained tag'):
        timm.create_model('cascade_resnet50.bogus')


def test_pretrained_without_published_heads_loads_the_backbone_and_warns_once(monkeypatch, tmp_path):
    import torch
    from safetensors.torch import save_file

    source = timm.create_model('test_resnet')
    save_file(source.state_dict(), tmp_path / 'w.safetensors')
    with pytest.warns(UserWarning, match='No exit fires') as caught:
        model = timm.create_model(
            'cascade_test_resnet',
            pretrained=True,
            pretrained_cfg_overlay=dict(file=str(tmp_path / 'w.safetensors'), hf_hub_id=None, url=None),
        )
    assert len(caught) == 1
    assert torch.equal(model.backbone.conv1[0].weight, source.conv1[0].weight)
    assert not model.any_open


def test_kwargs_reach_the_backbone():
    model = timm.create_model('cascade_test_vit', num_classes=5, in_chans=1, img_size=64, exits=2)
    assert (model.num_classes, model.in_chans, len(model.exits)) == (5, 1, 2)
    assert isinstance(model, timm_cascade.CascadeModel)


def test_checkpoint_path_takes_a_plain_checkpoint_of_the_backbone(tmp_path):
    import torch

    source = timm.create_model('test_resnet', num_classes=5)
    torch.save(source.state_dict(), tmp_path / 'plain.pth')
    model = timm.create_model('cascade_test_resnet', num_classes=5, checkpoint_path=str(tmp_path / 'plain.pth'))
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.backbone.state_dict().values(), source.state_dict().values(), strict=True)
    )


@pytest.mark.slow
def test_importing_costs_at_most_150_ms_over_timm():
    code = 'import time, timm; t = time.process_time(); import timm_cascade; print(time.process_time() - t)'
    runs = [
        float(subprocess.run([sys.executable, '-c', code], capture_output=True, check=True).stdout) for _ in range(5)
    ]
    assert min(runs) < 0.15, runs
