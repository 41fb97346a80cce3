"""Images with labels, in memory or in a data set's column."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from ..errors import BadImageError

__all__ = ['UNLABELLED', 'Column', 'ImageData']

_logger = logging.getLogger(__name__)
UNLABELLED = -1


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
                f'(0..{len(self.class_names) - 1}). Give every image one of these classes.'
            )

    @property
    def name(self) -> str:
        """The source without the folders of this machine: what tables and cards say."""
        return Path(self.source).name if Path(self.source).exists() else self.source

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image = self.images[index]
            if not isinstance(image, Image.Image):
                image = Image.fromarray(np.asarray(image))
            image.load()
        except Exception as e:  # decoders raise whatever they like
            raise BadImageError(
                f'{self.name_of(index)} is no image that can be read ({e}). Remove or replace it, or '
                f'leave all such images out: --on-bad-image skip, on_bad_image="skip".'
            ) from e
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])

    def name_of(self, index: int) -> str:
        """File of an image where that is known, else its place in the data set."""
        file = self.images.file_of(index) if isinstance(self.images, Column) else None
        return file or f'image {index} of {self.source} {self.split}'.rstrip()

    @property
    def fingerprint(self) -> str | None:
        """Changes whenever an image or the transform does; None where nobody can tell."""
        seen = repr(self.transform)
        if isinstance(self.images, Column):
            content = self.images.fingerprint
        elif isinstance(self.images, (np.ndarray, list, tuple)):
            digest = hashlib.sha256()
            for image in [self.images] if isinstance(self.images, np.ndarray) else self.images:
                array = np.ascontiguousarray(image)
                digest.update(f'{array.dtype} {array.shape} '.encode() + array.tobytes())
            content = digest.hexdigest()
        else:
            return None
        return None if ' at 0x' in seen else f'{content} {seen}'  # an address says nothing

    def without_bad_images(self, workers: int = 0) -> ImageData:
        """The images that can be decoded; the others are counted and named in the log. Decodes every image once."""
        loader = DataLoader(_Errors(self), batch_size=64, num_workers=workers, collate_fn=list)
        errors = [error for batch in loader for error in batch]
        good = [i for i, error in enumerate(errors) if error is None]
        if len(good) == len(errors):
            return self
        _logger.warning(
            '%d of %d images of %s %s cannot be read and are left out: %s',
            len(errors) - len(good),
            len(errors),
            self.source,
            self.split,
            ', '.join(self.name_of(i) for i, error in enumerate(errors) if error is not None),
        )
        images = self.images.select(good) if isinstance(self.images, Column) else [self.images[i] for i in good]
        labels = None if (self.labels == UNLABELLED).all() else self.labels[good]
        return ImageData(images, labels, self.class_names, self.source, self.split, self.transform)

    def with_transform(self, transform: Callable[[Image.Image], Any]) -> ImageData:
        """The same images, seen through `transform`."""
        labels = None if (self.labels == UNLABELLED).all() else self.labels
        return ImageData(self.images, labels, self.class_names, self.source, self.split, transform)


class _Errors(Dataset):
    """What is wrong with each image; None where nothing is."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __getitem__(self, index: int) -> str | None:
        try:
            self.data[index]
        except BadImageError as e:
            return str(e)
        return None

    def __len__(self) -> int:
        return len(self.data)


class Column:
    """A data set's image column as a sequence of PIL images."""

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __getitem__(self, index: int) -> Image.Image:
        return self.dataset[index][self.column]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> str:
        return f'{self.dataset._fingerprint} {self.column}'  # of the files, their times included

    def select(self, index: Sequence[int]) -> Column:
        return Column(self.dataset.select(index), self.column)

    def file_of(self, index: int) -> str | None:
        import datasets

        return self.dataset.cast_column(self.column, datasets.Image(decode=False))[index][self.column]['path']
