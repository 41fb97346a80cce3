"""Writing files so that a crash, a full disk or a kill leaves the old file or the new one, never half of one."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ['beside', 'git_oid', 'plain', 'readable_json', 'replacing', 'sha256_of', 'write_text']


def beside(path: Path) -> Path:
    """A name in the folder of `path` that nothing has, for what is to be renamed to `path` once it is whole."""
    return path.with_name(f'.{path.name}.{secrets.token_hex(4)}.tmp')


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; renames it to `path` on success, removes it on failure.

    Raises:
        OSError: Whatever writing raised (a full disk, say); `path` is then as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        with open(temporary, 'rb+') as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Replaces `path` by `text` (UTF-8) atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding='utf-8')


def plain(value: Any) -> Any:
    """Values as JSON holds them: lists for tuples, None for numbers that are not finite, such as a closed exit's."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def readable_json(content: Any, sort_keys: bool = False) -> str:
    """JSON with a key per line and lists of numbers on one line, so that files can be compared."""
    # Only lists without strings or lists inside: a text can then not be mistaken for one.
    return (
        re.sub(
            r'(?m)(?<=": )\[\n[^\[\]{}"]*\]',
            lambda found: re.sub(r'\n\s*', ' ', found[0]).replace('[ ', '[').replace(' ]', ']'),
            json.dumps(content, indent=1, sort_keys=sort_keys, allow_nan=False),
        )
        + '\n'
    )


def sha256_of(path: Path) -> str:
    return _hash(path, hashlib.sha256())


def git_oid(path: Path) -> str:
    """Git's name for the file's content, by which the Hub knows small files."""
    return _hash(path, hashlib.sha1(b'blob %d\0' % path.stat().st_size, usedforsecurity=False))


def _hash(path: Path, digest: hashlib._Hash) -> str:
    with open(path, 'rb') as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
