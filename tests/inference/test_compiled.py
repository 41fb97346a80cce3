"""Compiled stages. torch.compile's cheap backends show everything but the compiler's own work, which is slow."""

import copy
import pickle
import threading
import time
import warnings

import pytest
import timm
import torch
from helpers import Stubborn, batch_for, between, near, rounding, same
from torch import nn

from timm_cascade import CascadeModel
from timm_cascade.inference.batch import confidence
from timm_cascade.inference.compiled import CompileOptions, bucket


class Plain(nn.Module):
    """Convolutions and norms that do something, so that folding them is seen."""

    def __init__(self, width=8, num_classes=7):
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.pretrained_cfg = dict(architecture='plain', input_size=(3, 16, 16))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Sequential(nn.Conv2d(w, width, 3, padding=1), nn.BatchNorm2d(width)), nn.ReLU())
            for w in (3, width, width)
        )
        self.fc = nn.Linear(width, num_classes)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(std=0.1)
                m.running_var.uniform_(0.5, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.fc(x.mean((2, 3)))

    def get_classifier(self):
        return self.fc

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.fc = nn.Linear(self.num_features, num_classes)


def spread(model, x):
    """Thresholds between two confidences; half of the samples that reach an exit leave there."""
    here = torch.ones(len(x), dtype=torch.bool)
    thresholds = []
    for logits in model.forward_exits(x)[:-1]:
        found = confidence(logits)
        thresholds.append(between(found[here]))
        here &= found < thresholds[-1]
    model.thresholds = thresholds


@pytest.fixture
def cascade():
    torch.manual_seed(1)
    model = CascadeModel(Plain().eval(), ['blocks.0', 'blocks.1']).eval()
    x = (torch.randn(12, 3, 16, 16) * torch.linspace(0.2, 3, 12)[:, None, None, None])[torch.randperm(12)]
    with torch.no_grad():
        spread(model, x)
    return model, x


@pytest.fixture
def untraced():
    """What torch.compile gives runs as it was written, which takes no tracing: for what is ours around it."""
    with torch.compiler.set_stance('force_eager'):
        yield


def agree(out, want):
    assert torch.equal(out.exit, want.exit)
    assert near(out.logits, want.logits) and near(out.confidence, want.confidence)


def stages_of(model):
    (staged,) = model._router._exported.values()
    return [stage.module for stage in staged.stages]


@torch.no_grad()
def test_compiled_stages_answer_as_hooks_do(cascade):
    model, x = cascade
    want, plain = model.predict(x), model.backbone(x)
    assert len(want.exit.unique()) == 3
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert model.compile(backend='eager') is model and model.compiled
        agree(model.predict(x), want)
        for n in (1, 2, 7):
            agree(model.predict(x[:n]), type(want)(*(t[:n] for t in want)))
        same(list(model.stream(x.split(5))), want)
        model.thresholds = [0.0, None]
        assert model.predict(x).exit.tolist() == [0] * 12
        model.thresholds = None
        assert near(model(x), plain)  # exits off, and still compiled
    assert not any(stage.failed for stage in stages_of(model))
    model.compile(False)
    assert not model.compiled and torch.equal(model(x), plain)


@torch.no_grad()
def test_what_hooks_cannot_cut_is_compiled_too():
    model = CascadeModel(Stubborn().eval(), 3).eval()
    x = torch.randn(6, 3, 16, 16) * torch.linspace(0.3, 3, 6)[:, None, None, None]
    spread(model, x)
    want = model.predict(x)
    model.compile(backend='eager')
    agree(model.predict(x), want)
    same(list(model.stream(x.split(4))), want)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(cascade, dtype):
    model, x = cascade
    model, x = model.to(dtype), x.to(dtype)
    model.thresholds = [None, 1.5]
    want = model.predict(x)
    model.compile(backend='eager')
    got = model.predict(x)
    assert got.logits.dtype == dtype
    assert (got.logits.float() - want.logits.float()).abs().max() <= 4 * rounding(model, x)


@torch.no_grad()
def test_padding_to_a_few_batch_sizes_changes_nothing(cascade, untraced):
    model, x = cascade
    want = model.predict(x)
    model.compile(backend='eager')
    model._router.forget()
    model._router.options = CompileOptions('eager', buckets=True)
    for n in (12, 11, 5, 1):
        got = model.predict(x[:n])
        agree(got, type(want)(*(t[:n] for t in want)))
        assert got.logits.shape == (n, 7)
    same(list(model.stream(x.split(5))), want)
    assert {size for size, _ in stages_of(model)[0].forms} <= {1, 2}
    assert [bucket(n) for n in (1, 2, 3, 5, 7, 12, 13, 64, 65, 97)] == [1, 2, 3, 6, 8, 12, 16, 64, 96, 128]


@torch.no_grad()
def test_a_stage_that_is_faster_as_exported_runs_so(cascade, caplog):
    model, x = cascade
    want = model.predict(x)

    def slow(gm, example_inputs):
        return lambda *args: time.sleep(0.02) or gm(*args)

    with caplog.at_level('INFO', 'timm_cascade'):
        model.compile(backend=slow)
    assert 'compiled 3 stages' in caplog.text and 'eager is faster here for stages 0, 1, 2' in caplog.text
    agree(model.predict(x), want)
    assert all(stage.chose_eager() for stage in stages_of(model))
    model.compile(backend=slow, choose=False)
    assert not any(stage.chose_eager() for stage in stages_of(model))
    agree(model.predict(x), want)


@torch.no_grad()
def test_one_image_that_is_left_of_a_batch_compiles_nothing(cascade):
    model, x = cascade
    order = model.forward_exits(x)[0].softmax(-1).amax(-1).argsort()
    pair = x[order[[0, -1]]]
    thresholds = [between(confidence(model.forward_exits(pair)[0])), None]
    want = model.predict(pair, thresholds=thresholds)
    assert sorted(want.exit.tolist()) == [0, 2]
    model.compile(backend='eager')
    agree(model.predict(pair, thresholds=thresholds), want)
    assert not any(size == 1 for stage in stages_of(model) for size, _ in stage.forms)
    one = type(want)(*(t[:1] for t in want))
    agree(model.predict(pair[:1], thresholds=thresholds), one)
    assert any(size == 1 for size, _ in stages_of(model)[0].forms)


@torch.no_grad()
def test_new_weights_are_compiled_again(cascade, untraced):
    model, x = cascade
    model.thresholds = None
    model.compile(backend='eager')
    before = model(x)

    def changed(change):
        change()
        assert not near(model.backbone(x), before, 0.1)
        assert near(model(x), model.backbone(x))

    changed(lambda: model.backbone.get_classifier().weight.mul_(2))
    other = Plain().eval()
    changed(lambda: model.load_state_dict(other.state_dict()))
    other.get_classifier().bias.fill_(3)
    changed(lambda: model.backbone.load_state_dict(other.state_dict(), assign=True))
    model.reset_classifier(4)
    assert model(x).shape == (12, 4) and near(model(x), model.backbone(x))


@torch.no_grad()
def test_heads_stand_in_their_stages_and_closed_ones_are_not_computed(cascade):
    model, x = cascade
    want = model.predict(x)
    model.compile(backend='eager')
    eager = []
    for head in model.heads:  # not compiled: a compiled head has no Python left to call
        head.forward = lambda features, inner=head.forward: eager.append(1) or inner(features)
    agree(model.predict(x), want)
    first, second, last = stages_of(model)
    assert set(first.forms) == set(second.forms) == {(2, True)} and set(last.forms) == {(2, False)}
    first_alone = model.predict(x, thresholds=[model.thresholds[0].item(), None])
    assert set(second.forms) == {(2, True), (2, False)} and set(first.forms) == {(2, True)}
    assert first_alone.exit.unique().tolist() == [0, 2]
    assert eager == []


@torch.no_grad()
@pytest.mark.parametrize('change', ['write', 'assign', 'replace', 'inner', 'move'])
def test_heads_that_change_are_compiled_again(cascade, change, untraced):
    model, x = cascade
    model.compile(backend='eager')
    before = model.predict(x)
    head, other = model.heads[0], copy.deepcopy(model.heads[0])
    other.fc.weight.mul_(-3), other.norm.running_mean.add_(1)
    if change == 'write':
        head.fc.weight.copy_(other.fc.weight), head.norm.running_mean.copy_(other.norm.running_mean)
    elif change == 'assign':
        head.load_state_dict(other.state_dict(), assign=True)
    elif change == 'replace':
        model.heads[0] = other
    elif change == 'inner':
        head.fc, head.norm = other.fc, other.norm
    else:
        model.heads = nn.ModuleList([other, model.heads[1]])
    got = model.predict(x)
    model.compile(False)
    agree(got, model.predict(x))
    assert not torch.equal(got.exit, before.exit) or not near(got.logits, before.logits)


@torch.no_grad()
def test_a_replaced_module_of_the_backbone_is_compiled_again(cascade, untraced):
    model, x = cascade
    model.compile(backend='eager')
    before = model.predict(x)
    model.backbone.blocks[2][0] = copy.deepcopy(Plain().blocks[2][0])  # behind the exits, where no hook is
    got = model.predict(x)
    model.compile(False)
    agree(got, model.predict(x))
    assert not near(got.logits, before.logits)


@torch.no_grad()
def test_a_tie_leaves_and_nan_does_not(cascade):
    model, x = cascade
    model.compile(backend='eager')
    for n in (12, 1):
        model.thresholds = [2.0, None]
        model.heads[0].fc.weight.zero_(), model.heads[0].fc.bias.zero_()  # all confidences are one number
        found = confidence(torch.zeros(1, 7)).item()
        assert model.predict(x[:n], thresholds=[found, None]).exit.tolist() == [0] * n
        above = torch.nextafter(torch.tensor(found), torch.tensor(2.0)).item()
        assert model.predict(x[:n], thresholds=[above, None]).exit.tolist() == [2] * n
        model.heads[0].fc.bias.fill_(float('nan'))
        out = model.predict(x[:n], thresholds=[0.0, None])
        assert out.exit.tolist() == [2] * n and not out.logits.isnan().any()


@torch.no_grad()
@pytest.mark.parametrize('mode', ['default', 'buckets'])
def test_borders(cascade, mode, untraced):
    """All exit at once, none exits, one image, thresholds of each image, batches kept whole: as without compiling."""
    model, x = cascade
    own = torch.tensor([[0.0, 2.0], [2.0, 0.0], [2.0, 2.0]]).repeat(4, 1)
    cases = [
        dict(thresholds=[0.0, None]),
        dict(thresholds=[None, 0.0]),
        dict(thresholds=[2.0, 2.0]),
        dict(thresholds=own),
    ]

    def answers():
        found = [model.predict(x, **case) for case in cases]
        found += [model.predict(x[i : i + 1]) for i in range(12)]
        for share in (0.3, 1.0):
            model.min_leave = share
            found.append(model.predict(x))
        model.min_leave = 0.0
        batches = [(x[i : i + 4], dict(thresholds=own[i : i + 4])) for i in range(0, 12, 4)]
        return found, [list(model.stream(batches)), list(model.stream(x.split(5), batch_size=3))]

    want, streamed = answers()
    assert want[3].exit.tolist() == [0, 1, 2] * 4
    model.compile(backend='eager')
    if mode == 'buckets':
        model._router.forget()
        model._router.options = CompileOptions('eager', buckets=True)
    got, parts = answers()
    for a, b in zip(got, want, strict=True):
        agree(a, b)
    same(parts[0], want[3])
    assert len(streamed[0]) == len(parts[0])
    same(parts[1], model.predict(x))
    assert not any(stage.failed for stage in stages_of(model))


@torch.no_grad()
def test_a_head_that_the_compiler_cannot_read_still_answers(cascade):
    model, x = cascade

    class Odd(nn.Module):
        def forward(self, features):
            return torch.from_numpy(features.mean((2, 3)).numpy().copy())[:, :7]

    model.heads[0] = Odd()
    want = model.predict(x, thresholds=[0.2, None])
    model.compile(backend='eager')
    agree(model.predict(x, thresholds=[0.2, None]), want)


def test_gradients_and_training_run_as_before(cascade):
    model, x = cascade
    model.compile(backend='eager')
    model(x).sum().backward()
    assert (model.backbone.blocks[0][0][0].weight.grad != 0).any()
    with torch.no_grad():
        model.train()
        assert model(x).shape == (12, 7)


def test_inference_mode(cascade):
    model, x = cascade
    with torch.inference_mode():
        want = model.predict(x)
        model.compile(backend='eager')
        agree(model.predict(x), want)
        same(list(model.stream(x.split(5))), want)
    with torch.no_grad():
        agree(model.predict(x), want)
    assert not any(stage.failed for stage in stages_of(model))


@torch.no_grad()
def test_copies_compile_their_own(cascade, untraced):
    model, x = cascade
    want = model.predict(x)
    model.compile(backend='eager')
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other.compiled and not other._router._exported
        agree(other.predict(x), want)


@torch.no_grad()
def test_threads_share_the_stages(cascade, untraced):
    model, x = cascade
    want = model.predict(x)
    model.compile(backend='eager')
    results = []

    def work():
        with torch.no_grad():
            results.extend(model.predict(x) for _ in range(3))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 6
    for out in results:
        agree(out, want)


def broken(gm, example_inputs):
    raise OSError('no compiler here')


@torch.no_grad()
def test_without_a_compiler_it_runs_eagerly_and_says_why(cascade):
    model, x = cascade
    want = model.predict(x)
    with pytest.warns(UserWarning, match='runs eagerly.*no compiler here'):
        model.compile(backend=broken)
    assert not model.compiled
    agree(model.predict(x), want)


@torch.no_grad()
def test_a_compiler_that_fails_later_is_done_without(cascade):
    model, x = cascade
    want = model.predict(x)
    model.compile(backend='eager')
    stage = stages_of(model)[1]

    def fail(*inputs):
        raise RuntimeError('out of registers')

    stage.forms[2, True] = fail
    with pytest.warns(UserWarning, match='runs eagerly: RuntimeError: out of registers'):
        agree(model.predict(x), want)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        agree(model.predict(x), want)


@torch.no_grad()
def test_what_cannot_be_exported_runs_eagerly_and_says_why(cascade):
    model, x = cascade
    model.backbone.fc.forward = lambda x, inner=model.backbone.fc.forward: inner(x) * float(x.mean() > -1e9)
    want = model.predict(x)
    with pytest.warns(UserWarning, match=r'runs eagerly.*exported and compiled.*failed'):
        model.compile(backend='eager')
    agree(model.predict(x), want)


def test_importing_the_package_imports_no_compiler(interpreter, tmp_path):
    code = (
        'import sys, timm; before = set(sys.modules); import timm_cascade; '
        '[getattr(timm_cascade, name) for name in timm_cascade.__all__ if name != "export"]; '
        'print(*{"torch._dynamo", "torch._inductor", "torch.export", "accelerate", "datasets", "scipy"}'
        '.intersection(set(sys.modules) - before))'
    )
    done = interpreter.run(code, tmp_path)
    assert done.returncode == 0 and done.stdout.split() == [], done.stderr + done.stdout


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('name', ['test_resnet', 'test_vit', 'test_convnext', 'mobilenetv3_small_050'])
def test_timm_s_families(name):
    model = timm.create_model(f'cascade_{name}', num_classes=7).eval()
    x = batch_for(model, 8)
    spread(model, x)
    want = model.predict(x)
    model.compile(backend='eager')
    assert model.compiled
    agree(model.predict(x), want)
    same(list(model.stream(x.split(3))), want)


@pytest.mark.slow
@torch.no_grad()
def test_inductor(cascade):
    model, x = cascade
    want = model.predict(x)
    with warnings.catch_warnings():
        warnings.simplefilter('error', UserWarning)
        model.compile(choose=False)
        agree(model.predict(x), want)
        for i in range(12):
            agree(model.predict(x[i : i + 1]), type(want)(*(t[i : i + 1] for t in want)))
        with torch.inference_mode():
            agree(model.predict(x[:1]), type(want)(*(t[:1] for t in want)))
    assert model.compiled and all(stage.direct for stage in stages_of(model))
    model.backbone.get_classifier().weight.mul_(2)
    model.thresholds = None
    assert near(model(x), model.backbone(x)) and near(model(x[:1]), model.backbone(x[:1]))
