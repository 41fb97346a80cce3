"""Opens an image folder, parquet files, a saved or a Hub data set, or IDX files."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .columns import choose, from_columns, is_saved_dataset, load_hub, load_parquet, load_saved, parquet_files
from .folders import CLASS_ORDERS, load_folder
from .idx import is_idx_folder, load_idx
from .images import ImageData, join
from .splits import parse_splits

__all__ = ['hub_id', 'load_data']

HUB = 'hf://datasets/'
REPO = re.compile(r'[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?')
FILE = re.compile(r'\.(parquet|csv|json|jsonl|zip|tar|t?gz|png|jpe?g|npz?|arrow)$', re.IGNORECASE)


def load_data(
    source: Any,
    split: str | None = None,
    labels: bool = True,
    on_bad_image: str = 'fail',
    workers: int = 0,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    class_order: str = 'natural',
    extensions: Sequence[str] | None = None,
    seed: int = 0,
) -> ImageData:
    """Opens a data set.

    Args:
        source: An image folder (one sub-folder per class, or split folders of these), a folder or list of parquet
            files, a folder written by `save_to_disk`, a folder of IDX files, a `datasets.Dataset` or DatasetDict, or
            the id of a Hub data set (`user/name`, with a configuration `user/name:configuration`). What exists here, or
            is written as a path, is never looked for on the Hub.
        split: `train`, `validation`, `test`, ..., with an optional slice; needed where there are several. Counts
            (`train[:50000]`) go by the data's own order. Percentages (`train[:80%]`) are drawn by class with `seed`,
            so that `train[:80%]` and `train[80%:]` share no image and have the same classes. `a+b` joins two.
        labels: Without, only the images are read: enough to calibrate by agreement with the backbone.
        on_bad_image: `fail`: an image that cannot be decoded is an error once it is asked for. `skip`: every image is
            decoded once now, and those that cannot be are counted, named in the log and left out.
        workers: Processes that decode for `skip`.
        image_column, label_column: Columns that count, where a data set has several or their types do not say it.
            Labels may be class labels, integers 0..C-1, or text.
        class_order: Order of folders and text labels: `natural` (class10 after class9) as in timm, or `text` as in
            torchvision. It decides which output of a trained classifier a class is.
        extensions: File types to read in image folders beside timm's (.png, .jpg, .jpeg), such as ['.webp'].
        seed: Seed of the draw of slices in per cent.

    Returns:
        Images that are decoded when they are asked for; `class_names` in the order of the labels.

    Raises:
        FileNotFoundError: Neither a path here nor a Hub data set.
        ValueError: An unknown split, files that are not what they should be, ambiguous folders or columns, images that
            are in two splits; the message says which and what to do.

    Example:
        >>> train = timm_cascade.load_data('flowers', 'train[:80%]')
        >>> held_out = timm_cascade.load_data('flowers', 'train[80%:]')
    """
    if on_bad_image not in ('fail', 'skip'):
        raise ValueError(f'on_bad_image={on_bad_image!r}; choose fail or skip.')
    if class_order not in CLASS_ORDERS:
        raise ValueError(f'class_order={class_order!r}; choose {" or ".join(CLASS_ORDERS)}.')
    if isinstance(extensions, str):
        extensions = re.split(r'[\s,;]+', extensions.strip())
    settings: dict[str, Any] = dict(
        image_column=image_column, label_column=label_column, class_order=class_order, extensions=extensions
    )
    whole = []
    for part in parse_splits(split):
        try:
            # the classes decide what percentages draw, whether or not the labels are wanted
            data = _load(source, part.name, labels or part.percent, **settings)
        except ValueError:
            if labels or not part.percent:
                raise
            data = _load(source, part.name, False, **settings)
        data.split = part.text or data.split
        drawn = part.of(data, seed)
        whole.append(drawn if labels else drawn.without_labels())
    data = join(whole)
    return data.without_bad_images(workers) if on_bad_image == 'skip' else data


def _load(
    source: Any,
    split: str | None,
    labels: bool,
    image_column: str | None,
    label_column: str | None,
    class_order: str,
    extensions: Sequence[str] | None,
) -> ImageData:
    if hasattr(source, 'features') or (isinstance(source, dict) and source):
        table, name, title = *choose(source, split, type(source).__name__), type(source).__name__
        title = str(getattr(getattr(table, 'info', None), 'dataset_name', None) or title)
    else:
        given = list(source) if isinstance(source, (list, tuple)) else [source]
        if not given or not all(isinstance(s, (str, Path)) for s in given):
            raise ValueError(
                f'source is {type(source).__name__}; expected a path, a list of parquet files or a Hub id.'
            )
        paths, title = [Path(s).expanduser() for s in given], str(given[0])
        folder = paths[0] if len(paths) == 1 and paths[0].is_dir() else None
        data = None
        if folder is not None and is_idx_folder(folder):
            data = load_idx(folder, split)
        elif folder is not None and not is_saved_dataset(folder):
            data = load_folder(folder, split, labels, class_order, extensions)
        if data is not None:
            if image_column or label_column:
                raise ValueError(f'{folder} has no columns to choose from: leave out image_column and label_column.')
            return data if labels else data.without_labels()
        table, name = _table(given, paths, folder, split)
    order = CLASS_ORDERS[class_order]
    return from_columns(table, name, labels, title, image_column, label_column, order)


def _table(given: Sequence[Any], paths: list[Path], folder: Path | None, split: str | None) -> tuple[Any, str]:
    if folder is not None:
        if is_saved_dataset(folder):
            return load_saved(folder, split)
        if files := parquet_files(folder):
            return load_parquet(files, split, folder)
        raise ValueError(
            f'{folder} holds no images (.png, .jpg, .jpeg), no parquet files, no IDX files and no saved data set. '
            f'An image folder has one sub-folder per class.'
        )
    if all(p.suffix.lower() == '.parquet' for p in paths):
        return load_parquet(paths, split)
    if len(paths) > 1:
        raise ValueError(f'{", ".join(map(str, paths))}: several sources must all be parquet files.')
    if paths[0].exists():
        raise ValueError(
            f'{paths[0]} is a file that is not read here. Give an image folder, parquet files or a folder of IDX '
            f'files; unpack archives first.'
        )
    text = str(given[0])
    if repo := hub_id(given[0]):
        return load_hub(repo, split)
    siblings = [p.name for p in paths[0].parent.iterdir()] if paths[0].parent.is_dir() else []
    alike = difflib.get_close_matches(paths[0].name, siblings, 1)
    raise FileNotFoundError(
        f'{text} does not exist'
        + (f'; did you mean {paths[0].parent / alike[0]}?' if alike else f' (seen from {Path.cwd().name}).')
        + ' It is neither an IDX folder, an image folder, a parquet file nor a Hub data set id, which is user/name.'
    )


def hub_id(source: Any) -> str | None:
    """The id of a Hub data set, where the source is written as one and not as a path."""
    if not isinstance(source, str):
        return None
    if source.startswith(HUB):
        return source[len(HUB) :].strip('/')
    if not REPO.fullmatch(source) or FILE.search(source) or Path(source.split('/')[0]).exists():
        return None
    return source
