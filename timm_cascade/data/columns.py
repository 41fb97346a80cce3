"""Data sets with columns: parquet files, folders of `save_to_disk`, the Hub; and which columns count."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..utils.progress import bars_on_terminal_only
from .images import ImageData
from .splits import canonical, choose_split
from .storage import Column, files_below

__all__ = [
    'from_columns',
    'hub_parquet_files',
    'is_saved_dataset',
    'load_hub',
    'load_parquet',
    'load_saved',
    'parquet_files',
]

SHARD = re.compile(r'(?P<split>.+)-(?P<number>\d+)-of-(?P<count>\d+)$')
NAMES = ('label', 'labels', 'target', 'class', 'category')


def parquet_files(root: Path) -> list[Path]:
    """The parquet files of a folder and the folders in it, hidden ones left out."""
    return sorted(p for p in files_below(root) if p.suffix.lower() == '.parquet')


def _split_of(path: Path, root: Path | None) -> str | None:
    """The split that a file's name says: `train.parquet`, `test-00000-of-00001.parquet`, `val/x.parquet`."""
    match = SHARD.match(path.stem)
    inner = path.relative_to(root).parts[:-1] if root is not None else ()
    words = [match['split'] if match else path.stem, *reversed(inner)]
    return next((found for word in words if (found := canonical(word))), None)


def _check_shards(files: Sequence[Path]) -> None:
    shards: dict[tuple[Path, str, int], set[int]] = defaultdict(set)
    for file in files:
        if match := SHARD.match(file.stem):
            shards[file.parent, match['split'], int(match['count'])].add(int(match['number']))
    for (parent, split, count), numbers in shards.items():
        if missing := sorted(set(range(count)) - numbers):
            raise ValueError(
                f'{parent} has {len(numbers)} of the {count} parts of {split}; part {missing[0]} is missing. '
                f'Fetch the files again.'
            )


def load_parquet(files: Sequence[Path], split: str | None, root: Path | None = None) -> tuple[Any, str]:
    """Parquet files as one data set, and its split: those of the split that is asked for, where their names say one.

    Args:
        files: Named by the user, or found in `root`.
        split: A single file that the user named is taken whatever the split is called.

    Raises:
        FileNotFoundError: A file that does not exist.
        ValueError: No such split, or parts of one that are missing.
    """
    import datasets

    if missing := [str(p) for p in files if not p.is_file()]:
        raise FileNotFoundError(f'no such file: {", ".join(missing)}.')
    where = str(root or files[0])
    groups: dict[str | None, list[Path]] = defaultdict(list)
    for file in files:
        groups[_split_of(file, root)].append(file)
    if root is None and (len(files) == 1 or None in groups or len(groups) == 1):
        chosen, name = list(files), split or 'train'
    else:
        if None in groups and len(groups) > 1:
            raise ValueError(
                f'{where}: some parquet files are named as a split ({", ".join(sorted(filter(None, groups)))}), '
                f'{groups[None][0]} is not. Name the files that you mean.'
            )
        named = {name or 'train': found for name, found in groups.items()}
        known = choose_split(named, split, where)
        chosen, name = named[known], split or known
    _check_shards(chosen)
    names = [glob.escape(str(p.absolute())) for p in chosen]  # a pattern to the reader, a name to the user
    with bars_on_terminal_only():
        return datasets.load_dataset('parquet', data_files=names, split='train'), name


def is_saved_dataset(root: Path) -> bool:
    """Whether `datasets` has written the folder with save_to_disk."""
    return (root / 'dataset_dict.json').is_file() or (root / 'state.json').is_file()


def load_saved(root: Path, split: str | None) -> tuple[Any, str]:
    """A folder that `save_to_disk` has written, as a data set, and its split."""
    import datasets

    with bars_on_terminal_only():
        return choose(datasets.load_from_disk(str(root.absolute())), split, str(root))


def choose(loaded: Any, split: str | None, source: str) -> tuple[Any, str]:
    """One split of what `datasets` gives.

    Raises:
        ValueError: It is not there, or none is named and there are several.
    """
    if not isinstance(loaded, dict):
        if split is not None and loaded.split is not None and str(loaded.split) not in (split, canonical(split)):
            raise ValueError(f'{source} is the split {str(loaded.split)!r}; asked was {split!r}.')
        return loaded, split or str(loaded.split or '')
    name = choose_split(loaded, split, source)
    return loaded[name], name


def load_hub(repo: str, split: str | None) -> tuple[Any, str]:
    """A data set of the Hub, `user/name` or `user/name:configuration`, and its split.

    Raises:
        FileNotFoundError: It is not there, or cannot be reached.
        ValueError: No such split or configuration.
    """
    import datasets

    return choose(_ask_hub(datasets.load_dataset, repo, split=split), split, repo)


def hub_parquet_files(repo: str, split: str | None) -> list[str] | None:
    """The parquet files of one split of a Hub data set, as `hf://` addresses of one commit, which may be streamed.

    None where the data set is stored in another format, which `load_hub` fetches and converts.

    Args:
        repo: `user/name` or `user/name:configuration`.
        split: Name of the split; may be left out where there is only one.

    Raises:
        FileNotFoundError, ValueError: See `load_hub`.

    Example:
        >>> hub_parquet_files('uoft-cs/cifar10', 'test')
        ['hf://datasets/uoft-cs/cifar10@0b2714.../plain_text/test-00000-of-00001.parquet']
    """
    import datasets

    builder = _ask_hub(datasets.load_dataset_builder, repo)
    files: dict[str, list[str]] = {str(k): list(map(str, v)) for k, v in (builder.config.data_files or {}).items()}
    if not files or not all(f.startswith('hf://') and f.endswith('.parquet') for v in files.values() for f in v):
        return None
    return choose(files, split, repo)[0]


