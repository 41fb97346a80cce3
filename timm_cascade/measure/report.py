"""A page that shows what a cascade does on a set of images: one HTML file that needs nothing beside it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from ..data import check_labels, prepare_data
from ..model import CascadeModel
from ..thresholds import Samples, outcome, route
from ..utils.distributed import create_accelerator
from ..utils.files import write_text
from .calibrate import observe
from .curve import CurvePoint, curve_of

__all__ = ['write_report']

TICKS = (0.01, 0.02, 0.05, 0.1, 0.2)  # between lines of the curve
MOST_CLASSES = 40  # rows of the per-class chart and the confusion matrix

STYLE = """
:root { color-scheme: light }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222;
  background: #fff; overflow-wrap: anywhere }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
.wide { overflow-x: auto } svg { display: block } .curve { width: 100%; min-width: 26rem; height: auto }
text { font: 12px system-ui, sans-serif; fill: #333 } .note { color: #555 }
td, th { padding: 0 .8rem .2rem 0; text-align: right } td:first-child, th:first-child { text-align: left }
.row { display: grid; grid-template-columns: 11rem 1fr; gap: 0 1rem; align-items: center; margin: .5rem 0;
  line-height: 1.3 }
.row > :last-child { grid-column: 2; color: #555; font-size: .875rem }
.row i { display: block; height: .6rem; margin: .1rem 0; min-width: 1px }
@media (max-width: 40rem) { .row { grid-template-columns: 1fr } .row > :last-child { grid-column: 1 } }
"""
BLUE, GREY, ORANGE = '#2a6fbb', '#b8bec6', '#d9822b'


def write_report(
    model: CascadeModel, data: Dataset, path: str | Path, *, batch_size: int = 256, workers: int = 0
) -> None:
    """Writes the page: the curve, what each exit earns, images per exit, classes, confusions and the certificate.

    Args:
        model: A calibrated cascade at its active thresholds.
        data: Labelled images that were used neither for training nor for calibration.
        path: The HTML file; replaced atomically.
        batch_size: Images per batch.
        workers: Processes that decode images.

    Raises:
        NotCalibratedError: The cascade has no calibration.
        ValueError: Images without labels.

    Example:
        >>> model.set_max_drop(0.01)
        >>> write_report(model, test, 'report.html')
    """
    data = prepare_data(model, data)
    seen = observe(model, model.forward_exits, data, batch_size, workers, create_accelerator(), 'report')
    labels = seen.label
    check_labels(labels, model.num_classes)
    correct = seen.answer == labels[:, None]
    points = curve_of(model, dict(confidence=seen.confidence, correct=correct))
    exits = route(seen.confidence, model.thresholds)
    chosen = seen.answer[np.arange(len(exits)), exits]
    names = model.label_names or [str(i) for i in range(model.num_classes)]
    stage = np.cumsum(model.stage_macs()) / model.exits[-1].total
    title = str(model.pretrained_cfg['architecture'])
    samples = Samples(seen.confidence, correct, model.stage_macs(), model.head_macs())
    active = outcome(samples, model.thresholds)
    here = active.cost / model.exits[-1].total
    body = [
        f'<h1>{escape(title)}</h1>',
        f'<p>On {len(labels):,} images: the full network answers {active.full_accuracy:.1%} correctly, the cascade at '
        f'its active thresholds {active.accuracy:.1%} with {here:.1%} of the multiply-accumulates.</p>',
        '<h2>What is guaranteed</h2>',
        f'<p>{escape(_certificate(model))}</p>',
        '<h2>Accuracy against cost</h2>',
        _curve(points, stage, correct.mean(0), (here, active.accuracy)),
        '<p class="note">Line: every budget, with the thresholds that the calibration chooses. Circles: one exit alone '
        'answers all images. Square: the active thresholds.</p>',
        '<h2>Images per exit</h2>',
        _exit_bars(model, exits, chosen == labels, correct[:, -1]),
        '<h2>Accuracy per class</h2>',
        _classes(names, labels, correct[:, -1], chosen == labels),
        '<h2>Confusions</h2>',
        _confusion(names, labels, chosen),
    ]
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += f'<title>{escape(title)}</title><style>{STYLE}</style>'
    write_text(path, f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>')


def _certificate(model: CascadeModel) -> str:
    """The promise of the active thresholds in one sentence, where they are an operating point of the table."""
    if model.thresholds.isinf().all():
        return 'All exits are closed: the cascade is its full network, and nothing can be lost.'
    for point in model.table.points_at(model.thresholds) if model.table is not None else ():
        if point.certified and point.max_drop is not None:
            return (
                f'With a probability of at least {point.level:.0%} over the draw of the calibration images, accuracy '
                f'on new images of the same source is at most {100 * point.max_drop:g} points below that of the full '
                f'network. {point.measured_on:,} images were tested for this.'
            )
    return 'The active thresholds are not a certified setting of the threshold table; no loss is excluded.'


def _svg(width: int, height: int, parts: Sequence[str], label: str, style: str = '') -> str:
    """A drawing; where the screen is narrower than it can shrink to, it scrolls by itself."""
    size = f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" class="{style}"'
    return f'<div class="wide"><svg {size} role="img" aria-label="{escape(label)}">{"".join(parts)}</svg></div>'


def _row(name: str, bars: Sequence[tuple[float, str]], note: str) -> str:
    """A name, bars of shares of the width in their colours, and a note; below each other on a phone."""
    drawn = ''.join(f'<i style="width:{100 * share:.1f}%;background:{colour}"></i>' for share, colour in bars)
    return f'<div class="row"><span>{escape(name)}</span><div>{drawn}</div><span>{escape(note)}</span></div>'


def _text(x: float, y: float, text: str, anchor: str = 'start') -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _bar(x: float, y: float, width: float, height: float, colour: str, hint: str = '') -> str:
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0.5):.1f}" height="{height}" fill="{colour}">'
        f'<title>{escape(hint)}</title></rect>'
    )


def _curve(points: Sequence[CurvePoint], stage: np.ndarray, alone: np.ndarray, active: tuple[float, float]) -> str:
    width, height, left, bottom = 720, 380, 60, 50
    low = min(*alone, *(p.accuracy for p in points), active[1])
    high = max(*alone, *(p.accuracy for p in points), active[1])
    margin = max(0.02, 0.08 * (high - low))
    low, high = max(0.0, low - margin), min(1.0, high + margin)
    widest = max(1.0, float(stage[-1]))

    def at(macs: float, accuracy: float) -> tuple[float, float]:
        x = left + macs / widest * (width - left - 20)
        return x, 10 + (high - accuracy) / (high - low) * (height - bottom - 10)

    parts = []
    step = next(s for s in TICKS if (high - low) / s <= 7)
    for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        y = at(0, i * step)[1]
        parts += [
            f'<path d="M{left} {y:.1f}H{width - 20}" stroke="#e6e9ed"/>',
            _text(left - 8, y + 4, f'{100 * i * step:g}%', 'end'),
        ]
    parts += [_text(at(i / 5, low)[0], height - bottom + 18, f'{i / 5:.0%}', 'middle') for i in range(6)]
    line = ' '.join(f'{x:.1f},{y:.1f}' for x, y in (at(p.macs_share, p.accuracy) for p in points))
    parts.append(f'<polyline points="{line}" fill="none" stroke="{BLUE}" stroke-width="2.5"/>')
    for m, (macs, accuracy) in enumerate(zip(stage, alone, strict=True)):
        x, y = at(float(macs), float(accuracy))
        name = 'full network' if m == len(stage) - 1 else f'exit {m}'
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{ORANGE}"><title>{name}: {accuracy:.1%}</title></circle>'
        )
        parts.append(_text(x, y + 18, name, 'end' if m == len(stage) - 1 else 'middle'))
    x, y = at(*active)
    parts.append(_bar(x - 5, y - 5, 10, 10, '#222', f'active: {active[1]:.1%} with {active[0]:.1%} of the MACs'))
    parts.append(_text((left + width) / 2, height - 8, "share of the backbone's multiply-accumulates", 'middle'))
    return _svg(width, height, parts, 'accuracy against cost', 'curve')


def _exit_bars(model: CascadeModel, exits: np.ndarray, correct: np.ndarray, full: np.ndarray) -> str:
    rows, count = [], len(model.exits)
    thresholds = model.thresholds.tolist()
    for m in range(count + 1):
        here = exits == m
        label = 'full network' if m == count else f'exit {m} ({model.exits[m].module})'
        if m < count and np.isinf(thresholds[m]):
            note = 'closed'
        elif not here.any():
            note = 'no image'
        else:
            earned = 100 * (correct[here].mean() - full[here].mean())
            note = f'{here.mean():.1%} of the images, {correct[here].mean():.1%} correct'
            note += '' if m == count else f', {earned:+.1f} points against the full network on them'
        rows.append(_row(label, [(float(here.mean()), BLUE)], note))
    return ''.join(rows)


def _classes(names: Sequence[str], labels: np.ndarray, full: np.ndarray, cascade: np.ndarray) -> str:
    """Two bars per class; of many classes those that change most."""
    rows = []
    for c in np.unique(labels):
        mask = labels == c
        rows.append((str(names[c]), float(full[mask].mean()), float(cascade[mask].mean()), int(mask.sum())))
    more = len(rows) > MOST_CLASSES
    if more:
        rows = sorted(rows, key=lambda r: -abs(r[2] - r[1]))[:MOST_CLASSES]
    shown = [
        _row(name, [(before, GREY), (after, BLUE)], f'{before:.1%} to {after:.1%} ({count} image{"s" * (count > 1)})')
        for name, before, after, count in rows
    ]
    note = f' The {MOST_CLASSES} classes that change most are shown.' if more else ''
    legend = f'<p class="note">Grey: full network. Blue: cascade.{note}</p>'
    return legend + ''.join(shown)


def _confusion(names: Sequence[str], labels: np.ndarray, chosen: np.ndarray) -> str:
    """A matrix for few classes, a list of the most frequent confusions for many."""
    wrong = labels != chosen
    pairs, counts = np.unique(np.stack([labels[wrong], chosen[wrong]], 1), axis=0, return_counts=True)
    if len(names) > MOST_CLASSES:
        order = np.argsort(-counts)[:20]
        rows = ''.join(
            f'<tr><td>{escape(str(names[a]))}</td><td>{escape(str(names[b]))}</td><td>{n}</td></tr>'
            for (a, b), n in zip(pairs[order], counts[order], strict=True)
        )
        return f'<table><tr><th>class</th><th>answered as</th><th>images</th></tr>{rows}</table>'
    size, left, top = 22, 170, 130
    matrix = np.zeros((len(names), len(names)), int)
    np.add.at(matrix, (labels, chosen), 1)
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    short = [str(name) if len(str(name)) <= 24 else f'{str(name)[:23]}…' for name in names]
    parts = []
    for a in range(len(names)):
        parts.append(_text(left - 8, top + 15 + size * a, short[a], 'end'))
        x = left + size * a + 11
        parts.append(f'<g transform="rotate(-50 {x} {top - 6})">{_text(x, top - 6, short[a])}</g>')
        for b in range(len(names)):
            blue = f'rgba(42,111,187,{0.04 + 0.96 * shares[a, b]:.2f})'
            hint = f'{names[a]} answered as {names[b]}: {matrix[a, b]} ({shares[a, b]:.1%})'
            parts.append(_bar(left + size * b, top + size * a, size - 1, size - 1, blue, hint))
    note = '<p class="note">Rows: class. Columns: answer of the cascade. Point at a cell for its count.</p>'
    width, height = left + size * len(names) + 110, top + size * len(names) + 6
    return note + _svg(width, height, parts, 'confusion matrix')
