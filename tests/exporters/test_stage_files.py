"""Stage files give what the model gives, for every layout of features and any number of samples."""

import copy

import numpy as np
import onnx
import pytest
import timm
import torch
from exporters.cases import between, load_runner, quietly_export, small_model
from helpers import batch_for, near

from timm_cascade.exporters.stage_files import _keep_constants
from timm_cascade.exporters.stage_module import FoldedHead, _attention
from timm_cascade.heads import ExitHead


def rounding(model, x):
    """Logits of every exit in double precision, and how far the model's own are from them."""
    exact = copy.deepcopy(model).double().forward_exits(x.double())
    own = model.forward_exits(x)
    return exact, [max(float((a - b).abs().max()), 1e-6 * float(b.std())) for a, b in zip(own, exact, strict=True)]


def every_exit(cascade, images):
    """Logits of each exit when all samples leave there."""
    count = len(cascade.stages)
    result = []
    for k in range(count):
        cascade.set_thresholds([0.0 if i == k else None for i in range(count - 1)])
        out = cascade.predict(images)
        assert (out.exit == k).all()
        result.append(out.logits)
    return result


@torch.no_grad()
@pytest.mark.parametrize(
    'name, size', [pytest.param('test_resnet', {}, marks=pytest.mark.slow), ('test_vit', dict(depth=2))]
)
def test_logits_differ_by_no_more_than_the_networks_own_rounding(name, size, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(f'cascade_{name}', num_classes=7, exits=1, **size).eval()
    cascade = load_runner(quietly_export(model, tmp_path / 'out')).Cascade(tmp_path / 'out', threads=1)
    for n in (5, 1):
        x = batch_for(model, n)
        exact, own = rounding(model, x)
        for got, want, limit in zip(every_exit(cascade, x.numpy()), exact, own, strict=True):
            assert np.abs(got - want.numpy()).max() <= 8 * limit


@torch.no_grad()
@pytest.mark.parametrize('layout', ['NCHW', 'NHWC', 'NLC'])
@pytest.mark.parametrize('hidden', [0, 6])
@pytest.mark.parametrize('size', [(8, 8), (7, 5), (3, 2)], ids=str)  # grids that divide the map, do not, and exceed it
@pytest.mark.parametrize('beside', [False, True], ids=['grid', 'mean and tokens'])
def test_folded_heads_are_the_heads(layout, hidden, size, beside):
    prefix = 2 if layout == 'NLC' else 0
    head = ExitHead(6, size, 4, layout, prefix, grid=4, hidden=hidden, mean=beside, tokens=beside).double().eval()
    head.norm.running_mean.normal_()
    head.norm.running_var.uniform_(0.5, 2)
    head.norm.weight.data.normal_()
    head.norm.bias.data.normal_()
    shape = dict(NCHW=(6, *size), NHWC=(*size, 6), NLC=(size[0] * size[1] + prefix, 6))[layout]
    features = torch.randn(3, *shape, dtype=torch.float64)
    assert near(FoldedHead(head, [1, *shape]).double()(features), head(features), 1e-6)


@torch.no_grad()
@pytest.mark.parametrize(
    'description', [dict(grid=2, norm=False), dict(grid=(1, 2), hidden=6, hidden_norm=True)], ids=str
)
def test_other_heads_fold_too(description):
    head = ExitHead(6, (8, 8), 4, **description).double().eval()
    for norm in (m for m in head.hidden if isinstance(m, torch.nn.BatchNorm1d)):
        for tensor in (norm.running_mean, norm.weight, norm.bias):
            tensor.normal_()
    features = torch.randn(3, 6, 8, 8, dtype=torch.float64)
    assert near(FoldedHead(head, [1, 6, 8, 8]).double()(features), head(features), 1e-6)


@pytest.mark.parametrize('lead', [(), (2,), (2, 3)], ids=str)
@pytest.mark.parametrize('masked', [False, True])
def test_attention_with_any_number_of_batch_dimensions(lead, masked):
    query, key, value = (torch.randn(*lead, 4, n, 8) for n in (5, 6, 6))
    mask = torch.randn(5, 6) if masked else None
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, mask)
    assert torch.allclose(_attention(query, key, value, mask), want, atol=1e-6)


