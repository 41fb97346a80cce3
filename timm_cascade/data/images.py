"""Images with labels, in memory, in files or in a data set's column."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import DataLoader, Dataset

from ..errors import BadImageError
from .storage import Chain, content_of, file_of, take

__all__ = ['UNLABELLED', 'ImageData', 'join', 'upright']

_logger = logging.getLogger(__name__)
UNLABELLED = -1


class ImageData(Dataset):
    """Images with their labels: `data[i]` is a PIL image, or `transform` of it, and a class index.

    A photograph that says how it was held (EXIF orientation) is turned upright; of an animation the first frame counts.

    Args:
        images: Indexable by position; items are PIL images or uint8 arrays (H, W), (H, W, 1) or (H, W, 3).
        labels: (n,) class indices, or None where there are none: every label is then UNLABELLED.
        class_names: One name per class; they travel with the model that is trained on the images.
        source: Where the images are from, as the user named it; kept in tables and cards.
        split: Which part of the source, such as `train[:50000]`.
        transform: Applied to each PIL image.

    Raises:
        ValueError: The source is empty, or a label is outside 0..len(class_names)-1.

    Example:
        >>> data = timm_cascade.ImageData(numpy_images, labels, ['cat', 'dog'])
        >>> image, label = data[0]
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
            raise ValueError(f'{self.title} holds no images; give a split or a slice that has some.')
        low, high = int(self.labels.min()), int(self.labels.max())
        if labels is not None and high == UNLABELLED:
            raise ValueError(
                f'every label of {self.title} is -1: the labels of this split are hidden, as is usual for test sets. '
                f'Give another split, or pass labels=False (--no-labels) to count agreement with the full network.'
            )
        if labels is not None and (low < 0 or high >= len(self.class_names)):
            raise ValueError(
                f'{self.title} has labels from {low} to {high}, but there are {len(self.class_names)} classes '
                f'(0..{len(self.class_names) - 1}). Give every image one of these classes.'
            )

    @property
    def title(self) -> str:
        """Source and split, for messages."""
        return f'{self.source} {self.split}'.strip() or 'the data set'

    @property
    def name(self) -> str:
        """The source without the folders of this machine: what tables and cards say."""
        return Path(self.source).resolve().name if self.source and Path(self.source).exists() else self.source

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        try:
            image = upright(self.images[index])
        except Exception as e:  # decoders raise whatever they like
            raise BadImageError(
                f'{self.name_of(index)} is not an image that can be read ({e}). Remove or replace it, or '
                f'leave all such images out: --on-bad-image skip, on_bad_image="skip".'
            ) from e
        if self.transform is not None:
            try:
                image = self.transform(image)
            except BadImageError as e:
                raise BadImageError(f'{self.name_of(index)}: {e}') from e
        return image, int(self.labels[index])

    def name_of(self, index: int) -> str:
        """File of an image where that is known, else its place in the data set."""
        return file_of(self.images, index) or f'image {index} of {self.title}'

    @property
    def fingerprint(self) -> str | None:
        """Changes whenever an image, a label or the transform does; None where that cannot be known."""
        content, seen = content_of(self.images), repr(self.transform)
        if content is None or ' at 0x' in seen:  # an address says nothing
            return None
        return f'{content} {seen} {hashlib.sha256(self.labels.tobytes()).hexdigest()[:16]}'

    def select(self, index: Sequence[int] | np.ndarray) -> ImageData:
        """Some of the images, by position; class names, source and transform stay."""
        given = np.asarray(index)
        positions = np.flatnonzero(given) if given.dtype == bool else given.astype(np.int64).reshape(-1)
        positions = np.where(positions < 0, positions + len(self), positions)
        if not len(positions):
            raise ValueError(f'no images were selected from {self.title}; give a larger part of it.')
        return self._with(images=take(self.images, positions), labels=self.labels[positions])

    def without_bad_images(self, workers: int = 0) -> ImageData:
        """The images that can be decoded; the others are counted and named in the log. Decodes every image once."""
        loader = DataLoader(_Errors(self), batch_size=64, num_workers=workers, collate_fn=list)
        errors = [error for batch in loader for error in batch]
        good = [i for i, error in enumerate(errors) if error is None]
        if len(good) == len(errors):
            return self
        _logger.warning(
            '%d of %d images of %s cannot be read and are left out: %s',
            len(errors) - len(good),
            len(errors),
            self.title,
            ', '.join(self.name_of(i) for i, error in enumerate(errors) if error is not None),
        )
        if not good:
            raise ValueError(f'{self.title} holds no images that can be read.')
        return self.select(good)

    def without_labels(self) -> ImageData:
        """The same images, every label UNLABELLED."""
        return self._with(labels=np.full(len(self), UNLABELLED), class_names=[])

    def with_classes(self, names: Sequence[str]) -> ImageData:
        """The same images with the class indices of `names`, which holds all names of this data set.

        Raises:
            ValueError: A class that is not in `names`.
        """
        place = {name: i for i, name in enumerate(names)}
        if missing := [name for name in self.class_names if name not in place]:
            raise ValueError(f'{self.title} has the classes {", ".join(missing[:5])}, which are not among the others.')
        index = np.array([*(place[name] for name in self.class_names), UNLABELLED], dtype=np.int64)
        return self._with(labels=index[self.labels], class_names=list(names))  # -1 finds the last, which is -1

    def with_transform(self, transform: Callable[[Image.Image], Any] | None) -> ImageData:
        """The same images, seen through `transform`."""
        return self._with(transform=transform)

    def _with(self, **changed: Any) -> ImageData:
        part = copy.copy(self)
        vars(part).update(changed)
        return part


def upright(image: Any) -> Image.Image:
    """A PIL image or uint8 array as a decoded PIL image, turned as its EXIF data say that it was held."""
    if not isinstance(image, Image.Image):
        array = np.asarray(image)
        return Image.fromarray(array[..., 0] if array.ndim == 3 and array.shape[-1] == 1 else array)
    image.load()
    if image.format is not None and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # from a file
        image = ImageOps.exif_transpose(image)
    return image


def join(parts: Sequence[ImageData]) -> ImageData:
    """Several data sets as one, one after the other.

    Raises:
        ValueError: Classes that are not the same; classes are compared by name.
    """
    if len(parts) == 1:
        return parts[0]
    names = max((p.class_names for p in parts), key=len)
    return parts[0]._with(
        images=Chain([p.images for p in parts]),
        labels=np.concatenate([p.with_classes(names).labels for p in parts]),
        class_names=list(names),
        source=', '.join(dict.fromkeys(p.source for p in parts if p.source)),
        split='+'.join(dict.fromkeys(p.split for p in parts if p.split)),
    )


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
