"""What any data set yields, looked at once and brought into one form: (normalised tensor, class index)."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, IterableDataset, Subset, default_collate

from .columns import from_columns
from .images import UNLABELLED, ImageData, join
from .storage import Files

__all__ = ['ItemStream', 'Items', 'class_names_of', 'collate', 'fingerprint_of', 'resolve']

IMAGE_KEYS = ('image', 'img', 'images', 'pixel_values', 'picture', 'jpg', 'png', 'x')
LABEL_KEYS = ('label', 'labels', 'target', 'targets', 'class', 'cls', 'y')


def resolve(data: Any) -> Any:
    """The ImageData that a data set is a part, a join or another form of; any other data set as it is.

    Subset, ConcatDataset and random_split of an ImageData keep its transform, class names and fingerprint, however
    often they are nested. Image folders of torchvision and timm without a transform, and data sets of `datasets`
    without a format, become one.

    Raises:
        ValueError: Not a data set, or parts with classes that are not the same.
    """
    if isinstance(data, ImageData):
        return data
    if isinstance(data, DataLoader):
        raise ValueError('this is a DataLoader; give its data set (loader.dataset): batches are made here, in order.')
    if isinstance(data, (Tensor, np.ndarray, str)) or not (hasattr(data, '__getitem__') or hasattr(data, '__iter__')):
        raise ValueError(
            f'{type(data).__name__} is not a data set of (image, label). Give timm_cascade.load_data(...), '
            f'ImageData(images, labels, class_names) or TensorDataset(images, labels).'
        )
    if type(data) is Subset:  # a subclass may do more than select
        inner = resolve(data.dataset)
        return inner.select(data.indices) if isinstance(inner, ImageData) and len(data) else data
    if type(data) is ConcatDataset:
        parts = [resolve(part) for part in data.datasets]
        alike = all(isinstance(p, ImageData) and type(p) is type(parts[0]) for p in parts)
        same_transform = alike and all(p.transform is parts[0].transform for p in parts)
        return join(parts) if same_transform else data
    return _foreign(data)


def _foreign(data: Any) -> Any:
    library = sys.modules.get('datasets')
    if library is not None and isinstance(data, (library.DatasetDict, library.IterableDatasetDict)):
        raise ValueError(f'this is a DatasetDict with the splits {sorted(data)}; give one of them.')
    if library is not None and isinstance(data, library.Dataset):
        if data.format['type'] == 'custom':  # a transform of the user's
            return data
        name = str(getattr(data.info, 'dataset_name', None) or 'the data set')
        return from_columns(data.with_format(None), str(data.split or ''), source=name)
    folders = sys.modules.get('torchvision.datasets')
    if folders is not None and type(data) is folders.ImageFolder and not (data.transform or data.target_transform):
        samples = data.samples
        return ImageData(Files('', [s[0] for s in samples]), [s[1] for s in samples], data.classes, str(data.root))
    if type(data).__name__ == 'ImageDataset' and type(data).__module__ == 'timm.data.dataset':
        return _timm_folder(data)
    return data


def _timm_folder(data: Any) -> Any:
    reader = data.reader
    further = getattr(data, 'additional_features', None)  # older versions of timm have none
    plain = not (data.transform or data.target_transform or further)
    if not plain or not hasattr(reader, 'samples') or type(reader).__name__ != 'ReaderImageFolder':
        return data
    samples = reader.samples
    return ImageData(Files('', [s[0] for s in samples]), [s[1] for s in samples], _by_index(reader), str(reader.root))


def _by_index(reader: Any) -> list[str]:
    place = getattr(reader, 'class_to_idx', None) or {}
    names = sorted(place, key=place.get)  # type: ignore[arg-type]
    return [str(n) for n in names] if [place[n] for n in names] == list(range(len(names))) else []


def class_names_of(data: Any) -> list[str]:
    """Names of the classes, in the order of the labels; empty where the data set does not say them."""
    if type(data) is Subset:
        return class_names_of(data.dataset)
    if type(data) is ConcatDataset:
        named = [names for names in map(class_names_of, data.datasets) if names]
        if any(names != named[0] for names in named):
            raise ValueError(
                f'data sets with different classes are joined: {named[0][:5]} and '
                f'{next(n for n in named if n != named[0])[:5]}; label 1 is not the same class in both.'
            )
        return named[0] if named else []
    if hasattr(data, 'class_names'):
        return [str(n) for n in data.class_names or []]
    if getattr(data, 'target_transform', None) is not None:
        return []
    if isinstance(names := getattr(data, 'classes', None), (list, tuple)):
        return [str(n) for n in names]
    if hasattr(data, 'reader'):
        return _by_index(data.reader)
    if isinstance(features := getattr(data, 'features', None), Mapping):
        named = [f.names for f in features.values() if hasattr(f, 'names') and hasattr(f, 'str2int')]
        return list(named[0]) if len(named) == 1 else []
    return []


def fingerprint_of(data: Any) -> str | None:
    """A text that changes with the images, the labels and the transform; None where that cannot be known."""
    if type(data) is Subset:
        inner = fingerprint_of(data.dataset)
        index = hashlib.sha256(np.asarray(data.indices, dtype=np.int64).tobytes()).hexdigest()
        return None if inner is None else f'{inner} {index}'
    if type(data) is ConcatDataset:
        parts = [fingerprint_of(part) for part in data.datasets]
        return None if None in parts else ' + '.join(map(str, parts))
    return getattr(data, 'fingerprint', None)


class _Reader:
    """Takes an item apart and checks what is in it.

    Args:
        what: The data set, for messages.
        in_chans: Channels of the images that the model takes.
        transform: Applied to images that are not tensors yet.
    """

    def __init__(self, what: str, in_chans: int, transform: Callable[[Image.Image], Tensor]) -> None:
        self.what, self.in_chans, self.transform = what, in_chans, transform

    def __call__(self, item: Any) -> tuple[Tensor, int]:
        image, label = self._apart(item)
        return self._image(image), self._label(label)

    def _refuse(self, seen: str, advice: str) -> ValueError:
        return ValueError(
            f'{self.what} yields {seen}; expected (image, label): a PIL image, a uint8 array (H, W, 3) or a normalised '
            f'float tensor ({self.in_chans}, H, W), and one class index. {advice}'
        )

    def _apart(self, item: Any) -> tuple[Any, Any]:
        if isinstance(item, Mapping):
            images = [k for k, v in item.items() if _is_image(v)]
            labels = [k for k, v in item.items() if k not in images and _is_index(v)]
            images = _narrowed(images, IMAGE_KEYS)
            labels = _narrowed(labels or [k for k in item if k not in images], LABEL_KEYS)
            if len(images) == 1 and len(labels) == 1:
                return item[images[0]], item[labels[0]]
            raise self._refuse(
                f'a dict with {", ".join(f"{k} ({_describe(v)})" for k, v in item.items())}',
                'Which is the image and which the label cannot be told: name them image and label, or name the columns '
                'in load_data(data, image_column=..., label_column=...).',
            )
        if isinstance(item, (tuple, list)) and len(item) >= 2:
            if len(item) > 2 and not (_is_image(item[0]) and _is_index(item[1])):
                raise self._refuse(
                    f'{len(item)} values ({", ".join(map(_describe, item))})', 'Yield the two that count.'
                )
            return item[0], item[1]
        raise self._refuse(
            _describe(item[0] if isinstance(item, (tuple, list)) and len(item) == 1 else item) + ' without a label',
            'Where there are no labels yield -1, which counts agreement with the full network.',
        )

    def _image(self, image: Any) -> Tensor:
        if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
            if image.ndim == 3 and image.shape[-1] not in (1, 3, 4):
                raise self._refuse(_describe(image), 'Arrays have their channels last.')
            image = Image.fromarray(image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image)
        if isinstance(image, Image.Image):
            return self.transform(image)
        if isinstance(image, np.ndarray) and image.dtype.kind == 'f':
            image = torch.from_numpy(image)
        if not isinstance(image, Tensor):
            raise self._refuse(f'{_describe(image)} as image', 'Decode the image, or wrap the data set.')
        if image.ndim == 4:
            raise self._refuse(f'{_describe(image)} as image', 'These are batches; give a data set of single images.')
        if image.ndim != 3 or image.shape[0] != self.in_chans:
            raise self._refuse(
                f'{_describe(image)} as image',
                f'The model takes {self.in_chans} channels: convert the images, or create it with in_chans=.',
            )
        if not image.is_floating_point():
            raise self._refuse(
                f'{_describe(image)} as image', 'Normalise it as the model expects (timm_cascade.data.eval_transform).'
            )
        return image.float()

    def _label(self, label: Any) -> int:
        if label is None:
            return UNLABELLED
        if isinstance(label, str):
            raise self._refuse(
                f'the text {label!r} as label', 'Give the place of the class in a list of names (names.index(label)).'
            )
        array = np.asarray(label.detach().cpu() if isinstance(label, Tensor) else label)
        if array.size != 1 or array.ndim > 1:
            raise self._refuse(
                f'{_describe(label)} as label',
                'With several labels, or soft ones, no class has a confidence to exit by; where one class is meant, '
                'give its index (label.argmax()).',
            )
        if array.dtype.kind not in 'iub':
            raise self._refuse(f'{_describe(label)} as label', 'Give an integer (int(label)).')
        return int(array.reshape(()))


def _narrowed(found: Sequence[Any], known: Sequence[str]) -> list[Any]:
    if len(found) < 2:
        return list(found)
    named = [k for k in found if str(k).lower() in known]
    return named if named else list(found)


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, (Tensor, np.ndarray)) and value.ndim in (2, 3))


def _is_index(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        kind = np.asarray(value.detach().cpu() if isinstance(value, Tensor) else value).dtype.kind
        return value.ndim <= 1 and kind in 'iub' and np.size(value) == 1
    return value is None or isinstance(value, (int, np.integer, np.bool_))


def _describe(value: Any) -> str:
    if isinstance(value, (Tensor, np.ndarray)):
        kind = 'tensor' if isinstance(value, Tensor) else 'array'
        return f'a {str(value.dtype).removeprefix("torch.")} {kind} of shape {tuple(value.shape)}'
    if isinstance(value, Image.Image):
        return f'a PIL image ({value.mode}, {value.width}x{value.height})'
    return f'{type(value).__name__}' + (f' {value!r}' if isinstance(value, (int, float, str)) else '')


def _name(data: Any) -> str:
    return getattr(data, 'title', '') or type(data).__name__


class Items(Dataset):
    """Any data set as (float32 tensor, class index); every item is checked, and the error says what was seen.

    Args:
        data: Yields (image, label) or a dict of these.
        in_chans: Channels of the images that the model takes.
        transform: Applied to images that are not tensors yet.
    """

    def __init__(self, data: Any, in_chans: int, transform: Callable[[Image.Image], Tensor]) -> None:
        if isinstance(data, IterableDataset) or not hasattr(data, '__len__') or not hasattr(data, '__getitem__'):
            raise ValueError(
                f'{_name(data)} can only be read from front to back, without a length; this needs images by position. '
                f'Keep its items in a list, or load it without streaming.'
            )
        if not len(data):
            raise ValueError(f'{_name(data)} holds no images.')
        self.data, self.read = data, _Reader(_name(data), in_chans, transform)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.read(self.data[index])

    def __len__(self) -> int:
        return len(self.data)

    @property
    def transform(self) -> Any:
        """That of the data set."""
        return getattr(self.data, 'transform', None)


class ItemStream(IterableDataset):
    """An iterable data set in the form of `Items`."""

    def __init__(self, data: Any, in_chans: int, transform: Callable[[Image.Image], Tensor]) -> None:
        self.data, self.read = data, _Reader(_name(data), in_chans, transform)

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        return map(self.read, self.data)


def collate(items: Sequence[tuple[Tensor, int]]) -> list[Tensor]:
    """Images and labels as a batch.

    Raises:
        ValueError: Images of different sizes.
    """
    shapes = {tuple(image.shape): None for image, _ in items}
    if len(shapes) > 1:
        raise ValueError(
            f'images of one batch have different shapes: {", ".join(map(str, list(shapes)[:3]))}. Resize them in the '
            f"transform, or give PIL images, which go through the model's own."
        )
    return default_collate(list(items))
