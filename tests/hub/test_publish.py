"""scripts/releases/publish.py, and the same against the real Hub for whoever has a token."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .server import Repository

ROOT = str(Path(__file__).parents[2])


def test_publish_pushes_what_differs_and_shows_it_before(server, client, release, tmp_path):
    for name in ('one', 'two'):
        shutil.copytree(release, tmp_path / 'staged' / name)
    result = client(f"""
        import contextlib, io
        sys.path.insert(0, {ROOT!r})
        from scripts.releases import publish
        def run(*argv):
            out, err = io.StringIO(), io.StringIO()
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                status = publish.main(['--namespace', 'owner', '--releases', 'staged', *argv])
            return status, out.getvalue(), err.getvalue()
        result = [run('--dry-run'), run('one'), run('--dry-run')]
        model = hub.load('staged/one')
        model.table = model.calibration.table(max_drops=(0.3,))
        timm_cascade.save(model, 'staged/one')
        result += [run('--dry-run', 'one'), run(), run()]
        Path('staged/two/config.json').write_text('x')
        model.thresholds = None
        timm_cascade.save(model, 'staged/one')
        result += [run()]
    """)
    statuses, texts, errors = zip(*result, strict=True)
    assert statuses == (0, 0, 0, 0, 0, 0, 1)
    assert 'owner/one: README.md, calibration.safetensors' in texts[0] and '+' in texts[0]
    assert 'commit/' in texts[1] and 'two' not in texts[1]
    assert 'owner/one: no difference' in texts[2]
    assert 'owner/one: config.json, thresholds.json, README.md' in texts[3] and '+   "max_drop": 0.3,' in texts[3]
    assert texts[4].count('commit/') == 2 and texts[5].count('no difference') == 2
    assert 'commit/' in texts[6] and 'owner/two' in errors[6] and 'not a JSON' in errors[6]


def test_the_example_shares_a_release_and_loads_it_with_timm(server, client, release, tmp_path):
    folder = tmp_path / 'hub' / 'releases' / 'cascade_cifar_resnet20.fashion_mnist'
    shutil.copytree(release, folder)
    printed = client(f"""
        import contextlib, io, runpy
        sys.argv = ['sharing.py', 'owner/shared']
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            runpy.run_path({ROOT!r} + '/scripts/examples/sharing.py')
        result = out.getvalue().splitlines()
    """)
    assert 'model.safetensors' in printed[0] and printed[1] == 'again: nothing differs'
    assert printed[2].startswith('loaded with 2 exits')


def test_heads_load_from_a_warm_cache_without_a_pass_through_the_backbone(server, client):
    import timm
    from safetensors.torch import save

    name = 'test_resnet.r160_in1k'
    server.repos[f'timm/{name}'] = Repository()
    server.repos[f'timm/{name}'].put(model__safetensors=save(timm.create_model('test_resnet').state_dict()))
    load = "timm.create_model('hf-hub:owner/heads', pretrained=True)"
    assert (
        client(f"""
        warnings.simplefilter('ignore')
        model = timm.create_model('cascade_{name}', pretrained=True, exits=2, head='linear')
        assert timm_cascade.push_to_hub(model, 'owner/heads').files
        result = len({load}.exits)
    """)
        == 2
    )
    probed = client(
        f"""
        from timm_cascade.backbone import exits
        calls, plain = [], exits.meta_pass
        exits.meta_pass = lambda *args, **kwargs: calls.append(args) or plain(*args, **kwargs)
        loaded = {load}
        result = [len(calls)]
        exits.resolve_exits(loaded.backbone, 2)
        result.append(len(calls))
    """,
        offline=True,
    )
    assert probed[0] == 0 < probed[1]


@pytest.mark.skipif('TIMM_CASCADE_NAMESPACE' not in os.environ, reason='needs a token for the real Hub')
def test_the_real_hub(release, tmp_path):
    """HF_TOKEN=... TIMM_CASCADE_NAMESPACE=USER python -m pytest tests/hub -k real_hub

    Makes a private repository there, publishes, loads in another process with an empty cache, and deletes it.
    """
    from .conftest import PRELUDE

    environment = {k: v for k, v in os.environ.items() if k != 'HF_HUB_OFFLINE'} | dict(HF_HOME=str(tmp_path / 'cache'))
    if 'HF_TOKEN' not in os.environ:
        environment['HF_TOKEN_PATH'] = os.environ.get('HF_TOKEN_PATH', str(Path.home() / '.cache/huggingface/token'))
    code = (
        PRELUDE
        + f"""
import uuid
from huggingface_hub import HfApi
name = os.environ['TIMM_CASCADE_NAMESPACE'] + '/timm-cascade-test-' + uuid.uuid4().hex[:8]
try:
    model = timm_cascade.load({str(release)!r}).eval()
    first = timm_cascade.push_to_hub(model, name, private=True)
    assert first.files and not timm_cascade.push_to_hub(model, name).files
    model.thresholds = [0.5, None]
    second = timm_cascade.push_to_hub(model, name)
    assert set(second.files) == {{'config.json', 'README.md'}}
    timm_cascade.push_to_hub(model, name, tag='v1')
    loaded = timm.create_model(f'hf-hub:{{name}}@v1', pretrained=True).eval()
    assert torch.equal(loaded.thresholds, model.thresholds)
    assert all(torch.equal(a, b) for a, b in zip(loaded.forward_exits(x), model.forward_exits(x)))
    timm.models.push_to_hf_hub(model, name + '-timm', private=True)
    assert torch.equal(timm.create_model(f'hf-hub:{{name}}-timm', pretrained=True).eval()(x), model(x))
finally:
    for made in (name, name + '-timm'):
        HfApi().delete_repo(made, missing_ok=True)
print(json.dumps('done'))
"""
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == 'done'