def test_constants_that_the_optimiser_left_out_are_added():
    import onnx_ir as ir

    x, constant = ir.val('x', dtype=ir.DataType.FLOAT, shape=[1]), ir.val('c', dtype=ir.DataType.FLOAT, shape=[1])
    constant.const_value = ir.tensor(np.ones(1, np.float32), name='c')
    node = ir.node('Min', [x, constant])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={'': 18})
    _keep_constants(graph)
    assert graph.initializers['c'] is constant
    _keep_constants(graph)
    assert list(graph.initializers) == ['c']


@torch.no_grad()
def test_weights_are_written_once_and_nothing_of_this_machine(exported, calibrated):
    weights = sum(t.numel() * 4 for t in calibrated.state_dict().values())
    files = sorted(exported.glob('stage_*.onnx'))
    assert len(files) == 3
    assert sum(f.stat().st_size for f in files) < weights + 60_000
    for file in files:
        data = file.read_bytes()
        assert b'timm_cascade/' not in data and b'site-packages' not in data
        onnx.checker.check_model(onnx.load_from_string(data))


@torch.no_grad()
def test_a_backbone_that_hooks_cannot_cut(tmp_path):
    """The batch size is a number that crosses the exit, and a tensor with four rows per sample does too."""
    from helpers import Stubborn

    import timm_cascade

    torch.manual_seed(0)
    model = timm_cascade.CascadeModel(Stubborn().eval(), ['blocks.1'], head='linear').eval()
    cascade = load_runner(quietly_export(model, tmp_path / 'out')).Cascade(tmp_path / 'out')
    assert 4 in {t['rows'] for t in cascade.stages[0]['live']}
    x = torch.randn(6, 3, 16, 16) * torch.linspace(0.3, 3, 6)[:, None, None, None]
    model.thresholds = between(model, x, (0.5,))
    cascade.set_thresholds(model.thresholds.tolist())
    want, got = model.predict(x), cascade.predict(x.numpy())
    assert len(set(got.exit.tolist())) > 1 and (got.exit == want.exit.numpy()).all()
    assert near(got.logits, want.logits)


@torch.no_grad()
def test_half_precision_computes_in_half_and_reads_and_answers_in_single(tmp_path):
    model = small_model()
    folder = quietly_export(model, tmp_path / 'out', fp16=True)
    cascade = load_runner(folder).Cascade(folder)
    assert cascade.manifest['precision'] == 'float16'
    types = {t.data_type for f in folder.glob('stage_*.onnx') for t in onnx.load(f).graph.initializer}
    assert onnx.TensorProto.FLOAT16 in types and onnx.TensorProto.FLOAT not in types
    x = batch_for(model, 4)
    want = model.backbone(x)
    got = cascade.predict(x.numpy())
    assert got.logits.dtype == np.float32
    assert near(got.logits, want, 0.1)
    assert next(model.parameters()).dtype == torch.float32  # the model itself stays as it was


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize('fixed', [1, 4])
def test_fixed_batch_sizes(fixed, tmp_path):
    model = small_model()
    folder = quietly_export(model, tmp_path / 'out', batch_size=fixed)
    shapes = [d.dim_value for d in onnx.load(folder / 'stage_1.onnx').graph.input[0].type.tensor_type.shape.dim]
    assert shapes[0] == fixed and all(shapes)
    x = batch_for(model, 6)
    model.thresholds = between(model, x)
    cascade = load_runner(folder).Cascade(folder)
    cascade.set_thresholds(model.thresholds.tolist())
    want, got = model.predict(x), cascade.predict(x.numpy())
    assert (got.exit == want.exit.numpy()).all() and near(got.logits, want.logits)


@pytest.mark.slow
def test_another_opset(tmp_path):
    folder = quietly_export(small_model(), tmp_path / 'out', opset=20)
    assert {i.version for i in onnx.load(folder / 'stage_0.onnx').opset_import if i.domain == ''} == {20}
    assert load_runner(folder).Cascade(folder).manifest['opset'] == 20
