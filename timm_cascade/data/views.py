"""How the model sees images: timm's transforms, views that repeat, batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_transform
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from .images import ImageData

__all__ = ['View', 'create_loader', 'eval_transform', 'train_transform']


class _ToMode:
    """PIL image in any mode to the channels the model takes."""

    def __init__(self, in_chans: int) -> None:
        if in_chans not in (1, 3):
            raise ValueError(f'images have 1 or 3 channels, the model takes {in_chans}; give your own transform.')
        self.mode = 'L' if in_chans == 1 else 'RGB'

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.convert(self.mode)

    def __repr__(self) -> str:
        return f'{type(self).__name__}({self.mode})'


def _transform(model: nn.Module, training: bool) -> Callable[[Image.Image], Tensor]:
    config = resolve_input_data_config(model)  # of the model as it is, in_chans included
    transform = create_transform(**config, is_training=training)
    transform.transforms.insert(0, _ToMode(config['input_size'][0]))
    return transform


def eval_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """timm's evaluation transform for this model: PIL image to normalised (C, H, W)."""
    return _transform(model, training=False)


def train_transform(model: nn.Module) -> Callable[[Image.Image], Tensor]:
    """timm's training transform for this model (random crop, mirror, colour): PIL image to normalised (C, H, W)."""
    return _transform(model, training=True)


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
    """One look at each image of a data set, the same whenever it is asked for: (tensor, label).

    View 0 of an ImageData is what the model sees in evaluation, the others go through timm's training transform. A
    data set with a transform of its own is asked for each view anew.

    Args:
        model: Whose transform it is.
        data: An ImageData, or any data set of (normalised tensor, label).
        number: Which view.
        seed: What is random about it follows from seed, number and index.
    """

    def __init__(self, model: nn.Module, data: Dataset, number: int = 0, seed: int = 0) -> None:
        raw = isinstance(data, ImageData) and data.transform is None
        if raw:
            data = data.with_transform(train_transform(model) if number else eval_transform(model))  # type: ignore[attr-defined]
        self.data: Any = data
        self.number, self.seed, self.random = number, seed, bool(number) or not raw

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not self.random:
            return self.data[index]
        with _random_state(self.seed, self.number, index):
            return self.data[index]

    def __len__(self) -> int:
        return len(self.data)


def create_loader(model: nn.Module, data: Dataset, batch_size: int = 256, workers: int = 0) -> DataLoader:
    """Batches of (images, labels) in order; raw PIL images go through the model's evaluation transform.

    A data set with a transform of its own is taken as it is: anything that yields (tensor, label) works.
    """
    if isinstance(data, ImageData) and data.transform is None:
        data = data.with_transform(eval_transform(model))
    return DataLoader(data, batch_size=batch_size, num_workers=workers, pin_memory=torch.cuda.is_available())
