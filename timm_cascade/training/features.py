"""What heads on a frozen backbone train on: pooled taps and the backbone's own output, image by image.

`Taps` runs the backbone whenever it is asked; `StoredTaps` reads what a pass of it has left on disk, in arrays that
many processes map. Both hand out the same batches, so training does not know which of the two it has.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from timm.data.model_config import resolve_input_data_config
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from tqdm.auto import tqdm

from ..data import View
from ..errors import BadImageError
from ..model import CascadeModel
from ..utils.digest import heads_digest
from ..utils.distributed import on_main
from ..utils.files import write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Batch', 'StoredTaps', 'Taps', 'store']

_logger = logging.getLogger(__name__)
FORMAT = 1  # of the cache: raise it when what is stored for the same key changes
LAYOUT = 'layout.json'
MAX_BATCH = 256  # images that the backbone sees at once

Batch = tuple[list[Tensor], Tensor]  # for b images: M of (b, in_features) and the final (b, ...); labels (b,)


def _collate(items: list[Any]) -> Any:
    return default_collate(items) if items else None


class Taps:
    """One view of a data set through the frozen backbone, which runs again whenever a batch is asked for.

    Args:
        model: The cascade; in evaluation mode whenever batches are asked for.
        data: An ImageData, or any data set of (normalised tensor, label).
        accelerator: Its device and precision are used; what is asked for is this process's own.
        view: Which view (see data.View).
        seed: Of what is random about the view.
        workers: Processes that decode.
        features: The last array is what the backbone's classifier gets, instead of its logits.
        batch: Images that the backbone sees at once when all are asked for; at most MAX_BATCH.
    """

    def __init__(
        self,
        model: CascadeModel,
        data: Dataset,
        accelerator: Accelerator,
        view: int = 0,
        seed: int = 0,
        workers: int = 0,
        features: bool = False,
        batch: int = MAX_BATCH,
    ) -> None:
        self.model, self.data, self.accelerator = model, data, accelerator
        self.view = View(model, data, view, seed)
        self.workers, self.features = workers, features
        last = model.get_classifier().weight.shape[1] if features else model.num_classes
        self.widths: list[int] = [*(h.in_features for h in model.heads), last]  # type: ignore[list-item]
        self.batch = min(batch, MAX_BATCH)

    def __len__(self) -> int:
        return len(self.view)

    @torch.no_grad()
    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """For each array of indices in `plan` the M+1 arrays, float32 on the accelerator's device, and the labels."""
        device = self.accelerator.device
        loader = DataLoader(
            self.view,
            batch_sampler=[p.tolist() for p in plan],
            num_workers=self.workers,
            collate_fn=_collate,
            pin_memory=device.type == 'cuda',
        )
        for batch in loader:
            if batch is None:  # this process's share of a batch smaller than there are processes
                yield [torch.empty(0, w, device=device) for w in self.widths], torch.empty(0, dtype=torch.long)
                continue
            images, labels = batch
            with self.accelerator.autocast():
                pooled, final = self.model.forward_pooled(images.to(device), self.features)
            yield [t.float() for t in (*pooled, final)], labels

    def key(self) -> str:
        """Changes with everything that the arrays follow from: backbone, exits, grids, images, transform, precision.

        Raises:
            ValueError: A data set that cannot say when it has changed.
        """
        model, skip = self.model, set()
        if self.features:  # the classifier is not asked, and may be new in each run
            ids = {id(p) for p in model.get_classifier().parameters()}
            skip = {name for name, p in model.backbone.named_parameters() if id(p) in ids}
        state = {name: t for name, t in model.backbone.state_dict().items() if name not in skip}
        fingerprint = getattr(self.data, 'fingerprint', None)
        if fingerprint is None:
            raise ValueError(
                f'{type(self.data).__name__} does not say what is in it, so nobody could tell whether stored taps are '
                f'still its own. Give it an attribute `fingerprint` (a text that changes with its images and its '
                f'transform), or train without a cache that is kept.'
            )
        parts = dict(
            format=FORMAT,
            weights=heads_digest([type(model.backbone).__name__], state),
            exits=[(p.module, p.item, p.layout, p.prefix_tokens) for p in model.exits],
            grids=[h.grid for h in model.heads],
            features=self.features,
            images=str(fingerprint),
            transform=repr(self.view.data.transform) if hasattr(self.view.data, 'transform') else '',
            config={k: v for k, v in resolve_input_data_config(model).items()},
            view=self.view.number,
            seed=self.view.seed if self.view.random else None,
            dtype=str(next(model.parameters()).dtype),
            precision=str(self.accelerator.mixed_precision),
            device=self.accelerator.device.type,
            versions=[timm.__version__, torch.__version__],
        )
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:24]


