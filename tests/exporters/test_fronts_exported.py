"""Networks in front are stages like any other: in the stage files, for the runner, and in the single file."""

import onnxruntime as ort
import pytest
import timm
import torch
from exporters.cases import between, load_runner, quietly_export
from helpers import batch_for, near

SIZE = dict(input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3))
COLOUR = dict(num_classes=5, depth=1, pretrained_cfg_overlay=SIZE)
SMALL = {**COLOUR, 'pretrained_cfg_overlay': {**SIZE, 'input_size': (3, 12, 12), 'mean': (0.1, 0.2, 0.3)}}


@pytest.mark.parametrize(
    'front, exits',
    [
        pytest.param('cifar_resnet20@11', 1, marks=pytest.mark.slow),  # its weights are the backbone's, as one of two
        (lambda: timm.create_model('cifar_resnet20', width=8, **COLOUR), 0),  # at the backbone's own size
        (lambda: [timm.create_model('cifar_resnet20', width=8, **SMALL), 'cifar_resnet20@9'], 1),
    ],
    ids=['shared', 'same size', 'two'],
)
def test_a_front_is_the_first_stage(front, exits, tmp_path):
    front = front() if callable(front) else front
    model = timm.create_model('cascade_cifar_resnet20', front=front, exits=exits, **COLOUR).eval()
    pictures = batch_for(model, 9)
    model.thresholds = between(model, pictures, shares=(0.3, 0.5, 0.7)[: len(model.exits)])
    folder = quietly_export(model, tmp_path / 'cascade', single_file='batch')
    with torch.no_grad():
        want, every = model.predict(pictures), model.forward_exits(pictures)
    assert len(set(want.exit.tolist())) > 1
    stage = ort.InferenceSession(str(folder / 'stage_0.onnx'))
    logits, _ = stage.run(['logits', 'confidence'], {'images': pictures.numpy()})
    assert near(logits, every[0])
    got = load_runner(folder).Cascade(folder, threads=1).predict(pictures.numpy())
    assert (got.exit == want.exit.numpy()).all() and near(got.logits, want.logits)
    whole = ort.InferenceSession(str(folder / 'cascade_batch.onnx'))
    logits, exits, _ = whole.run(None, {'images': pictures.numpy()})
    assert (exits == want.exit.numpy()).all() and near(logits, want.logits)
    single = ort.InferenceSession(str(folder / 'cascade.onnx'))
    for i in range(3):
        logits, exit, _ = single.run(None, {'images': pictures.numpy()[i : i + 1]})
        assert exit[0] == want.exit[i] and near(logits[0], want.logits[i])
