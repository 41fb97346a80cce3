"""Publishing over HTTP with the genuine client."""

from __future__ import annotations

import re

NAME = 'owner/cascade_tiny'


def commits(server):
    return sum(bool(re.search('POST .*/commit/', line)) for line in server.log)


def test_publish_again_change_branch_tag_and_pull_request(server, client, release):
    result = client(f"""
        folder, name = {str(release)!r}, {NAME!r}
        result = {{}}
        model = hub.load(folder)
        def push(key, what=folder, name=name, **kwargs):
            done = timm_cascade.push_to_hub(what, name, **kwargs)
            result[key] = [list(done.files), done.commit, done.url, done.pull_request]
        push('first', model)
        push('same model', model)
        push('same folder', timm_cascade.save(model, 'again'))
        push('tagged', tag='v1')
        result['compared'] = [hub.compare(folder, name), hub.compare(folder, 'owner/other')]
        model.thresholds = [0.5, None]
        push('dial', model)
        model.table = model.calibration.table(max_drops=(0.2,))
        push('table', model)
        model.calibration = None
        push('without calibration', model)
        push('branch', folder, revision='trial')
        push('request', folder, create_pr=True)
        push('private', folder, name='owner/hidden', private=True)
        from timm_cascade.cli.main import main
        result['cli'] = main(['push', folder, 'owner/by_cli', '--message', 'hello'])
    """)
    everything = [
        'config.json',
        'model.safetensors',
        'thresholds.json',
        'calibration.safetensors',
        'path.json',
        'README.md',
    ]
    files = {key: value[0] for key, value in result.items() if key not in ('compared', 'cli')}
    assert files == {
        'first': everything,
        'same model': [],
        'same folder': [],
        'tagged': [],
        'dial': ['config.json', 'README.md'],
        'table': ['config.json', 'thresholds.json', 'README.md'],
        'without calibration': ['config.json', 'README.md', 'calibration.safetensors'],
        'branch': ['config.json', 'thresholds.json', 'calibration.safetensors', 'README.md'],
        'request': ['config.json', 'thresholds.json', 'calibration.safetensors', 'README.md'],
        'private': everything,
    }
    assert result['compared'] == [[], sorted(everything)]
    assert result['cli'] == 0
    repo = server.repos[NAME]
    assert commits(server) == 8
    assert repo.refs['v1'] == result['first'][1] == result['same model'][1]
    assert set(repo.at('main')[1]) == set(everything) - {'calibration.safetensors'}
    assert set(repo.at('trial')[1]) == set(repo.at('refs/pr/1')[1]) == set(everything)
    assert result['request'][3].endswith('discussions/1') and result['first'][2].startswith(server.url)
    assert server.repos['owner/hidden'].private and not repo.private
    card = repo.at('v1')[1]['README.md'].content.decode()
    assert f"'hf-hub:{NAME}'" in card and 'model-index' in card and 'library_name: timm' in card


def test_refusals_have_names_and_publish_nothing(server, client, release):
    somebody_else_pushes(server)
    server.fault('/revision/broken', 500)
    result = client(f"""
        folder, name = {str(release)!r}, {NAME!r}
        result = {{'first': timm_cascade.push_to_hub(folder, name).commit}}
        model = hub.load(folder)
        model.thresholds = [0.5, None]
        timm_cascade.save(model, 'changed')
        push = timm_cascade.push_to_hub
        result['race'] = error(push, 'changed', name, commit_message='race')
        result['bad token'] = error(push, 'changed', name, token='wrong')
        result['reader'] = error(push, 'changed', name, token='reader-token')
        result['not mine'] = error(push, 'changed', 'someone/else')
        result['5xx'] = error(push, 'changed', name, revision='broken')
        result['tag'] = error(push, folder, 'owner/new', tag='main')
        result['nan'] = error(lambda: (model.heads[0].fc.bias.data.fill_(float('nan')), push(model, name)))
        result['no release'] = error(push, '.', name)
        result['no cascade'] = error(push, model.backbone, name)
        del os.environ['HF_TOKEN']
        result['no token'] = error(push, 'changed', 'owner/new_one')
    """)
    expected = {
        'race': ('PushConflictError', 'another commit meanwhile'),
        'bad token': ('PushDeniedError', 'not valid'),
        'reader': ('PushDeniedError', 'may not write'),
        'not mine': ('PushDeniedError', 'may not write'),
        '5xx': ('PushError', 'answered 500'),
        'tag': ('PushError', 'exists already'),
        'no token': ('PushDeniedError', 'there is no token'),
        'nan': ('ReleaseError', 'NaN'),
        'no release': ('ReleaseError', 'no config.json'),
        'no cascade': ('ReleaseError', 'CifarResNet is not a cascade'),
    }
    for key, (name, text) in expected.items():
        assert result[key][0] == name and text in result[key][1], (key, result[key])
    files = server.repos[NAME].at('main')[1]
    assert files['someone.txt'].content == b'else' and len(server.repos[NAME].commits) == 3  # empty, ours, theirs

    server.__exit__()
    result = client(f"""
        result = error(timm_cascade.push_to_hub, {str(release)!r}, {NAME!r})
    """)
    assert result[0] == 'HubUnavailableError' and 'cannot be reached' in result[1]


def somebody_else_pushes(server):
    """Between our look at the repository and our second commit."""
    seen = []

    def race():
        seen.append(1)
        if len(seen) == 2:
            server.repos[NAME].put(someone__txt=b'else')

    server.fault(f'POST /api/models/{NAME}/commit/main', race)