def _ask_hub(load: Callable[..., Any], repo: str, **kwargs: Any) -> Any:
    import datasets

    name, _, configuration = repo.partition(':')
    try:
        with bars_on_terminal_only():
            return load(name, configuration or None, **kwargs)
    except (OSError, datasets.exceptions.DatasetsError) as e:
        raise FileNotFoundError(
            f'{name} is neither a folder nor a file here, and cannot be loaded from the Hub as a data set: {e}'
        ) from e
    except ValueError as e:
        if 'onfig' in str(e):
            raise ValueError(f'{e} (here: {name}:CONFIGURATION)') from e
        raise


def _say(features: Any) -> str:
    return ', '.join(f'{name} ({getattr(f, "dtype", None) or type(f).__name__})' for name, f in features.items())


def _check_column(features: Any, source: str, column: str) -> None:
    if column not in features:
        raise ValueError(f'{source} has no column {column!r}; its columns: {_say(features)}.')


def _is_text(feature: Any) -> bool:
    """Whether a column's values are classes by their text: strings and booleans."""
    kind = getattr(feature, 'dtype', '')
    return 'string' in kind or kind == 'bool'


def _may_be_label(feature: Any) -> bool:
    import datasets

    return isinstance(feature, datasets.Value) and (_is_text(feature) or feature.dtype.startswith(('int', 'uint')))


def _image_column(dataset: Any, source: str, column: str | None) -> tuple[Any, str]:
    import datasets

    features = dataset.features
    found = [c for c, f in features.items() if isinstance(f, datasets.Image)]
    if column is None:
        if len(found) != 1:
            raise ValueError(
                f'{source} has {len(found)} image columns ({", ".join(found) or "none"}); name the one that counts '
                f'with image_column= (--image-column). Its columns: {_say(features)}.'
            )
        column = found[0]
    _check_column(features, source, column)
    if column not in found:
        try:
            dataset = dataset.cast_column(column, datasets.Image())
        except Exception as e:  # whatever Arrow makes of it
            raise ValueError(f'the column {column} of {source} holds no images: {features[column]}.') from e
    return dataset, column


def _label_column(features: Any, source: str, column: str | None) -> str:
    import datasets

    if column is not None:
        _check_column(features, source, column)
        return column
    classes = [c for c, f in features.items() if isinstance(f, datasets.ClassLabel)]
    plain = [c for c, f in features.items() if _may_be_label(f)]
    found = classes or [c for c in plain if c.lower() in NAMES] or plain
    if len(found) != 1:
        raise ValueError(
            f'{source} has {len(found)} columns that may be labels ({", ".join(found) or "none"}); name the one that '
            f'counts with label_column= (--label-column)'
            + ('' if found else ', or go without labels: labels=False (--no-labels)')
            + f'. Its columns: {_say(features)}.'
        )
    return found[0]


def _class_labels(dataset: Any, column: str, source: str, order: Callable[[str], Any]) -> tuple[np.ndarray, list[str]]:
    """Class indices and names of a label column: class labels, integers 0..C-1, text, or booleans."""
    import datasets

    feature, values = dataset.features[column], dataset[column][:]
    if missing := sum(v is None for v in values):
        raise ValueError(f'{missing} of {len(values)} values in the column {column} of {source} are missing.')
    if isinstance(feature, datasets.ClassLabel):
        return np.array(values, dtype=np.int64), list(feature.names)
    if not _may_be_label(feature):
        raise ValueError(
            f'the column {column} of {source} holds {feature}; a label is one class per image: a class label, an '
            f'integer 0..C-1, or text. Several or soft labels per image have no one class to be confident of.'
        )
    if _is_text(feature):
        texts = [str(v) for v in values]
        names = sorted(set(texts), key=order)
        place = {name: i for i, name in enumerate(names)}
        return np.array([place[t] for t in texts], dtype=np.int64), names
    labels = np.array(values, dtype=np.int64)
    high, distinct = int(labels.max(initial=-1)), len(np.unique(labels))
    if high >= max(1000, 10 * distinct):
        raise ValueError(
            f'the column {column} of {source} holds numbers up to {high}; integer labels are classes 0..C-1.'
        )
    return labels, [str(i) for i in range(high + 1)]  # the number is the class


def from_columns(
    dataset: Any,
    split: str = '',
    labels: bool = True,
    source: str = '',
    image_column: str | None = None,
    label_column: str | None = None,
    order: Callable[[str], Any] = str,
) -> ImageData:
    """A `datasets.Dataset` as images with labels; text labels become classes in `order`.

    Raises:
        ValueError: Columns that are missing, ambiguous, or hold something else; the message names the argument that
            helps.
    """
    if not hasattr(dataset, '_fingerprint') or not hasattr(dataset, 'select'):
        raise ValueError(
            f'{source or type(dataset).__name__} is a streaming data set, which has no order to return to; load it '
            f'without streaming=True.'
        )
    dataset, image = _image_column(dataset, source or 'the data set', image_column)
    if not labels:
        return ImageData(Column(dataset, image), None, (), source, split)
    column = _label_column(dataset.features, source or 'the data set', label_column)
    indices, names = _class_labels(dataset, column, source or 'the data set', order)
    return ImageData(Column(dataset, image), indices, names, source, split)
