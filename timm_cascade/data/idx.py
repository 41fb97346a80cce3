"""IDX files, the format of MNIST and Fashion-MNIST."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np

from .images import ImageData
from .splits import choose_split

__all__ = ['is_idx_folder', 'load_idx', 'read_idx']

FILES = {'train': 'train', 'test': 't10k'}


def is_idx_folder(folder: Path) -> bool:
    """Whether it holds images in IDX files."""
    return any(folder.glob('*-idx3-ubyte*'))


def load_idx(folder: Path, split: str | None) -> ImageData:
    """The images of a folder of IDX files: its split train, or test.

    Raises:
        FileNotFoundError: A file of the split is not there.
        ValueError: Another split, or damaged files.
    """
    name = choose_split(FILES, split, str(folder))
    arrays = []
    for kind in ('images-idx3', 'labels-idx1'):
        found = sorted(folder.glob(f'{FILES[name]}-{kind}-ubyte*'))
        if not found:
            raise FileNotFoundError(f'{folder} has no {FILES[name]}-{kind}-ubyte[.gz].')
        arrays.append(read_idx(found[0]))
    images, labels = arrays
    if len(images) != len(labels):
        raise ValueError(f'{folder} {name}: {len(images)} images but {len(labels)} labels; fetch the files again.')
    names = [str(c) for c in range(int(labels.max(initial=0)) + 1)]  # the format has no names
    return ImageData(images, labels, names, str(folder), split or '')


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
