"""The benchmark's own arithmetic, and a tiny run that writes its page. Times need an idle machine: none is checked."""

from __future__ import annotations

import json
import signal
import time

import numpy as np
import pytest
import timm
import torch

from scripts.experiments.benchmark import gpu, gpu_cells, peer, static_networks, timing
from scripts.experiments.benchmark import page as bench_page
from scripts.experiments.benchmark import plain as bench_plain
from scripts.experiments.benchmark import sections as benchmark
from scripts.experiments.benchmark import static as bench_static
from scripts.experiments.equal_accuracy import cheapest, compare
from timm_cascade.thresholds import Samples, outcome

SMALL = dict(num_classes=10, pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))


@pytest.fixture(scope='module')
def model():
    return bench_plain.build('resnet18', bench_plain.pictures(20, (3, 32, 32)), **SMALL)


def test_in_turns_times_each_contestant_as_often_and_reverses_the_order():
    calls = []
    runs = timing.in_turns({name: lambda name=name: calls.append(name) or name for name in 'ab'}, 0, least=4)
    assert calls == ['a', 'b', 'b', 'a', 'a', 'b', 'b', 'a', 'a', 'b']  # the first two are the warm-up
    assert runs.returned == dict(a=['a'] * 4, b=['b'] * 4)
    assert all(len(s) == 4 and (s > 0).all() for s in runs.seconds.values())


def test_ratios_are_formed_within_a_repetition():
    runs = timing.Runs(dict(a=np.array([1.0, 4.0, 9.0]), b=np.array([1.0, 2.0, 3.0])), {})
    assert runs.ratio('a', 'b') == dict(median=2.0, low=1.5, high=2.5, n=3)


def test_the_ideal_takes_every_stage_at_the_batch_size_that_comes_to_it():
    batches = [[4, 3, 1], [4, 4, 0]]
    assert timing.occurring(batches) == [(2, 1), (1, 3), (1, 4)]
    stages = {
        4: np.array([[10.0, 20.0], [11.0, 21.0]]),
        3: np.array([[7.0, 8.0], [7.0, 9.0]]),
        1: np.array([[1.0, 2.0, 3.0]] * 2),
    }
    assert timing.ideal_seconds(batches, stages).tolist() == [10 + 8 + 3 + 10 + 20, 11 + 9 + 3 + 11 + 21]


def test_stages_are_timed_up_to_the_one_asked_for(model):
    images = bench_plain.pictures(2, (3, 32, 32))
    with torch.inference_mode():
        assert len(timing.stage_seconds(model, images)) == 4
        first = timing.stage_seconds(model, images, last=1)
    assert len(first) == 2 and (first > 0).all()


@pytest.mark.parametrize(['share', 'expected'], [(0.0, [20, 20, 20, 20]), (0.4, [20, 12, 7, 4]), (0.6, [20, 8, 3, 1])])
def test_forced_shares_leave_and_no_others(model, share, expected):
    images = bench_plain.pictures(20, (3, 32, 32))
    model.thresholds = bench_plain.forced(bench_plain.observe(model, [images]), share)
    assert not torch.isinf(model.thresholds).any()  # the heads run, even where nobody leaves
    with torch.inference_mode():
        assert timing.survivors(model.predict(images).exit, 4) == expected
        singles = torch.cat([model.predict(x).exit for x in images.split(1)])
    assert timing.survivors(singles, 4) == expected


def test_choosing_afterwards_answers_as_the_cascade_does(model):
    images = bench_plain.pictures(20, (3, 32, 32))
    model.thresholds = bench_plain.forced(bench_plain.observe(model, [images]), 0.4)
    with torch.inference_mode():
        ours, theirs = model.predict(images), bench_static.choose_afterwards(model, images)
    assert ours.exit.equal(theirs.exit)
    torch.testing.assert_close(ours.logits, theirs.logits)


def test_earlyon_answers_as_the_cascade_does(model):
    pytest.importorskip('earlyon')
    images = bench_plain.pictures(20, (3, 32, 32))
    model.thresholds = bench_plain.forced(bench_plain.observe(model, [images]), 0.4)
    peer.same_answers(model, peer.wrap(model, (3, 32, 32)), [images])
    model.thresholds = [None, *model.thresholds.tolist()[1:]]  # a closed exit
    peer.same_answers(model, peer.wrap(model, (3, 32, 32)), [images])


