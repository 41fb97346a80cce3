import json
import logging

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.tracking import GeneralTracker
from helpers import near_weights, trained
from torch import nn
from torch.utils.data import TensorDataset

import timm_cascade
from timm_cascade.data import ImageData


@pytest.fixture
def forget_accelerators():
    """Accelerate's state is one for all: what a test sets there is taken back."""
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_heads_learn_and_the_backbone_does_not_change(small, images, tmp_path):
    before = {k: v.clone() for k, v in small.backbone.state_dict().items()}
    small.train()
    history = timm_cascade.train_heads(small, images, images, epochs=12, batch_size=32, lr=1e-2, work_dir=tmp_path)
    assert small.training
    assert all(torch.equal(v, before[k]) for k, v in small.backbone.state_dict().items())
    assert history[-1]['loss'] < 0.5 * history[0]['loss']
    assert min(history[-1]['accuracy'][:2]) > 0.9 and len(history[-1]['accuracy']) == 3
    assert [json.loads(line) for line in (tmp_path / 'heads.jsonl').read_text().splitlines()] == history


def test_the_same_seed_gives_the_same_heads(small, images):
    state = {k: v.clone() for k, v in small.state_dict().items()}
    results = []
    for _ in range(2):
        small.load_state_dict(state)
        timm_cascade.train_heads(small, images, epochs=2, batch_size=32)
        results.append({k: v.clone() for k, v in small.heads.state_dict().items()})
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])


