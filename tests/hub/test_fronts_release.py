"""Releases with networks in front, pushed to and loaded from a Hub: by names alone, by weights, and hostile ones."""

from __future__ import annotations

import json

import pytest
import timm
from safetensors.torch import load, save

from .server import Repository

LARGE, SMALL = 'timm/test_vit.r160_in1k', 'timm/test_efficientnet.r160_in1k'
CODE = """
x = torch.randn(3, 3, 160, 160, generator=torch.Generator().manual_seed(1))
warnings.simplefilter('ignore')

def logits(name):
    with torch.no_grad():
        return timm.create_model(f'hf-hub:{name}', pretrained=True).eval().forward_exits(x)

def same(name):
    return all(torch.equal(a, b) for a, b in zip(logits(name), torch.load('logits.pt', weights_only=True)))
"""


@pytest.fixture
def published(server):
    """timm's repositories of a large and a small network, as far as timm reads them."""
    for name in (LARGE, SMALL):
        server.repos[name] = Repository()
        network = timm.create_model(name.partition('/')[2].partition('.')[0])
        server.repos[name].put(model__safetensors=save(network.state_dict()), pytorch_model__bin=b'a pickle')
    return server.repos


def test_a_release_of_names_alone(server, client, published):
    made = client(
        CODE,
        """
        import numpy as np
        model = timm.create_model('cascade_test_vit', front='test_efficientnet', exits=0, pretrained=True).eval()
        images = np.random.default_rng(0).integers(0, 255, (8, 160, 160, 3), dtype=np.uint8)
        data = timm_cascade.ImageData(images, np.arange(8), [str(i) for i in range(1000)], 'me/noise', 'train')
        timm_cascade.calibrate(model, data, batch_size=8)
        model.thresholds = [0.002]
        with torch.no_grad():
            torch.save(model.forward_exits(x), 'logits.pt')
        done = timm_cascade.push_to_hub(model, 'owner/names')
        timm_cascade.push_to_hub(model, 'owner/whole', layout='full')
        smaller = timm.create_model('cascade_test_vit', front='test_vit@96', exits=0, pretrained=True)
        timm_cascade.push_to_hub(smaller, 'owner/self')
        with torch.no_grad():
            model.fronts[0].inner.classifier.bias += 1e-3  # fine-tuned: it travels in the release
        model.forget_calibration()
        timm_cascade.push_to_hub(model, 'owner/tuned')
        result = done.files
    """,
    )
    assert 'model.safetensors' in made
    files = {name: server.repos[f'owner/{name}'].at('main')[1] for name in ('names', 'whole', 'self', 'tuned')}
    weights = {name: set(load(f['model.safetensors'].content)) for name, f in files.items()}
    assert weights['names'] == weights['self'] == {'heads.0.scale', 'heads.0.shift'}
    assert len(files['names']['model.safetensors'].content) < 1000
    assert {n.split('.')[0] for n in weights['whole']} == {'backbone', 'heads'} and len(weights['whole']) > 100
    assert {n.rpartition('.network.')[0] for n in weights['tuned']} == {'', 'heads.0'}
    entry = json.loads(files['names']['config.json'].content)['cascade']
    assert entry['layout'] == 'heads' and entry['backbone']['hub_id'] == LARGE
    front = entry['fronts'][0]['published']
    assert front['hub_id'] == SMALL and front['revision'] == published[SMALL].at('main')[0]
    assert front['digest'] == entry['fronts'][0]['digest']
    card = files['names']['README.md'].content.decode()
    assert 'behind a smaller network' in card and '| test_efficientnet.r160_in1k@160 | 160x160 |' in card
    assert f'is fetched from `{SMALL}`' in card and '%' in card

    published[SMALL].put(model__safetensors=save(timm.create_model('test_efficientnet').state_dict()))  # a new commit
    server.log.clear()
    pulled = client(
        CODE,
        """
        result = [same('owner/names'), same('owner/whole'), len(logits('owner/self')), len(logits('owner/tuned'))]
        model = timm.create_model('hf-hub:owner/names', pretrained=True).eval()
        result += [model.any_open, model.calibration is not None, timm_cascade.push_to_hub(model, 'owner/names').files]
    """,
        cache='fresh',
    )
    assert pulled == [True, True, 2, 2, True, True, []]
    assert not any('pytorch_model.bin' in line for line in server.log)


def test_a_hostile_release_of_names_is_refused(server, client, published):
    found = client(
        CODE,
        """
        import copy
        model = timm.create_model('cascade_test_vit', front='test_efficientnet', exits=0, pretrained=True).eval()
        timm_cascade.save(model, 'sound')
        good = json.loads(Path('sound/config.json').read_text())

        def refused(heads_hash=good['cascade']['heads_hash'], **values):
            config = copy.deepcopy(good)
            config['cascade']['heads_hash'] = heads_hash
            front = config['cascade']['fronts'][0]
            front['published'].update(values.pop('published', {}))
            front.update(values)
            Path('sound/config.json').write_text(json.dumps(config))
            return error(timm_cascade.load, 'sound')

        from safetensors.torch import load_file
        from timm_cascade.utils.digest import state_digest
        other = timm.create_model('test_efficientnet').state_dict()
        digest = state_digest(other)
        heads = {k.removeprefix('heads.'): t for k, t in load_file('sound/model.safetensors').items()}
        names = ['front:test_efficientnet.r160_in1k@160']
        assert state_digest(heads, also=[*names, model.fronts[0].digest()]) == good['cascade']['heads_hash']
        consistent = state_digest(heads, also=[*names, digest])
        result = dict(
            sound=refused(),
            swapped=refused(digest=digest, published=dict(digest=digest)),
            consistent=refused(consistent, digest=digest, published=dict(digest=digest)),
            one=refused(published=dict(digest=digest)),
            path=refused(published=dict(hub_id='../../etc')),
            pickle=refused(published=dict(filename='../pytorch_model.bin')),
            branch=refused(published=dict(revision='main')),
            network=refused(published=dict(name='test_resnet')),
            unknown=refused(architecture='nonsense', published=dict(name='nonsense')),
            cascade=refused(architecture='cascade_test_resnet', published=dict(name='cascade_test_resnet')),
            classes=refused(args=dict(num_classes=5)),
            gone=refused(published=dict(revision='0' * 40)),
            nothing=refused(published=dict(hub_id='owner/nothing')),
            size=refused(size=[10**9, 16]),
            name=refused(name='x'),
            missing=refused(published=dict(hub_id=None)),
        )
    """,
    )
    assert found.pop('sound') == ['nothing', '']
    assert all(kind in ('ReleaseError', 'HubUnavailableError') for kind, _ in found.values()), found
    for key, text in dict(
        swapped='its heads are',
        consistent='front test_efficientnet.r160_in1k@160 was made for',
        one='is not that of the published network',
        path='hub_id',
        pickle='filename',
        branch='revision',
        network='published.name is',
        unknown='does not know',
        cascade='does not know',
        classes='was made for',
    ).items():
        assert text in found[key][1], (key, found[key])
