"""Progress bars that show on a terminal and stay silent in a log or a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm.auto import tqdm

__all__ = ['bars_on_terminal_only', 'progress']


def progress(items: Iterable[Any] | None = None, title: str | None = None, show: bool = True, **kwargs: Any) -> Any:
    """A tqdm bar over `items`, or one to update by hand.

    Args:
        items: What to iterate over; None for a bar with `update` and `total`.
        title: Text in front of the bar.
        show: False on all processes but the main one.
        **kwargs: Arguments of tqdm, such as total and initial.

    Example:
        >>> for batch in progress(loader, 'calibration'):
        ...     ...
    """
    # tqdm takes disable=None as: only where the output is a terminal
    return tqdm(items, title, disable=None if show else True, **kwargs)


@contextmanager
def bars_on_terminal_only() -> Iterator[None]:
    """Silences the bars of `datasets` and `huggingface_hub` where stderr is not a terminal."""
    if sys.stderr is not None and sys.stderr.isatty():
        yield
        return
    import datasets
    import huggingface_hub.utils

    switched_off: list[Any] = []
    for library in (datasets, huggingface_hub.utils):
        if not library.are_progress_bars_disabled():
            library.disable_progress_bars()
            switched_off.append(library)
    try:
        yield
    finally:
        for library in switched_off:
            library.enable_progress_bars()
