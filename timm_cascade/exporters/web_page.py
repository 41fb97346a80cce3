"""A page that runs an exported cascade in the browser: index.html, onnxruntime-web and samples, no network needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..errors import ExportError

__all__ = ['write_page']

PACKAGE = 'onnxruntime-web@1.22.0'
FILES = ('ort.wasm.min.js', 'ort-wasm-simd-threaded.mjs', 'ort-wasm-simd-threaded.wasm')
MAX_SAMPLES = 60
SUFFIXES = ('.png', '.jpg', '.jpeg', '.webp')


def write_page(folder: Path, samples: Sequence[Path] = ()) -> list[str]:
    """Adds the page to a folder that is being exported.

    Args:
        folder: Holds the stage files and cascade.json.
        samples: Image files, or folders of them; up to 60 are copied for the gallery.

    Returns:
        Names of the files that it wrote directly into the folder.

    Raises:
        ExportError: npm is not there or cannot get onnxruntime-web, or a sample is not an image file.
    """
    found = []
    for path in samples:
        files = sorted(path.rglob('*')) if path.is_dir() else [path]
        chosen = [f for f in files if f.suffix.lower() in SUFFIXES and f.is_file()]
        if not chosen:
            raise ExportError(f'{path} has no samples; expected image files ({", ".join(SUFFIXES)}).')
        found += chosen
    names = []
    for number, path in enumerate(found[:MAX_SAMPLES]):
        (folder / 'samples').mkdir(exist_ok=True)
        names.append(f'samples/{number:02}{path.suffix.lower()}')
        shutil.copyfile(path, folder / names[-1])
    (folder / 'samples.json').write_text(json.dumps(names), encoding='utf-8')
    shutil.copyfile(Path(__file__).with_name('web') / 'index.html', folder / 'index.html')
    _fetch_runtime(folder / 'ort')
    return ['index.html', 'samples.json']


def _fetch_runtime(target: Path) -> None:
    """The runtime's files, by npm: the WebAssembly of 11 MB is too large to travel with this library."""
    npm = shutil.which('npm')
    if npm is None:
        raise ExportError(f'the page needs {PACKAGE}, and npm, which gets it, is not installed; install Node.js.')
    with tempfile.TemporaryDirectory() as temporary:
        command = [npm, 'pack', '--silent', PACKAGE]
        done = subprocess.run(command, cwd=temporary, capture_output=True, text=True)
        archives = list(Path(temporary).glob('*.tgz'))
        if done.returncode or not archives:
            raise ExportError(f'npm could not get {PACKAGE}: {done.stderr.strip()[-300:] or "no archive"}')
        target.mkdir()
        with tarfile.open(archives[0]) as archive:
            for name in FILES:
                member = archive.extractfile(f'package/dist/{name}')
                if member is None:
                    raise ExportError(f'{PACKAGE} has no {name}.')
                (target / name).write_bytes(member.read())
