"""Puts requests together into batches, and answers each image when it exits."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import NamedTuple

from .service import Answer, Asked, Service

__all__ = ['Batcher']

_logger = logging.getLogger(__name__)


class _Waiting(NamedTuple):
    asked: Asked
    future: Future[Answer]
    since: float


class Batcher:
    """One thread that runs the model on whatever waits.

    While a batch runs, requests collect for the next one, so a busy server forms batches by itself; `max_wait` is for
    devices where a fuller batch is worth a delay. A request whose future was cancelled is left out.

    Args:
        service: Answers the batches.
        max_batch: Images in one batch.
        max_wait: Seconds that the oldest request waits for others.
        on_batch: Called with the size of each batch.

    Example:
        >>> future = batcher.submit(service.prepare(data, max_drop=0.01))
        >>> answer = future.result(timeout=10)
    """

    def __init__(
        self,
        service: Service,
        max_batch: int = 32,
        max_wait: float = 0.0,
        on_batch: Callable[[int], None] = lambda size: None,
    ) -> None:
        if max_batch < 1 or not max_wait >= 0:
            raise ValueError(
                f'max_batch={max_batch}, max_wait={max_wait}: expected at least 1, and at least 0 seconds.'
            )
        self.service, self.max_batch, self.max_wait, self.on_batch = service, max_batch, max_wait, on_batch
        self._queue: queue.SimpleQueue[_Waiting | None] = queue.SimpleQueue()
        self._closed = False
        self._lock = threading.Lock()  # nothing is queued behind the mark that ends the thread
        self._thread = threading.Thread(target=self._work, name='timm-cascade batches', daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether requests are answered."""
        return self._thread.is_alive()

    def submit(self, asked: Asked) -> Future[Answer]:
        """Queues an image; cancel the future if the answer is no longer wanted.

        Raises:
            RuntimeError: The batcher was closed.
        """
        future: Future[Answer] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError('the batcher was closed; no more requests are answered.')
            self._queue.put(_Waiting(asked, future, time.monotonic()))
        return future

    def close(self) -> None:
        """Answers what was queued, then ends the thread."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        while True:
            first = self._queue.get()
            if first is None:
                return
            batch, last = self._collect(first)
            if batch:
                self._run(batch)
            if last:
                return

    def _collect(self, first: _Waiting) -> tuple[list[_Waiting], bool]:
        """A batch that begins with `first`, without requests that were cancelled; and whether it is the last."""
        batch = [first] if first.future.set_running_or_notify_cancel() else []
        until = first.since + self.max_wait
        while len(batch) < self.max_batch:
            left = until - time.monotonic()
            try:
                found = self._queue.get(timeout=left) if left > 0 else self._queue.get_nowait()
            except queue.Empty:
                break
            if found is None:
                return batch, True
            if found.future.set_running_or_notify_cancel():
                batch.append(found)
        return batch, False

    def _run(self, batch: list[_Waiting]) -> None:
        def tell(place: int, answer: Answer) -> None:
            if not batch[place].future.done():
                batch[place].future.set_result(answer)

        self.on_batch(len(batch))
        try:
            self.service.run([w.asked for w in batch], tell)
        except Exception as e:  # of this batch only; the next one may well succeed
            _logger.exception('a batch of %d images failed', len(batch))
            for waiting in batch:
                if not waiting.future.done():
                    waiting.future.set_exception(e)
