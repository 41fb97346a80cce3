"""Images that are in two splits at once: what was trained on must not be measured on."""

from __future__ import annotations

import filecmp
import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .storage import names_of

__all__ = ['File', 'Seen', 'check_leaks']

_logger = logging.getLogger(__name__)

SAMPLE = 5000  # images of a split whose content is compared; of more, as many evenly spaced ones
EDGE = 4096  # bytes at either end that are compared first


class File(NamedTuple):
    """A file: path below the root, size in bytes, device and inode."""

    path: str
    size: int
    identity: tuple[int, int]


def _edges(path: Path, size: int) -> bytes:
    with open(path, 'rb') as f:
        head = f.read(EDGE)
        f.seek(max(0, size - EDGE))
        return hashlib.sha256(head + f.read(EDGE)).digest()


def _pairs(root: Path, mine: Sequence[File], other: Sequence[File]) -> list[tuple[str, str]]:
    by_identity = {f.identity: f.path for f in other}
    pairs = [(f.path, by_identity[f.identity]) for f in mine if f.identity in by_identity]
    if pairs:
        return pairs
    few, many = (mine, other) if len(mine) <= len(other) else (other, mine)
    few = [few[i * len(few) // SAMPLE] for i in range(SAMPLE)] if len(few) > SAMPLE else few
    common = {f.size for f in many} - {0}
    digests = {(f.size, _edges(root / f.path, f.size)): f for f in few if f.size in common}
    sizes = {size for size, _ in digests}
    for file in many:
        found = digests.get((file.size, _edges(root / file.path, file.size))) if file.size in sizes else None
        if found and filecmp.cmp(root / file.path, root / found.path, shallow=False):
            pairs.append((file.path, found.path) if many is mine else (found.path, file.path))
    return pairs


class Seen:
    """The images that a training has seen, by file or row; eight bytes for each.

    Args:
        data: An ImageData; of other data sets nothing is known.
    """

    def __init__(self, data: Any) -> None:
        self.keys = _keys(data)

    def keep(self, model: Any) -> None:
        """Remembers, in this process, that `model` was trained on them."""
        vars(model)['trained_on'] = self

    def warn_of(self, data: Any) -> None:
        """Says in the log how many images of `data` are among them."""
        keys = _keys(data)
        if shared := int(np.isin(keys, self.keys).sum()):
            _logger.warning(
                '%d of the %d images of %s were trained on: heads and backbone know them better than new images, so '
                'that what is measured on them promises too much. Give images of another split.',
                shared,
                len(keys),
                data.title,
            )


def _keys(data: Any) -> np.ndarray:
    names = names_of(getattr(data, 'images', None))
    return np.fromiter(map(hash, names), dtype=np.int64, count=len(names))


def check_leaks(root: Path, name: str, files: Sequence[File], others: Mapping[str, Sequence[File]]) -> None:
    """Makes sure that no image of a split is in another one: the same file, a link to it, or a copy.

    Copies are looked for among at most SAMPLE images of the smaller split.

    Raises:
        ValueError: There are some; the message names them.
    """
    for other, members in others.items():
        if pairs := _pairs(root, files, members):
            raise ValueError(
                f'{len(pairs)} of the images of {root} {name} are in {other} too: '
                + '; '.join(f'{a} is {b}' for a, b in pairs[:3])
                + f'{"; ..." if len(pairs) > 3 else ""}. What a cascade was trained on says nothing about new images: '
                f'remove them from one of the two.'
            )
