"""The command line of the experiment, its page and its picture."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use('Agg')
import matplotlib.pyplot as plt

from scripts import ROOT, evidence
from scripts.experiments.benchmark.page import verdict
from scripts.experiments.benchmark.timing import machine
from scripts.experiments.fronts.equality import equality
from scripts.experiments.fronts.measure import measure
from scripts.experiments.fronts.members import load_members
from timm_cascade.utils.files import replacing, write_text

PARTS = 1.03  # a cascade may cost this much of the sum of its parts
FASTER = {'ResNet-14': 1.5, 'ResNet-20, half width': 1.5}  # than these static networks; at least as fast as others
SETS = ('emoji', 'fashion_mnist', 'emoji64', 'han1000')  # that there are targets for
FEWER = 1.3  # times the MACs, where the networks are EfficientNets


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('names', nargs='+', help='data sets, as in the recipes hub/recipes/*.NAME.yaml, or equality')
    parser.add_argument('--runs', type=Path, default=ROOT / 'runs', help='where the networks were trained')
    parser.add_argument('--docs', type=Path, default=ROOT / 'docs', help='where page and results are written')
    parser.add_argument('--prepare', action='store_true', help='run the networks over all images, and measure nothing')
    parser.add_argument('--untimed', action='store_true', help='accuracy and MACs alone')
    parser.add_argument('--seconds', type=float, default=4.0, help='per comparison, at least')
    parser.add_argument('--repetitions', type=int, default=5, help='per comparison, at least')
    parser.add_argument('--epochs', type=int, default=10, help="of static networks that lack the recipe's epochs")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    results, _ = evidence(args.docs)
    file = results / 'fronts.json'
    sections = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    for name in args.names:
        if name == 'equality':
            sections[name] = dict(rows=equality(), machine=machine())
        else:
            members = load_members(name, args.runs, args.epochs)
            if args.prepare:
                continue
            found = measure(members, args)
            settings = dict(repetitions=args.repetitions, seconds=args.seconds, untimed=args.untimed)
            sections[name] = dict(found, machine=machine(), **settings)
        write(args.docs, sections)


def write(docs: Path, sections: dict[str, Any]) -> None:
    """Writes results, picture and page into a docs folder."""
    results, pages = evidence(docs)
    write_text(results / 'fronts.json', json.dumps(sections, indent=1) + '\n')
    sets = {name: s for name, s in sections.items() if name != 'equality'}
    text = [
        '# Networks in front of a network',
        '',
        'Whole networks, each trained by itself, put in front of the largest; nothing else is trained. Settings (which '
        'networks stand in front, and their thresholds) are chosen on the calibration images, for the accuracy that a '
        'static network has there, and judged on the test images. MACs are averages over the test images. Times are '
        'ratios measured in turns within one run, eager, channels-last: medians, with quartiles in brackets. '
        '**missed** marks a target that was not met.',
    ]
    if sets:
        plot(sets, results / 'fronts.png')
        text += ['', '![accuracy against MACs](../../results/fronts.png)']
    for name, s in sets.items():
        text += ['', f'## {name}', '', *_section(name, s)]
    if 'equality' in sections:
        text += ['', '## equality', '', *_equality(sections['equality'])]
    untimed = [name for name, s in sets.items() if s.get('untimed')]
    if untimed:
        text += ['', '## Not timed', '', f'No time has been measured on {", ".join(untimed)}: their targets are open.']
    if missing := [name for name in SETS if name not in sets]:
        text += ['', '## Not measured', '', f'Nothing has been measured on {", ".join(missing)} yet.']
    write_text(pages / 'fronts.md', '\n'.join([*text, '']))


def _section(name: str, s: dict[str, Any]) -> list[str]:
    m = s['machine']
    efficient = any('efficientnet' in n['network'] for n in s['networks'])
    text = [
        f'    python scripts/experiments/fronts {name} '
        + ('--untimed' if s.get('untimed') else f'--seconds {s["seconds"]:g} --repetitions {s["repetitions"]}'),
        '',
        f'{m["device"]}, torch {m["torch"]}, timm {m["timm"]}. {s["calibrated_on"]:,} calibration images, {s["n"]:,} '
        'test images. In brackets after an accuracy: the change from the static network in points, and half its 95 % '
        'interval.',
        '',
        '| static network | accuracy | MACs | chosen by | in front | accuracy of the cascade | fewer MACs | faster by '
        '| `stream` faster by | time over that of the parts | `stream` |',
        '| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |',
    ]
    macs = {n['network']: n['macs'] for n in s['networks']}
    for r in s['rows']:
        chosen = 'MACs' if r['batch'] is None else f'time, batch {r["batch"]}'
        start = f'| {r["network"]} | {r["accuracy"]:.2%} | {macs[r["network"]] / 1e6:.1f} M | {chosen} |'
        c = r['cascade']
        if c is None:
            text.append(f'{start} no setting is as accurate | | | | | | |')
            continue
        fewer = f'{c["fewer_macs"]:.2f}'
        if efficient and r['batch'] is None and c['fewer_macs'] < FEWER:
            fewer += f' **missed** (>= {FEWER})'
        limit = FASTER.get(r['network'], 1.0)
        times = [
            verdict(r[key], bound, at_least=at_least) if key in r else ''
            for key, bound, at_least in (
                ('faster', limit, True),
                ('stream_faster', limit, True),
                ('to_parts', PARTS, False),
                ('stream_to_parts', PARTS, False),
            )
        ]
        answer = f'{c["accuracy"]:.2%} ({100 * c["change"]:+.2f}, {100 * c["half"]:.2f})'
        text.append(f'{start} {" + ".join(c["front"])} | {answer} | {fewer} | {" | ".join(times)} |')
    return text


def _equality(s: dict[str, Any]) -> list[str]:
    return [
        '    python scripts/experiments/fronts equality',
        '',
        'Random weights, six images of which the first network answers about half: the largest difference between the '
        "logits of the images that remain and the large network's on all six alone, as a share of their standard "
        'deviation.',
        '',
        '| large network | in front | remaining | largest difference | equal up to rounding |',
        '| --- | --- | --- | --- | --- |',
        *(
            f'| {r["large"]} | {r["front"]} | {r["remaining"]} of {r["of"]} | {r["deviation"]:.1e} | '
            f'{"yes" if r["equal"] else "**no**"} |'
            for r in s['rows']
        ),
    ]


def plot(sets: dict[str, Any], path: Path) -> None:
    """Accuracy against MACs: the cascades of each set of fronts, and the static networks."""
    figure, axes = plt.subplots(1, len(sets), figsize=(5 * len(sets), 4), dpi=130, squeeze=False)
    for ax, (name, s) in zip(axes[0], sets.items(), strict=True):
        for front in dict.fromkeys(tuple(p['front']) for p in s['curve']):
            alone = s['networks'][-1]['macs']  # of settings that open no front; the network has a point of its own
            points = [p for p in s['curve'] if tuple(p['front']) == front and p['macs'] != alone]
            macs, right = [p['macs'] / 1e6 for p in points], [100 * p['accuracy'] for p in points]
            # no line: where a front opens, cost and accuracy jump
            ax.plot(macs, right, 'o', ms=2.5, label=' + '.join(front))
        ax.plot([n['macs'] / 1e6 for n in s['networks']], [100 * n['accuracy'] for n in s['networks']], 'ko', ms=5)
        for n in s['networks']:
            ax.annotate(
                n['network'],
                (n['macs'] / 1e6, 100 * n['accuracy']),
                fontsize=7,
                xytext=(3, -9),
                textcoords='offset points',
            )
        ax.set(title=name, xlabel='MACs per image (M)', ylabel='accuracy on test images (%)')
        ax.grid(alpha=0.25)
        ax.legend(title='in front', fontsize=6, title_fontsize=7)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, format='png')
    plt.close(figure)
