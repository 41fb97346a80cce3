"""Part files: the predictions of one unit, which are written whole or not at all."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from ..utils.files import replacing

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = ['Predicted', 'count_part', 'to_table', 'write_part']


class Predicted(NamedTuple):
    """What the images of one unit got, K of its n images being readable.

    Attributes:
        names: (n,) name and row of each image.
        errors: (n,) why an image could not be read; None where it could.
        index, prob: (K, topk) classes and softmax probabilities, best first.
        exit: (K,) the exit that answered.
    """

    names: Sequence[tuple[str, int]]
    errors: Sequence[str | None]
    index: np.ndarray  # type: ignore[assignment]  # and not tuple's method
    prob: np.ndarray
    exit: np.ndarray


def to_table(predicted: Predicted, label_names: Sequence[str] | None) -> pa.Table:
    """Columns named as in timm's inference.py: filename, row, index, label, prob, exit, their top-k lists, error."""
    import pyarrow as pa

    good = np.array([e is None for e in predicted.errors], dtype=bool)
    mask = ~good

    def spread(values: np.ndarray, kind: Any) -> Any:
        full = np.zeros((len(good), *values.shape[1:]), dtype=values.dtype)
        full[good] = values
        if values.ndim == 1:
            return pa.array(full, kind, mask=mask)
        return pa.array([None if bad else row for row, bad in zip(full.tolist(), mask, strict=True)], kind)

    best = predicted.index[:, 0]
    labels = np.full(len(good), None, dtype=object)
    labels[good] = [str(c) if label_names is None else label_names[c] for c in best.tolist()]
    return pa.table(
        {
            'filename': pa.array([name for name, _ in predicted.names], pa.string()),
            'row': pa.array([row for _, row in predicted.names], pa.int64()),
            'index': spread(best, pa.int32()),
            'label': pa.array(labels, pa.string()),
            'prob': spread(predicted.prob[:, 0], pa.float32()),
            'exit': spread(predicted.exit, pa.int16()),
            'topk_index': spread(predicted.index, pa.list_(pa.int32())),
            'topk_prob': spread(predicted.prob, pa.list_(pa.float32())),
            'error': pa.array(list(predicted.errors), pa.string()),
        }
    )


def write_part(path: Path, table: pa.Table) -> None:
    """Writes one part; a crash or a full disk leaves no half of it.

    Raises:
        OSError: What writing raised.
    """
    import pyarrow.parquet as pq

    with replacing(path) as temporary:
        pq.write_table(table, temporary)


def count_part(path: Path, exits: int) -> tuple[np.ndarray, int]:
    """(M+1,) images answered by each exit, and images that could not be read, of a part that is there.

    Raises:
        ValueError: A file that is not such a part.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        column = pq.read_table(path, columns=['exit']).column('exit')
    except (pa.ArrowInvalid, KeyError, OSError) as e:
        raise ValueError(f'{path} is damaged ({e}). Remove it and run again: only its images are predicted.') from e
    found = column.drop_null().to_numpy()
    return np.bincount(found, minlength=exits), column.null_count
