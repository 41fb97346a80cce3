"""Predicts the units of an input on this machine, with workers that decode ahead."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..backbone import evaluating
from ..data import ImageData
from ..data.views import eval_transform
from ..errors import BadImageError
from ..thresholds.samples import exit_costs
from ..utils.files import plain
from ..utils.progress import progress
from ..version import __version__
from .cluster import predict_on_ray
from .inputs import Source, open_image, open_sources
from .units import Unit, divide, open_folder, parse_shard
from .writer import Predicted, count_part, to_table, write_part

__all__ = ['Summary', 'UnitPredictor', 'predict']

ENGINES = ('local', 'ray')
FORMAT_VERSION = 1
LEFTOVER_AGE = 600.0  # seconds


@dataclass(frozen=True)
class Summary:
    """What a folder of predictions holds, and what this run did of it.

    Attributes:
        folder: The folder.
        images: Images predicted in all parts that are there.
        bad_images: Images among them that could not be read.
        parts, parts_written, parts_missing: Part files that are there, that this run wrote, and that other shards still
            have to write.
        exit_shares: (M+1,) share of the readable images that each exit answered.
        macs_share: Average MACs of an image, heads counted, as a share of the backbone's.
        images_per_second: Images that this run predicted per second, decoding included; nan if it had none to predict.
    """

    folder: str
    images: int
    bad_images: int
    parts: int
    parts_written: int
    parts_missing: int
    exit_shares: tuple[float, ...]
    macs_share: float
    images_per_second: float


class Chunk(NamedTuple):
    """Images of one unit as a worker decoded them."""

    names: list[tuple[str, int]]
    errors: list[str | None]
    images: Tensor  # (K, C, H, W), the readable ones


class DecodedChunks(Dataset):
    """Ranges of images, each decoded when it is asked for."""

    def __init__(self, ranges: Sequence[tuple[Source, int, int]], transform: Any) -> None:
        self.ranges = ranges
        self.transform = transform

    def __len__(self) -> int:
        return len(self.ranges)

    def __getitem__(self, index: int) -> Chunk:
        source, start, stop = self.ranges[index]
        names: list[tuple[str, int]] = []
        errors: list[str | None] = []
        images: list[Tensor] = []
        for item in source.read(start, stop):
            names.append((item.filename, item.row))
            try:
                images.append(self.transform(open_image(item.image)))
                errors.append(None)
            except Exception as e:  # decoders raise whatever they like
                errors.append(f'{type(e).__name__}: {_without_address(str(e))}'[:300])
        return Chunk(names, errors, torch.stack(images) if images else torch.empty(0))


def _without_address(text: str) -> str:
    return text.partition(' <_io.BytesIO')[0]  # an address differs from run to run, and parts must not


class UnitPredictor:
    """Predicts units, in turn, with survivors of a unit's batches going on together.

    Nothing of one unit depends on another, so a part is the same whichever run, shard or machine makes it.

    Args:
        model: The cascade; its active thresholds are used.
        sources: The input.
        batch_size: Images that a stage runs on.
        topk: Classes per image in the results.
        workers: Processes that decode ahead.
        on_bad_image: `record` (a row with the error) or `fail`.
    """

    def __init__(
        self,
        model: Any,
        sources: Sequence[Source],
        batch_size: int = 256,
        topk: int = 5,
        workers: int = 0,
        on_bad_image: str = 'record',
    ) -> None:
        self.model, self.sources = model, sources
        self.batch_size, self.workers, self.on_bad_image = batch_size, workers, on_bad_image
        self.topk = min(topk, model.num_classes)
        self.transform = eval_transform(model)

    def write(self, units: Sequence[Unit], folder: Path) -> Iterator[Unit]:
        """Predicts the units; yields each once its part is written."""
        for unit, predicted in self.predict(units):
            write_part(unit.part(folder), to_table(predicted, self.model.label_names))
            yield unit

    def predict(self, units: Sequence[Unit]) -> Iterator[tuple[Unit, Predicted]]:
        """What the images of each unit get, unit by unit.

        Raises:
            BadImageError: An image that cannot be read, if `on_bad_image` is `fail`.
        """
        ranges = [self._ranges(unit) for unit in units]
        loader = iter(
            DataLoader(
                DecodedChunks([r for each in ranges for r in each], self.transform),
                batch_size=None,
                num_workers=self.workers,
                pin_memory=torch.cuda.is_available(),
            )
        )
        for unit, each in zip(units, ranges, strict=True):
            yield unit, self._predict_unit(loader, len(each))

    def _ranges(self, unit: Unit) -> list[tuple[Source, int, int]]:
        starts = range(unit.start, unit.stop, self.batch_size)
        return [(self.sources[unit.source], s, min(s + self.batch_size, unit.stop)) for s in starts]

    @torch.inference_mode()
    def _predict_unit(self, loader: Iterator[Chunk], count: int) -> Predicted:
        names: list[tuple[str, int]] = []
        errors: list[str | None] = []

        def batches() -> Iterator[Tensor]:
            for _ in range(count):
                chunk = next(loader)
                names.extend(chunk.names)
                errors.extend(chunk.errors)
                self._refuse_bad(chunk)
                if len(chunk.images):
                    yield chunk.images

        index = [np.zeros((0, self.topk), np.int64)]
        prob, exits = [np.zeros((0, self.topk), np.float32)], [np.zeros(0, np.int64)]
        for output in self.model.stream(batches(), batch_size=self.batch_size):
            p, i = output.logits.float().softmax(-1).topk(self.topk)
            index.append(i.cpu().numpy())
            prob.append(p.cpu().numpy())
            exits.append(output.exit.cpu().numpy())
        return Predicted(names, errors, np.concatenate(index), np.concatenate(prob), np.concatenate(exits))

    def _refuse_bad(self, chunk: Chunk) -> None:
        if self.on_bad_image == 'record':
            return
        for (name, row), error in zip(chunk.names, chunk.errors, strict=True):
            if error is not None:
                place = name if row < 0 else f'image {row} of {name}'
                raise BadImageError(
                    f'{place} cannot be read ({error}). Remove or replace it, or record such images in the results: '
                    f'on_bad_image="record", --on-bad-image record.'
                )


def predict(
    model: Any,
    data: ImageData | str | Path | Sequence[str | Path],
    out: str | Path,
    *,
    split: str | None = None,
    topk: int = 5,
    batch_size: int = 256,
    workers: int = 0,
    unit: int = 4096,
    shard: str | None = None,
    on_bad_image: str = 'record',
    image_column: str | None = None,
    engine: str = 'local',
    actors: int | None = None,
) -> Summary:
    """Labels every image of an input, into parquet files that a stopped run continues.

    The input is divided into units of `unit` images; each gives one part file with a name of its own, written beside
    and renamed. `_predict.json` in the folder records model, thresholds, input and settings: run again with the same
    ones only the missing parts are made, with others the folder is refused.

    Columns, as in timm's inference.py: `filename`, `row` (-1 where a file is one image), `index`, `label`, `prob`,
    `exit`, `topk_index`, `topk_prob`, `error`; the last is null for images that could be read, the others before it
    are null for those that could not.

    Args:
        model: The cascade, on its device, with the thresholds to use; or an exported folder, opened with
            `timm_cascade.exporters.ExportedCascade`.
        data: Image files, folders, globs, parquet files, IDX folders or Hub data set ids, one or several; or an
            ImageData.
        out: Folder for the parts; made if it is not there.
        split: Split of a Hub data set or an IDX folder.
        topk: Classes per image.
        batch_size: Images that a stage runs on.
        workers: Processes that decode ahead.
        unit: Images per part.
        shard: `I/N`: predict every N-th unit, from the I-th (1 to N) on; all shards may share `out`.
        on_bad_image: `record`: an image that cannot be read is a row with its error; `fail`: it ends the run.
        image_column: Column with the images, where a parquet file has several.
        engine: `local`, or `ray` for a Ray cluster (`pip install "timm-cascade[ray]"`), whose nodes all see `data` and
            `out` under these paths.
        actors: Most Ray actors at once; by default one per GPU, or per CPU where there is none.

    Returns:
        What the folder holds now, and how fast this run was.

    Raises:
        PlanError: The folder was begun with other settings.
        BadImageError: An image that cannot be read, if `on_bad_image` is `fail`. Finished parts stay.
        FileNotFoundError, ValueError: An input that does not exist or holds no images, or numbers out of range.
        OSError: The disk is full, for instance. Finished parts stay.

    Example:
        >>> model.set_max_drop(0.01)
        >>> print(timm_cascade.predict(model, 'photos/', 'predictions/').exit_shares)
    """
    if min(topk, batch_size, unit) < 1 or workers < 0:
        raise ValueError(
            f'topk={topk}, batch_size={batch_size}, unit={unit}, workers={workers}: expected at least 1, 1, 1 and 0.'
        )
    if on_bad_image not in ('record', 'fail'):
        raise ValueError(f'on_bad_image={on_bad_image!r}; choose record or fail.')
    if engine not in ENGINES:
        raise ValueError(f'engine={engine!r}; choose {" or ".join(ENGINES)}.')
    if not model.num_classes:
        raise ValueError('this model has no classes, so it labels nothing; load one that classifies.')
    first, of = parse_shard(shard)
    sources = open_sources(data, split, image_column)
    units = divide(sources, unit)
    if not units:
        raise ValueError(f'{data} holds no images.')
    folder = Path(out)
    open_folder(folder, _plan(model, sources, units, unit, topk, batch_size))
    mine = units[first - 1 :: of]
    todo = [u for u in mine if not u.part(folder).exists()]
    _remove_leftovers(folder)
    run = UnitPredictor.write if engine == 'local' else partial(predict_on_ray, actors=actors)
    predictor = UnitPredictor(model, sources, batch_size, topk, workers, on_bad_image)
    began, count = time.perf_counter(), sum(u.stop - u.start for u in todo)
    total = sum(u.stop - u.start for u in mine)
    with evaluating(model), progress(total=total, initial=total - count, unit='images') as bar:
        for done in run(predictor, todo, folder):
            bar.update(done.stop - done.start)
    seconds = time.perf_counter() - began
    return _summary(model, folder, units, len(todo), count / seconds if count else float('nan'))


def _remove_leftovers(folder: Path) -> None:
    """Deletes what runs that were killed had half written; what is younger may be another shard's at work."""
    for file in folder.glob('.part-*.tmp'):
        with contextlib.suppress(FileNotFoundError):  # another shard was faster
            if time.time() - file.stat().st_mtime > LEFTOVER_AGE:
                file.unlink()


