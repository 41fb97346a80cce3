"""What tests of several rooms share."""

from __future__ import annotations

import copy
import gzip
import json
import struct
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import timm_cascade
from timm_cascade.cli.main import main
from timm_cascade.data import ImageData
from timm_cascade.inference.batch import confidence
from timm_cascade.utils import timm_models

ROOT = Path(__file__).parent.parent


def batch_for(model: torch.nn.Module, n: int = 6) -> torch.Tensor:
    """Random images of the size the model wants; of different contrast, so that confidences differ."""
    size = timm.data.resolve_model_data_config(model)['input_size']
    return torch.randn(n, *size) * torch.linspace(0.2, 3, n)[:, None, None, None]


def needs(*names: str) -> pytest.MarkDecorator:
    """Skips a test of models that this version of timm does not have yet."""
    missing = [name for name in names if not timm.is_model(name)]
    return pytest.mark.skipif(bool(missing), reason=f'timm {timm.__version__} has no {", ".join(missing)}')


def as_png(array: np.ndarray, path: Path) -> None:
    Image.fromarray(array).save(path)


def save_as_timm_does(model: nn.Module, folder: str | Path, **kwargs) -> None:
    """timm's own saving, which before 1.0.31 has to be told what the model was built with."""
    told = {} if timm_models.newer else dict(model_args=model._model_args)
    timm.models.save_for_hf(model, str(folder), **told, **kwargs)


def write_idx(path, array):
    with gzip.open(path, 'wb') as f:
        f.write(struct.pack(f'>BBBB{array.ndim}I', 0, 0, 8, array.ndim, *array.shape) + array.tobytes())


def near(got, want, tolerance=1e-3):
    """Equal up to rounding, measured by how much the rows of `want` differ from each other.

    Another row is off by about 1 of that. float32 rounding is some 1e-6 to 1e-5 of it in the networks of the tests, by
    processor, batch size and thread count.
    """
    got, want = (torch.as_tensor(t).detach().double() for t in (got, want))
    if got.shape != want.shape or not want.numel():
        return got.shape == want.shape
    spread = want.std(0).mean() if len(want) > 1 else want.abs().mean()
    return bool((got - want).abs().max() <= tolerance * spread.clamp_min(1e-2 * want.abs().max()))


def near_weights(got, want, start, tolerance=0.05):
    """Equal up to rounding, measured by how far training moved the tensors from `start`."""
    moved = {k: float((want[k].double() - start[k].double()).abs().max()) if k in start else 1.0 for k in want}
    return got.keys() == want.keys() and all(
        float((got[k].double() - want[k].double()).abs().max()) <= tolerance * moved[k] for k in want
    )


def rounding(model, x):
    """Largest error of every exit's logits by the precision that `model` computes in, beside float32."""
    exact = copy.deepcopy(model).float().forward_exits(x.float())
    return max(float((a.float() - b).abs().max()) for a, b in zip(model.forward_exits(x), exact, strict=True))


def between(values):
    """A number in a wide gap of `values` that has many on either side: rounding moves nothing past it."""
    ordered = values.detach().cpu().double().sort().values
    gaps = ordered.diff()
    if not len(gaps) or gaps.max() == 0:
        return 1.01 * float(ordered[-1])
    above = torch.arange(1, len(ordered))
    best = (gaps.sqrt() * torch.minimum(above, len(ordered) - above)).argmax()
    return float((ordered[best] + ordered[best + 1]) / 2)


def quarters():
    """96 grey 16x16 images of 4 classes that a head can tell apart: a bright quarter on noise."""
    generator = np.random.default_rng(0)
    labels = generator.integers(0, 4, 96)
    pictures = generator.integers(0, 120, (96, 16, 16), dtype=np.uint8)
    for picture, label in zip(pictures, labels, strict=True):
        y, x = 8 * (label // 2), 8 * (label % 2)
        picture[y : y + 8, x : x + 8] += 100
    return ImageData(pictures, labels, ['a', 'b', 'c', 'd'], 'quarters', 'all')


def trained(model, *args, **kwargs):
    """History and weights; the model is left as it was."""
    state = {k: v.clone() for k, v in model.state_dict().items()}
    history = timm_cascade.train_heads(model, *args, **kwargs)
    after = {k: v.clone() for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    return history, after


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))

    def forward(self, x):
        return x + self.inner(self.norm(x))


class Stubborn(nn.Module):
    """Keeps the batch size in a local, the first block's output for the end, and works on 4 rows a sample between."""

    def __init__(self, width=16, num_classes=5):
        super().__init__()
        self.num_classes, self.num_features = num_classes, width
        self.pretrained_cfg = dict(architecture='stubborn', input_size=(3, 16, 16))
        self.embed = nn.Conv2d(3, width, 4, 4)
        self.blocks = nn.ModuleList(Block(width) for _ in range(5))
        self.rows = Block(width)
        self.register_buffer('shift', torch.randn(1, 16, width), persistent=False)
        self.head = nn.Linear(width, num_classes)

    def forward(self, x):
        n = x.shape[0]
        x = self.embed(x).flatten(2).transpose(1, 2) + self.shift
        first = None
        rows = x.reshape(n * 4, 4, -1)
        for i, block in enumerate(self.blocks):
            x = block(x.reshape(n, 16, -1))
            rows = self.rows(rows) + i
            first = x if first is None else first
        return self.head((x + first + rows.reshape(n, 16, -1)).mean(1))

    def reset_classifier(self, num_classes):
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes)


def whole(results):
    return [torch.cat(column) for column in zip(*results, strict=True)]


def same(results, want):
    index, logits, exits, found = whole(results)
    assert sorted(index.tolist()) == list(range(len(want.exit)))
    assert torch.equal(exits, want.exit[index])
    assert near(logits, want.logits[index]) and near(found, want.confidence[index])


def split_thresholds(model, x):
    """Thresholds at which some of the images that are left go out at each exit."""
    thresholds, left = list[float](), torch.ones(len(x), dtype=torch.bool, device=x.device)
    with torch.no_grad():
        for found in [confidence(e) for e in model.forward_exits(x)[:-1]]:
            thresholds.append(between(found[left]))
            left &= found < thresholds[-1]
    return thresholds


def run(capsys, *argv):
    status = main([*map(str, argv), '--json'])
    out = capsys.readouterr()
    return status, (json.loads(out.out) if out.out else None), out.err