class StoredTaps:
    """Taps on disk, mapped: what is not asked for takes no memory.

    Args:
        folder: That `store` filled.
        writable: To fill it.

    Raises:
        ValueError, OSError: Files that are missing or cut short.
    """

    def __init__(self, folder: Path, writable: bool = False) -> None:
        layout = json.loads((folder / LAYOUT).read_text(encoding='utf-8'))
        self.widths: list[int] = layout['widths']
        self.batch: int = layout['batch']

        def mapped(name: str) -> np.ndarray:
            return np.load(folder / f'{name}.npy', mmap_mode='r+' if writable else 'r')

        self.maps = [mapped(name) for name in _names(self.widths)]
        self.labels, self.sums = mapped('labels'), mapped('checksums')
        # plain arrays on the same pages: indexing a memmap costs several times as much
        self._arrays = [np.asarray(m) for m in self.maps]

    def __len__(self) -> int:
        return len(self.labels)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """For each array of indices in `plan` the M+1 arrays, float32 on the CPU, and the labels."""
        for index in plan:
            yield [torch.from_numpy(a[index]) for a in self._arrays], torch.from_numpy(np.asarray(self.labels[index]))

    def rows(self, chunk: int) -> np.ndarray:
        """Indices of the images that are computed together."""
        return np.arange(chunk * self.batch, min((chunk + 1) * self.batch, len(self)))

    def checksum(self, chunk: int) -> int:
        """Of what the chunk holds now, never 0."""
        rows = self.rows(chunk)
        total = 0
        for array in (*self._arrays, self.labels):
            total = zlib.crc32(array[rows[0] : rows[-1] + 1].tobytes(), total)
        return total or 1

    def write(self, chunk: int, arrays: Sequence[Tensor], labels: Tensor) -> None:
        rows = slice(self.rows(chunk)[0], self.rows(chunk)[-1] + 1)
        for target, array in zip((*self._arrays, self.labels), (*arrays, labels), strict=True):
            target[rows] = array.cpu().numpy()
        self.sums[chunk] = self.checksum(chunk)  # last: a chunk without the right one is computed again

    def flush(self) -> None:
        for array in (*self.maps, self.labels, self.sums):
            array.flush()  # type: ignore[attr-defined]


def _names(widths: Sequence[int]) -> list[str]:
    return [*(f'tap{m}' for m in range(len(widths) - 1)), 'final']


def store(taps: Taps, folder: Path, key: str, lasting: bool = True) -> StoredTaps:
    """The taps in `folder`/`key`; what of them is not there is computed, each process its share.

    Args:
        lasting: Make sure that they survive a power failure before they are taken for complete.

    Raises:
        OSError: They do not fit on the disk; nothing is left there then.
    """
    accelerator, done, part = taps.accelerator, folder / key, folder / f'{key}.part'
    title = f'view {taps.view.number} of {getattr(taps.data, "split", "") or "the data"}'
    if not on_main(accelerator, done.is_dir):
        on_main(accelerator, lambda: _allocate(part, taps, title))
        stored = StoredTaps(part, writable=True)
        chunks = range(accelerator.process_index, len(stored.sums), accelerator.num_processes)
        missing = [c for c in chunks if stored.sums[c] == 0 or stored.sums[c] != stored.checksum(c)]
        results = taps.batches([stored.rows(c) for c in missing])
        bar = tqdm(
            results,
            f'backbone, {title}',
            len(chunks),
            initial=len(chunks) - len(missing),
            disable=not accelerator.is_main_process,
        )
        try:
            for chunk, (arrays, labels) in zip(missing, bar, strict=True):
                stored.write(chunk, arrays, labels)
        except BadImageError:  # once the image is mended the key is another one
            shutil.rmtree(part, ignore_errors=True)
            raise
        if lasting:
            stored.flush()
        accelerator.wait_for_everyone()
        on_main(accelerator, lambda: _finish(part, done))
    elif accelerator.is_main_process:
        _logger.info('%s: taps are in %s already', title, done)
    return StoredTaps(done)


def _allocate(part: Path, taps: Taps, title: str) -> None:
    """Files of full size in `part`, unless they are there; the size is said and compared with the disk first."""
    n, widths, batch = len(taps), taps.widths, taps.batch
    layout = dict(n=n, widths=widths)  # what was begun keeps its batch
    try:
        found = json.loads((part / LAYOUT).read_text(encoding='utf-8'))
        if {k: found[k] for k in layout} == layout:
            _logger.info('%s: continuing the taps in %s', title, part)
            return
    except (OSError, ValueError, KeyError):
        pass
    shutil.rmtree(part, ignore_errors=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    shapes: dict[str, tuple[tuple[int, ...], type]] = {
        name: ((n, width), np.float32) for name, width in zip(_names(widths), widths, strict=True)
    }
    shapes |= dict(labels=((n,), np.int64), checksums=((-(-n // batch),), np.uint32))
    size = sum(int(np.prod(shape)) * np.dtype(dtype).itemsize + 128 for shape, dtype in shapes.values())
    free = shutil.disk_usage(part.parent).free
    _logger.info(
        '%s: the taps of %d images take %.1f MB in %s (%.1f MB are free)', title, n, size / 1e6, part.parent, free / 1e6
    )
    if size > free:
        raise OSError(
            f'the taps of {n} images take {size / 1e9:.2f} GB, but {part.parent} has {free / 1e9:.2f} GB '
            f'free. Name a folder on another disk (--cache, cache=), use heads with a smaller grid, or do '
            f'without a cache (--no-cache, cache=False): the backbone then runs in every epoch.'
        )
    try:
        part.mkdir()
        for name, (shape, dtype) in shapes.items():
            array = np.lib.format.open_memmap(part / f'{name}.npy', mode='w+', dtype=dtype, shape=shape)
            del array
            if hasattr(os, 'posix_fallocate'):  # a file with holes would end in a bus error on a full disk
                with open(part / f'{name}.npy', 'rb+') as f:
                    os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
        write_text(part / LAYOUT, json.dumps(dict(layout, batch=batch)))
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def _finish(part: Path, done: Path) -> None:
    try:
        part.rename(done)
    except OSError:
        if not done.is_dir():  # else another run has computed the same meanwhile
            raise
