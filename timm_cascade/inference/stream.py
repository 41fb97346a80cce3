"""Bulk inference with full batches in every stage: the remaining samples of several batches go on together.

At every exit samples wait until there are enough for a full batch; the forward that brought the last of them goes on
with all. At the end of the input the waiting samples are carried on by the forward of a single blank image.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader

from ..backbone import merge_rows
from .batch import ActiveBatch, Exited
from .engine import Boundary, Runner, StopForward

if TYPE_CHECKING:
    from accelerate import Accelerator


__all__ = ['StreamOutput', 'StreamedModel', 'stream']


class StreamOutput(NamedTuple):
    """Results of some of the samples.

    Attributes:
        index: (K,) int64, positions of the samples in the whole input.
        logits: (K, C)
        exit: (K,) int64, the exit of each sample, M for the backbone's own classifier.
        confidence: (K,) float32, max softmax of `logits`.
    """

    index: Tensor  # type: ignore[assignment]  # hides tuple.index
    logits: Tensor
    exit: Tensor
    confidence: Tensor


class _Waiting:
    """Samples in front of a stage."""

    def __init__(self) -> None:
        self.chunks: deque[tuple[Tensor, list[Tensor]]] = deque()
        self.rows: Sequence[int] = (1,)
        self.count = 0

    def add(self, ids: Tensor, tensors: list[Tensor], rows: Sequence[int]) -> None:
        self.chunks.append((ids, tensors))
        self.rows = rows
        self.count += len(ids)

    def take(self, most: int) -> tuple[Tensor, list[Tensor]]:
        """Up to `most` samples, those that waited longest."""
        taken: list[tuple[Tensor, list[Tensor]]] = []
        missing = min(most, self.count)
        self.count -= missing
        while missing:
            ids, tensors = self.chunks.popleft()
            if len(ids) > missing:
                # copied, because a view would keep the memory of the whole chunk
                rest = [t[missing * r :].clone() if r else t for t, r in zip(tensors, self.rows, strict=True)]
                self.chunks.appendleft((ids[missing:], rest))
                ids = ids[:missing]
                tensors = [t[: missing * r] if r else t for t, r in zip(tensors, self.rows, strict=True)]
            taken.append((ids, tensors))
            missing -= len(ids)
        columns = zip(*(tensors for _, tensors in taken), strict=True)
        return torch.cat([ids for ids, _ in taken]), [merge_rows(c, r) for c, r in zip(columns, self.rows, strict=True)]


class _Stages:
    """The samples that wait in front of each stage, and the forwards that carry them on."""

    def __init__(self, cascade: StreamedModel, batch_size: int) -> None:
        self.cascade = cascade
        self.batch_size = batch_size
        self.heads, self.thresholds = cascade.heads, cascade.thresholds
        self.own = False  # samples have thresholds of their own, which wait with them as their last tensor
        self.waiting = [_Waiting() for _ in range(len(cascade.heads) + 1)]
        self.runner: Runner | None = None
        self.kind: Any = None
        self.carrier = torch.empty(0)

    @property
    def held(self) -> int:
        return sum(w.count for w in self.waiting)

    def feed(self, ids: Tensor, images: Tensor, limits: Tensor | None) -> Iterator[Exited]:
        """Adds images, with thresholds (N, M) where they have their own, and runs every stage that has a full batch."""
        kind = (images.shape[1:], images.dtype, images.device)
        if limits is not None and not self.own:
            yield from self.drain()
            self.own = True
        if self.own and limits is None:
            limits = torch.tensor([list(self.thresholds)]).expand(len(ids), -1)
        if kind != self.kind:
            yield from self.drain()  # samples of another size cannot go on together
            self.runner = self.cascade.runner(images)
            self.kind = kind
            self.carrier = images.new_zeros(1, *images.shape[1:])
        self._wait(0, ids, [images], (1,), limits)
        while self.waiting[0].count >= self.batch_size:
            yield from self._run(0, self.batch_size)

    def drain(self) -> Iterator[Exited]:
        """Runs all waiting samples to their end."""
        for stage, waiting in enumerate(self.waiting):
            while waiting.count:
                yield from self._run(stage, 1)

    def _wait(self, stage: int, ids: Tensor, tensors: list[Tensor], rows: Sequence[int], limits: Tensor | None) -> None:
        if limits is not None:
            tensors, rows = [*tensors, limits.to(ids.device)], (*rows, 1)
        self.waiting[stage].add(ids, tensors, rows)

    def _take(self, stage: int) -> tuple[Tensor, list[Tensor], Tensor | None]:
        ids, tensors = self.waiting[stage].take(self.batch_size)
        return (ids, tensors[:-1], tensors[-1]) if self.own else (ids, tensors, None)

    def _run(self, stage: int, least: int) -> list[Exited]:
        """Runs `stage`, and the following stages as long as at least `least` samples wait for them."""
        assert self.runner is not None
        ids, tensors, limits = self._take(stage)
        batch = ActiveBatch(ids, self.heads, self.thresholds if limits is None else limits)

        def on_exit(index: int, boundary: Boundary) -> list[Tensor] | None:
            remaining = batch.exit_confident(index, boundary.features, boundary.answer)
            waiting = self.waiting[index + 1]
            if remaining is None or len(remaining):
                tensors = boundary.tensors if remaining is None else boundary.select(remaining)
                self._wait(index + 1, batch.ids, tensors, boundary.rows, batch.limits)
            if waiting.count < least:
                raise StopForward
            ids, tensors, limits = self._take(index + 1)
            batch.replace(ids, limits)
            return tensors

        try:
            images, begin = (tensors[0], None) if stage == 0 else (self.carrier, tensors)
            batch.finish(self.runner(images, on_exit, stage, begin, batch.is_open))
        except StopForward:
            pass
        return batch.exited


class _InOrder:
    """Puts results back into the input's order; each batch is handed out once it is complete.

    Args:
        size: Number of samples to hold, counted from the oldest incomplete one.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.batches: deque[tuple[Tensor, int, int]] = deque()  # index of its samples, first and last place
        self.end = 0
        self.complete = torch.zeros(size, dtype=torch.bool)
        self.table: list[Tensor] | None = None

    @property
    def held(self) -> int:
        return self.end - self.batches[0][1] if self.batches else 0

    def expect(self, index: Tensor) -> Tensor:
        """Reserves places for a batch."""
        self.batches.append((index, self.end, self.end + len(index)))
        self.end += len(index)
        return torch.arange(self.end - len(index), self.end, device=index.device)

    def put(self, exited: Exited) -> None:
        places = exited.ids % self.size
        columns = [exited.logits, torch.full_like(places, exited.exit), exited.confidence]
        if self.table is None:
            self.table = [c.new_empty(self.size, *c.shape[1:]) for c in columns]
        for i, column in enumerate(columns):
            if self.table[i].dtype != column.dtype:  # exits may answer in several dtypes under autocast
                self.table[i] = self.table[i].to(torch.promote_types(self.table[i].dtype, column.dtype))
            self.table[i].index_copy_(0, places, column.to(self.table[i].dtype))
        self.complete[places.cpu()] = True

    def ready(self) -> Iterator[StreamOutput]:
        while self.batches:
            index, first, last = self.batches[0]
            places = torch.arange(first, last) % self.size
            if not self.complete[places].all():
                return
            self.complete[places] = False
            self.batches.popleft()
            assert self.table is not None
            logits, exits, found = (t[places.to(t.device)] for t in self.table)
            yield StreamOutput(index, logits, exits, found)