@torch.inference_mode()
def test_a_bare_loop_answers_as_the_cascade_does(model):
    images = bench_plain.pictures(20, (3, 32, 32))
    thresholds = bench_plain.forced(bench_plain.observe(model, [images]), 0.4)
    for values in (thresholds, [None, *thresholds[1:]], None):
        model.thresholds = values
        loop = peer.bare_loop(model)
        singles = torch.cat([loop(x) for x in images.split(1)])
        torch.testing.assert_close(singles, model.predict(images).logits, rtol=1e-3, atol=1e-3)


def test_static_networks_are_smaller_and_of_the_same_kind():
    recipe = dict(backbone=dict(seed=0), model=dict(base='cifar_resnet20', create=dict(in_chans=1, num_classes=10)))
    whole = sum(p.numel() for p in timm.create_model('cifar_resnet20', in_chans=1).parameters())
    for name in set(static_networks.NETWORKS) - {'ResNet-20'}:
        network = static_networks.create(recipe, name).eval()
        assert sum(p.numel() for p in network.parameters()) < 0.7 * whole
        assert network(torch.zeros(2, 1, 28, 28)).shape == (2, 10)
    assert len(static_networks.create(recipe, 'ResNet-14').layer3) == 2


def test_rows_that_were_measured_before_stay():
    def row(data, network, accuracy):
        return dict(data=data, network=network, mode='eager', batch=1, accuracy=accuracy)

    old = dict(everything=[dict(max_drop=0.01, batch=1)], static=[row('a', 'ResNet-8', 1), row('a', 'ResNet-14', 2)])
    new = dict(everything=[], static=[row('b', 'ResNet-8', 3), row('a', 'ResNet-14', 4)])
    merged = bench_static.merge(old, new)
    assert [r['accuracy'] for r in merged['static']] == [1, 3, 4]
    assert merged['everything'] == old['everything']


def test_parts_are_written_as_they_come_and_rows_of_another_machine_say_so(tmp_path):
    row = dict(
        network='resnet18',
        batch=1,
        off=dict(median=1.0, low=1.0, high=1.0),
        control=dict.fromkeys(('median', 'low', 'high'), 1.0),
    )
    times = {key: dict(median=0.1, low=0.1, high=0.1) for key in ('ours', 'timm')}
    about = dict(command='python x', quick=False, imports=times, first=[], memory=[])
    machines = [dict(device='a machine', torch=v, timm='1') for v in '12']
    benchmark.write_part('overhead', dict(about, machine=machines[0], off=[row]), tmp_path)
    benchmark.write_part('overhead', dict(about, machine=machines[1], off=[dict(row, batch=64)]), tmp_path)
    page = (tmp_path / 'pages' / 'evidence' / 'benchmark.md').read_text()
    assert 'a machine, torch 2, timm 1. On a machine, torch 1, timm 1: resnet18 batch 1.' in page
    assert page.count('| resnet18 |') == 2


def test_calibration_images_choose_the_setting_and_test_images_judge_it():
    rng = np.random.default_rng(0)
    correct = rng.random((2000, 3)) < np.array([0.7, 0.8, 0.9])
    confidence = np.clip(0.4 * correct + 0.6 * rng.random((2000, 3)), 0, 1)
    samples = Samples(confidence, correct, [1.0, 1.0, 1.0])
    settings = [cheapest(samples, accuracy) for accuracy in (0.8, 0.88)]
    assert settings[0].cost < settings[1].cost < 3 and settings[1].accuracy >= 0.88
    assert cheapest(samples, 1.01) is None
    other = rng.random(2000) < 0.5
    truth = compare(samples, settings[0].thresholds, other)
    assert truth.difference == pytest.approx(truth.accuracy - other.mean()) and truth.half > 0
    assert truth.cost == outcome(samples, settings[0].thresholds).cost


def test_a_missed_target_says_so():
    assert bench_page.verdict(dict(median=1.2, low=1.0, high=1.3), 1.05) == '1.20 (1.00 to 1.30) **missed** (<= 1.05)'
    assert bench_page.verdict(dict(median=1.2, low=1.0, high=1.3), 1.5, at_least=True).endswith('**missed** (>= 1.50)')
    assert 'missed' not in bench_page.verdict(dict(median=1.04, low=1.0, high=1.3), 1.05)


