import torch

from timm_cascade.utils.digest import state_digest


def test_every_value_counts_and_so_does_its_place():
    state = {'a': torch.arange(1000.0), 'n': torch.tensor(3)}
    want = state_digest(state)
    assert state_digest(dict(reversed(state.items()))) == want and len(want) == 16
    for at in range(0, 1000, 37):
        other = {**state, 'a': state['a'].clone()}
        other['a'][at] += 1e-3
        assert state_digest(other) != want
    swapped = {**state, 'a': state['a'].flip(0)}
    assert state_digest(swapped) != want
    assert state_digest({**state, 'n': torch.tensor(4)}) != want
    assert state_digest({**state, 'a': state['a'].reshape(10, 100)}) != want
    assert state_digest({'b': state['a'], 'n': state['n']}) != want
    assert state_digest(state, also=['layer1']) != want
    assert state_digest({}) != want


def test_half_precision_counts_by_value():
    for dtype in (torch.bfloat16, torch.float16):
        half = {'a': torch.randn(100, 3).to(dtype)}
        assert state_digest(half) == state_digest({'a': half['a'].float()})
        assert state_digest({'a': torch.randn(100, 3)}) != state_digest(half)


def test_strides_and_empty_tensors():
    a = torch.randn(4, 5)
    assert state_digest({'a': a.t()}) == state_digest({'a': a.t().contiguous()})
    assert state_digest({'a': torch.zeros(0)}) == state_digest({'a': torch.zeros(0)})
    assert state_digest({'a': torch.tensor([True, False])}) != state_digest({'a': torch.tensor([True, True])})
