"""The machine that models run on: what it is called, and its clock."""

from __future__ import annotations

import platform
import time
from functools import lru_cache
from pathlib import Path

import torch

__all__ = ['clock', 'default_device', 'device_name']


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter()


def default_device() -> str:
    """Where a model runs unless something else is asked for."""
    return 'cuda' if torch.cuda.is_available() else 'cpu'


def device_name(device: torch.device) -> str:
    """Of the GPU, or of the processor and the number of threads that torch uses on it."""
    if device.type == 'cuda':
        return torch.cuda.get_device_name(device)
    return f'{_processor()}, {torch.get_num_threads()} threads' if device.type == 'cpu' else device.type


@lru_cache
def _processor() -> str:
    try:
        lines = Path('/proc/cpuinfo').read_text(encoding='utf-8').splitlines()
    except OSError:  # not Linux
        lines = []
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
    return names[0] if names else platform.processor() or platform.machine()
