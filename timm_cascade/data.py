"""Labelled images from wherever they are: a Hub data set, parquet files, an image folder, IDX files."""
from __future__ import annotations

import gzip
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

__all__ = ['UNLABELLED', 'ImageData', 'create_loader', 'eval_transform', 'load_data']

UNLABELLED = -1
IDX_SPLITS = {'train': 'train', 'test': 't10k'}
SPLIT = re.compile(r'(?P<name>[\w.-]+?)(?:\[(?P<start>\d*):(?P<stop>\d*)\])?$')


class ImageData(Dataset):
    """Images with their labels: `data[i]` is a PIL image, or `transform` of it, and a class index.

    Args:
        images: Indexable by position; items are PIL images or uint8 arrays (H, W) or (H, W, 3).
        labels: (n,) class indices, or None where there are none: every label is then UNLABELLED.
        class_names: One name a class.
        source: Where the images are from, as the user named it; kept in tables and cards.
        split: Which part of the source, such as `train[:50000]`.
        transform: Applied to each PIL image.

    Raises:
        ValueError: The source is empty, or a label is outside 0..len(class_names)-1.
    """

    def __init__(
            self,
            images: Any,
            labels: Sequence[int] | np.ndarray | None,
            class_names: Sequence[str] = (),
            source: str = '',
            split: str = '',
            transform: Callable[[Image.Image], Any] | None = None,
    ) -> None:
        self.images = images
        self.labels = np.asarray([UNLABELLED] * len(images) if labels is None else labels, dtype=np.int64)
        self.class_names = list(class_names)
        self.source = source
        self.split = split
        self.transform = transform
        if len(self.labels) == 0:
            raise ValueError(f'{source} {split} holds no images; give a split or a slice that has some.')
        low, high = int(self.labels.min()), int(self.labels.max())
        if labels is not None and (low < 0 or high >= len(self.class_names)):
            raise ValueError(
                f'{source} {split} has labels from {low} to {high}, but there are {len(self.class_names)} classes '
                f'(0..{len(self.class_names) - 1}). Give every image one of these classes.')

    @property
    def name(self) -> str:
        """The source without the folders of this machine: what tables and cards say."""
        return Path(self.source).name if Path(self.source).exists() else self.source

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = self.images[index]
        if not isinstance(image, Image.Image):
            image = Image.fromarray(np.asarray(image))
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    def with_transform(self, transform: Callable[[Image.Image], Any]) -> ImageData:
        """The same images, seen through `transform`."""
        labels = None if (self.labels == UNLABELLED).all() else self.labels
        return ImageData(self.images, labels, self.class_names, self.source, self.split, transform)


def load_data(
        source: str | Path | Sequence[str | Path],
        split: str | None = None,
        labels: bool = True,
) -> ImageData:
    """Opens a data set.

    Args:
        source: A folder of IDX files, an image folder (one sub-folder a class), parquet file(s), or a Hub id.
        split: `train`, `test`, ..., with an optional slice: `train[:50000]`. Needed where there are several.
        labels: Without, only the images are read: enough to calibrate by agreement with the backbone.

    Raises:
        FileNotFoundError: A path that does not exist.
        ValueError: An unknown split, or files that are not what they should be; the message says which.
    """
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
        with (gzip.open(path) if path.suffix == '.gz' else open(path, 'rb')) as f:
            data = f.read()
    except (EOFError, gzip.BadGzipFile) as e:
        raise ValueError(f'{path} is truncated or damaged ({e}); fetch it again.') from e
    if len(data) < 4 or data[:3] != b'\0\0\x08':
        raise ValueError(f'{path} is not an IDX file of unsigned bytes; fetch it again.')
    dims = data[3]
    shape = np.frombuffer(data[4:4 + 4 * dims], dtype='>u4').astype(int)
    body = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * dims)
    if len(shape) != dims or body.size != int(np.prod(shape)):
        raise ValueError(f'{path} holds {body.size} bytes where its header says {shape.tolist()}; fetch it again.')
    return body.reshape(shape)


class _Column:
    """A data set's image column as a sequence of PIL images."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __getitem__(self, index: int) -> Image.Image:
        return self.dataset[index][self.column]

    def __len__(self) -> int:
        return len(self.dataset)


def _load_datasets(paths: list[Path], split: str | None, labels: bool) -> ImageData:
    import datasets

    kind: dict[str, Any]
    if all(p.suffix == '.parquet' for p in paths):
        missing = [str(p) for p in paths if not p.is_file()]
        if missing:
            raise FileNotFoundError(f'no such file: {", ".join(missing)}.')
        kind = dict(path='parquet', data_files=[str(p) for p in paths])
        split = f'train{split[split.index("["):]}' if split and '[' in split else 'train'
    elif len(paths) == 1 and paths[0].is_dir():
        kind = dict(path='imagefolder', data_dir=str(paths[0]), drop_labels=not labels)
    elif len(paths) == 1 and re.fullmatch(r'[\w.-]+(/[\w.-]+)?', str(paths[0])):
        kind = dict(path=str(paths[0]))
    else:
        raise FileNotFoundError(
            f'{", ".join(map(str, paths))} is no IDX folder, no image folder, no parquet file and no Hub data set id.')
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
            f'{dict(features)}.')
    if not labels:
        return ImageData(_Column(loaded, image[0]), None, source=str(paths[0]), split=str(split))
    return ImageData(
        _Column(loaded, image[0]), loaded[label[0]][:], features[label[0]].names, str(paths[0]), str(split))


class _ToMode:
    """PIL image in any mode to the channels the model takes."""

    def __init__(self, in_chans: int) -> None:
        if in_chans not in (1, 3):
            raise ValueError(f'images have 1 or 3 channels, the model takes {in_chans}; give your own transform.')
        self.mode = 'L' if in_chans == 1 else 'RGB'

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert(self.mode)


def eval_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform for this model: PIL image to normalised (C, H, W)."""
    config = resolve_input_data_config(model)  # of the model as it is, in_chans included
    transform = create_transform(**config, is_training=False)
    transform.transforms.insert(0, _ToMode(config['input_size'][0]))
    return transform


def create_loader(model: nn.Module, data: Dataset, batch_size: int = 256, workers: int = 0) -> DataLoader:
    """Batches of (images, labels) in order; raw PIL images go through the model's evaluation transform.

    A data set with a transform of its own is taken as it is: anything that yields (tensor, label) works.
    """
    if isinstance(data, ImageData) and data.transform is None:
        data = data.with_transform(eval_transform(model))
    return DataLoader(data, batch_size=batch_size, num_workers=workers, pin_memory=torch.cuda.is_available())
