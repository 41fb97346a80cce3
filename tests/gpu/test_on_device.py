"""Cascades on an accelerator. What is right there is what the device itself computes without shrinking the batch."""

import copy
import gc
import threading
import warnings

import numpy as np
import pytest
import timm
import torch
from helpers import batch_for, between, same, split_thresholds
from torch.utils.data import TensorDataset

import timm_cascade
from timm_cascade.inference.batch import confidence
from timm_cascade.inference.compiled import CompileOptions
from timm_cascade.thresholds import route


def error(model, x):
    """What the device rounds, with room: logits beside those in double precision, and in batches of other sizes."""
    with torch.no_grad():
        want = [w.double() for w in model.forward_exits(x)]
        exact = copy.deepcopy(model).double().forward_exits(x.double())
        parts = zip(*(model.forward_exits(p) for n in (1, 3) for p in x.split(n)), strict=True)
    found = max(float((a - b).abs().max()) for a, b in zip(want, exact, strict=True))
    twice = [torch.cat([w, w]) for w in want]
    return 8 * max(found, *(float((torch.cat(p) - w).abs().max()) for p, w in zip(parts, twice, strict=True)))


@torch.no_grad()
def expected(model, x):
    """Exits and logits from every exit's logits and `route`."""
    outs = model.forward_exits(x)
    found = torch.stack([confidence(o) for o in outs], 1)
    exits = torch.from_numpy(route(found.double().cpu().numpy(), model.thresholds.double().numpy())).to(x.device)
    return exits, torch.stack(outs)[exits, torch.arange(len(x), device=x.device)]


def agree(model, out, x, allowed=None):
    exits, logits = expected(model, x)
    assert torch.equal(out.exit, exits)
    assert out.logits.device.type == out.confidence.device.type == x.device.type
    assert float((out.logits.float() - logits.float()).abs().max()) <= (error(model, x) if allowed is None else allowed)
    assert torch.equal(out.logits.argmax(1), logits.argmax(1)) or allowed is not None


@torch.no_grad()
def opened(model, x):
    """Thresholds in wide gaps, with samples on either side at every exit."""
    here, thresholds = torch.ones(len(x), dtype=torch.bool, device=x.device), []
    for logits in model.forward_exits(x)[:-1]:
        found = confidence(logits)
        thresholds.append(between(found[here].cpu()) if here.sum() > 1 else 2.0)
        here &= found < thresholds[-1]
    model.thresholds = [None if t > 1 else t for t in thresholds]
    return model


@torch.no_grad()
def test_answers_are_those_of_every_exit_and_the_routing_rule(model, x):
    out = opened(model, x).predict(x)
    assert len(out.exit.unique()) > 1
    agree(model, out, x)
    assert out.exit.dtype == torch.int64 and out.confidence.dtype == torch.float32


@torch.no_grad()
def test_the_order_of_a_batch_does_not_matter(model, x):
    opened(model, x)
    order = torch.randperm(len(x), device=x.device)
    agree(model, model.predict(x[order]), x[order])


@torch.no_grad()
def test_single_images(model, x):
    opened(model, x)
    allowed, (exits, logits) = error(model, x), expected(model, x)
    for i in range(len(x)):
        out = model.predict(x[i : i + 1])
        assert out.exit.tolist() == exits[i : i + 1].tolist()
        assert float((out.logits - logits[i]).abs().max()) <= allowed


@torch.no_grad()
def test_all_exit_at_the_first_and_none_exits(model, x):
    model.thresholds = [0.0, 0.0, 0.0]
    agree(model, model.predict(x), x)
    assert model.predict(x).exit.tolist() == [0] * len(x)
    model.thresholds = [1.5, 1.5, 1.5]
    assert model.predict(x).exit.tolist() == [3] * len(x)
    model.thresholds = None
    agree(model, model.predict(x), x)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(model, x, dtype):
    model, x = model.to(dtype), x.to(dtype)
    out = opened(model, x).predict(x)
    assert out.logits.dtype == dtype and out.confidence.dtype == torch.float32
    near_a_threshold = torch.stack([(c - t).abs() for c, t in close(model, x)]).amin(0) < 0.02
    exits, logits = expected(model, x)
    same_exit = out.exit == exits
    assert bool((same_exit | near_a_threshold).all())
    assert float((out.logits - logits).float().abs()[same_exit].max()) <= error(model, x)


