"""Whether a data set's classes are those of a model, and whether they can be learned."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from .images import UNLABELLED, ImageData
from .items import class_names_of, resolve

__all__ = ['check_labels', 'check_training_classes', 'match_classes', 'warn_of_other_classes', 'weak_backbone']

_logger = logging.getLogger(__name__)


def match_classes(data: Dataset, num_classes: int, label_names: Sequence[str] | None = None) -> Any:
    """The data set with its labels in a model's order of classes; classes are compared by name.

    A data set that lacks some classes, or has them in another order, gets the model's indices, and the log says so.

    Args:
        num_classes: Outputs of the model.
        label_names: Names of the model's classes, where it knows them.

    Raises:
        ValueError: Classes that the model does not have, another number of them where the model knows no names, one
            output only, or no data set.
    """
    check_outputs(num_classes)
    data = resolve(data)
    names, known = class_names_of(data), list(label_names or [])
    if len(known) != num_classes:  # of another classifier
        known = []
    source = getattr(data, 'title', '') or type(data).__name__
    if len(names) > num_classes:
        raise ValueError(
            f"{source} has {len(names)} classes, the model {num_classes}; give images of the model's "
            f'classes, or train a cascade for these.'
        )
    if not names or names == known or (_only_numbers(names) and not (known and _only_numbers(known))):
        return data
    if not known or (_only_numbers(known) and not set(names) <= set(known)):
        if len(names) < num_classes:
            raise ValueError(
                f'{source} has {len(names)} classes ({", ".join(names[:3])}, ...), the model {num_classes}, and the '
                f'model does not know their names, so the labels cannot be matched. Set model.label_names.'
            )
        return data
    other = [(i, name, known[i]) for i, name in enumerate(names) if name not in known]
    if other:
        raise ValueError(
            f'{source} has other classes than the model: '
            + '; '.join(f'class {i} is {name!r} there and {mine!r} here' for i, name, mine in other[:3])
            + (f'; {len(other)} differ in all' if len(other) > 3 else '')
            + ". Give images of the model's classes; where only the names differ, set "
            'model.label_names or class_names.'
        )
    missing = [name for name in known if name not in names]
    if names == known[: len(names)]:  # the labels are right as they are
        return data.with_classes(known) if isinstance(data, ImageData) else data
    if not isinstance(data, ImageData):
        raise ValueError(
            f'{source} has the classes {", ".join(names[:5])}, the model {", ".join(known[:5])}, so label '
            f'{next(i for i, name in enumerate(names) if name != known[i])} is not the same class in both. Open the '
            f'images with load_data, which matches classes by name, or give them the labels of the model.'
        )
    _logger.warning(
        '%s: labels were matched to the classes of the model by name: %s',
        source,
        f'{", ".join(missing[:5])} not among them' if missing else 'they are in another order there',
    )
    return data.with_classes(known)


def warn_of_other_classes(loader: Any, num_classes: int, label_names: Sequence[str] | None) -> None:
    """Warns where the labels of a loader's data set do not mean a model's classes, index by index."""
    if (data := getattr(loader, 'dataset', None)) is None:
        return
    try:
        names, known = class_names_of(data), list(label_names or [])
    except ValueError as e:
        warnings.warn(str(e), stacklevel=3)
        return
    numbers = _only_numbers(names) or _only_numbers(known)
    if not names or len(known) != num_classes or names == known[: len(names)] or (numbers and set(names) - set(known)):
        return
    warnings.warn(
        f'labels of these batches are of the classes {", ".join(names[:5])}, the answers of {", ".join(known[:5])}: '
        f'compare names, not indices, or open the images with load_data and match_classes.',
        stacklevel=3,
    )


def check_labels(labels: Any, num_classes: int, needed: bool = True) -> None:
    """Makes sure that labels are classes of the model.

    Args:
        labels: (N,) tensor or array of integers; may be empty.
        num_classes: Outputs of the model.
        needed: Every image must have a label.

    Raises:
        ValueError: They are of other classes, or missing.
    """
    low, high = (int(labels.min()), int(labels.max())) if len(labels) else (0, 0)
    if needed and low == UNLABELLED:
        raise ValueError(
            f'labels go from {low} to {high}: some images have no label (-1), and this needs a label '
            f'0..{num_classes - 1} for every image. Give a split that has labels.'
        )
    if low < UNLABELLED or high >= num_classes:
        raise ValueError(
            f'labels go from {low} to {high}, the model has the classes 0..{num_classes - 1}: these images belong to '
            f'other classes. Give images of its classes, or create it with num_classes={high + 1}.'
        )


def check_outputs(num_classes: int) -> None:
    """Makes sure that a softmax over the model's outputs says something.

    Raises:
        ValueError: One output: its softmax is always 1.
    """
    if num_classes == 1:
        raise ValueError(
            'the model has one output, whose softmax is always 1: every sample would exit at the first exit, and no '
            'drop in accuracy could be told. For two classes create it with num_classes=2 and labels 0 and 1.'
        )


def _only_numbers(names: Sequence[str]) -> bool:
    """Whether the names are the indices again, as where the format has none."""
    return list(names) == [str(i) for i in range(len(names))]


def check_training_classes(data: Dataset) -> None:
    """Makes sure that there is something to learn.

    Raises:
        ValueError: One class only, or classes without an image.
    """
    data = resolve(data)
    if not isinstance(data, ImageData) or not data.class_names:
        return
    if len(data.class_names) == 1:
        raise ValueError(
            f'{data.title} has one class only, {data.class_names[0]!r}: there is nothing to tell apart. An '
            f'image folder has one sub-folder per class.'
        )
    counts = np.bincount(data.labels[data.labels >= 0], minlength=len(data.class_names))
    empty = [name for name, count in zip(data.class_names, counts, strict=True) if not count]
    if empty and counts.any():
        raise ValueError(
            f'{data.title} has no image of {len(empty)} of its {len(data.class_names)} classes: '
            f'{", ".join(empty[:5])}{", ..." if len(empty) > 5 else ""}. Take a split or slice that has '
            f'some of each (train[:80%] is drawn by class), or take the classes out of the data set.'
        )


def weak_backbone(accuracy: Sequence[float], n: int) -> str | None:
    """One or two sentences where the backbone knows the labels less than a head on its own features does.

    Args:
        accuracy: (M+1,) of each exit on labelled images, the backbone's own last.
        n: How many images.
    """
    best = int(np.argmax(accuracy[:-1])) if len(accuracy) > 1 else 0
    error = 0.5 / max(n, 1) ** 0.5  # standard error of a share, at most
    gain = accuracy[best] - accuracy[-1] if len(accuracy) > 1 else 0.0
    if gain < max(0.01, 3 * error):
        return None
    if gain < 0.1:
        return (
            f"Exit {best} is right on {accuracy[best]:.1%} of these images, the backbone's own classifier on "
            f'{accuracy[-1]:.1%}: a classifier trained like the heads may do better (timm-cascade train --classifier '
            f'train, or train_heads(..., classifier=True)).'
        )
    return (
        f'The backbone is right on {accuracy[-1]:.0%} of these images where its exit {best} is right on '
        f'{accuracy[best]:.0%}: its classifier was trained for too few epochs, on other classes, or on the same in '
        f'another order. Fine-tune it for longer (--finetune), compare class_names with those it was trained on '
        f'(load_data(..., class_order="text") is torchvision\'s order), or train the classifier too (timm-cascade '
        f'train --classifier train, or train_heads(..., classifier=True)).'
    )
