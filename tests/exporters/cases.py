"""Small cascades to export, and the runner of an exported folder."""

from __future__ import annotations

import importlib.util
import sys
import warnings
from pathlib import Path

import numpy as np
import timm
import torch

import timm_cascade
from timm_cascade.thresholds import Calibration


def load_runner(folder: Path):
    """The runner as it lies in an exported folder."""
    spec = importlib.util.spec_from_file_location('exported_runner', folder / 'runner.py')
    module = importlib.util.module_from_spec(spec)
    sys.modules['exported_runner'] = module
    spec.loader.exec_module(module)
    return module


def quietly_export(model, folder, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # not calibrated
        return timm_cascade.export(model, folder, **kwargs)


def small_model():
    torch.manual_seed(0)
    model = timm.create_model(
        'cascade_cifar_resnet20',
        depth=1,  # what an export takes grows with the number of operators
        in_chans=3,
        num_classes=5,
        exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(3, 16, 16), mean=(0.5, 0.4, 0.3), std=(0.25, 0.2, 0.3), crop_pct=0.8),
    ).eval()
    with torch.no_grad():  # batch norms that a wrong folding would show
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d)):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.1)
    model.label_names = ['ant', 'bee', 'cat', 'dog', 'elk']
    return model


def calibrate_by_hand(model, dtype='float32'):
    """A calibration of made-up samples in which confident answers are correct: every rule opens exits."""
    generator = np.random.default_rng(0)
    count = len(model.exits) + 1
    confidence = generator.uniform(0.2, 1, (4000, count)).astype(np.float32)
    final = generator.uniform(size=4000) < 0.9
    correct = np.where(confidence > 0.5, final[:, None], generator.uniform(size=(4000, count)) < 0.5)
    correct[:, -1] = final
    agreement = correct == final[:, None]
    model.calibration = Calibration(
        confidence=confidence,
        correct=correct,
        agreement=agreement,
        stage_cost=model.stage_macs(),
        head_cost=model.head_macs(),
        backbone_cost=float(model.exits[-1].total),
        exits=tuple(p.module for p in model.exits),
        num_classes=model.num_classes,
        heads_hash=model.heads_hash(),
        provenance=dict(dtype=dtype, labelled=True),
    )
    model.table = model.calibration.table()
    return model


def between(model, x, shares=(0.4, 0.7)):
    """Thresholds that lie between two samples' confidences, so that no rounding decides."""
    result = []
    with torch.no_grad():
        for logits, share in zip(model.forward_exits(x)[:-1], shares, strict=True):
            ordered = logits.softmax(1).amax(1).sort(descending=True).values
            at = round(share * len(x))
            result.append(float(ordered[at - 1 : at + 1].mean()))
    return result