def test_a_tiny_run_writes_its_section_and_leaves_others(tmp_path, capsys):
    machine = dict(device='a machine', torch='2', timm='1')
    overhead = dict(
        command='python x',
        quick=False,
        machine=machine,
        first=[],
        off=[],
        memory=[],
        imports=dict(ours=dict(median=0.2, low=0.2, high=0.2), timm=dict(median=3.0, low=3.0, high=3.0)),
    )
    (tmp_path / 'results').mkdir()
    (tmp_path / 'results' / 'benchmark.json').write_text(json.dumps(dict(overhead=overhead)))
    benchmark.main(
        [
            'plain',
            '--networks',
            'resnet18',
            '--batch',
            '2',
            '--size',
            '32',
            '--modes',
            'eager',
            '--quick',
            '--device',
            'cpu',
            '--out',
            str(tmp_path),
        ]
    )
    sections = json.loads((tmp_path / 'results' / 'benchmark.json').read_text())
    assert list(sections) == ['plain', 'overhead']
    assert [r['share'] for r in sections['plain']['rows']] == list(bench_plain.SHARES)
    text = (tmp_path / 'pages' / 'evidence' / 'benchmark.md').read_text()
    assert 'python scripts/experiments/benchmark plain --networks resnet18' in text and str(tmp_path) not in text
    assert 'quick run' in text and '**missed** (<= 150 ms)' in text
    assert (tmp_path / 'results' / 'benchmark.png').stat().st_size > 1000
    assert '| resnet18 | 2 | eager | 40% |' in capsys.readouterr().out


def test_the_gpu_s_command_says_what_it_needs(capsys, tmp_path):
    for argv, message in (([], 'no CUDA device'), (['--device', 'cpu'], '--out FOLDER')):
        if argv or not torch.cuda.is_available():
            with pytest.raises(SystemExit):
                benchmark.main(['gpu', *argv])
            assert message in capsys.readouterr().err


def test_the_gpu_s_important_cells_come_first():
    cells = gpu.plan(gpu.parser_of().parse_args([]))
    assert [c[1:4] for c in cells[:4]] == [(n, d, 64) for n in ('resnet50', 'release') for d in ('float32', 'bfloat16')]
    assert {c.batch for c in cells[:12]} == {1, 64, 256} and {c.network for c in cells[:12]} == set(gpu.FIRST)
    assert len(cells) == len({c.name for c in cells})
    jobs = gpu.jobs_of(cells)
    assert len(jobs) == len(set(jobs))
    assert ('resnet50', 'float32', 'cascade', 'graphs', 256) not in jobs  # the form of 64 serves it


def gpu_trial(tmp_path, *argv):
    common = ['--device', 'cpu', '--backend', 'eager', '--networks', 'test_resnet', '--batch', '2']
    shown = ['--dtypes', 'float32', '--seconds', '0', '--repetitions', '2', '--workers', '0', '--out', str(tmp_path)]
    benchmark.main(['gpu', *common, *shown, *argv])
    content = json.loads((tmp_path / 'results' / 'gpu.json').read_text())
    return content, (tmp_path / 'pages' / 'evidence' / 'gpu.md').read_text()


@pytest.mark.slow
def test_a_tiny_run_of_the_gpu_s_cells(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_cells, 'SHARES', (0.0, 0.4))
    cells = [gpu.Cell(kind, 'test_resnet', 'float32', 2, ['graphs']) for kind in ('compare', 'regroup')]
    monkeypatch.setattr(gpu, 'plan', lambda args: cells)
    content, page = gpu_trial(tmp_path)
    assert not [c for c in content['cells'] if 'error' in c] and content['missing'] == []
    compared, streamed = content['cells']
    assert compared['still_compiled'] == dict(graphs=True)
    assert 'graphs' in {r['mode'] for r in compared['rows']} and {r['share'] for r in streamed['rows']} == {0.4}
    assert 'a trial on a CPU' in page and '| test_resnet | float32 | 2 | graphs | 40% |' in page
    assert str(tmp_path) not in page


def test_what_the_time_does_not_suffice_for_and_what_fails_is_named(tmp_path, monkeypatch):
    def fail(*args):
        raise OSError('no such kernel')

    monkeypatch.setattr(gpu, 'Subject', lambda *args: None)
    monkeypatch.setattr(gpu, 'compare', fail)
    monkeypatch.setattr(gpu, 'regroup', lambda *args: signal.setitimer(signal.ITIMER_REAL, 0.01) and time.sleep(60))
    content, page = gpu_trial(tmp_path)
    assert 'OSError: no such kernel' in page and 'The time did not suffice for' in page
    assert content['missing'][0].startswith('regroup')
