"""Digests that identify weights."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

__all__ = ['heads_digest', 'state_digest']


def state_digest(state: Mapping[str, Tensor]) -> str:
    """Identifies a state dict by names, dtypes, shapes and values, on any device; a change of one value changes it.

    Fast, because it hashes the XOR of each tensor's bytes and 64 of its words. It is not made against an adversary.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        octets = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        words = octets.view(np.uint64) if len(octets) % 8 == 0 else octets
        digest.update(f'{name} {tensor.dtype} {tuple(tensor.shape)} {np.bitwise_xor.reduce(words)} '.encode())
        digest.update(words[:: max(1, len(words) // 64)].tobytes())
    return digest.hexdigest()[:16]


def heads_digest(exits: Sequence[str], state: Mapping[str, Tensor]) -> str:
    """Identifies exits (module names) and the state of their heads, whatever its dtype; releases store it."""
    digest = hashlib.sha256(repr(list(exits)).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f'{name} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().to('cpu', torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]
