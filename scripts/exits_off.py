"""What a cascade costs while no exit is open: paired, alternating runs beside its plain backbone.

    OMP_NUM_THREADS=1 python scripts/exits_off.py [NAME ...] [--batch-sizes 1 64] [--seconds 20]

Prints the median of the paired ratios, for the cascade and for a second copy of the plain backbone: what that one is
off by is the noise of the machine. Time is the thread's own, so that other work on the machine counts as little as it
can; run it with one thread.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import numpy as np
import timm
import torch

import timm_cascade  # noqa: F401  registers the models


def ratios(contestants: list[Callable[[], object]], seconds: float) -> np.ndarray:
    """(rounds, contestants) time over that of the first one, in the same round; the order changes every round."""
    for call in contestants * 3:
        call()
    rounds: list[list[float]] = []
    orders = np.random.default_rng(0)
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(rounds) < 10:
        spent = [0.] * len(contestants)
        for i in orders.permutation(len(contestants)):
            began = time.thread_time()
            contestants[i]()
            spent[i] = time.thread_time() - began
        rounds.append(spent)
    spent_all = np.array(rounds)
    return spent_all / spent_all[:, :1]


def measure(name: str, batch_size: int, seconds: float) -> dict[str, float | int | str]:
    """The ratios of one model."""
    torch.manual_seed(0)
    cascade = timm.create_model(f'cascade_{name}', exits=3).eval()
    plain, control = (timm.create_model(name).eval() for _ in range(2))
    for m in (plain, control):
        m.load_state_dict(cascade.backbone.state_dict())
    images = torch.randn(batch_size, *timm.data.resolve_model_data_config(plain)['input_size'])
    with torch.inference_mode():
        found = ratios([lambda m=m: m(images) for m in (plain, control, cascade)], seconds)
    return dict(model=name, batch_size=batch_size, rounds=len(found), control=float(np.median(found[:, 1])),
                cascade=float(np.median(found[:, 2])))


def main() -> None:
    """Prints a line of JSON for each model and batch size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('names', nargs='*', default=['resnet18', 'test_resnet', 'test_vit'])
    parser.add_argument('--batch-sizes', nargs='+', type=int, default=[1, 64])
    parser.add_argument('--seconds', type=float, default=20)
    args = parser.parse_args()
    for name in args.names:
        for batch_size in args.batch_sizes:
            print(json.dumps(measure(name, batch_size, args.seconds)), flush=True)


if __name__ == '__main__':
    main()
