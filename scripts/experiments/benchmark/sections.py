"""What early exits cost and save, in time, beside the plain network and other libraries.

    python scripts/experiments/benchmark SECTION [--help]

    plain      the plain timm backbone in its best mode, and the ideal from stage times
    earlyon    earlyon 0.3.0 (pip install --no-deps earlyon==0.3.0)
    static     every exit computed; smaller networks of equal accuracy
    release    the Fashion-MNIST release on test images, with loading
    export     exported cascades in onnxruntime, beside the plain network's ONNX file and earlyon's export
    overhead   exits off, import, first forward, memory of stream
    heads      open exits at which nothing leaves: what heads and decisions cost

    gpu                       everything an accelerator is needed for, with a page of its own
    training                  what training heads costs; printed only
    static-networks RECIPE    trains the smaller networks that `static` needs

Each section is written to docs/pages/evidence/benchmark.md and docs/results/benchmark.json and .png (--out names
another docs folder); the other sections stay as they are. Contestants run in turns within one process; every figure is
a ratio of times of one repetition: median and quartiles. Run it on an idle machine; --quick is a trial.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

import torch

from scripts import ROOT, evidence
from scripts.experiments.benchmark import page
from scripts.experiments.benchmark.timing import machine

# section: its module; only the one that is asked for is imported
SECTIONS = dict(
    plain='plain',
    earlyon='peer',
    static='static',
    release='release',
    overhead='overhead',
    heads='head_costs',
    export='exported',
)
OTHERS = {
    'gpu': 'gpu',
    'training': 'training',
    'static-networks': 'static_networks',
}  # commands that write no section of this page


def module_of(name: str) -> Any:
    return importlib.import_module(f'scripts.experiments.benchmark.{SECTIONS[name]}')


def render(name: str, section: dict[str, Any]) -> list[str]:
    return module_of(name).markdown(section)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in OTHERS:
        importlib.import_module(f'scripts.experiments.benchmark.{OTHERS[argv[0]]}').main(argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='section', required=True, metavar='SECTION')
    for name in SECTIONS:
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument('--seconds', type=float, default=10, help='about how long a comparison is repeated')
        command.add_argument('--repetitions', type=int, default=5, help='each is measured at least this often')
        command.add_argument('--threads', type=int, help='of the CPU; default: all')
        command.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
        command.add_argument('--out', type=Path, default=ROOT / 'docs')
        command.add_argument('--quick', action='store_true', help='two repetitions: does it work?')
    if argv and argv[0] in SECTIONS:
        module_of(argv[0]).add_arguments(commands.choices[argv[0]])
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    if args.quick:
        args.seconds, args.repetitions = 0.0, 2
    if args.threads:
        torch.set_num_threads(args.threads)

    # the page does not say where it was written
    shown = [a for i, a in enumerate(argv) if a != '--out' and (not i or argv[i - 1] != '--out')]
    about = dict(
        command=shlex.join(['python', 'scripts/experiments/benchmark', *shown]), quick=args.quick, machine=machine()
    )
    module = module_of(args.section)
    parts = module.run(args)
    section = None
    for part in [parts] if isinstance(parts, dict) else parts:  # each is written at once: a later one may fail
        section = write_part(args.section, {**about, **part}, args.out)
    if section is None:
        raise SystemExit('nothing was measured.')
    print('\n'.join(render(args.section, section)))


def write_part(name: str, section: dict[str, Any], docs: Path) -> dict[str, Any]:
    """Writes what was measured of a section, beside its other rows; returns the whole section."""
    file = evidence(docs)[0] / 'benchmark.json'
    sections = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    old = sections.get(name)
    if old and old['quick'] == section['quick']:
        if old['machine'] != section['machine']:
            for row in (r for value in old.values() if isinstance(value, list) for r in value):
                row.setdefault('machine', old['machine'])
        commands = dict.fromkeys([*old['command'].split('\n    '), section['command']])
        section = dict(module_of(name).merge(old, section), command='\n    '.join(commands))
    sections[name] = section
    page.write(docs, {n: sections[n] for n in SECTIONS if n in sections}, render)
    return section