def _plan(
    model: Any, sources: Sequence[Source], units: Sequence[Unit], unit: int, topk: int, batch_size: int
) -> dict[str, Any]:
    weight = next(model.parameters(), None)
    return dict(
        format_version=FORMAT_VERSION,
        version=__version__,
        model=model.pretrained_cfg['architecture'],
        heads=model.heads_hash(),
        thresholds=plain(model.thresholds.tolist()),
        dtype=model.precision if weight is None else str(weight.dtype).removeprefix('torch.'),
        transform=repr(eval_transform(model)),
        topk=topk,
        batch_size=batch_size,
        unit=unit,
        units=len(units),
        input=[s.identity() for s in sources],
    )


def _summary(model: Any, folder: Path, units: Sequence[Unit], written: int, speed: float) -> Summary:
    exits = len(model.exits) + 1
    counts, bad, parts = np.zeros(exits, dtype=np.int64), 0, 0
    for unit in units:
        if unit.part(folder).exists():
            answered, unreadable = count_part(unit.part(folder), exits)
            counts, bad, parts = counts + answered, bad + unreadable, parts + 1
    good = int(counts.sum())
    shares = counts / max(good, 1)
    costs = exit_costs(model.stage_macs(), model.head_macs(), model.thresholds)
    return Summary(
        folder=str(folder),
        images=good + bad,
        bad_images=bad,
        parts=parts,
        parts_written=written,
        parts_missing=len(units) - parts,
        exit_shares=tuple(shares.tolist()),
        macs_share=float(shares @ costs / model.exits[-1].total) if good else float('nan'),
        images_per_second=speed,
    )
