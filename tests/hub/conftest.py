from __future__ import annotations

import json
import textwrap
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from .server import TestHub

PRELUDE = '''
import json, os, sys, warnings
from pathlib import Path
import timm, torch, timm_cascade
from timm_cascade import hub
import time
wait = time.sleep
time.sleep = lambda seconds: wait(min(seconds, 0.05))  # what the client waits before it tries again
torch.manual_seed(0)
x = torch.randn(5, 1, 16, 16, generator=torch.Generator().manual_seed(1))

def tiny():
    return timm.create_model(
        'cascade_cifar_resnet20', depth=1, in_chans=1, num_classes=4, exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(1, 16, 16), mean=(0.5,), std=(0.25,))).eval()

def error(call, *args, **kwargs):
    """Name and text of what a call raises."""
    try:
        call(*args, **kwargs)
    except Exception as e:
        return type(e).__name__, str(e)
    return 'nothing', ''
'''


@pytest.fixture
def server(interpreter):
    with TestHub(port=urlsplit(interpreter.env['HF_ENDPOINT']).port) as hub:
        yield hub


@pytest.fixture
def client(server, interpreter, tmp_path):
    """Runs code in a fresh process with its own cache; what it leaves in `result` (JSON) comes back."""

    def run(*code: str, cache: str = 'cache', offline: bool = False):
        home = Path(interpreter.env['HF_HOME'])
        (tmp_path / cache).mkdir(exist_ok=True)
        home.unlink(missing_ok=True)
        home.symlink_to(tmp_path / cache)
        script = '\n'.join([PRELUDE, *map(textwrap.dedent, code)]) + '\nprint("RESULT" + json.dumps(result))\n'
        # what HF_HUB_OFFLINE=1 says to a client that is imported later
        said = 'import huggingface_hub.constants\nhuggingface_hub.constants.HF_HUB_OFFLINE = True\n' if offline else ''
        done = interpreter.run(said + script, tmp_path, dict(HF_TOKEN='owner-token'), ours=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.rpartition('RESULT')[2])

    return run


@pytest.fixture
def release(released) -> Path:
    return released[1]
