"""scripts/demo.py and the coverage experiment on a tiny release."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml

import timm_cascade
from scripts import demo
from scripts.datasets import fashion_mnist
from scripts.experiments.coverage import draws as coverage


@pytest.fixture
def tiny(released):
    return released[1].rename(released[1].with_name('cascade_cifar_resnet20.quarters'))


def test_demo_prints_the_table_and_names_its_pictures_last(tiny, images, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, 'RELEASE', tiny)
    monkeypatch.setattr(fashion_mnist, 'load_test', lambda: images)
    monkeypatch.setattr('sys.argv', ['demo.py', '--rule', 'joint', '--images', '64', '--out', str(tmp_path / 'out')])
    demo.main()
    printed = capsys.readouterr().out.rstrip().splitlines()
    assert printed[-1].endswith('exits.png') and printed[-2].endswith('tradeoff.png')
    assert sum(line.lstrip().startswith(('backbone', '0 %', '0.5 %', '1 %', '2 %')) for line in printed) >= 5
    table = json.loads((tmp_path / 'out' / 'table.json').read_text())
    assert [r['max_drop'] for r in table['rows']] == [0, 0.005, 0.01, 0.02]
    assert table['n'] == 64 and '64 of 96' in printed[0]
    for row in table['rows']:
        assert {'thresholds', 'accuracy', 'change', 'macs', 'macs_share', 'time_share', 'exit_shares'} <= row.keys()
        assert sum(row['exit_shares']) == pytest.approx(1)
    assert all((tmp_path / 'out' / name).stat().st_size > 5000 for name in ('exits.png', 'tradeoff.png'))


def test_the_shipped_sample_serves_where_there_is_nothing_else(monkeypatch, tmp_path):
    """No Debian package, no network: the tests run offline, so the Hub does not answer."""
    monkeypatch.setattr(fashion_mnist, 'DEBIAN', tmp_path / 'nowhere')
    data = fashion_mnist.load_test()
    assert len(data) == 1000 and data.class_names == fashion_mnist.CLASSES
    assert data[0][0].size == (28, 28) and set(data.labels) == set(range(10))


def test_coverage_reads_losses_off_the_whole_population(tiny, images, tmp_path, monkeypatch, capsys):
    recipe = tmp_path / 'quarters.yaml'
    recipe.write_text(yaml.safe_dump(dict(data=dict(name='quarters', calibration='a', test='b'))))
    monkeypatch.setitem(coverage.DATA, 'quarters', lambda split: images)
    monkeypatch.setattr(coverage, 'ROOT', tmp_path)
    argv = [
        'coverage',
        str(tiny),
        '--recipe',
        str(recipe),
        '--n',
        '40',
        '80',
        '--out',
        str(tmp_path / 'docs'),
        '--processes',
        '1',
        '--draws',
    ]
    monkeypatch.setattr('sys.argv', [*argv, '2'])
    coverage.main()
    log = next((tmp_path / 'runs').glob('*.jsonl'))
    first = log.read_text()
    assert len(first.splitlines()) == 4
    log.write_text(first + '{"n": 40, "dr')  # a kill in the middle of a line
    monkeypatch.setattr('sys.argv', [*argv, '3'])
    coverage.main()
    assert log.read_text().startswith(first)  # nothing done twice
    report = json.loads(next((tmp_path / 'docs' / 'results').glob('*.json')).read_text())
    assert len(report['rows']) == 2 * 5 * 4 and all(r['draws'] == 3 for r in report['rows'])
    assert '| 40 | certified |' in capsys.readouterr().out

    whole = timm_cascade.Calibration.load(next((tmp_path / 'runs').glob('*.safetensors')))
    assert whole.n == 2 * len(images)
    drawn = coverage.sample(whole, 50, 1)
    assert drawn.n == 50 and np.isin(drawn.confidence[:, 0], whole.confidence[:, 0]).all()
