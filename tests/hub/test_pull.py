"""Loading over HTTP with the genuine client: both layouts, offline, damage on the way and in the cache."""

from __future__ import annotations

import hashlib
import json
import re
import textwrap

import pytest
import timm
from safetensors.torch import load, save

from .server import Repository

BACKBONE = 'timm/test_resnet.r160_in1k'
STATE = 'x = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1))\n'


@pytest.fixture
def published(server):
    """timm's repository of a small backbone, as far as timm reads it."""
    repo = server.repos[BACKBONE] = Repository()
    repo.put(model__safetensors=save(timm.create_model('test_resnet').state_dict()), pytorch_model__bin=b'a pickle')
    return repo


def downloads(server, name):
    return {line.rpartition('/')[2] for line in server.log if f'/{name}/resolve/' in line}


def test_heads_only(server, client, published):
    made = client(
        STATE,
        """
        import numpy as np
        from timm_cascade import ImageData
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            model = timm.create_model('cascade_test_resnet', pretrained=True, exits=2).eval()
        images = np.random.default_rng(0).integers(0, 255, (8, 160, 160, 3), dtype=np.uint8)
        data = ImageData(images, np.arange(8), [str(i) for i in range(1000)], 'me/noise', 'train')
        timm_cascade.calibrate(model, data, batch_size=8)
        model.thresholds = [0.002, None]
        with torch.no_grad():
            torch.save(model.forward_exits(x), 'logits.pt')
        done = timm_cascade.push_to_hub(model, 'owner/heads')
        timm_cascade.push_to_hub(model, 'owner/whole', layout='full')
        result = [error(timm_cascade.save, timm.create_model('cascade_test_resnet'), 'x', layout='heads')]
        with torch.no_grad():
            model.backbone.conv1[0].weight[0, 0, 0, 0] += 1e-3
        result.append(error(timm_cascade.save, model, 'x', layout='heads'))
        result.append(error(timm_cascade.push_to_hub, model, 'owner/changed'))  # its calibration is the old one's
        model.forget_calibration()
        timm_cascade.push_to_hub(model, 'owner/changed')
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            adapted = timm.create_model('cascade_test_resnet', pretrained=True, num_classes=7)
        result += [dict(vars(model.published)), done.files, adapted.published is None, adapted.base_model]
    """,
    )
    assert 'published checkpoint' in made[0][1] and 'no longer test_resnet' in made[1][1]
    assert made[2][0] == 'TableMismatchError'
    assert made[3]['hub_id'] == BACKBONE and made[3]['revision'] == published.at('main')[0] and made[5]
    assert made[6] == BACKBONE
    files = server.repos['owner/heads'].at('main')[1]
    assert {name.split('.')[0] for name in load(files['model.safetensors'].content)} == {'heads'}
    for name in ('whole', 'changed'):
        whole = load(server.repos[f'owner/{name}'].at('main')[1]['model.safetensors'].content)
        assert {n.split('.')[0] for n in whole} == {'backbone', 'heads'}
    card = files['README.md'].content.decode()
    assert f'base_model: {BACKBONE}' in card and 'base_model_relation: adapter' in card and 'me/noise' in card

    server.log.clear()
    check = STATE + textwrap.dedent("""
        def check(name):
            with warnings.catch_warnings():
                warnings.simplefilter('error')
                model = timm.create_model(f'hf-hub:{name}', pretrained=True).eval()
            with torch.no_grad():
                wanted = torch.load('logits.pt', weights_only=True)
                same = [torch.equal(a, b) for a, b in zip(model.forward_exits(x), wanted)]
            return all(same) and model.any_open and model.table is not None and len(model.calibration.confidence) == 8
    """)
    full = client(check, "result = check('owner/whole')", cache='whole')
    assert full is True and not downloads(server, BACKBONE)  # it would have been overwritten

    fresh = client(
        check,
        """
        result = [check('owner/heads')]
        import huggingface_hub
        result.append(timm_cascade.push_to_hub(timm_cascade.load('owner/heads'), 'owner/heads').files)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter('always')
            other = timm.create_model('hf-hub:owner/heads', pretrained=True, num_classes=5, in_chans=1)
        result += [[str(w.message) for w in said], other.num_classes, other.in_chans, other.any_open]
    """,
        cache='fresh',
    )
    assert fresh[:2] == [True, []] and fresh[3:] == [5, 1, False]
    assert len(fresh[2]) == 1 and 'heads and thresholds do not apply' in fresh[2][0]
    assert downloads(server, BACKBONE) == {'model.safetensors'}  # and never the pickle

    published.put(model__safetensors=save(timm.create_model('test_resnet').state_dict()))  # timm changes its mind
    assert client(check, "result = check('owner/heads')", cache='later') is True  # pinned
    server.__exit__()
    offline = client(
        check,
        """
        import socket
        def refuse(*args, **kwargs): raise AssertionError('a connection')
        socket.socket.connect = refuse
        result = [check('owner/heads'), error(timm_cascade.load, 'owner/never')]
    """,
        cache='fresh',
        offline=True,
    )
    assert offline[0] is True and offline[1][0] == 'HubUnavailableError'
    assert client(check, "result = check('owner/heads')", cache='fresh') is True  # without being told so


