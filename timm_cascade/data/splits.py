"""What a split is called, and which part of it a slice is."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from .images import ImageData

__all__ = ['Slice', 'canonical', 'choose_split', 'parse_splits']

SYNONYMS = {
    'train': ('train', 'training'),
    'validation': ('validation', 'val', 'valid', 'dev', 'eval', 'evaluation'),
    'test': ('test', 'testing'),
}
CANONICAL = {word: name for name, words in SYNONYMS.items() for word in words}
BOUND = r'-?\d+(?:\.\d+)?%?'
SPLIT = re.compile(rf'(?P<name>[^\[\]+]+?)(?:\[(?P<start>{BOUND})?:(?P<stop>{BOUND})?\])?$')


def canonical(word: str) -> str | None:
    """train, validation or test where `word` is one of their names (val, valid, dev, ...), in any case; else None."""
    return CANONICAL.get(word.lower())


def choose_split(have: Iterable[str], split: str | None, source: str) -> str:
    """The one of the splits `have` that is asked for, by its name or a synonym; the only one where none is asked for.

    Raises:
        ValueError: It is not there, or none is named and there are several.
    """
    names = list(have)
    if split is None and len(names) == 1:
        return names[0]
    alike = [name for name in names if split and canonical(name) == canonical(split) is not None]
    if split in names or len(alike) == 1:
        return split if split in names else alike[0]
    asked = 'none was chosen' if split is None else f'asked was {split!r}'
    raise ValueError(f'{source} has the splits {sorted(names)}; {asked}. Choose one with split= (--split).')


def parse_splits(split: str | None) -> list[Slice]:
    """What is joined: `train`, `train[:50000]`, `train[-100:]`, `train[:80%]`, `train[:80%]+test`.

    Raises:
        ValueError: Another form.
    """
    return [_parse(part) for part in split.split('+')] if split else [Slice()]


def _parse(split: str) -> Slice:
    match = SPLIT.match(split.strip())
    bounds = [match['start'], match['stop']] if match else []
    kinds = {b.endswith('%') for b in bounds if b}
    if match is None or len(kinds) > 1 or (False in kinds and any('.' in b for b in bounds if b)):
        raise ValueError(
            f'split {split!r} is not NAME, NAME[START:STOP] or NAME[START%:STOP%], such as train[:50000] or '
            f'train[:80%]; several are joined by +.'
        )
    percent = True in kinds
    start, stop = (float(b.rstrip('%')) if b else None for b in bounds)
    if percent and any(not -100 <= b <= 100 for b in (start, stop) if b is not None):
        raise ValueError(f'split {split!r}: percentages go from 0 to 100.')
    return Slice(match['name'], split, start, stop, percent)


@dataclass(frozen=True)
class Slice:
    """A split by its name (None: the only one that there is) or a part of it, and the text that says so.

    Counts go by the data's own order. Percentages are drawn by class: each class is shuffled by a seed of its own,
    and its first 80 % are in `[:80%]`, the others in `[80%:]`; what is drawn keeps the data's order. Slices that share
    no percentage share no image, whatever the class order.
    """

    name: str | None = None
    text: str = ''
    start: float | None = None
    stop: float | None = None
    percent: bool = False

    @property
    def is_whole(self) -> bool:
        """Whether nothing is cut off."""
        return self.start is None and self.stop is None

    def of(self, data: ImageData, seed: int = 0) -> ImageData:
        """The part of `data`.

        Raises:
            ValueError: It has no images.
        """
        if self.is_whole:
            return data
        if self.percent:
            index = self._drawn(data, seed)
        else:
            bounds = (None if b is None else int(b) for b in (self.start, self.stop))
            index = np.arange(len(data))[slice(*bounds)]
        if not len(index):
            raise ValueError(f'{data.title} holds no images; it has {len(data)} before the slice. Give a larger part.')
        return data.select(index)

    def _drawn(self, data: ImageData, seed: int) -> np.ndarray:
        def place(bound: float | None, n: int, default: float) -> int:
            share = default if bound is None else bound if bound >= 0 else 100 + bound
            return int(np.floor(n * share / 100 + 0.5))

        chosen = []
        for label in np.unique(data.labels):
            name = data.class_names[label] if label >= 0 else ''
            members = np.flatnonzero(data.labels == label)
            order = np.random.default_rng([seed, zlib.crc32(name.encode('utf-8', 'surrogateescape'))])
            begin, end = place(self.start, len(members), 0), place(self.stop, len(members), 100)
            chosen.append(order.permutation(members)[begin:end])
        return np.sort(np.concatenate(chosen))
