"""Which samples exit, which remain, and that the backbone no longer computes those that exited."""

import copy
import threading

import pytest
import torch
from helpers import batch_for, between, near, split_thresholds
from torch.utils._python_dispatch import TorchDispatchMode

from timm_cascade.errors import RoutingError
from timm_cascade.inference import router
from timm_cascade.inference.batch import confidence
from timm_cascade.model import MIN_LEAVE


@pytest.fixture
def cascade(family):
    yield family
    family.eval()
    family.thresholds = None


@torch.no_grad()
def test_every_image_gets_the_logits_of_the_exit_that_answers(cascade):
    x = batch_for(cascade)
    every = cascade.forward_exits(x)
    cascade.thresholds = split_thresholds(cascade, x)
    out = cascade.predict(x)
    assert len(set(out.exit.tolist())) > 1
    for m, logits in enumerate(every):
        assert near(out.logits[out.exit == m], logits[out.exit == m])
    open_at = torch.stack([confidence(e) >= t for e, t in zip(every, [*cascade.thresholds, 0.0], strict=True)])
    assert torch.equal(out.exit, open_at.int().argmax(0))
    assert torch.allclose(out.confidence, confidence(out.logits))
    assert torch.equal(cascade(x), cascade.predict(x).logits)


@torch.no_grad()
def test_blocks_see_only_the_remaining_samples(cascade):
    x = batch_for(cascade)
    cascade.thresholds = split_thresholds(cascade, x)
    seen = {}
    modules = [p.module for p in cascade.exits]
    handles = [
        cascade.backbone.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen.__setitem__(name, len(args[0]))
        )
        for name in modules
    ]
    exits = cascade.predict(x).exit
    for handle in handles:
        handle.remove()
    assert seen == {name: int((exits >= m).sum()) for m, name in enumerate(modules) if (exits >= m).any()}
    assert sum(seen.values()) < len(x) * len(modules)


@torch.no_grad()
def test_a_fresh_model_is_its_backbone_and_runs_no_head(cascade):
    x = batch_for(cascade)

    def fail(*args):
        raise AssertionError('a head ran')

    handles = [h.register_forward_pre_hook(fail) for h in cascade.heads]
    assert torch.equal(cascade(x), cascade.backbone(x))
    out = cascade.predict(x)
    assert torch.equal(out.logits, cascade.backbone(x))
    assert out.exit.tolist() == [len(cascade.exits)] * len(x)
    for handle in handles:
        handle.remove()


@torch.no_grad()
def test_all_samples_exit_at_the_first_exit(cascade):
    x = batch_for(cascade)
    cascade.thresholds = [0.0] * len(cascade.exits)
    out = cascade.predict(x)
    assert out.exit.tolist() == [0] * len(x)
    assert near(out.logits, cascade.forward_exits(x)[0])


@torch.no_grad()
def test_no_sample_exits(cascade):
    x = batch_for(cascade)
    cascade.thresholds = [1.5] * len(cascade.exits)  # heads run, and no confidence is that high
    assert near(cascade(x), cascade.backbone(x))


@torch.no_grad()
def test_results_do_not_depend_on_the_batch(cascade):
    x = batch_for(cascade)
    cascade.thresholds = split_thresholds(cascade, x)
    whole = cascade.predict(x)
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    mixed = cascade.predict(x[order])
    assert torch.equal(mixed.exit, whole.exit[order])
    assert near(mixed.logits, whole.logits[order])
    ones = [cascade.predict(x[i : i + 1]) for i in range(len(x))]
    assert torch.equal(torch.cat([o.exit for o in ones]), whole.exit)
    assert near(torch.cat([o.logits for o in ones]), whole.logits)


@torch.no_grad()
def test_nan_in_a_head_goes_on_to_the_end(cascade):
    x = batch_for(cascade)
    broken = copy.deepcopy(cascade)
    for head in broken.heads:
        torch.nn.init.constant_(head.fc.weight, float('nan'))
    broken.thresholds = [0.0] * len(broken.exits)
    assert broken.predict(x).exit.tolist() == [len(broken.exits)] * len(x)
    assert near(broken(x), cascade.backbone(x))


@torch.no_grad()
def test_a_tie_exits(cascade):
    x = batch_for(cascade)
    found = confidence(cascade.forward_exits(x)[0])
    cascade.thresholds = [float(found[2]), *[None] * (len(cascade.exits) - 1)]
    assert torch.equal(cascade.predict(x).exit == 0, found >= found[2])


@torch.no_grad()
def test_closed_exits_run_no_head(cascade):
    x = batch_for(cascade)
    cascade.thresholds = [None, *[0.0] * (len(cascade.exits) - 1)]
    handle = cascade.heads[0].register_forward_pre_hook(lambda *args: pytest.fail("the closed exit's head ran"))
    assert cascade.predict(x).exit.tolist() == [1] * len(x)
    handle.remove()


