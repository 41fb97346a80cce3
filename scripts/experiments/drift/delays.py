"""How often a DriftWatch alarms where nothing has changed, how soon where something has, and what it costs.

    python scripts/experiments/drift hub/releases/cascade_cifar_resnet20.fashion_mnist

Confidences of the release on its calibration and test images, and on corrupted test images, are recorded once; streams
are drawn from them with replacement and go through the watch's own processes. A quiet stream and its calibration come
from the same pool, so that they are exchangeable.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

import timm_cascade
from scripts import ROOT, evidence
from scripts.datasets.fashion_mnist import load
from timm_cascade.measure.calibrate import record
from timm_cascade.thresholds import route
from timm_cascade.thresholds.drift import ConfidenceShift, DisagreementRise, histogram_of
from timm_cascade.utils.files import write_text

FALSE_ALARM, SHADOW, SHADOW_ALERT = 0.01, 0.01, 0.25
MAX_DROP = 0.005  # when costs are measured
PROTOTYPE = dict(shift=68, noise=54, rotation=105, darker=362, blur=1825)
LENGTH = 20_000  # of a changed stream, at most
Pool = dict[str, np.ndarray]  # confidence, agreement, correct: (n, M+1)
QUIET = 2_000  # images before the change, in the second series


def _rotated(x: torch.Tensor) -> torch.Tensor:
    angle = torch.tensor(10 * torch.pi / 180)
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0], [angle.sin(), angle.cos(), 0]]).expand(len(x), 2, 3)
    return F.grid_sample(x, F.affine_grid(turn, list(x.shape), align_corners=False), align_corners=False)


def _blurred(x: torch.Tensor, sigma: float = 0.6) -> torch.Tensor:
    row = torch.exp(-(torch.arange(-2, 3) ** 2) / (2 * sigma**2))
    kernel = torch.outer(row, row)
    return F.conv2d(x, (kernel / kernel.sum())[None, None], padding=2)


# of grey images (N, 1, 28, 28) in 0..1
CORRUPTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    'shift': lambda x: F.pad(x, (2, 0, 0, 0))[..., :-2],
    'noise': lambda x: (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1),
    'rotation': _rotated,
    'darker': lambda x: 0.8 * x,
    'blur': _blurred,
}
MEANING = dict(
    shift='two pixels to the right',
    noise='standard deviation 0.1',
    rotation='10 degrees',
    darker='times 0.8',
    blur='Gaussian, 0.6 pixels',
)


def images_of(model: Any, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(n, 1, 28, 28) test images in 0..1, and their labels."""
    data = load(f'test[:{n}]')
    x = torch.stack([torch.from_numpy(np.array(data[i][0], dtype=np.float32)) for i in range(len(data))])
    return x[:, None] / 255, torch.as_tensor(np.array(data.labels))


def normalised(model: Any, x: torch.Tensor) -> torch.Tensor:
    return (x - model.pretrained_cfg['mean'][0]) / model.pretrained_cfg['std'][0]


def recorded(model: Any, n: int) -> dict[str, dict[str, np.ndarray]]:
    """Confidence and agreement on the held-out images (quiet) and on n corrupted test images each."""
    x, y = images_of(model, n)
    found = {}
    for name, corrupt in CORRUPTIONS.items():
        pairs = list(zip(normalised(model, corrupt(x)), y.tolist(), strict=True))
        found[name] = record(model, pairs)  # type: ignore[arg-type]
    test = record(model, load('test'))
    keys = ('confidence', 'agreement', 'correct')
    found['quiet'] = {k: np.concatenate([getattr(model.calibration, k), test[k]]) for k in keys}
    return found


