"""How the model sees images: timm's transforms, views that repeat, batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageCms
from timm.data import create_transform
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ..errors import BadImageError
from ..utils.timm_models import resolve_input_data_config
from .classes import match_classes
from .images import UNLABELLED, ImageData
from .items import Items, ItemStream, collate, resolve

__all__ = ['View', 'as_items', 'create_loader', 'eval_transform', 'prepare_data']


class _ToMode:
    """PIL image in any mode to the channels the model takes; grey of 16 bits and of floats keeps its range.

    Transparency is dropped, as timm's readers do.
    """

    def __init__(self, in_chans: int) -> None:
        if in_chans not in (1, 3):
            raise ValueError(f'images have 1 or 3 channels, the model takes {in_chans}; give your own transform.')
        self.mode = 'L' if in_chans == 1 else 'RGB'

    def __call__(self, image: Image.Image) -> Image.Image:
        try:
            if image.mode in ('I', 'F') or image.mode.startswith('I;'):
                image = _to_bytes(image)
            elif image.mode == 'LAB':
                image = _from_lab(image)
            elif image.mode in ('P', 'PA') and 'transparency' in image.info:
                image = image.convert('RGBA')  # Pillow's own advice, which else it gives as a warning
            elif image.mode in ('La', 'RGBa'):
                image = image.convert('LA' if image.mode == 'La' else 'RGBA')
            return image.convert(self.mode)
        except (ValueError, OSError) as e:
            raise BadImageError(f'an image of mode {image.mode} cannot be brought to {self.mode}: {e}') from e

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.mode}, 2)'  # the number is of what the conversion does


def _from_lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB')
    converted = ImageCms.profileToProfile(image, *profiles, outputMode='RGB')
    if converted is None:
        raise ValueError('no conversion')
    return converted


def _to_bytes(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits to 0..255; Pillow alone would cut them off at 255, which is white.

    Integers of up to 16 bits fill 0..65535, others 0..255 where they stay in it; floats fill 0..1, or 0..255.

    Raises:
        ValueError: Values outside of these ranges.
    """
    values = np.asarray(image).astype(np.float64)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 65535 or (image.mode == 'F' and high > 255):
        raise ValueError(
            f'its values go from {low:g} to {high:g}; expected 0..1 or 0..255 of floats, up to 65535 of integers. '
            f'Convert it, or give the data set a transform of its own'
        )
    wide = image.mode.startswith('I;') or image.format in ('PNG', 'PPM')  # 16 bits; Pillow opens some as 32
    scale = 255 if image.mode == 'F' and high <= 1 else 1 / 257 if image.mode != 'F' and (wide or high > 255) else 1
    return Image.fromarray((values * scale + 0.5).astype(np.uint8))


def _transform(model: nn.Module, training: bool) -> Callable[[Image.Image], Tensor]:
    """timm's transform for this model: that of evaluation, or that of training (random crop, mirror, colour)."""
    config = resolve_input_data_config(model)  # of the model as it is, in_chans included
    transform = create_transform(**config, is_training=training)
    transform.transforms.insert(0, _ToMode(config['input_size'][0]))
    return transform


def eval_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform for this model: PIL image to normalised (C, H, W)."""
    return _transform(model, training=False)


@contextmanager
def _random_state(*key: int) -> Iterator[None]:
    """Every generator that transforms draw from, seeded by `key`, and put back afterwards."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


class View(Dataset):
    """A view of each image of a data set, the same whenever it is asked for: (tensor, label).

    View 0 of an ImageData is what the model sees in evaluation, the others go through timm's training transform. A
    data set with a transform of its own is asked again for each view.

    Args:
        model: Whose transform it is.
        data: An ImageData, or any data set of (image, label); see `as_items`.
        number: Which view.
        seed: What is random about it follows from seed, number and index.

    Raises:
        ValueError: Data without a length, or of another kind.
    """

    def __init__(self, model: nn.Module, data: Dataset, number: int = 0, seed: int = 0) -> None:
        raw = isinstance(resolved := resolve(data), ImageData) and resolved.transform is None
        self.data: Any = as_items(model, resolved, training=bool(number))
        if isinstance(self.data, ItemStream):
            self.data = Items(resolved, 0, eval_transform(model))  # raises: views are asked for by position
        self.number, self.seed, self.random = number, seed, bool(number) or not raw

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not self.random:
            return self.data[index]
        with _random_state(self.seed, self.number, index):
            return self.data[index]

    def __len__(self) -> int:
        return len(self.data)


def as_items(model: nn.Module, data: Any, training: bool = False) -> Any:
    """Any data set as (normalised float32 tensor, class index).

    PIL images and uint8 arrays go through the model's transform; tensors are taken as they are.

    Args:
        data: An ImageData, a part or join of some, a `datasets.Dataset`, a folder of torchvision or timm, or any data
            set that yields (image, label) or a dict of these.
        training: timm's training transform, not that of evaluation.

    Raises:
        ValueError: Not a data set, or an empty one. Asked for an item, it raises ValueError where that is not an
            image with one class index, and says what was seen.
    """
    data = resolve(data)
    if isinstance(data, ImageData) and data.transform is None:
        return data.with_transform(_transform(model, training))
    in_chans = resolve_input_data_config(model)['input_size'][0]
    transform = _transform(model, training) if in_chans in (1, 3) else _no_transform
    iterable = isinstance(data, IterableDataset) or not hasattr(data, '__getitem__')
    return (ItemStream if iterable else Items)(data, in_chans, transform)


def _no_transform(image: Image.Image) -> Tensor:
    raise ValueError('the model takes neither 1 nor 3 channels; give the data set a transform of its own.')


def prepare_data(model: Any, data: Any, names: Sequence[str] | None = None) -> Any:
    """The data set as a cascade's public functions take it: classes matched by name, its first item looked at.

    Args:
        model: The cascade; its `num_classes` is compared.
        names: Names of the model's classes; by default model.label_names.

    Raises:
        ValueError: Classes or items that do not fit the model; the message says what was seen and what to pass.
        BadImageError: The first image cannot be read.
    """
    data = match_classes(data, model.num_classes, model.label_names if names is None else names)
    items = as_items(model, data)
    if isinstance(items, ItemStream):
        first = next(iter(items), None)
        if first is None:
            raise ValueError(f'{type(data).__name__} holds no images.')
    elif isinstance(items, Items):
        first = items[0]
    else:
        return data  # an ImageData holds what it says
    if not UNLABELLED <= first[1] < model.num_classes:
        raise ValueError(
            f'the first label of {type(data).__name__} is {first[1]}; the model has the classes '
            f'0..{model.num_classes - 1}. Create it with more classes, or correct the labels.'
        )
    return data


def create_loader(model: nn.Module, data: Dataset, batch_size: int = 256, workers: int = 0) -> DataLoader:
    """Batches of (images, labels) in order; raw images go through the model's evaluation transform.

    A data set with a transform of its own is taken as it is; see `as_items`.
    """
    return DataLoader(
        as_items(model, data),
        batch_size=batch_size,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
    )
