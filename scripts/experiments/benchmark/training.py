"""What ten epochs of head training cost beside one plain evaluation pass of the backbone over the same images.

    python scripts/experiments/benchmark training [--json]

Both are timed from images in memory, decoding and transform included, alternating in one run. A training is the whole
call of train_heads: the pass that fills the cache (one view), the statistics, the epochs. Random weights: they cost
what trained ones cost. The images are Fashion-MNIST's, 28 pixels as they are, or scaled up to 224 by the transform.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import timm
import torch

import timm_cascade
from scripts.datasets import fashion_mnist
from timm_cascade.data import ImageData, create_loader

TARGET = 1.5
EPOCHS = 10
CASES: dict[str, dict[str, Any]] = {
    'cifar_resnet20, 28 px': dict(
        model='cascade_cifar_resnet20',
        images=2000,
        create=dict(
            in_chans=1,
            num_classes=10,
            pretrained_cfg_overlay=dict(input_size=(1, 28, 28), mean=(0.2860,), std=(0.3530,)),
        ),
    ),
    'resnet18, 224 px': dict(model='cascade_resnet18', images=256, create=dict(num_classes=10)),
}


@torch.inference_mode()
def plain_pass(model: timm_cascade.CascadeModel, data: ImageData, batch_size: int) -> float:
    """Top-1 of the backbone: timm's validation loop, without its printing."""
    model.eval()
    device = next(model.parameters()).device
    correct = sum(
        (model.backbone(x.to(device)).argmax(1).cpu() == y).sum() for x, y in create_loader(model, data, batch_size)
    )
    return float(correct) / len(data)


def measure(case: dict[str, Any], images: int, rounds: int, batch_size: int) -> dict[str, Any]:
    data = fashion_mnist.load(f'train[:{images}]')
    torch.manual_seed(0)
    model = timm.create_model(case['model'], **case['create'])
    model.to('cuda' if torch.cuda.is_available() else 'cpu')
    few = fashion_mnist.load(f'train[:{min(images, 64)}]')
    plain_pass(model, few, batch_size), timm_cascade.train_heads(model, few, epochs=1)  # imports, allocators
    times: dict[str, list[float]] = {'plain': [], 'training': [], 'epochs': []}
    for i in range(rounds):
        for what in ('plain', 'training') if i % 2 else ('training', 'plain'):
            began = time.perf_counter()
            if what == 'plain':
                plain_pass(model, data, batch_size)
            else:
                history = timm_cascade.train_heads(model, data, epochs=EPOCHS, batch_size=batch_size)
                times['epochs'].append(sum(line['seconds'] for line in history))
            times[what].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    ratios = [t / p for t, p in zip(times['training'], times['plain'], strict=True)]
    return dict(
        images=images,
        rounds=rounds,
        **seconds,
        ratio=statistics.median(ratios),
        ratios=ratios,
        head_share=float(model.head_macs().sum() / model.exits[-1].total),
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--rounds', type=int, default=3, help='each times both once')
    parser.add_argument('--images', type=int, nargs=len(CASES), default=[c['images'] for c in CASES.values()])
    parser.add_argument('--batch-size', type=int, default=256)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args(argv)
    results = {
        name: measure(case, n, args.rounds, args.batch_size)
        for (name, case), n in zip(CASES.items(), args.images, strict=True)
    }
    if args.json:
        print(json.dumps(results, indent=1))
        return
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f'CPU, {torch.get_num_threads()} threads'
    print(
        f'{EPOCHS} epochs of head training, 3 exits, one view; {device}, torch {torch.__version__}; medians of '
        f'{args.rounds} rounds'
    )
    print('| backbone | images | plain pass, s | training, s | of it epochs, s | ratio (each round) | at most |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    for name, r in results.items():
        print(
            f'| {name} | {r["images"]} | {r["plain"]:.2f} | {r["training"]:.2f} | {r["epochs"]:.2f} | '
            f'{r["ratio"]:.2f} ({", ".join(f"{x:.2f}" for x in r["ratios"])}) | {TARGET} '
            f'{"met" if r["ratio"] <= TARGET else "MISSED"} |'
        )