def one_stream(
    pool: dict[str, np.ndarray],
    changed: dict[str, np.ndarray],
    thresholds: np.ndarray,
    quiet: int,
    run: int,
    length: int,
) -> tuple[float, float]:
    """Images after the change until "changed" and until "broken"; inf where it did not come."""
    rng = np.random.default_rng([20, run])
    first, n = int(np.argmax(np.isfinite(thresholds))), 10_000
    calibration = rng.integers(0, len(pool['confidence']), n)

    def disagrees(part: dict[str, np.ndarray], rows: np.ndarray) -> np.ndarray:
        return ~part['agreement'][rows, route(part['confidence'][rows], thresholds)]

    before = rng.integers(0, len(pool['confidence']), quiet)
    after = rng.integers(0, len(changed['confidence']), length)
    shift = ConfidenceShift(histogram_of(pool['confidence'][calibration, first]), rng)
    stream = np.append(pool['confidence'][before, first], changed['confidence'][after, first])
    alarms = np.flatnonzero(shift.update(stream) >= 1 / FALSE_ALARM)
    at = int(alarms[0]) + 1 if len(alarms) else len(stream) + 1
    rise = DisagreementRise(int(disagrees(pool, calibration).sum()), n, FALSE_ALARM)
    shares = np.where(np.arange(1, len(stream) + 1) <= at, SHADOW, SHADOW_ALERT)
    drawn = np.flatnonzero(rng.random(len(stream)) < shares)
    wrong = np.append(disagrees(pool, before), disagrees(changed, after))[drawn]
    broken = np.flatnonzero(rise.update(wrong) >= 2 / FALSE_ALARM) if len(drawn) else drawn
    return (at - quiet if len(alarms) else np.inf, int(drawn[broken[0]]) + 1 - quiet if len(broken) else np.inf)


def cost(model: Any, batch: int, repeats: int) -> dict[str, float]:
    """CPU time of calls over that of `predict(x)`: the median of passes over 256 images (512 in batches).

    watched and shadowed: with a watch that compares only, and with one that shadows 1 %. request: with the active
    `max_drop` as an argument. routed: the router alone, without what `predict` checks and resolves.
    """
    x = normalised(model, images_of(model, 2048)[0])
    parts = [x[i : i + batch] for i in range(0, len(x), batch)]
    step = 256 if batch == 1 else 512 // batch
    model.set_max_drop(MAX_DROP)
    calls: dict[str, Callable[[torch.Tensor], Any]] = dict(
        plain=model.predict,
        watched=partial(model.predict, watch=timm_cascade.DriftWatch(model, shadow=0)),
        shadowed=partial(model.predict, watch=timm_cascade.DriftWatch(model)),
        request=partial(model.predict, max_drop=MAX_DROP),
        routed=lambda x: model._router.route(model.backbone, x, list(model.heads), model._thresholds, model.min_leave),
    )
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    with torch.inference_mode():
        for r in range(repeats + 1):
            at = r * step % len(parts)
            for name in list(calls)[:: 1 if r % 2 else -1]:
                call, began = calls[name], time.process_time()
                for part in parts[at : at + step]:
                    call(part)
                if r:  # the first one warms up
                    seconds[name].append(time.process_time() - began)
    plain = np.array(seconds['plain'])
    return {name: float(np.median(np.array(seconds[name]) / plain)) - 1 for name in calls if name != 'plain'}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('release', type=Path)
    parser.add_argument('--runs', type=int, default=50, help='changed streams of each kind')
    parser.add_argument('--quiet-runs', type=int, default=200)
    parser.add_argument('--quiet-length', type=int, default=100_000)
    parser.add_argument('--images', type=int, default=3000, help='test images that are corrupted')
    parser.add_argument('--cost', action='store_true', help='measure and print only what a watch and a max_drop cost')
    parser.add_argument('--repeats', type=int, default=20, help='passes that costs are measured in')
    parser.add_argument('--out', type=Path, default=ROOT / 'docs')
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = timm_cascade.load(args.release).eval()
    if args.cost:
        print('\n'.join(costs_of({str(b): cost(model, b, args.repeats) for b in (1, 64)})))
        return
    results, pages = evidence(args.out)
    thresholds = model.thresholds.double().numpy()
    pools = recorded(model, args.images)
    quiet = pools.pop('quiet')
    runs = tqdm(range(args.quiet_runs), desc='quiet', disable=None)
    alarms = [one_stream(quiet, quiet, thresholds, 0, r, args.quiet_length) for r in runs]
    rows = []
    for name, changed in pools.items():
        picked = np.arange(len(changed['confidence']))
        early = route(changed['confidence'], thresholds)
        full = changed['correct'][:, -1].mean()
        row: dict[str, Any] = dict(
            change=name, full=full, drop=full - changed['correct'][picked, early].mean(), prototype=PROTOTYPE[name]
        )
        for before in (0, QUIET):
            found = np.array([one_stream(quiet, changed, thresholds, before, r, LENGTH) for r in range(args.runs)])
            row[f'changed_{before}'], row[f'broken_{before}'] = np.median(found, axis=0).tolist()
        rows.append(row)
    costs = {str(b): cost(model, b, args.repeats) for b in (1, 64)}
    content = dict(
        command=f'python scripts/experiments/drift hub/releases/{args.release.name} --runs {args.runs} '
        f'--quiet-runs {args.quiet_runs} --quiet-length {args.quiet_length}',
        quiet_changed=sum(a < np.inf for a, _ in alarms),
        quiet_broken=sum(b < np.inf for _, b in alarms),
        quiet_runs=args.quiet_runs,
        quiet_length=args.quiet_length,
        rows=[{k: None if v == np.inf else v for k, v in row.items()} for row in rows],
        costs=costs,
    )
    write_text(results / 'drift.json', json.dumps(content, indent=1, default=float))
    text = page(content)
    write_text(pages / 'drift.md', text)
    print(text)


