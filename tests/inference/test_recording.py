"""Tracing and exporting: never a graph with one route baked in; replaced modules keep their exits."""

import io

import pytest
import torch
from helpers import near
from torch import nn

from timm_cascade.errors import RoutingError

X = torch.zeros(2, 1, 16, 16)
WAYS = {
    'jit': lambda m: torch.jit.trace(m, X),
    'export': lambda m: torch.export.export(m, (X,), strict=False).module(),  # the default since torch 2.7
    'strict': lambda m: torch.export.export(m, (X,), strict=True).module(),
    'fx': lambda m: torch.fx.symbolic_trace(m),
}


@torch.no_grad()
@pytest.mark.parametrize('way', WAYS)
def test_open_exits_are_refused(small, way):
    small.thresholds = [0.3, None]
    with pytest.raises(Exception, match=r'timm_cascade\.export') as caught:
        WAYS[way](small)
    assert way == 'strict' or isinstance(caught.value, RoutingError)


@torch.no_grad()
@pytest.mark.parametrize('way', ['jit', 'export'])
def test_closed_exits_are_the_backbone(small, way):
    x = torch.randn(2, 1, 16, 16)
    small.thresholds = [0.3, 0.3]
    small.thresholds = None
    assert near(WAYS[way](small)(x), small(x))


@torch.no_grad()
def test_the_old_onnx_exporter_writes_no_file(small):
    small.thresholds = [0.3, None]
    file = io.BytesIO()
    with pytest.raises(RoutingError, match=r'timm_cascade\.export'):
        torch.onnx.export(small, (X,), file, dynamo=False)
    assert not file.getvalue()


@torch.no_grad()
def test_replaced_modules_keep_their_exits(small):
    x = torch.randn(5, 1, 16, 16)
    small.thresholds = [None, 0.0]
    want = small.predict(x)
    small.backbone.layer2 = nn.Sequential(*small.backbone.layer2)
    assert torch.equal(small.predict(x).exit, want.exit) and want.exit.tolist() == [1] * 5
    small.backbone.layer1 = nn.Sequential(*small.backbone.layer1)
    assert len(small.forward_exits(x)) == 3
    small.backbone.layer1 = nn.Sequential(*small.backbone.layer1)
    assert [o.exit.tolist() for o in small.stream([x])] == [[1] * 5]
    del small.backbone.layer1
    with pytest.raises(RoutingError, match='no longer has the modules'):
        small.forward_exits(x)
