"""Builds the elpv data set: 2,624 solar cells in electroluminescence, classed by the probability of a defect.

    python scripts/datasets/elpv.py --out runs/elpv

The pictures (300x300, grey) come from the package elpv-dataset 1.0.0.post1, checked against its pinned digest. Files
under --out, each with the four classes in the set's own shares: train.parquet (half), calibration.parquet and
test.parquet (a quarter each). The set does not say which cells come from one module, so cells of one module can stand
in several files: figures on them compare cascades with their backbones, and say nothing about solar cells.

Licence of the pictures: CC BY-NC-SA 4.0 (Buerhop-Lutz et al. 2018, Deitsch et al. 2019). Measure with them; commit and
publish none of them, nor networks trained on them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from zipfile import ZipFile

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that scripts.* is found

import numpy as np

from scripts.datasets.parquet import load_split, write_split
from scripts.datasets.wheels import open_wheel
from timm_cascade.data import ImageData

VERSION = '1.0.0.post1'
DIGEST = '85e31c1126ee9b48e62d3a0232c58f58b2d189b0814a45c13642fa0415af4a4c'
DATA = 'elpv_dataset/data/'
CLASSES = {0.0: 'functional', 1 / 3: 'probably functional', 2 / 3: 'probably defective', 1.0: 'defective'}
SHARES = dict(train=0.5, calibration=0.25, test=0.25)
BUILT = Path(__file__).resolve().parents[2] / 'runs' / 'elpv'


def read(archive: ZipFile) -> tuple[list[bytes], list[int]]:
    """Encoded pictures and labels 0..3 of all cells.

    Raises:
        RuntimeError: A list of labels that is missing or not as expected, or a picture that it names and is not there.
    """
    try:
        lines = archive.read(f'{DATA}labels.csv').decode().split('\n')
        rows = [line.split() for line in lines if line.strip()]
        probabilities = [float(probability) for _, probability, _ in rows]
        pictures = [archive.read(DATA + name) for name, _, _ in rows]
    except (KeyError, ValueError) as e:
        raise RuntimeError(
            f'the wheel is not laid out as expected (name, probability and kind of each cell): {e}'
        ) from e
    known = list(CLASSES)
    labels = [int(np.argmin(np.abs(np.array(known) - p))) for p in probabilities]
    if wrong := [p for p, label in zip(probabilities, labels, strict=True) if abs(p - known[label]) > 1e-3]:
        raise RuntimeError(f'labels.csv has the probability {wrong[0]}; expected {[round(k, 3) for k in known]}.')
    return pictures, labels


def split_rows(labels: list[int], seed: int = 0) -> dict[str, list[int]]:
    """Rows of each file in random order, every class in the same shares."""
    random, parts = np.random.default_rng(seed), {name: [] for name in SHARES}  # type: dict[str, list[int]]
    for label in sorted(set(labels)):
        rows = random.permutation(np.flatnonzero(np.array(labels) == label))
        cuts = np.round(np.cumsum(list(SHARES.values()))[:-1] * len(rows)).astype(int)
        for name, part in zip(SHARES, np.split(rows, cuts), strict=True):
            parts[name] += part.tolist()
    return {name: random.permutation(rows).tolist() for name, rows in parts.items()}


def load(split: str, folder: Path = BUILT) -> ImageData:
    """`train`, `calibration` or `test`; raises FileNotFoundError where the set is not built yet."""
    return load_split(folder, split, 'elpv-dataset', 'python scripts/datasets/elpv.py')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('runs/elpv'), help='folder of the parquet files')
    parser.add_argument('--wheel', type=Path, help='the wheel, where pip cannot fetch it')
    args = parser.parse_args()
    try:
        with open_wheel('elpv-dataset', VERSION, DIGEST, args.wheel) as archive:
            pictures, labels = read(archive)
    except RuntimeError as e:
        sys.exit(f'elpv: {e}')
    for name, rows in split_rows(labels).items():
        chosen = [labels[i] for i in rows]
        write_split(args.out / f'{name}.parquet', [pictures[i] for i in rows], chosen, list(CLASSES.values()))
        print(f'{name}.parquet: {len(rows)} cells, {np.bincount(chosen, minlength=len(CLASSES)).tolist()} per class')


if __name__ == '__main__':
    main()