class StreamedModel(NamedTuple):
    """The parts of a model that a stream needs.

    Attributes:
        runner: Returns the runner for images of a kind.
        prepare: Checks images and moves them to the device; its exceptions end the stream.
        request: Returns thresholds for (count, max_drop, thresholds).
        heads: One per exit.
        thresholds: M numbers, for batches without a request.
    """

    runner: Callable[[Tensor], Runner]
    prepare: Callable[[Tensor], Tensor]
    request: Callable[[int | None, Any, Any], Any]
    heads: Sequence[Callable[[Tensor], Tensor]]
    thresholds: Sequence[float]

    def limits(self, request: Mapping[str, Any] | None, count: int) -> Tensor | None:
        """Thresholds (count, M) of a batch's own request."""
        if request is None:
            return None
        found = self.request(count, request.get('max_drop'), request.get('thresholds'))
        return found if isinstance(found, Tensor) else torch.tensor([found]).expand(count, -1)


def stream(
    batches: Iterable[Any],
    cascade: StreamedModel,
    batch_size: int | None = None,
    ordered: bool = True,
    max_held: int | None = None,
    accelerator: Accelerator | None = None,
) -> Iterator[StreamOutput]:
    """See `CascadeModel.stream`."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f'batch_size is {batch_size}; expected at least 1.')
    if max_held is not None and max_held < (batch_size or 1):
        raise ValueError(f'max_held is {max_held}; expected at least the batch size, {batch_size or 1}.')
    share = _ProcessShard(batches, accelerator)
    return _raise_everywhere(_stream(cascade, share, batch_size, ordered, max_held), share)


@torch.no_grad()
def _stream(
    cascade: StreamedModel, share: _ProcessShard, batch_size: int | None, ordered: bool, max_held: int | None
) -> Iterator[StreamOutput]:
    stages: _Stages | None = None
    order: _InOrder | None = None
    failure: Exception | None = None
    source = iter(share)
    while True:
        try:
            start, images, request = next(source)
            images, limits = cascade.prepare(images), cascade.limits(request, len(images))
        except StopIteration:
            break
        except Exception as e:  # an exception of the input is raised after the results of earlier samples
            failure = e
            break
        if not len(images):
            continue
        if stages is None:
            batch_size = batch_size or len(images)
            max_held = max(max_held or 32 * batch_size, batch_size)
            stages = _Stages(cascade, batch_size)
        assert max_held is not None
        for part, offset in zip(images.split(max_held), range(0, len(images), max_held), strict=True):
            index = torch.arange(start + offset, start + offset + len(part), device=images.device)
            if ordered and order is None:
                order = _InOrder(max_held)
            if (order.held if order else stages.held) + len(part) > max_held:
                yield from _results(stages.drain(), order)
            ids = order.expect(index) if order else index
            own = None if limits is None else limits[offset : offset + len(part)]
            yield from _results(stages.feed(ids, part, own), order)
        del images, part  # freed while the next ones are made
    if stages is not None:
        yield from _results(stages.drain(), order)
    if failure is not None:
        raise failure


def _results(exited: Iterator[Exited], order: _InOrder | None) -> Iterator[StreamOutput]:
    for e in exited:
        if order is None:
            yield StreamOutput(e.ids, e.logits, torch.full_like(e.ids, e.exit), e.confidence)
        else:
            order.put(e)
            yield from order.ready()


class _ProcessShard:
    """Every P-th batch, for this process, with the position of its first sample in the whole input."""

    def __init__(self, batches: Iterable[Any], accelerator: Accelerator | None) -> None:
        self.processes = accelerator.num_processes if accelerator is not None else 1
        self.process = accelerator.process_index if accelerator is not None else 0
        self.batches = batches
        self.size: int | None = None  # of all batches, where the loader was sharded before loading
        if self.processes == 1 or not isinstance(batches, DataLoader):
            return
        from accelerate.data_loader import DataLoaderShard, prepare_data_loader

        if isinstance(batches, DataLoaderShard):
            raise ValueError(
                'these batches are already sharded for this process. Pass the plain loader with the '
                'accelerator, or the prepared one without it.'
            )
        if type(batches.batch_sampler) is BatchSampler:
            assert accelerator is not None
            self.size = batches.batch_sampler.batch_size
            self.batches = prepare_data_loader(
                batches,
                num_processes=self.processes,
                process_index=self.process,
                even_batches=False,
                rng_types=accelerator.rng_types,
            )

    def __iter__(self) -> Iterator[tuple[int, Any, Mapping[str, Any] | None]]:
        start = number = 0
        for batch in self.batches:
            images = batch[0] if isinstance(batch, (tuple, list)) and len(batch) else batch
            second = batch[1] if isinstance(batch, (tuple, list)) and len(batch) > 1 else None
            request = second if isinstance(second, Mapping) and {'max_drop', 'thresholds'} & set(second) else None
            if not isinstance(images, Tensor):
                raise TypeError(f'a batch is {type(images).__name__}; expected images (N, C, H, W), or (images, ...).')
            if self.size is not None:
                yield (number * self.processes + self.process) * self.size, images, request
            else:
                if number % self.processes == self.process:
                    yield start, images, request
                start += len(images)
            number += 1
            del batch, images  # freed while the next ones are made


def _raise_everywhere(results: Iterator[StreamOutput], share: _ProcessShard) -> Iterator[StreamOutput]:
    """If one process fails, all raise."""
    if share.processes == 1:
        yield from results
        return
    from accelerate.utils import gather_object

    failure: str | None = 'it stopped early'
    try:
        yield from results
        failure = None
    except Exception as e:
        failure = f'{type(e).__name__}: {e}'
        raise
    finally:
        failures = gather_object([failure])
        if failure is None and any(failures):
            raise RuntimeError(
                'the stream is incomplete: '
                + '; '.join(f'process {i} failed ({f})' for i, f in enumerate(failures) if f)
            )
