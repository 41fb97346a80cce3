"""Finite populations with known truth: calibration sets are drawn from them with replacement."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from scipy.special import expit, ndtr


def realistic(n: int, exits: int, seed: int = 0, first: float = 0.8, last: float = 0.93):
    """Confidence (n, M+1) float32 and correctness: latent easiness, noisy heads, saturated confidences."""
    rng = np.random.default_rng(seed)
    easiness, common = rng.normal(size=(2, n))
    confidence, correct = np.empty((n, exits + 1), 'f4'), np.empty((n, exits + 1), bool)
    for m, accuracy in enumerate(np.linspace(first, last, exits + 1)):
        shift = _shift(easiness, accuracy)
        logit = 1.2 * (2.2 * easiness + shift)
        correct[:, m] = ndtr(0.75 * common + np.sqrt(1 - 0.75**2) * rng.normal(size=n)) < expit(logit)
        confidence[:, m] = 0.1 + 0.9 * expit(logit + 0.8 * rng.normal(size=n))
    confidence[confidence > 0.9995] = 1
    return confidence, correct


def _shift(easiness, accuracy, low=-10.0, high=10.0):
    for _ in range(60):
        middle = (low + high) / 2
        below = expit(1.2 * (2.2 * easiness + middle)).mean() < accuracy
        low, high = (middle, high) if below else (low, middle)
    return low


def rare_harm(n: int, harm: float, seed: int = 0):
    """One exit, as good as the network but for rare errors among its surest answers."""
    rng = np.random.default_rng(seed)
    correct = np.repeat((rng.random(n) < 0.9)[:, None], 2, axis=1)
    harmed = rng.permutation(n)[: round(harm * n)]
    correct[harmed] = [False, True]
    confidence = rng.uniform(0.3, 0.9, (n, 2))
    confidence[harmed, 0] = 0.99
    return confidence, correct


def one_point(n: int, harm: float, help_: float, seed: int = 0):
    """One exit, all confidences equal: everyone leaves or nobody; the true drop is harm - help_ exactly."""
    kind = np.arange(n) / n
    correct = np.ones((n, 2), bool)
    correct[kind < harm, 0] = False
    correct[(kind >= harm) & (kind < harm + help_), 1] = False
    return np.ones((n, 2)), correct


def tied(n: int, exits: int, seed: int = 0):
    """Confidences in tenths."""
    confidence, correct = realistic(n, exits, seed)
    return np.round(confidence, 1), correct


def useless(n: int, exits: int, seed: int = 0):
    """Exits that know nothing, neither the answer nor how sure to be."""
    rng = np.random.default_rng(seed)
    correct = rng.random((n, exits + 1)) < np.append(np.full(exits, 0.3), 0.9)
    return rng.random((n, exits + 1)), correct


def overconfident(n: int, exits: int, seed: int = 0):
    """Exits that are surest where they are wrong."""
    confidence, correct = realistic(n, exits, seed)
    confidence[:, :-1] = np.where(correct[:, :-1], confidence[:, :-1] * 0.9, 0.9 + confidence[:, :-1] * 0.1)
    return confidence, correct


def in_sorts(work: Callable[[], object], n: int) -> float:
    """CPU time of `work`, in units of sorting 24 columns of `n` numbers on the same machine at the same time."""
    columns = np.random.default_rng(0).random((24, n))
    best = []
    for run in (work, lambda: [np.argsort(column, kind='stable') for column in columns]):
        seconds = []
        for _ in range(3):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        best.append(min(seconds))
    return best[0] / best[1]
