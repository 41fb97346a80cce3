"""What early exits cost and save, in time, beside the plain network and the peers.

    python scripts/benchmark.py plain      the plain timm backbone in its best mode, and the ideal from stage times
    python scripts/benchmark.py earlyon    earlyon 0.3.0 (pip install --no-deps earlyon==0.3.0)
    python scripts/benchmark.py static     every exit computed; smaller networks of equal accuracy
    python scripts/benchmark.py release    the Fashion-MNIST release on test images, with loading
    python scripts/benchmark.py overhead   exits off, import, first forward, memory of stream
    python scripts/benchmark.py training   training of heads (its own page: bench_training.py)

Each writes its section of docs/benchmark.md, .json and .png (--out) and leaves the others as they are. Contestants run
in turns within one process; every figure is a ratio of times of one repetition: median and quartiles. Run it on an
idle machine; --quick is for trying whether it works.
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

import bench_page
import torch
from timing import machine

ROOT = Path(__file__).resolve().parent.parent
SECTIONS = ('plain', 'earlyon', 'static', 'release', 'overhead')


def render(name: str, section: dict[str, Any]) -> list[str]:
    return importlib.import_module(f'bench_{name}').markdown(section)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ['training']:
        importlib.import_module('bench_training').main(argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest='section', required=True, metavar='SECTION')
    for name in SECTIONS:
        command = commands.add_parser(name, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
        command.add_argument('--seconds', type=float, default=10, help='about how long a comparison is repeated')
        command.add_argument('--repetitions', type=int, default=5, help='at least so many of each')
        command.add_argument('--threads', type=int, help='of the CPU; default: all')
        command.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
        command.add_argument('--out', type=Path, default=ROOT / 'docs')
        command.add_argument('--quick', action='store_true', help='two repetitions: does it work?')
    if argv[:1] and argv[0] in SECTIONS:  # only the section that is asked for is imported
        importlib.import_module(f'bench_{argv[0]}').add_arguments(commands.choices[argv[0]])
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format='%(asctime)s %(message)s')
    if args.quick:
        args.seconds, args.repetitions = 0.0, 2
    if args.threads:
        torch.set_num_threads(args.threads)

    module = importlib.import_module(f'bench_{args.section}')
    section = module.run(args)
    # where it was written is nobody's business
    shown = [a for i, a in enumerate(argv) if a != '--out' and (not i or argv[i - 1] != '--out')]
    section = dict(
        command=shlex.join(['python', 'scripts/benchmark.py', *shown]), quick=args.quick, machine=machine(), **section
    )
    file = args.out / 'benchmark.json'
    sections = json.loads(file.read_text(encoding='utf-8')) if file.exists() else {}
    old = sections.get(args.section)
    if old and hasattr(module, 'merge') and (old['machine'], old['quick']) == (section['machine'], section['quick']):
        both = dict.fromkeys([*old['command'].split('\n    '), section['command']])
        section = dict(module.merge(old, section), command='\n    '.join(both))
    sections[args.section] = section
    args.out.mkdir(parents=True, exist_ok=True)
    bench_page.write(args.out, {name: sections[name] for name in SECTIONS if name in sections}, render)
    print('\n'.join(render(args.section, section)))


if __name__ == '__main__':
    main()
