"""Opens a Hub data set, parquet files, an image folder or IDX files."""

from __future__ import annotations

import gzip
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .images import Column, ImageData

__all__ = ['load_data', 'read_idx']

IDX_SPLITS = {'train': 'train', 'test': 't10k'}
SPLIT = re.compile(r'(?P<name>[\w.-]+?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?$')


def load_data(
    source: str | Path | Sequence[str | Path],
    split: str | None = None,
    labels: bool = True,
    on_bad_image: str = 'fail',
    workers: int = 0,
) -> ImageData:
    """Opens a data set.

    Args:
        source: A folder of IDX files, an image folder (one sub-folder a class), parquet file(s), or a Hub id.
        split: `train`, `test`, ..., with an optional slice: `train[:50000]`. Needed where there are several.
        labels: Without, only the images are read: enough to calibrate by agreement with the backbone.
        on_bad_image: `fail`: an image that cannot be decoded is an error once it is asked for. `skip`: every image is
            decoded once now, and those that cannot be are counted, named in the log and left out.
        workers: Processes that decode for `skip`.

    Raises:
        FileNotFoundError: A path that does not exist.
        ValueError: An unknown split, or files that are not what they should be; the message says which.
    """
    if on_bad_image not in ('fail', 'skip'):
        raise ValueError(f'on_bad_image={on_bad_image!r}; choose fail or skip.')
    data = _load(source, split, labels)
    return data.without_bad_images(workers) if on_bad_image == 'skip' else data


def _load(source: str | Path | Sequence[str | Path], split: str | None, labels: bool) -> ImageData:
    paths = [Path(s) for s in (source if isinstance(source, (list, tuple)) else [source])]  # type: ignore[arg-type]
    if len(paths) == 1 and paths[0].is_dir() and list(paths[0].glob('*-idx3-ubyte*')):
        data = _load_idx(paths[0], split)
        return data if labels else ImageData(data.images, None, source=data.source, split=data.split)
    return _load_datasets(paths, split, labels)


def _parse_split(split: str) -> tuple[str, slice]:
    match = SPLIT.match(split)
    if match is None:
        raise ValueError(f'split {split!r} is not NAME or NAME[START:STOP], such as train[:50000].')
    start, stop = (int(v) if v else None for v in (match['start'] or '', match['stop'] or ''))
    return match['name'], slice(start, stop)


def _load_idx(folder: Path, split: str | None) -> ImageData:
    name, part = _parse_split(split) if split else ('', slice(None))
    if name not in IDX_SPLITS:
        raise ValueError(f'{folder} has the splits {sorted(IDX_SPLITS)}; asked was {split!r}. Choose one of them.')
    arrays = []
    for kind in ('images-idx3', 'labels-idx1'):
        found = sorted(folder.glob(f'{IDX_SPLITS[name]}-{kind}-ubyte*'))
        if not found:
            raise FileNotFoundError(f'{folder} has no {IDX_SPLITS[name]}-{kind}-ubyte[.gz].')
        arrays.append(read_idx(found[0]))
    images, labels = arrays
    if len(images) != len(labels):
        raise ValueError(f'{folder} {name}: {len(images)} images but {len(labels)} labels; fetch the files again.')
    names = [str(c) for c in range(int(labels.max(initial=0)) + 1)]  # the format has no names
    return ImageData(images[part], labels[part], names, str(folder), split or '')


def read_idx(path: Path) -> np.ndarray:
    """One IDX file (LeCun's MNIST format, gzipped or not) of unsigned bytes, as an array.

    Raises:
        ValueError: Not an IDX file of bytes, or shorter than its header says.
    """
    try:
        with gzip.open(path) if path.suffix == '.gz' else open(path, 'rb') as f:
            data = f.read()
    except (EOFError, gzip.BadGzipFile) as e:
        raise ValueError(f'{path} is truncated or damaged ({e}); fetch it again.') from e
    if len(data) < 4 or data[:3] != b'\0\0\x08':
        raise ValueError(f'{path} is not an IDX file of unsigned bytes; fetch it again.')
    dims = data[3]
    shape = np.frombuffer(data[4 : 4 + 4 * dims], dtype='>u4').astype(int)
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dims)
    if len(shape) != dims or body.size != int(np.prod(shape)):
        raise ValueError(f'{path} holds {body.size} bytes where its header says {shape.tolist()}; fetch it again.')
    return body.reshape(shape)


def _load_datasets(paths: list[Path], split: str | None, labels: bool) -> ImageData:
    import datasets

    kind: dict[str, Any]
    if all(p.suffix == '.parquet' for p in paths):
        missing = [str(p) for p in paths if not p.is_file()]
        if missing:
            raise FileNotFoundError(f'no such file: {", ".join(missing)}.')
        kind = dict(path='parquet', data_files=[str(p) for p in paths])
        split = f'train{split[split.index("[") :]}' if split and '[' in split else 'train'
    elif len(paths) == 1 and paths[0].is_dir():
        kind = dict(path='imagefolder', data_dir=str(paths[0]), drop_labels=not labels)
        if labels:
            _no_empty_folders(paths[0])
    elif len(paths) == 1 and re.fullmatch(r'[\w.-]+(/[\w.-]+)?', str(paths[0])):
        kind = dict(path=str(paths[0]))
    else:
        raise FileNotFoundError(
            f'{", ".join(map(str, paths))} is no IDX folder, no image folder, no parquet file and no Hub data set id.'
        )
    loaded = datasets.load_dataset(**kind, split=split)
    if isinstance(loaded, dict):
        if len(loaded) > 1:
            raise ValueError(f'{paths[0]} has the splits {sorted(loaded)}; choose one with --split.')
        split, loaded = next(iter(loaded.items()))
    features = loaded.features
    image = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    label = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    if len(image) != 1 or (labels and len(label) != 1):
        raise ValueError(
            f'{paths[0]} needs one image column{" and one class label column" if labels else ""}; it has '
            f'{dict(features)}.'
        )
    if not labels:
        return ImageData(Column(loaded, image[0]), None, source=str(paths[0]), split=str(split))
    return ImageData(Column(loaded, image[0]), loaded[label[0]][:], features[label[0]].names, str(paths[0]), str(split))


def _no_empty_folders(root: Path) -> None:
    """The reader of image folders passes over a class without files in silence."""
    used = {file.parent for file in root.rglob('*') if file.is_file() and not file.name.startswith('.')}
    names = {folder.name for folder in used}
    empty = sorted(
        str(folder)
        for parent in {folder.parent for folder in used if folder != root}
        for folder in parent.iterdir()
        if folder.is_dir() and folder.name not in names and not any(p.is_file() for p in folder.rglob('*'))
    )
    if empty:
        raise ValueError(
            f'{len(empty)} class folders hold no files: {", ".join(empty[:5])}. Add images or remove the folders.'
        )
