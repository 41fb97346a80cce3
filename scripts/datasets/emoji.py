"""Builds the emoji data set: 64 px pictures in nine categories, split by emoji.

    python scripts/datasets/emoji.py --out runs/emoji

The pictures come from four npm packages, emoji-datasource-{google,twitter,facebook,apple}, all at one pinned version,
checked against pinned digests: base emoji only (no skin tones, no 'Component'), RGBA laid over white. Columns: image,
label (the category) and name (unified code, underscore, vendor). Files under --out:

    train.parquet              about 60 % of the emoji
    test.parquet               all other emoji
    test_calibration.parquet   half of the emoji of test.parquet
    test_report.parquet        the other half

The split is by emoji: all drawings of an emoji are in one file. Rows are in random order, but slices (test[:1500])
can part the drawings of one emoji: to choose thresholds on one part of the held-out side and report on another, take
the last two files and no slices. Mind also that up to four rows show one emoji, so the rows of a file are exchangeable
but not independent, and that a few emoji share one picture (the flags of Norway and Bouvet Island, some families): for
each file the summary counts the pictures that train.parquet also holds. --out/cache may be removed afterwards.

Licences: google is Noto Emoji (images Apache-2.0, font OFL); twitter is Twemoji (CC-BY 4.0); facebook and apple are
proprietary, for experiments only. Commit and publish none of the data.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import io
import json
import logging
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from PIL import Image

from timm_cascade.data import ImageData, load_data
from timm_cascade.utils.files import replacing, write_text

_logger = logging.getLogger(__name__)

VERSION = '16.0.0'
DIGESTS = {  # vendor: base64 of the sha512 of its package at VERSION
    'google': 'ZRexfzs7MVoLnmzZmNsO4TKhnAJp5D++Vm6PpUpH/jEQQlemp3l88CjZ+DoZ2faM9R4QxZkOPJCoT8DlPhfQ3A==',
    'twitter': '7F+uCuHH+7Qnrc15P5tnbvKkg9E6tlzi4MnT2uW1RlN4pLYTza6cP/dstIfSDMtpjFLWuZewWg8jBbuL2eyELQ==',
    'facebook': 'b9ZxJdB7nMWGckH1vyCjPSosaa6MJYuojPPFiQ0LmDIZS8vlG454XKcmTFKrXIMAA72O4MRJMYFhvWI8pjyciQ==',
    'apple': 'dVYjsK0FnCry9F+PBtnivhG2K0xdwlmqYaSgiUtztUdAGPYiHYhZcVKvNBqC791g2qyEcFNTBO6utg4eQ3uLTw==',
}
SIZE = 64
BUILT = Path(__file__).resolve().parents[2] / 'runs' / 'emoji'


def fetch(vendor: str, cache: Path) -> Path:
    """The vendor's package folder (emoji.json and the pictures needed), from the cache or through npm.

    Raises:
        RuntimeError: No npm, npm failed, or the package is not the one that was pinned.
    """
    folder = cache / f'emoji-datasource-{vendor}-{VERSION}'
    if folder.is_dir():
        return folder
    tarball = folder.with_name(f'{folder.name}.tgz')
    if not tarball.is_file() or digest(tarball) != DIGESTS[vendor]:
        if shutil.which('npm') is None:
            raise RuntimeError('npm is not installed; the pictures are npm packages. Install Node.js with npm.')
        cache.mkdir(parents=True, exist_ok=True)
        spec = f'emoji-datasource-{vendor}@{VERSION}'
        _logger.info('%s: npm pack', spec)
        command = ['npm', 'pack', spec, '--pack-destination', str(cache), '--ignore-scripts', '--loglevel=error']
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        if done.returncode or not tarball.is_file():
            raise RuntimeError(f'npm pack {spec} gave no {tarball.name}: {done.stderr.strip()[-1000:]}')
        if digest(tarball) != DIGESTS[vendor]:
            raise RuntimeError(f'{tarball} is not the package this script was written for (sha512 differs); remove it.')
    with tempfile.TemporaryDirectory(dir=cache) as temporary, tarfile.open(tarball) as tar:
        members = {m.name: m for m in tar.getmembers()}
        if 'package/emoji.json' not in members:
            raise RuntimeError(f'{tarball} has no package/emoji.json.')
        tar.extract(members['package/emoji.json'], temporary, filter='data')
        wanted = [f'package/{path}' for _, _, path in pictures(vendor, Path(temporary, 'package'))]
        if missing := [name for name in wanted if name not in members]:
            raise RuntimeError(f'{tarball} lacks {len(missing)} pictures that its emoji.json names: {missing[:3]}')
        tar.extractall(temporary, [members[name] for name in wanted], filter='data')
        Path(temporary, 'package').rename(folder)
    return folder


def digest(path: Path) -> str:
    return base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode()


def pictures(vendor: str, folder: Path) -> list[tuple[str, str, str]]:
    """(unified code, category, path inside the package) of each base emoji that the vendor draws."""
    entries = json.loads((folder / 'emoji.json').read_text(encoding='utf-8'))
    return [
        (e['unified'], e['category'], f'img/{vendor}/{SIZE}/{e["image"]}')
        for e in entries
        if e['category'] != 'Component' and e[f'has_img_{vendor}']
    ]


def over_white(path: Path) -> bytes:
    """The picture as an RGB PNG, transparency replaced by white.

    Raises:
        RuntimeError: Missing, damaged or of another size.
    """
    try:
        with Image.open(path) as image:
            rgba = image.convert('RGBA')
    except OSError as e:
        raise RuntimeError(f'{path} does not open as a picture ({e}); remove its package folder and run again.') from e
    if rgba.size != (SIZE, SIZE):
        raise RuntimeError(f'{path} has {rgba.size} pixels, not {SIZE} x {SIZE}.')
    buffer = io.BytesIO()
    Image.alpha_composite(Image.new('RGBA', rgba.size, 'white'), rgba).convert('RGB').save(buffer, 'PNG')
    return buffer.getvalue()


def split_codes(codes: set[str], seed: int, fraction: float) -> dict[str, set[str]]:
    """The emoji of each file; depends on the set of codes, the seed and the fraction alone."""
    order = [str(c) for c in np.random.default_rng(seed).permutation(sorted(codes))]
    first = round(fraction * len(order))
    middle = (first + len(order)) // 2
    return {
        'train': set(order[:first]),
        'test': set(order[first:]),
        'test_calibration': set(order[first:middle]),
        'test_report': set(order[middle:]),
    }


def build(folders: dict[str, Path], out: Path, seed: int, fraction: float) -> dict[str, Any]:
    """Writes the parquet files and returns the summary."""
    rows = [
        (code, category, vendor, over_white(folder / path))
        for vendor, folder in folders.items()
        for code, category, path in pictures(vendor, folder)
    ]
    times = Counter(code for code, _ in {r[:2] for r in rows})
    if changed := sorted(code for code, n in times.items() if n > 1):
        raise RuntimeError(f'the packages put these emoji in different categories: {changed}')
    names = sorted({r[1] for r in rows})
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=names), name=datasets.Value('string')
    )
    rows = [rows[i] for i in np.random.default_rng([seed, 1]).permutation(len(rows))]
    files: dict[str, Any] = {}
    seen: set[bytes] = set()
    for name, codes in split_codes({r[0] for r in rows}, seed, fraction).items():
        part = [r for r in rows if r[0] in codes]
        table = datasets.Dataset.from_dict(
            {
                'image': [{'bytes': r[3], 'path': None} for r in part],
                'label': [names.index(r[1]) for r in part],
                'name': [f'{r[0]}_{r[2]}' for r in part],
            },
            features=features,
        )
        with replacing(out / f'{name}.parquet') as temporary:
            table.to_parquet(temporary)
        pictures_in, emoji_in = Counter(r[1] for r in part), Counter(c for _, c in {r[:2] for r in part})
        seen = seen or {r[3] for r in part}  # of train, the first
        files[name] = {
            'pictures': len(part),
            'emoji': len(codes),
            'pictures_also_in_train': sum(r[3] in seen for r in part),
            'categories': {c: {'pictures': pictures_in[c], 'emoji': emoji_in[c]} for c in names},
        }
        _logger.info('%s.parquet: %d pictures of %d emoji', name, len(part), len(codes))
    return files


def load(split: str, folder: Path = BUILT) -> ImageData:
    """`train`, or the held-out emoji: `held_out`, and its halves `calibration` and `test`; slices as in `train[:90%]`.

    Raises:
        FileNotFoundError: The set is not built yet.
    """
    files = dict(train='train', held_out='test', calibration='test_calibration', test='test_report')
    name, bracket, part = split.partition('[')
    if name not in files:
        raise ValueError(f'split {split!r} is not one of {sorted(files)}.')
    path = folder / f'{files[name]}.parquet'
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not there; run python scripts/datasets/emoji.py --out {folder} first.')
    data = load_data(path, f'train[{part}' if bracket else None)
    data.source, data.split = 'emoji-datasource', split
    # decoded once: the epochs that follow read arrays
    data.images = [np.asarray(data.images[i].convert('RGB')) for i in range(len(data))]
    return data


def main() -> None:
    parser = argparse.ArgumentParser(
        description='Builds the emoji data set.', formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument('--out', type=Path, default=Path('runs/emoji'), help='folder of the parquet files')
    parser.add_argument('--seed', type=int, default=0, help='of the split and of the order of the rows')
    parser.add_argument('--fraction', type=float, default=0.6, help='of the emoji that are for training')
    args = parser.parse_args()
    if not 0 < args.fraction < 1:
        parser.error('--fraction lies between 0 and 1.')
    logging.basicConfig(level=logging.INFO, format='%(message)s')
    datasets.disable_progress_bars()
    made_by = {'version': VERSION, 'seed': args.seed, 'fraction': args.fraction}
    summary_file = args.out / 'summary.json'
    summary = json.loads(summary_file.read_text(encoding='utf-8')) if summary_file.is_file() else {}
    done = summary.get('made_by') == made_by and all((args.out / f'{n}.parquet').is_file() for n in summary['files'])
    if not done:
        try:
            folders = {vendor: fetch(vendor, args.out / 'cache') for vendor in DIGESTS}
            summary_file.unlink(missing_ok=True)  # the last file written: without it nothing counts as done
            summary = {'made_by': made_by, 'files': build(folders, args.out, args.seed, args.fraction)}
        except RuntimeError as e:
            sys.exit(f'emoji: {e}')
        write_text(summary_file, json.dumps(summary, indent=2) + '\n')
    print(json.dumps(summary, indent=2))


if __name__ == '__main__':
    main()
