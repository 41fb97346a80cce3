"""Heads that learn from the frozen network's answers, where images have no labels."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import timm_cascade
from timm_cascade.data import create_loader
from timm_cascade.training.trainer import _loss

NONE = torch.full((96,), -1)


@pytest.fixture
def answered(small, images):
    """The cascade with a backbone that gives every class to some image, the images as tensors, and its answers."""
    x = torch.cat([batch for batch, _ in create_loader(small, images)])
    with torch.no_grad():
        small.backbone.fc.weight.mul_(30)
        small.backbone.fc.bias.sub_(small.backbone(x).mean(0))
        answers = small.backbone(x).argmax(1)
    assert len(answers.unique()) == 4
    return small, x, answers


def test_the_loss_of_a_sample_is_by_its_label_or_by_the_answer():
    logits, answer = torch.randn(4, 3), torch.randn(4, 3)
    soft, mine = (F.softmax(x / 4, 1) for x in (answer, logits))
    distance = 16 * (soft * (soft / mine).log()).sum(1)
    entropy = -F.log_softmax(logits, 1)[torch.arange(4), [0, 1, 2, 0]]
    labels = torch.tensor([0, 1, -1, -1])
    expected = entropy[0] + entropy[1] + distance[2] + distance[3]
    torch.testing.assert_close(_loss(logits, labels, answer), expected)
    torch.testing.assert_close(_loss(logits, torch.tensor([0, 1, 2, 0]), answer), entropy.sum())
    assert float(_loss(answer + 3, labels[2:].repeat(2), answer)) == pytest.approx(0, abs=1e-5)


def test_without_labels_heads_learn_what_the_network_says(answered):
    model, x, answers = answered
    data = TensorDataset(x, NONE)
    history = timm_cascade.train_heads(model, data, data, epochs=20, batch_size=32, lr=1e-2)
    assert history[-1]['accuracy'][-1] == 1  # agreement with the network, its own among them
    with torch.no_grad():
        agree = [float((y.argmax(1) == answers).float().mean()) for y in model.forward_exits(x)[:-1]]
    assert min(agree) > 0.8 and agree == pytest.approx(
        history[-1]['accuracy'][:-1], abs=0.011
    )  # one image on the border


def test_an_image_folder_opened_without_labels_is_enough(small, images):
    before = [p.clone() for p in small.heads.parameters()]
    bare = timm_cascade.ImageData(images.images, None, source='quarters')
    timm_cascade.train_heads(small, bare, epochs=1, batch_size=32)
    assert all(not torch.equal(a, b) for a, b in zip(before, small.heads.parameters(), strict=True))


def test_a_classifier_in_training_has_no_answers_to_give(answered):
    model, x, _ = answered
    with pytest.raises(ValueError, match='labels go from -1'):
        timm_cascade.train_heads(model, TensorDataset(x, NONE), epochs=1, classifier=True)
