"""What the server counts, in the format of Prometheus."""

from __future__ import annotations

import os
import re
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, multiprocess

from .service import Answer, Asked

__all__ = ['Metrics']

FOLDER = 'PROMETHEUS_MULTIPROC_DIR'  # set where several processes answer: each counts in files there
SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters of one application.

    `timm_cascade_expected_answers_total` counts the answers that each exit would have given on images like the
    calibration's, at the settings that were asked for. An exit whose answers leave that line sees other images than
    the thresholds were chosen for.

    Args:
        exits: Number of exits, M.
        total: MACs of the plain backbone for one image.
    """

    def __init__(self, exits: int, total: float) -> None:
        self.registry = CollectorRegistry()
        self.total = total
        numbers = [str(i) for i in range(exits + 1)]
        self.requests = self._counter('requests', 'Requests to /predict by HTTP status', 'status')
        self.refusals = self._counter('refusals', 'Requests to /predict that were not answered, by reason', 'reason')
        answers = self._counter('answers', 'Answers by exit', 'exit')
        expected = self._counter('expected_answers', "Answers by exit, as the calibration's images have them", 'exit')
        latency = Histogram(
            'timm_cascade_latency_seconds',
            'Time from the first byte of a request to its answer, by exit',
            ['exit'],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.answers = [answers.labels(n) for n in numbers]
        self.expected = [expected.labels(n) for n in numbers]
        self.latency = [latency.labels(n) for n in numbers]
        self.macs = self._counter('macs', 'MACs spent on answers')
        self.saved = self._counter('saved_macs', 'MACs that the plain backbone would have spent beyond those')
        self.queue = Gauge(
            'timm_cascade_queue',
            'Requests that are being decoded or wait for an answer',
            registry=self.registry,
            multiprocess_mode='livesum',
        )
        self.batches = Histogram('timm_cascade_batch_size', 'Images in a batch', buckets=SIZES, registry=self.registry)

    def answered(self, asked: Asked, answer: Answer, seconds: float) -> None:
        """Counts one answer."""
        self.answers[answer.exit].inc()
        self.latency[answer.exit].observe(seconds)
        for counter, share in zip(self.expected, asked.setting.expected or (), strict=False):
            counter.inc(share)
        macs = asked.setting.macs[answer.exit]
        self.macs.inc(macs)
        self.saved.inc(max(self.total - macs, 0.0))

    def refused(self, reason: str) -> None:
        """Counts a request that got no answer."""
        self.refusals.labels(reason).inc()

    def text(self) -> bytes:
        """All counters, of all processes, as Prometheus reads them."""
        if FOLDER not in os.environ:
            return generate_latest(self.registry)
        _forget_the_dead(Path(os.environ[FOLDER]))
        registry = CollectorRegistry()
        multiprocess.MultiProcessCollector(registry)
        return generate_latest(registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f'timm_cascade_{name}', help, labels, registry=self.registry)


def _forget_the_dead(folder: Path) -> None:
    """Drops the queues of processes that were killed."""
    for file in folder.glob('gauge_live*_*.db'):
        found = re.search(r'_(\d+)\.db$', file.name)
        if found is not None:
            try:
                os.kill(int(found[1]), 0)
            except ProcessLookupError:
                multiprocess.mark_process_dead(int(found[1]))
            except OSError:  # it lives, as another user
                pass
