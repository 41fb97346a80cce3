"""Where pictures lie: in files, in a data set's column, in arrays; parts of these, and several as one.

Everything here is indexed by position and decodes when it is asked, so that a data set costs no memory.
"""

from __future__ import annotations

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

__all__ = ['Chain', 'Column', 'Files', 'content_of', 'file_of', 'files_below', 'names_of', 'take']


def files_below(folder: Path) -> Iterator[Path]:
    """The files at any depth, in text order; links are followed, hidden files and folders left out."""
    seen: set[tuple[int, int]] = set()
    for root, folders, names in os.walk(folder, followlinks=True):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:  # a link back to where we have been
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders[:] = sorted(f for f in folders if not f.startswith('.'))
        yield from (Path(root, name) for name in sorted(names) if not name.startswith('.'))


class Files:
    """Image files.

    Args:
        root: Folder that the paths start from.
        paths: Relative to it.
    """

    def __init__(self, root: str, paths: Sequence[str]) -> None:
        self.root, self.paths = root, list(paths)

    def __getitem__(self, index: int) -> Image.Image:
        with open(os.path.join(self.root, self.paths[index]), 'rb') as f:
            image = Image.open(f)
            image.load()
        return image

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for path in self.paths:
            state = os.stat(os.path.join(self.root, path))
            digest.update(f'{path} {state.st_size} {state.st_mtime_ns}\n'.encode('utf-8', 'surrogateescape'))
        return digest.hexdigest()

    def select(self, index: np.ndarray) -> Files:
        return Files(self.root, [self.paths[i] for i in index])

    def file_of(self, index: int) -> str:
        return os.path.join(self.root, self.paths[index])

    def names(self) -> list[str]:
        root = os.path.realpath(self.root)
        return [os.path.join(root, path) for path in self.paths]


class Column:
    """The image column of a `datasets.Dataset`.

    Args:
        dataset: What is read.
        column: Name of the column with the images.
    """

    def __init__(self, dataset: Any, column: str) -> None:
        self.dataset, self.column = dataset, column

    def __getitem__(self, index: int) -> Image.Image:
        return self.dataset[int(index)][self.column]

    def __len__(self) -> int:
        return len(self.dataset)

    @property
    def fingerprint(self) -> str:
        return f'{self.dataset._fingerprint} {self.column}'  # of the files, their times included

    def names(self) -> list[str]:
        return [f'{self.dataset._fingerprint} {row}' for row in range(len(self))]

    def file_of(self, index: int) -> str | None:
        import datasets

        encoded = self.dataset.select_columns([self.column]).cast_column(self.column, datasets.Image(decode=False))
        return (encoded[int(index)][self.column] or {}).get('path')


class Part:
    """Some of the images of a sequence that can only be asked for one at a time."""

    def __init__(self, images: Any, index: np.ndarray) -> None:
        self.images, self.index = images, index

    def __getitem__(self, index: int) -> Any:
        return self.images[int(self.index[index])]

    def __len__(self) -> int:
        return len(self.index)

    @property
    def fingerprint(self) -> str | None:
        content = content_of(self.images)
        return None if content is None else f'{content} {hashlib.sha256(self.index.tobytes()).hexdigest()}'

    def select(self, index: np.ndarray) -> Part:
        return Part(self.images, self.index[index])

    def file_of(self, index: int) -> str | None:
        return file_of(self.images, int(self.index[index]))


class Chain:
    """Several sequences of images, one after the other."""

    def __init__(self, parts: Sequence[Any]) -> None:
        self.parts = list(parts)
        self.ends = list(accumulate(len(p) for p in self.parts))

    def _at(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number = bisect_right(self.ends, index)
        return self.parts[number], index - (self.ends[number - 1] if number else 0)

    def __getitem__(self, index: int) -> Any:
        part, place = self._at(int(index))
        return part[place]

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @property
    def fingerprint(self) -> str | None:
        contents = [content_of(p) for p in self.parts]
        return None if None in contents else ' + '.join(c for c in contents if c is not None)

    def file_of(self, index: int) -> str | None:
        return file_of(*self._at(int(index)))


def take(images: Any, index: np.ndarray) -> Any:
    """The images at `index`, of the same kind where that is possible."""
    if isinstance(images, np.ndarray):
        contiguous = len(index) == index[-1] - index[0] + 1 and bool((np.diff(index) == 1).all())
        return images[index[0] : index[-1] + 1] if contiguous else images[index]
    if isinstance(images, (list, tuple)):
        return [images[i] for i in index]
    return images.select(index) if isinstance(images, (Files, Part)) else Part(images, index)


def content_of(images: Any) -> str | None:
    """A text that changes with the images; None where that cannot be known."""
    if isinstance(images, (Files, Column, Part, Chain)):
        return images.fingerprint
    if not isinstance(images, (np.ndarray, list, tuple)):
        return None
    digest = hashlib.sha256()
    for image in [images] if isinstance(images, np.ndarray) else images:
        array = np.ascontiguousarray(image)
        digest.update(f'{array.dtype} {array.shape} '.encode() + array.tobytes())
    return digest.hexdigest()


def names_of(images: Any) -> list[str]:
    """A name for each image, the same in every part of one source; none where that cannot be known."""
    if isinstance(images, Part):
        names = names_of(images.images)
        return [names[i] for i in images.index] if names else []
    if isinstance(images, Chain):
        return [name for part in images.parts for name in names_of(part)]
    return images.names() if isinstance(images, (Files, Column)) else []


def file_of(images: Any, index: int) -> str | None:
    """The file of an image, where it is in one."""
    return images.file_of(index) if isinstance(images, (Files, Column, Part, Chain)) else None