@torch.no_grad()
def test_two_threads_get_their_own_results(cascade):
    batches = [batch_for(cascade), batch_for(cascade, 5) * 2]
    cascade.thresholds = split_thresholds(cascade, batches[0])
    want = [cascade.predict(x) for x in batches]
    got: list[list] = [[], []]

    def work(k):
        with torch.no_grad():
            got[k] = [cascade.predict(batches[k]) for _ in range(5)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for k in range(2):
        assert len(got[k]) == 5
        for out in got[k]:
            assert torch.equal(out.exit, want[k].exit) and near(out.logits, want[k].logits)


@torch.no_grad()
def test_a_copy_and_its_original_do_not_meet(cascade):
    x = batch_for(cascade)
    twin = copy.deepcopy(cascade)
    twin.thresholds = [0.0] * len(twin.exits)
    assert torch.equal(cascade(x), cascade.backbone(x))
    assert twin.predict(x).exit.tolist() == [0] * len(x)
    assert torch.equal(twin.backbone(x), cascade.backbone(x))


@torch.no_grad()
def test_a_backbone_that_mixes_rows_is_caught(small):
    """A single remaining sample can be broadcast silently: the number of rows that come back is checked every time."""
    x = torch.randn(3, 1, 16, 16) * torch.tensor([0.2, 1, 3])[:, None, None, None]
    found = confidence(small.forward_exits(x)[0])
    small.thresholds = [float(found.sort().values[1]), None]  # one goes on
    small.backbone.fc.register_forward_hook(lambda module, args, out: out.expand(3, -1))
    with pytest.raises(RoutingError, match='1 samples reached the end'):
        small.predict(x)


@torch.no_grad()
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision(small, dtype):
    model = copy.deepcopy(small).to(dtype)
    x = torch.randn(4, 1, 16, 16).to(dtype)
    exact = 0.99912345
    model.thresholds = [exact, None]
    assert float(model.thresholds[0]) == pytest.approx(exact, abs=1e-7)  # not rounded to the weights' dtype
    model.thresholds = [0.3, 0.3]
    out = model.predict(x)
    assert out.logits.dtype == dtype and out.confidence.dtype == torch.float32
    with torch.autocast('cpu', torch.bfloat16):
        small.thresholds = [0.3, 0.3]
        assert small(x.float()).shape == (4, 4)


def test_gradients_flow_through_a_routed_batch(small):
    x = torch.randn(4, 1, 16, 16, requires_grad=True)
    small.thresholds = [0.3, 0.3]
    small(x).sum().backward()
    assert x.grad is not None and (x.grad != 0).any()


class Counted(TorchDispatchMode):
    """Operations for which the host has to wait for the device."""

    WAITING = (
        'aten.nonzero',
        'aten._local_scalar_dense',
        'aten.item',
        'aten.masked_select',
        'aten.unique',
        'aten.is_nonzero',
        'aten.equal',
    )

    def __init__(self):
        super().__init__()
        self.waits, self.calls = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls += 1
        name = str(func)
        # rows picked by a mask wait too: how many there are is asked for
        mask = name.startswith('aten.index') and any(
            isinstance(a, torch.Tensor) and a.dtype == torch.bool
            for arg in args
            if isinstance(arg, (list, tuple))
            for a in arg
        )
        if name.startswith(self.WAITING) or mask or (name.startswith('aten._to_copy') and 'device' in (kwargs or {})):
            self.waits.append(name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
@pytest.mark.parametrize('min_leave', [0.0, 1.0])
def test_one_synchronisation_an_exit_and_no_loop_over_samples(cascade, min_leave):
    calls = []
    try:
        cascade.min_leave = min_leave
        for n in (6, 24):
            x = batch_for(cascade, n)
            # half exit at the first exit, none at the others
            cascade.thresholds = [split_thresholds(cascade, x)[0], *[1.5] * (len(cascade.exits) - 1)]
            with Counted() as counted:
                exits = cascade.predict(x).exit
            assert exits.unique().tolist() == [0, len(cascade.exits)]
            assert counted.waits == ['aten.nonzero.default'] * len(cascade.exits)
            calls.append(counted.calls)
    finally:
        cascade.min_leave = MIN_LEAVE
    assert calls[1] <= 1.2 * calls[0]


@torch.no_grad()
def test_a_batch_that_is_not_worth_cutting_goes_on_whole(cascade):
    x = batch_for(cascade, 10)
    cascade.thresholds = split_thresholds(cascade, x)
    want = cascade.predict(x)
    assert len(want.exit.unique()) > 1
    seen = []
    handle = cascade.backbone.get_submodule(cascade.exits[-1].module).register_forward_hook(
        lambda module, args, out: seen.append(len(args[0]))
    )
    try:
        for share in (0.0, 0.3, 0.6, 1.0):
            cascade.min_leave = share
            out = cascade.predict(x)
            assert torch.equal(out.exit, want.exit)
            assert near(out.logits, want.logits) and near(out.confidence, want.confidence)
    finally:
        handle.remove()
        cascade.min_leave = MIN_LEAVE
    before_last = int((want.exit >= len(cascade.exits) - 1).sum())
    assert seen[0] == before_last < seen[-1] == 10


@torch.no_grad()
def test_a_sample_exits_once_though_its_row_goes_on(small):
    """Later thresholds let every sample exit; samples that exited before keep the first result."""
    x = torch.randn(10, 1, 16, 16)
    small.thresholds = [between(confidence(small.forward_exits(x)[0])), 0.0]
    small.min_leave = 1.0
    out = small.predict(x)
    first = small.forward_exits(x)[0]
    assert set(out.exit.tolist()) == {0, 1}
    assert near(out.logits[out.exit == 0], first[out.exit == 0])


@torch.no_grad()
def test_that_compiling_pays_is_said_once_after_many_images(small, caplog, monkeypatch):
    monkeypatch.setattr(router, 'MANY', 70)
    model, x = copy.deepcopy(small), torch.zeros(32, 1, 16, 16)
    model._router = router.Router(model.backbone, model.exits)
    model.predict(x)  # all exits are closed: the plain network
    model.thresholds = [0.0, None]
    for n, said in ((31, 0), (32, 0), (32, 0), (32, 1), (32, 1)):
        model.predict(x[:n])
        assert len([r for r in caplog.records if 'model.compile()' in r.getMessage()]) == said
