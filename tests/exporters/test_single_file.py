"""One file with all stages: it answers as the stage files do, and later stages really do not run."""

import json

import numpy as np
import onnxruntime as ort
import pytest
from exporters.cases import between, load_runner
from helpers import batch_for, near


@pytest.fixture
def cascade(exported):
    return load_runner(exported).Cascade(exported, threads=1)


def session(path, **options):
    settings = ort.SessionOptions()
    settings.log_severity_level = 3  # a default that can be overridden is not a mistake
    for name, value in options.items():
        setattr(settings, name, value)
    return ort.InferenceSession(str(path), settings)


def test_one_image_at_a_time(exported, calibrated, cascade):
    pictures = batch_for(calibrated, 9).numpy()
    thresholds = np.float32(between(calibrated, batch_for(calibrated, 9)))
    single = session(exported / 'cascade.onnx')
    for values in (thresholds, np.float32([0, 0]), np.float32([np.inf, np.inf])):
        cascade.set_thresholds(values.tolist())
        want = cascade.predict(pictures)
        for i in range(9):
            logits, exits, confidence = single.run(None, {'images': pictures[i : i + 1], 'thresholds': values})
            assert exits.tolist() == [want.exit[i]]
            assert near(logits[0], want.logits[i])
            assert near(confidence, want.confidence[i : i + 1])


@pytest.mark.parametrize('n', [1, 9])
def test_batches(n, exported, calibrated, cascade):
    pictures = batch_for(calibrated, 9)
    thresholds = np.float32(between(calibrated, pictures))
    single = session(exported / 'cascade_batch.onnx')
    images = pictures.numpy()[:n]
    for values in (thresholds, np.float32([0, 0]), np.float32([np.inf, np.inf])):
        cascade.set_thresholds(values.tolist())
        want = cascade.predict(images)
        logits, exits, confidence = single.run(None, {'images': images, 'thresholds': values})
        assert (exits == want.exit).all() and near(logits, want.logits)
        assert near(confidence, want.confidence)


def test_the_active_thresholds_are_the_default(exported, calibrated, cascade):
    images = batch_for(calibrated, 4).numpy()
    want = cascade.predict(images)
    (exits,) = session(exported / 'cascade_batch.onnx').run(['exit'], {'images': images})
    assert (exits == want.exit).all()


@pytest.mark.parametrize('name', ['cascade.onnx', 'cascade_batch.onnx'])
def test_later_stages_do_not_run(name, exported, calibrated, tmp_path):
    """Counted by onnxruntime's own profile of the nodes that it executed."""
    images = batch_for(calibrated, 1).numpy()

    def convolutions(values):
        single = session(
            exported / name,
            enable_profiling=True,
            profile_file_prefix=str(tmp_path / 'profile'),
            graph_optimization_level=ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        )
        single.run(None, {'images': images, 'thresholds': np.float32(values)})
        with open(single.end_profiling(), encoding='utf-8') as file:
            events = json.load(file)
        ran = [e['args'] for e in events if e.get('cat') == 'Node' and 'kernel_time' in e['name']]
        return sum(a['op_name'] == 'Conv' for a in ran)

    count = [convolutions(v) for v in ([0, 0], [np.inf, 0], [np.inf, np.inf])]
    assert 0 < count[0] < count[1] < count[2]
