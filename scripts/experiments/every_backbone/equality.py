"""Whether a cascade answers as its backbone does: samples that go on get the logits they get in the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import timm_cascade
from timm_cascade.backbone import ExitPoint, candidates
from timm_cascade.inference.router import Router

# of the logits' standard deviation; a wrong cut is off by about 1
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
ROUNDINGS = 8  # other batches round otherwise, and the difference of two has twice the rounding of one


def randomise(model: nn.Module, images: Tensor) -> None:
    """Weights that let every part of the network matter.

    Fresh timm models have layers that add nothing (zero-initialised classifiers, layer scales of 1e-6): a wrong cut
    there would not show. Batch norm gets the statistics of `images`, which keeps deep networks finite.
    """
    with torch.no_grad():
        for p in model.parameters():
            if p.numel() > 1 and p.is_floating_point() and float(p.std()) < 1e-3:
                p.add_(torch.randn_like(p).mul_(0.02 if p.ndim > 1 else 0.1))
                if p.ndim == 1 and float(p.mean().abs()) < 1e-3:
                    p.add_(0.1)
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if norms:
        momenta = [m.momentum for m in norms]
        for m in norms:
            m.momentum = 1.0
            m.train()
        with torch.no_grad():
            model(images)
        for m, momentum in zip(norms, momenta, strict=True):
            m.momentum = momentum
            m.eval()


def batch(input_size: tuple[int, ...], n: int = 3) -> Tensor:
    """Random images of different contrast and brightness."""
    contrast = torch.linspace(0.3, 2, n)[:, None, None, None]
    return torch.randn(n, *input_size) * contrast + torch.linspace(-1, 1, n)[:, None, None, None]


def _stub(
    leaving: Callable[[int], list[int]],
    classes: int,
    head: Callable[[Tensor], Tensor] | None = None,
    seen: list[Tensor] | None = None,
) -> Callable[[Tensor], Tensor]:
    """A head that lets rows `leaving(rows)` exit and no others."""

    def answer(features: Tensor) -> Tensor:
        if head is not None and seen is not None:
            seen.append(head(features))
        logits = features.new_zeros(len(features), classes)
        logits[leaving(len(features)), 0] = 100
        return logits

    return answer


@torch.no_grad()
def check(model: timm_cascade.CascadeModel, images: Tensor, quick: bool = False) -> float:
    """Largest error of survivors' logits, over the logits' standard deviation.

    Two samples survive each exit, and then one; with `quick` two the first exit, one the second, and so on.

    Raises:
        ValueError: The backbone answers every image alike, or nothing finite: the check would be blind.
    """
    want = model.backbone(images)
    every = model.forward_exits(images)
    scale = float(want.std())
    if not torch.isfinite(want).all() or not float(want.std(0).mean()) > 1e-3 * scale:
        raise ValueError(f'blind: logits of std {scale:.2g} that do not depend on the image')
    count, n, classes = len(model.exits), len(images), model.num_classes
    worst = float((every[-1] - want).abs().max()) / scale

    def run(stubs: list, open_exits: list[float]) -> Any:
        return model._router.route(model.backbone, images, stubs, open_exits)

    for i in range(count):
        for keep in ([0, 2], [1]) if not quick else ([[0, 2], [1]][i % 2],):
            gone = [k for k in range(n) if k not in keep]
            stubs: list = [None] * count
            stubs[i] = _stub(lambda rows, gone=gone: gone, classes)
            out = run(stubs, [0.9 if k == i else float('inf') for k in range(count)])
            assert (out.exit == count).nonzero().flatten().tolist() == keep, out.exit
            worst = max(worst, float((out.logits[keep] - want[keep]).abs().max()) / scale)
    seen: list[list[Tensor]] = [[] for _ in range(count)]
    alive = [list(range(n))]
    for _ in range(count):
        alive.append(alive[-1][:-1] if len(alive[-1]) > 1 else alive[-1])
    out = run(
        [
            _stub(lambda rows: [rows - 1] if rows > 1 else [], classes, head, s)
            for head, s in zip(model.heads, seen, strict=True)
        ],
        [0.9] * count,
    )
    keep = alive[-1]
    assert (out.exit == count).nonzero().flatten().tolist() == keep, out.exit
    worst = max(worst, float((out.logits[keep] - want[keep]).abs().max()) / scale)
    for i, (s, rows) in enumerate(zip(seen, alive, strict=False)):  # and the features are the whole batch's
        worst = max(worst, float((s[0] - every[i][rows]).abs().max() / every[i].std().clamp_min(1e-6)))
    for i in (0, count - 1):
        stubs = [None] * count
        stubs[i] = _stub(lambda rows: list(range(rows)), classes)
        out = run(stubs, [0.9 if k == i else float('inf') for k in range(count)])
        assert out.exit.tolist() == [i] * n, out.exit
    return worst


@torch.no_grad()
def _rounding(model: timm_cascade.CascadeModel, images: Tensor) -> float:
    """How far the plain network is from its float64 answers, over the logits' standard deviation."""
    rounded = model.backbone(images)
    exact = model.backbone.double()(images.double())
    model.backbone.float()
    return float((rounded - exact).abs().max() / exact.std())


def judge(model: timm_cascade.CascadeModel, images: Tensor, quick: bool = False) -> tuple[bool, float, float | None]:
    """Whether they are equal, and the error in float32 and, where that is more than usual, in float64.

    How much of the error is rounding hangs on the network (the plain inception_v4 with random weights is 4e-3 off its
    own float64 answers), on the processor and on the number of threads; float64 tells rounding from a wrong cut.
    With `quick` an error of a few times what the plain network's rounding makes is told to be rounding first.
    """
    error = check(model, images, quick)
    if error <= TOLERANCE[torch.float32]:
        return True, error, None
    if quick and error <= ROUNDINGS * _rounding(model, images) < 0.1:
        return True, error, None
    exact = check(model.double(), images.double(), quick)
    model.float()
    return exact <= TOLERANCE[torch.float64], error, exact


def _as_picture(features: Tensor, point: ExitPoint) -> Tensor:
    if point.layout == 'NHWC':
        return features.permute(0, 3, 1, 2)
    if point.layout == 'NLC':
        return features[:, point.prefix_tokens :].transpose(1, 2).unflatten(2, point.size)
    return features


@torch.no_grad()
def layout_seen(model: timm_cascade.CascadeModel, images: Tensor) -> str:
    """How many places' layouts agree by value with timm's forward_intermediates, of those that it returns too."""
    try:
        pictures = model.backbone.forward_intermediates(images[:1], output_fmt='NCHW', intermediates_only=True)
    except Exception as e:
        return f'no forward_intermediates ({type(e).__name__})'
    points = candidates(model.backbone)
    router = Router(model.backbone, points)
    collected, _ = router.collect(model.backbone, images[:1], [torch.clone] * len(points))
    router.remove_hooks()
    counts = {'agree': 0, 'differ': 0, 'without grid': 0}
    for features, point in zip(collected, points, strict=True):
        values = _as_picture(features, point)
        for picture in pictures:
            if picture.shape == values.shape and torch.allclose(picture, values, atol=1e-5):
                counts['agree'] += 1
                break
            if picture.numel() == values.numel() and torch.allclose(  # the same numbers in another order
                picture.flatten().sort().values, values.flatten().sort().values, atol=1e-5
            ):
                counts['without grid' if 1 in point.size else 'differ'] += 1
                break
    return ', '.join(f'{n} {what}' for what, n in counts.items() if n) or 'none returned'