def page(content: dict[str, Any]) -> str:
    """The evidence page."""

    def number(value: float | None) -> str:
        return f'{value:,.0f}' if value is not None else f'more than {LENGTH:,}'

    text = [
        '# Drift watch: false alarms, delays, cost',
        '',
        f'    {content["command"]}',
        '',
        f'False alarms in {content["quiet_runs"]} quiet runs of {content["quiet_length"]:,} images at 1 %: '
        f'{content["quiet_changed"]} "changed", {content["quiet_broken"]} "broken".',
        '',
        f'Images of corrupted Fashion-MNIST until a flag is set, median of the runs, where the change comes with the '
        f'first image, and where it comes after {QUIET:,} quiet ones. Accuracy of the full network on the changed '
        f'images, and what the early exits lose against it there. Aim: at most 1.3 times the prototype.',
        '',
        '| change | full network | lost | changed, at once | changed, later | prototype | broken, at once | later |',
        '| --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    for r in content['rows']:
        counts = [number(r[k]) for k in ('changed_0', f'changed_{QUIET}', 'prototype', 'broken_0', f'broken_{QUIET}')]
        what = f'{r["change"]} ({MEANING[r["change"]]})'
        text.append(f'| {what} | {r["full"]:.1%} | {100 * r["drop"]:.2f} | {" | ".join(counts)} |')
    return '\n'.join([*text, '', *costs_of(content['costs']), ''])


def costs_of(costs: dict[str, dict[str, float]]) -> list[str]:
    """Lines on what a watch and a `max_drop` add to the time of `predict`, by batch size."""
    text = [
        f'CPU time over that of `predict(x)` at max_drop {MAX_DROP:.1%}, one thread: the median of passes measured in '
        f'turn. Aim: a watch adds at most 2 %, a `max_drop` at most 1 %. A shadowed image runs the whole network once '
        f'more. Last column: the stages and exits alone, without what `predict` checks and resolves.',
        '',
        '| batch | watch (shadow=0) | watch, 1 % shadowed | max_drop as an argument | without checks |',
        '| --- | --- | --- | --- | --- |',
    ]
    names = ('watched', 'shadowed', 'request', 'routed')
    return text + [f'| {b} | {" | ".join(f"{c[name]:+.1%}" for name in names)} |' for b, c in costs.items()]


if __name__ == '__main__':
    main()