def test_wrong_labels_leave_the_heads_as_they_were(small):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    data = TensorDataset(torch.randn(8, 1, 16, 16), torch.tensor([0, 1, 2, 3, 4, 0, 1, 2]))
    with pytest.raises(ValueError, match='num_classes=5'):
        timm_cascade.train_heads(small, data, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_a_loss_that_is_not_finite_leaves_the_heads_as_they_were(small):
    before = {k: v.clone() for k, v in small.state_dict().items()}
    data = TensorDataset(torch.full((8, 1, 16, 16), float('nan')), torch.zeros(8, dtype=torch.long))
    with pytest.raises(ValueError, match='loss is nan'):
        timm_cascade.train_heads(small, data, epochs=1)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


def test_training_drops_a_calibration_for_the_old_heads(small, images):
    timm_cascade.calibrate(small, images)
    small.thresholds = [0.5, 0.5]
    timm_cascade.train_heads(small, images, epochs=1)
    assert small.calibration is None and small.table is None and not small.any_open


def test_grey_images_for_a_colour_model():
    import timm

    model = timm.create_model('cascade_test_resnet', num_classes=2, exits=1)
    data = ImageData(np.random.default_rng(0).integers(0, 255, (6, 20, 20), dtype=np.uint8), [0, 1] * 3, ['a', 'b'])
    assert np.isfinite(timm_cascade.train_heads(model, data, epochs=1)[0]['loss'])


# ---- the backbone's classifier


@pytest.mark.parametrize('cache', [True, False])
def test_a_new_classifier_is_trained_and_nothing_else_of_the_backbone(small, images, tmp_path, cache):
    before = {k: v.clone() for k, v in small.backbone.state_dict().items()}
    small.label_names = images.class_names
    history = timm_cascade.train_heads(
        small, images, images, epochs=12, batch_size=32, lr=1e-2, classifier=True, cache=cache
    )
    after = small.backbone.state_dict()
    assert {k for k in after if not torch.equal(after[k], before[k])} == {'fc.weight', 'fc.bias'}
    assert len(history[-1]['train_accuracy']) == 3 and history[-1]['accuracy'][-1] > 0.9
    transform = timm_cascade.data.eval_transform(small)
    x = torch.stack([transform(images[i][0]) for i in range(96)])
    answers = small(x).argmax(1)
    assert (answers == torch.from_numpy(images.labels)).float().mean() == pytest.approx(
        history[-1]['accuracy'][-1], abs=0.011
    )
    timm_cascade.save(small, tmp_path)
    again = timm_cascade.load(tmp_path).eval()
    assert torch.equal(again(x), small(x)) and again.label_names == list('abcd')


def test_a_classifier_that_is_kept_is_kept(small, images):
    before = {k: v.clone() for k, v in small.backbone.state_dict().items()}
    history = timm_cascade.train_heads(small, images, images, epochs=1)
    assert len(history[0]['train_accuracy']) == 2
    assert all(torch.equal(v, before[k]) for k, v in small.backbone.state_dict().items())


@pytest.mark.parametrize('name', ['test_vit', 'test_convnext', 'test_efficientnet', 'test_nfnet', 'resnetv2_18'])
def test_classifiers_of_other_families(name):
    size = dict(pretrained_cfg_overlay=dict(input_size=(3, 64, 64))) if name == 'resnetv2_18' else {}
    model = timm.create_model(f'cascade_{name}', num_classes=3, exits=1, **size)  # of resnetv2 a 1x1 convolution
    data = ImageData(np.random.default_rng(0).integers(0, 255, (6, 20, 20), dtype=np.uint8), [0, 1, 2] * 2, list('abc'))
    before = {k: v.clone() for k, v in model.backbone.state_dict().items()}
    history = timm_cascade.train_heads(model, data, data, epochs=3, classifier=True)
    report = timm_cascade.evaluate(model, data)  # what was trained on stored features is what the backbone does
    assert report.full_accuracy == pytest.approx(history[-1]['accuracy'][-1], abs=0.011)
    after = model.backbone.state_dict()
    classifier = {id(p) for p in model.get_classifier().parameters()}
    names = {n for n, p in model.backbone.named_parameters() if id(p) in classifier}
    assert len(names) == 2 and {k for k in after if not torch.equal(after[k], before[k])} == names


@pytest.mark.parametrize(
    'classifier, message',
    [
        (lambda n: nn.Sequential(nn.Linear(n, 4)), 'is Sequential, not one linear'),
        (None, 'does more than its classifier'),
    ],
)
def test_a_classifier_that_is_no_linear_layer(small, images, classifier, message):
    if classifier:
        small.backbone.fc = classifier(64)
    else:
        forward_head = small.backbone.forward_head
        small.backbone.forward_head = lambda x, pre_logits=False: forward_head(x, pre_logits) * (1 + pre_logits)
    before = {k: v.clone() for k, v in small.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        timm_cascade.train_heads(small, images, epochs=1, classifier=True)
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


# ---- what is wrong with data is said before anything is written


def test_data_that_cannot_be_learned(small, images, tmp_path):
    def data(labels, names):
        return ImageData(images.images[: len(labels)], labels, names, 'pictures', 'train')

    small.label_names = list('abcd')
    before = {k: v.clone() for k, v in small.state_dict().items()}
    for wrong, message in (
        (data([0, 0], ['a']), "one class only, 'a'"),
        (data([0, 2], list('abcd')), 'no image of 2 of its 4 classes: b, d'),
        (data([0, 1, 2, 3], list('abde')), "class 3 is 'e' there and 'd' here"),
        (data([0, 1, 2, 3, 4], list('abcde')), '5 classes, the model 4'),
    ):
        with pytest.raises(ValueError, match=message):
            timm_cascade.train_heads(small, wrong, epochs=1, work_dir=tmp_path / 'work')
    with pytest.raises(ValueError, match="class 0 is 'x' there"):
        timm_cascade.train_heads(small, images, data([0, 1, 2, 3], list('xbdc')), epochs=1, work_dir=tmp_path / 'work')
    assert not list(tmp_path.iterdir())
    assert all(torch.equal(v, before[k]) for k, v in small.state_dict().items())


# ---- Accelerate


def test_accumulated_gradients_are_those_of_the_larger_batch(small, images, forget_accelerators):
    _, whole = trained(small, images, epochs=3, batch_size=40)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    history, parts = trained(small, images, epochs=3, batch_size=10, accelerator=accelerator)
    assert near_weights(parts, whole, small.state_dict())
    assert len(history) == 3


def test_mixed_precision(small, images, forget_accelerators):
    _, exact = trained(small, images, epochs=2)
    AcceleratorState._reset_state(True)
    history, mixed = trained(small, images, images, epochs=2, accelerator=Accelerator(cpu=True, mixed_precision='bf16'))
    start = small.state_dict()
    assert not near_weights(mixed, exact, start, 1e-4) and near_weights(mixed, exact, start, 2.0)
    assert all(v.dtype != torch.bfloat16 for v in mixed.values()) and np.isfinite(history[-1]['loss'])


class Kept(GeneralTracker):
    name, requires_logging_directory = 'kept', False

    def __init__(self):
        super().__init__()
        self.lines = []

    @property
    def tracker(self):
        return self.lines

    def store_init_configuration(self, values):
        pass

    def log(self, values, step, **_):
        self.lines.append((step, values))


def test_trackers_get_one_number_a_name(small, images, forget_accelerators):
    tracker = Kept()
    accelerator = Accelerator(cpu=True, log_with=tracker)
    accelerator.init_trackers('x')
    history = timm_cascade.train_heads(small, images, images, epochs=2, accelerator=accelerator)
    assert [step for step, _ in tracker.lines] == [1, 2]
    _, values = tracker.lines[-1]
    assert values['loss'] == history[-1]['loss'] and values['accuracy/exit_2'] == history[-1]['accuracy'][2]


def test_it_says_on_how_many_processes_it_runs(small, images, caplog):
    caplog.set_level(logging.INFO, 'timm_cascade')
    timm_cascade.train_heads(small, images, epochs=1)
    assert 'training on 1 process (cpu)' in caplog.messages