def close(model, x):
    return [
        (confidence(o), min(t, 2.0)) for o, t in zip(model.forward_exits(x), model.thresholds.tolist(), strict=False)
    ]


@torch.no_grad()
def test_autocast(model, x):
    with torch.autocast(x.device.type, torch.bfloat16):
        out = opened(model, x).predict(x)
        exits, logits = expected(model, x)
        same_exit = out.exit == exits
        near_a_threshold = torch.stack([(c - t).abs() for c, t in close(model, x)]).amin(0) < 0.02
        assert bool((same_exit | near_a_threshold).all())
        assert float((out.logits - logits).float().abs()[same_exit].max()) <= error(model, x)


@torch.no_grad()
def test_stream_answers_as_predict(model, x):
    want = opened(model, x).predict(x)
    for ordered in (True, False):
        same(list(model.stream(x.cpu().split(5), batch_size=4, ordered=ordered)), want)


@torch.no_grad()
def test_each_image_its_own_thresholds(model, x):
    thresholds = split_thresholds(model, x)
    rows = [thresholds if i % 2 else [None] * 3 for i in range(len(x))]
    out = model.predict(x, thresholds=rows)
    assert out.exit[::2].tolist() == [3] * (len(x) // 2)
    model.thresholds = thresholds
    assert torch.equal(out.exit[1::2], model.predict(x).exit[1::2])


@torch.no_grad()
def test_the_model_moves_between_devices(model, x):
    out = opened(model, x).predict(x)
    there = model.cpu().predict(x.cpu())
    assert there.logits.device.type == 'cpu'
    again = model.to(x.device).predict(x)
    assert torch.equal(again.exit, out.exit) and torch.equal(there.exit, out.exit.cpu())
    torch.testing.assert_close(again.logits, out.logits, atol=error(model, x), rtol=0)


def test_heads_train_and_are_calibrated_on_the_device(device, images):
    pytest.importorskip('accelerate')
    model = timm.create_model('cascade_cifar_resnet20', in_chans=1, num_classes=4, exits=2).eval().to(device)
    pixels = torch.from_numpy(np.stack([images[i][0] for i in range(len(images))])).float()
    data = TensorDataset(pixels.reshape(-1, 1, 16, 16) / 255, torch.as_tensor(images.labels))
    history = timm_cascade.train_heads(model, data, data, epochs=2, batch_size=32)
    assert len(history) == 2 and all(np.isfinite(h['loss']) for h in history)
    assert next(model.heads.parameters()).device.type == device.type
    calibration = timm_cascade.calibrate(model, data)
    assert len(calibration.confidence) == len(data)
    point = model.set_max_drop(0.5, rule='joint')
    assert len(point.thresholds) == 2
    one_each = model.predict(data.tensors[0][:4].to(device), max_drop=[0.0, 0.5, 0.0, 0.5])
    assert one_each.exit.shape == (4,)
    assert timm_cascade.evaluate(model, data).n == len(data)
    assert timm_cascade.profile(model, batch_size=2, repeats=1).device


MODE = 'reduce-overhead'


def compiled(model, x, static, backend='inductor'):
    """The model compiled with CUDA graphs; on a CPU with the same padding, and a backend that is quick."""
    on_cpu = x.device.type == 'cpu'
    model._router.forget()
    model._router.options = CompileOptions(
        'eager' if on_cpu else backend, None if on_cpu else MODE, buckets=True, static=static
    )
    return model


def stages(model):
    return [stage.module for staged in model._router._exported.values() for stage in staged.stages]


@torch.no_grad()
@pytest.mark.parametrize('static', [False, True])
def test_compiled_with_graphs_for_many_batch_sizes(model, x, static):
    if static and type(model.backbone).__name__ != 'ResNet':
        pytest.skip('one network suffices')
    opened(model, x)
    allowed = error(model, x)
    eager = {n: model.predict(x[:n]) for n in (1, 2, 3, 5, 12)}
    compiled(model, x, static)
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*runs eagerly')  # the compiler itself has advice, too
        kept = [(n, model.predict(x[:n])) for _ in range(3) for n in eager]
    assert not any(stage.failed for stage in stages(model)) and model.compiled
    for n, out in kept:  # later calls have not written over them
        assert torch.equal(out.exit, eager[n].exit)
        assert float((out.logits - eager[n].logits).abs().max()) <= allowed


@pytest.fixture
def graphs(device):
    """A small compiled cascade, its images, and what it answered before."""
    model = timm.create_model('cascade_test_resnet', num_classes=7, exits=3).eval().to(device)
    x = batch_for(model, 12).to(device)
    with torch.no_grad():
        allowed, want = error(opened(model, x), x), model.predict(x)
    return compiled(model, x, False), x, want, allowed


@torch.no_grad()
def test_compiled_stream(graphs):
    model, x, want, allowed = graphs
    found = sorted(model.stream(x.split(5), batch_size=4, ordered=True), key=lambda r: int(r.index[0]))
    assert torch.equal(torch.cat([r.exit for r in found]), want.exit)
    assert float((torch.cat([r.logits for r in found]) - want.logits).abs().max()) <= allowed


@torch.no_grad()
def test_new_weights_are_noticed_after_compiling(graphs):
    model, x, _, allowed = graphs
    model.predict(x)
    model.thresholds = None
    before = model(x)
    model.backbone.get_classifier().weight.mul_(3)
    after = model(x)
    assert float((after - before).abs().max()) > allowed
    assert float((after - model.backbone(x)).abs().max()) <= 4 * allowed
    model.thresholds = [0.0, None, None]
    model.heads[0].fc.bias.add_(torch.arange(7.0, device=x.device))
    agree(model, model.predict(x), x, 4 * allowed + 1e-3)


def in_threads(work, count=2):
    failures, results = [], {}

    def guarded(i):
        try:
            with torch.no_grad():
                results[i] = work(i)
        except Exception as e:
            failures.append(e)

    threads = [threading.Thread(target=guarded, args=(i,)) for i in range(count)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not failures, failures
    return results


def on_a_stream(device, call):
    if device.type != 'cuda':
        return call()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        result = call()
    stream.synchronize()
    return result


@pytest.mark.parametrize('mode', ['eager', 'graphs'])
def test_threads_with_streams_of_their_own(graphs, mode):
    model, x, want, allowed = graphs
    if mode == 'eager':
        model.compile(False)
    halves = [x, x.flip(0)]
    answers = [want, type(want)(*(t.flip(0) for t in want))]
    results = in_threads(lambda i: [on_a_stream(x.device, lambda: model.predict(halves[i])) for _ in range(8)])
    assert not any(stage.failed for stage in stages(model)) and model.compiled == (mode == 'graphs')
    for i, outs in results.items():
        for out in outs:
            assert torch.equal(out.exit, answers[i].exit)
            assert float((out.logits - answers[i].logits).abs().max()) <= allowed


@torch.no_grad()
def test_memory_returns_after_predictions(model, x):
    if x.device.type != 'cuda':
        pytest.skip('memory is counted on a CUDA device')
    opened(model, x)

    def used():
        gc.collect()
        torch.cuda.synchronize()
        return torch.cuda.memory_allocated()

    def work():
        model.predict(x)
        for _ in model.stream(x.split(4)):
            pass

    work()
    before = used()
    for _ in range(5):
        work()
    assert used() == before


@torch.no_grad()
def test_one_synchronisation_at_each_exit(model, x):
    if x.device.type != 'cuda':
        pytest.skip('synchronisations are counted on a CUDA device')
    opened(model, x)
    model.predict(x), model.predict(x[:1])
    for images in (x, x[:1]):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            try:
                out = model.predict(images)
            finally:
                torch.cuda.set_sync_debug_mode('default')
        reached = min(int(out.exit.max()) + 1, int(torch.isfinite(model.thresholds).sum()))
        assert sum('synchroniz' in str(w.message) for w in caught) <= reached


@pytest.mark.slow
def test_a_model_on_the_device_is_exported(model, x, tmp_path):
    pytest.importorskip('onnx')
    pytest.importorskip('onnxscript')
    opened(model, x)
    state = copy.deepcopy(model.state_dict())
    timm_cascade.export(model, tmp_path / 'exported')
    assert any((tmp_path / 'exported').iterdir())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in state.items())
