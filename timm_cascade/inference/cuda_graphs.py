"""Lets any thread and stream replay the CUDA graphs of compiled stages.

A recorded graph reads and writes the same memory at every replay: one call at a time may be between its inputs and the
copies of its outputs. And the compiler keeps its graphs with the thread that asked for them first; other threads have
none, which some versions of torch take for an error.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ['replaying']

_lock = threading.Lock()
_shared: dict[str, Any] = {}
_last: dict[torch.device, torch.cuda.Stream] = {}  # by device, the stream that ran a graph last


@contextmanager
def replaying(device: torch.device) -> Iterator[None]:
    """Runs graphs, and copies what they returned, while no other thread does; nothing on other devices than CUDA."""
    if device.type != 'cuda':
        yield
        return
    with _lock:
        _share()
        stream = torch.cuda.current_stream(device)
        if _last.get(device, stream) != stream:
            stream.wait_stream(_last[device])
        _last[device] = stream
        yield


def _share() -> None:
    """Gives this thread the graphs of the thread that came first."""
    from torch._inductor import cudagraph_trees

    local: Any = cudagraph_trees.local
    kept: dict[str, Any] = dict(tree_manager_containers={}, tree_manager_locks=defaultdict(threading.Lock))
    for name, new in kept.items():  # what the compiler keeps for each thread
        shared = _shared.setdefault(name, getattr(local, name, new))
        if not hasattr(local, name):
            setattr(local, name, shared)
