"""Whether a data set's classes are those of a model, and whether they can be learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch.utils.data import Dataset

from .images import ImageData

__all__ = ['check_classes', 'check_training_classes']


def check_classes(data: Dataset, num_classes: int, label_names: Sequence[str] | None = None) -> None:
    """Makes sure that the labels of `data` mean the classes of a model, as far as both say what they are.

    Raises:
        ValueError: More classes than the model has, or other names, or the same in another order.
    """
    names = list(getattr(data, 'class_names', []))
    source = f'{getattr(data, "source", "")} {getattr(data, "split", "")}'.strip() or 'the data set'
    if len(names) > num_classes:
        raise ValueError(
            f"{source} has {len(names)} classes, the model {num_classes}; give images of the model's "
            f'classes, or train a cascade for these.'
        )
    known = list(label_names or [])
    if not names or not known or _only_numbers(names) or _only_numbers(known):
        return
    other = [(i, name, known[i]) for i, name in enumerate(names) if name != known[i]]
    if other:
        raise ValueError(
            f'{source} has other classes than the model, or the same in another order: '
            + '; '.join(f'class {i} is {name!r} there and {mine!r} here' for i, name, mine in other[:3])
            + (f'; {len(other)} differ in all' if len(other) > 3 else '')
            + ". Give images of the model's classes in its order; where only the names differ, set "
            'model.label_names or class_names.'
        )


def _only_numbers(names: Sequence[str]) -> bool:
    """Whether the names are the indices again, as where the format has none."""
    return list(names) == [str(i) for i in range(len(names))]


def check_training_classes(data: Dataset) -> None:
    """Makes sure that there is something to learn.

    Raises:
        ValueError: One class only, or classes without an image.
    """
    if not isinstance(data, ImageData) or not data.class_names:
        return
    source = f'{data.source} {data.split}'.strip()
    if len(data.class_names) == 1:
        raise ValueError(
            f'{source} has one class only, {data.class_names[0]!r}: there is nothing to tell apart. An '
            f'image folder has one sub-folder a class.'
        )
    counts = np.bincount(data.labels[data.labels >= 0], minlength=len(data.class_names))
    empty = [name for name, count in zip(data.class_names, counts, strict=True) if not count]
    if empty and counts.any():
        raise ValueError(
            f'{source} has no image of {len(empty)} of its {len(data.class_names)} classes: '
            f'{", ".join(empty[:5])}{", ..." if len(empty) > 5 else ""}. Take a split or slice that has '
            f'some of each, or take the classes out of the data set.'
        )
