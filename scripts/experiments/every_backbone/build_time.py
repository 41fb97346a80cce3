"""What making `cascade_X` costs over making `X`, for the cheapest model of each of timm's module files.

    python scripts/experiments/every_backbone/build_time.py [NAMES ...]

Processor time of this process, one thread, the better of two runs each; waiting for other processes does not count.
"""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))  # the repository, so that scripts.* is found

import torch

from scripts.experiments.every_backbone.sweep import all_names, by_cost, cheapest_of_each_file, create, module_file


def seconds(name: str) -> float:
    """Processor time to build it, the better of two."""
    runs = []
    for _ in range(2):
        start = time.process_time()
        create(name, num_classes=1000)
        runs.append(time.process_time() - start)
    return min(runs)


def main() -> None:
    torch.set_num_threads(1)
    create('cascade_test_resnet')  # imports on demand are not the model's cost
    names = sys.argv[1:] or sorted(cheapest_of_each_file(by_cost(all_names())))
    plain, cascade = [], []
    for name in names:
        plain.append(seconds(name))
        cascade.append(seconds(f'cascade_{name}'))
        print(f'{module_file(name):28} {name:36} {plain[-1]:7.2f} s  {cascade[-1]:7.2f} s', flush=True)
    over = [c - 1.5 * p - 1 for p, c in zip(plain, cascade, strict=True)]
    print(
        f'{len(names)} models: median {statistics.median(plain):.2f} s, as a cascade '
        f'{statistics.median(cascade):.2f} s; median of (cascade - 1.5 plain - 1 s) {statistics.median(over):.2f} s; '
        f'{sum(o > 0 for o in over)} models above 1.5 times plain + 1 s: '
        f'{", ".join(n for n, o in zip(names, over, strict=True) if o > 0)}'
    )


if __name__ == '__main__':
    main()
