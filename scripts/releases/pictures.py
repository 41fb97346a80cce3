"""The pictures that demo and release draw."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

COLOURS = {'per_exit': '#b8860b', 'joint': '#4878a8', 'certified': '#2e7d32'}
LABELS = {'per_exit': "per_exit (the paper's rule)", 'joint': 'joint', 'certified': 'certified'}


def plot_tradeoff(report: dict[str, Any], path: Path, title: str) -> None:
    """Accuracy against average MACs, one line per rule, each point marked with the drop that was asked."""
    figure, axes = plt.subplots(figsize=(7, 4.5), dpi=150)
    full = 100 * report['rows'][0]['full_accuracy']
    axes.axhline(full, color='0.6', lw=1, ls='--', zorder=0)
    axes.plot(100, full, 'o', color='black')
    axes.annotate(f'backbone {full:.2f} %', (100, full), (-4, 6), textcoords='offset points', ha='right', fontsize=9)
    for rule in dict.fromkeys(row['rule'] for row in report['rows']):
        rows = sorted((r for r in report['rows'] if r['rule'] == rule), key=lambda r: r['macs_share'])
        x, y = [100 * r['macs_share'] for r in rows], [100 * r['accuracy'] for r in rows]
        axes.plot(x, y, 'o-', color=COLOURS[rule], label=LABELS[rule], ms=5)
        asked: dict[tuple[float, float], list[float]] = {}  # settings that come to the same point share its label
        for r, a, b in zip(rows, x, y, strict=True):
            asked.setdefault((a, b), []).append(100 * r['max_drop'])
        for point, drops in asked.items():
            text = ' to '.join(f'{d:g}' for d in sorted({min(drops), max(drops)}))
            axes.annotate(text, point, (3, -11), textcoords='offset points', fontsize=7, color=COLOURS[rule])
    axes.set(xlabel='average MACs, % of the backbone (heads counted)', ylabel='accuracy, %', title=title)
    axes.set_xlim(0, 105)
    axes.margins(y=0.1)
    axes.grid(alpha=0.25)
    below = dict(loc='upper center', bbox_to_anchor=(0.5, -0.14), ncol=3, frameon=False)  # it would hide points
    axes.legend(fontsize=8, title='numbers: max_drop asked, in points', title_fontsize=8, **below)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)


def contact_sheet(
    images: list[Image.Image], exits: np.ndarray, confidence: np.ndarray, names: list[str], path: Path, each: int = 14
) -> None:
    """A row of images for each exit that answered any, the most confident first; `names` has one entry per exit."""
    rows = [m for m in range(len(names)) if (exits == m).any()]
    figure, axes = plt.subplots(len(rows), each, figsize=(each * 0.75, len(rows) * 0.95), dpi=130, squeeze=False)
    for row, m in zip(axes, rows, strict=True):
        chosen = np.flatnonzero(exits == m)
        chosen = chosen[np.argsort(-confidence[chosen], kind='stable')]
        chosen = chosen[np.linspace(0, len(chosen) - 1, min(each, len(chosen))).astype(int)]
        for k, cell in enumerate(row):
            cell.axis('off')
            if k < len(chosen):
                cell.imshow(images[chosen[k]], cmap='gray_r' if images[chosen[k]].mode == 'L' else None)
        row[0].set_title(f'{names[m]}: {(exits == m).mean():.1%} of the images', loc='left', fontsize=8)
    figure.suptitle('which exit answered which images; the most confident of each on the left', fontsize=9)
    figure.subplots_adjust(
        left=0.01, right=0.99, bottom=0.01, top=1 - 0.75 / figure.get_figheight(), wspace=0.05, hspace=0.35
    )
    figure.savefig(path)
    plt.close(figure)
