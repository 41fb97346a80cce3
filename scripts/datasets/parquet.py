"""Pictures with labels in parquet files, as `load_data` reads them."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from PIL import Image

from timm_cascade.data import ImageData, load_data
from timm_cascade.utils.files import replacing

__all__ = ['load_split', 'png', 'write_split']


def png(picture: np.ndarray) -> bytes:
    """A grey (H, W) or colour (H, W, 3) uint8 picture as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, 'PNG')
    return buffer.getvalue()


def write_split(path: Path, pictures: Sequence[bytes], labels: Sequence[int], names: Sequence[str]) -> None:
    """Writes one parquet file of encoded pictures, in one step."""
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=list(names)))
    columns = dict(image=[{'bytes': each, 'path': None} for each in pictures], label=list(labels))
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        datasets.Dataset.from_dict(columns, features=features).to_parquet(temporary)


def load_split(folder: Path, split: str, source: str, command: str) -> ImageData:
    """The pictures of `split`.parquet, or a slice as in `train[:90%]`, decoded once, in colour.

    Raises:
        ValueError: No such split.
        FileNotFoundError: The set is not built yet; the message names the command.
    """
    splits = ('train', 'calibration', 'test')
    name, bracket, part = split.partition('[')
    if name not in splits:
        raise ValueError(f'split {split!r} is not one of {list(splits)}.')
    path = folder / f'{name}.parquet'
    if not path.is_file():
        raise FileNotFoundError(f'{path} is not there; run {command} --out {folder} first.')
    data = load_data(path, f'train[{part}' if bracket else None)
    data.source, data.split = source, split
    data.images = [np.asarray(data.images[i].convert('RGB')) for i in range(len(data))]
    return data