def test_what_timm_pushes_and_damage_on_the_way(server, client, release):
    client(f"""
        model = timm_cascade.load({str(release)!r}).eval()
        from timm_cascade.utils import timm_models
        args = dict() if timm_models.newer else dict(model_args=model._model_args)  # before 1.0.31 timm has to be told
        timm.models.push_to_hf_hub(model, 'owner/foreign', **args)
        timm.models.push_to_hf_hub(model, 'owner/pickle', safe_serialization=False, **args)
        for name in ('good', 'flipped', 'once', 'cut', 'large', 'flaky', 'cached'):
            timm_cascade.push_to_hub(model, f'owner/{{name}}', tag='v1')
        with torch.no_grad():
            torch.save(model(x), 'logits.pt')
        result = 0
    """)
    assert 'pytorch_model.bin' in server.repos['owner/foreign'].at('main')[1]
    sound = server.repos['owner/large'].at('main')[1]['model.safetensors'].content
    server.repos['owner/large'].put(model__safetensors=bytes(len(sound) + (20 << 20)))
    server.repos['owner/good'].put(config__json=b'{}')  # after v1
    for name, content in (('flipped', b'f'), ('once', b'o'), ('cut', b'c')):  # other bytes, so that storage differs
        tensors = load(sound)
        tensors['heads.0.fc.bias'] = tensors['heads.0.fc.bias'] * 1
        weights = save(tensors, metadata={'name': content.decode()})
        sha = hashlib.sha256(weights).hexdigest()
        config = json.loads(server.repos[f'owner/{name}'].at('main')[1]['config.json'].content)
        config['cascade']['files']['model.safetensors'] = dict(sha256=sha, size=len(weights))
        server.repos[f'owner/{name}'].put(model__safetensors=weights, config__json=json.dumps(config).encode())
        server.fault(f'GET /storage/{sha}', 'cut' if name == 'cut' else 'flip', 1 << 30 if name == 'flipped' else 1)
    server.fault('/owner/flaky/resolve/.*/model.safetensors', 503, times=1)
    server.log.clear()
    result = client("""
        from timm_cascade.hub.download import Repository
        def logits(name):
            model = timm.create_model(f'hf-hub:owner/{name}', pretrained=True).eval()
            with torch.no_grad():
                return torch.equal(model(x), torch.load('logits.pt', weights_only=True))
        result = {name: logits(name) for name in ('foreign', 'good@v1', 'once', 'cut', 'cached')}
        result |= {name: error(logits, name) for name in ('pickle', 'flipped', 'large', 'flaky')}
        result['flaky again'] = logits('flaky')
        result['none'] = error(timm_cascade.load, 'owner/nothing')
        result['no revision'] = error(timm_cascade.load, 'owner/cached@v9')
        blob = Repository('owner/cached').path('model.safetensors', 1 << 30).resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b'x')
        result['repaired'] = logits('cached')
        blob.write_bytes(blob.read_bytes()[:-1] + b'x')
        result['blob'] = str(blob)
    """)
    right = ('foreign', 'good@v1', 'once', 'cut', 'flaky again', 'repaired')
    assert {name: result[name] for name in right} == dict.fromkeys(right, True)
    assert 'only pytorch_model.bin, a pickle' in result['pickle'][1]
    assert result['flipped'][0] == 'ReleaseError' and 'another hash' in result['flipped'][1]
    assert result['large'][0] == 'ReleaseError' and 'expected are at most' in result['large'][1]
    large = server.repos['owner/large'].at('main')[1]['model.safetensors'].sha256
    assert not any(re.search(f'GET /storage/{large}', line) for line in server.log)
    assert result['flaky'][0] == 'HubUnavailableError' and 'model.safetensors' in result['flaky'][1]
    assert result['none'][0] == 'ReleaseError' and 'not on the Hub' in result['none'][1]
    assert result['no revision'][0] == 'ReleaseError' and 'v9' in result['no revision'][1]

    damaged = client(
        """
        result = error(timm.create_model, 'hf-hub:owner/cached', pretrained=True)
    """,
        offline=True,
    )
    assert damaged[0] == 'ReleaseError' and result['blob'] in damaged[1] and 'Delete the file' in damaged[1]
