"""Stage files whose parts can be joined: around a closed exit the runner has one session, without the exit's head."""

import itertools

import numpy as np
import onnx
import pytest
from exporters.cases import load_runner
from helpers import batch_for, near

from timm_cascade.exporters import read_manifest


@pytest.fixture
def cascade(exported):
    return load_runner(exported).Cascade(exported, threads=1)


def test_files_are_whole_onnx_files_and_cut_where_the_manifest_says(exported):
    manifest = read_manifest(exported)
    for entry in manifest.stages:
        data = (exported / entry.file).read_bytes()
        model = onnx.load_from_string(data)
        onnx.checker.check_model(model)
        cuts = [*entry.cuts[1:], len(data)]
        parts = [onnx.GraphProto.FromString(data[a:b]) for a, b in itertools.pairwise(cuts)]
        assert [v.name for part in parts for v in part.input] == entry.inputs
        assert [v.name for part in parts for v in part.output] == [*entry.outputs, 'logits', 'confidence']
        body, head = parts[len(entry.inputs)], parts[len(entry.inputs) + 1]
        assert [*body.node, *head.node] == list(model.graph.node)
        assert set(entry.outputs) <= {name for node in body.node for name in node.output}
        assert {'logits', 'confidence'} <= {name for node in head.node for name in node.output}


def test_names_of_joined_stages_do_not_collide(exported):
    seen = set()
    for entry in read_manifest(exported).stages:
        graph = onnx.load(exported / entry.file).graph
        own = {n for node in graph.node for n in [*node.output, node.name]} | {w.name for w in graph.initializer}
        assert not own & (seen - {'logits', 'confidence'})
        seen |= own


@pytest.mark.parametrize('closed', [[0], [1], [0, 1]])
def test_joined_stages_compute_what_they_do_alone(closed, cascade, calibrated):
    images = batch_for(calibrated, 5).numpy()
    cascade.set_thresholds([2.0, 2.0])  # open, and no sample exits
    assert list(cascade._sessions) == [(0, 0), (1, 1), (2, 2)]
    want = cascade.predict(images)
    cascade.set_thresholds([None if k in closed else 2.0 for k in range(2)])
    assert len(cascade._sessions) == 3 - len(closed)
    got = cascade.predict(images)
    assert near(got.logits, want.logits) and (got.exit == want.exit).all()
    cascade.set_thresholds([None if k in closed else 0.0 for k in range(2)])
    first = next((k for k in range(2) if k not in closed), 2)
    assert (cascade.predict(images).exit == first).all()


def test_a_closed_exits_head_is_left_out(exported, cascade):
    runner = load_runner(exported)
    files = {stage['file']: (exported / stage['file']).read_bytes() for stage in cascade.stages}
    joined = onnx.load_from_string(runner._join(cascade.stages, files))
    assert [v.name for v in joined.graph.input] == ['images']
    assert [v.name for v in joined.graph.output] == ['logits', 'confidence']
    kept = {w.name for w in joined.graph.initializer}
    for stage, data in zip(cascade.stages, files.values(), strict=True):
        head, outputs = stage['cuts'][len(stage['inputs']) + 2 :][:2]
        weights = {w.name for w in onnx.GraphProto.FromString(data[head:outputs]).initializer}
        assert weights and (weights <= kept if stage is cascade.stages[-1] else not weights & kept)


def test_files_without_cuts_still_run(exported, cascade, calibrated):
    images = batch_for(calibrated, 4).numpy()
    cascade.set_thresholds([None, None])
    want = cascade.predict(images)
    for stage in cascade.stages:
        stage['cuts'] = []
    cascade.set_thresholds([None, None])
    assert len(cascade._sessions) == 3
    assert near(cascade.predict(images).logits, want.logits)
    assert np.isinf(cascade.thresholds).all()
