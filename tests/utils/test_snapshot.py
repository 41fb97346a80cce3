"""Every way in which a module's tensors and parts can change, but for values written through `Tensor.data`."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from timm_cascade.utils.snapshot import Snapshot, places_of

CHANGES = {
    'a tensor written to': lambda m: m[0].bias.add_(1),
    'a parameter replaced': lambda m: setattr(m[0], 'weight', nn.Parameter(m[0].weight.clone())),
    'a module replaced': lambda m: m.__setitem__(1, nn.ReLU()),
    'the last module removed': lambda m: m.pop(2),
    'a buffer replaced': lambda m: setattr(m[2], 'running_mean', torch.zeros(3)),
    'a buffer set to None': lambda m: setattr(m[2], 'running_mean', None),
}


@pytest.mark.parametrize('change', CHANGES.values(), ids=CHANGES)
@torch.no_grad()
def test_a_change_is_noticed(change):
    module = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.BatchNorm1d(3)).eval()
    snapshot = Snapshot([*module.parameters(), *module.buffers()], places_of(module))
    module(torch.zeros(2, 2))
    assert not snapshot.changed()
    change(module)
    assert snapshot.changed()
    assert not Snapshot([*module.parameters()], places_of(module)).changed()
