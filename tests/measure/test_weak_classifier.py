"""Where the heads know the labels better than the backbone's own classifier, the user is told what to do."""

import logging

import pytest
import timm
import torch
from torch.utils.data import TensorDataset

import timm_cascade
from timm_cascade.data import weak_backbone


@pytest.mark.parametrize(
    'accuracy, n, words',
    [
        ((0.70, 0.80, 0.78), 100, None),  # two points on 100 images are within the error
        ((0.70, 0.80, 0.78), 10_000, 'classifier=True'),
        ((0.80, 0.79, 0.805), 10_000, None),
        ((0.70, 0.80, 0.20), 1_000, 'on other classes'),
        ((0.80,), 1_000, None),
    ],
)
def test_a_classifier_that_is_weaker_than_a_head_is_named(accuracy, n, words):
    text = weak_backbone(accuracy, n)
    assert (text is None) if words is None else (words in text and '--classifier train' in text)


@pytest.mark.parametrize('label, warned', [(1, True), (0, False)])
def test_evaluate_says_that_the_exits_beat_the_classifier(label, warned, caplog):
    model = timm.create_model('cascade_test_resnet', exits=1, num_classes=2).eval()
    with torch.no_grad():
        for linear, answer in ((model.heads[0].fc, 1), (model.backbone.get_classifier(), 0)):
            linear.weight.zero_()
            linear.bias.copy_(torch.nn.functional.one_hot(torch.tensor(answer), 2).float())
    model.thresholds = [0.0]
    data = TensorDataset(torch.randn(8, 3, 64, 64), torch.full((8,), label))
    with caplog.at_level(logging.WARNING):
        timm_cascade.evaluate(model, data)
    assert ('--classifier train' in caplog.text) == warned
