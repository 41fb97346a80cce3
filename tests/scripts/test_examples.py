"""scripts/examples in tiny form: what users copy runs as it stands, on a small release or a small network."""

from __future__ import annotations

import re

import datasets
import numpy as np
import pytest
import timm
from helpers import ROOT
from PIL import Image
from safetensors.torch import save_file

import timm_cascade

EXAMPLES = ROOT / 'scripts' / 'examples'
RELEASE, SAMPLE = 'hub/releases/cascade_cifar_resnet20.fashion_mnist', 'hub/samples/fashion_mnist_test.parquet'


def run(name: str, **instead: str) -> None:
    """Runs an example with the words of `instead` replaced; each must occur."""
    text = (EXAMPLES / name).read_text(encoding='utf-8')
    for word, other in instead.items():
        assert word in text
        text = text.replace(word, other)
    exec(compile(text, name, 'exec'), {'__name__': '__main__'})


@pytest.fixture
def folder(released, images, tmp_path, monkeypatch):
    """A folder with a release and a parquet file where the examples look for them."""
    (tmp_path / RELEASE).parent.mkdir(parents=True)
    released[1].rename(tmp_path / RELEASE)
    features = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=images.class_names)))
    columns = dict(image=[images[i][0] for i in range(len(images))], label=images.labels.tolist())
    (tmp_path / SAMPLE).parent.mkdir()
    datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / SAMPLE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_quickstart(folder, capsys):
    run('quickstart.py')
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and all(re.match(r'allowed .* accuracy \d+\.\d%, .* saved$', line) for line in lines)


def test_choosing_max_drop(folder, capsys):
    run('choosing_max_drop.py', **{'set_cost(0.25)': 'set_cost(0.6)'})  # its head alone costs a third
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and lines[1].split()[0] == '0.10%' and 'a quarter' in lines[-1]


def test_streaming_answers_every_image_once(folder, images, capsys):
    run('streaming.py')
    answered = re.search(r'answered by (\{.*\})', capsys.readouterr().out)
    assert answered is not None
    assert sum(eval(answered[1]).values()) == len(images)


def test_own_backbone(tmp_path, monkeypatch, capsys):
    random = np.random.default_rng(0)
    for split, n in (('train', 6), ('validation', 4), ('test', 3)):
        for label in ('daisy', 'rose', 'tulip'):
            (tmp_path / 'flowers' / split / label).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 256, (40, 40, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / 'flowers' / split / label / f'{i}.png')
    save_file(timm.create_model('test_resnet', num_classes=3).state_dict(), tmp_path / 'finetuned.safetensors')
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning):  # twelve images certify nothing
        run('own_backbone.py', **{'resnet50': 'test_resnet', 'num_classes=5': 'num_classes=3', 'exits=5': 'exits=2'})
    assert 'test: ' in capsys.readouterr().out
    assert timm_cascade.load(tmp_path / 'cascade_test_resnet.flowers').calibration.n == 12


def test_examples_are_short_and_import_nothing_of_the_repository():
    files = sorted(EXAMPLES.glob('*.py'))
    assert len(files) == 5
    for file in files:
        text = file.read_text(encoding='utf-8')
        assert text.count('\n') < 40 and 'scripts.' not in text and 'timm_cascade._' not in text
