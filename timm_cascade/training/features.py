"""What heads on a frozen backbone train on: pooled features and the backbone's own output, one row per image.

`FrozenFeatures` runs the backbone whenever a batch is asked for; `StoredFeatures` maps the file in which one pass has
left them. Both yield the same batches.
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
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..data import View, collate, fingerprint_of
from ..errors import BadImageError
from ..fronts import Front
from ..model import CascadeModel
from ..utils.digest import state_digest
from ..utils.distributed import on_main
from ..utils.progress import progress
from ..utils.timm_models import resolve_input_data_config

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['Batch', 'FrozenFeatures', 'StoredFeatures', 'store']

_logger = logging.getLogger(__name__)
FORMAT = 2  # of the file: raise it when what is stored for the same key changes
HEADER = 1024  # bytes, more than the header of the file takes
MAX_BATCH = 256  # images that the backbone sees at once

Batch = tuple[list[Tensor], Tensor]  # for b images: M of (b, in_features) and the final (b, ...); labels (b,)


def _collate(items: list[Any]) -> Any:
    return collate(items) if items else None


class FrozenFeatures:
    """One view of a data set through the frozen backbone, which runs whenever a batch is asked for.

    Args:
        model: The cascade; in evaluation mode whenever batches are asked for.
        data: An ImageData, or any data set of (normalised tensor, label).
        accelerator: Says device and precision; each process asks for its own batches.
        view: Number of the view (see data.View).
        seed: Seed of the view's augmentation.
        workers: Processes that decode images.
        pre_logits: The last array holds what the backbone's classifier reads, instead of its logits.
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
        pre_logits: bool = False,
        batch: int = MAX_BATCH,
    ) -> None:
        self.model, self.data, self.accelerator = model, data, accelerator
        self.view = View(model, data, view, seed)
        self.workers, self.pre_logits = workers, pre_logits
        last = model.get_classifier().weight.shape[1] if pre_logits else model.num_classes
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
                pooled, final = self.model.forward_pooled(self.model.as_images(images), self.pre_logits)
            yield [t.float() for t in (*pooled, final)], labels

    def key(self) -> str:
        """Changes with everything that the arrays follow from: backbone, exits, grids, images, transform, precision.

        Raises:
            ValueError: The data set does not say when it has changed.
        """
        model, skip = self.model, set()
        if self.pre_logits:  # the classifier is not run, and may be new in each training
            ids = {id(p) for p in model.get_classifier().parameters()}
            skip = {name for name, p in model.backbone.named_parameters() if id(p) in ids}
        state = {name: t for name, t in model.backbone.state_dict().items() if name not in skip}
        fingerprint = fingerprint_of(self.data)
        if fingerprint is None:
            raise ValueError(
                f'{type(self.data).__name__} has no attribute `fingerprint`, so features stored in work_dir could not '
                f'be recognised as its own. Give it one (a text that changes with its images and its transform), or '
                f'train without work_dir.'
            )
        parts = dict(
            format=FORMAT,
            weights=state_digest(state, also=[type(model.backbone).__name__]),
            exits=[(p.module, p.item, p.layout, p.prefix_tokens) for p in model.exits],
            pooled=[(h.grid, h.mean, h.tokens) for h in model.heads if not isinstance(h, Front)],
            **({'fronts': [f.digest() for f in model.fronts]} if model.fronts else {}),
            pre_logits=self.pre_logits,
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


class StoredFeatures:
    """Features in a mapped file of one record per image; records that are not asked for take no memory.

    Args:
        path: The file that `store` wrote.
        writable: Map it for writing.

    Raises:
        ValueError, OSError: The file is missing or truncated.
    """

    batch = MAX_BATCH

    def __init__(self, path: Path, writable: bool = False) -> None:
        self.map = np.load(path, mmap_mode='r+' if writable else 'r')
        # a plain array on the same pages: indexing a memmap costs several times as much
        self.records = np.asarray(self.map)
        *self.names, _, _ = self.records.dtype.names or ()
        self.widths: list[int] = [self.records.dtype[name].shape[0] for name in self.names]
        self._flat = self.records.view(np.float32).reshape(
            len(self.records), -1
        )  # one copy per batch, not one per exit

    def __len__(self) -> int:
        return len(self.records)

    def batches(self, plan: Sequence[np.ndarray]) -> Iterator[Batch]:
        """For each array of indices in `plan` the M+1 arrays, float32 on the CPU, and the labels."""
        for index in plan:
            rows = self._flat[index]
            *arrays, _ = torch.from_numpy(rows).split([*self.widths, 2], 1)
            yield arrays, torch.from_numpy(rows[:, -2].view(np.int32).astype(np.int64))

    def write(self, index: np.ndarray, arrays: Sequence[Tensor], labels: Tensor) -> None:
        """Writes the records of a batch, each with its checksum."""
        rows = np.zeros(len(index), self.records.dtype)
        for name, array in zip(self.names, arrays, strict=True):
            rows[name] = array.cpu().numpy()
        rows['label'] = labels.cpu().numpy()
        rows['checksum'] = _checksums(rows)
        self.records[index] = rows

    def complete(self, index: np.ndarray) -> bool:
        """Whether the records of a batch are there and as they were written."""
        rows = self.records[index]
        return bool(rows['checksum'].all() and (rows['checksum'] == _checksums(rows)).all())


def _checksums(rows: np.ndarray) -> np.ndarray:
    """One checksum per record, never 0: a record of zeros has not been written."""
    return np.array([zlib.crc32(row.tobytes()[:-4]) or 1 for row in rows], np.uint32)


def store(source: FrozenFeatures, path: Path, lasting: bool = True) -> StoredFeatures:
    """The features in the file `path`; what is missing there is computed, each process its share.

    Args:
        source: What computes them.
        path: The file. While it is incomplete it has the suffix `.part`.
        lasting: Wait until they would survive a power failure before they count as complete.

    Raises:
        OSError: They do not fit on the disk; no file is left behind then.
    """
    accelerator, part = source.accelerator, path.with_suffix('.part')
    title = f'view {source.view.number} of {getattr(source.data, "split", "") or "the data"}'
    if on_main(accelerator, path.is_file):
        if accelerator.is_main_process:
            _logger.info('%s: the features are in %s already', title, path)
        return StoredFeatures(path)
    on_main(accelerator, lambda: _allocate(part, source, title))
    stored = StoredFeatures(part, writable=True)
    chunks = [np.arange(i, min(i + source.batch, len(stored))) for i in range(0, len(stored), source.batch)]
    mine = chunks[accelerator.process_index :: accelerator.num_processes]
    missing = [chunk for chunk in mine if not stored.complete(chunk)]
    bar = progress(
        source.batches(missing),
        f'backbone, {title}',
        accelerator.is_main_process,
        total=len(mine),
        initial=len(mine) - len(missing),
    )
    try:
        for chunk, (arrays, labels) in zip(missing, bar, strict=True):
            stored.write(chunk, arrays, labels)
    except BadImageError:  # once the image is replaced the key is another one
        part.unlink(missing_ok=True)
        raise
    if lasting:
        stored.map.flush()
    accelerator.wait_for_everyone()
    on_main(accelerator, lambda: part.replace(path) if part.exists() else None)  # else another run was faster
    return StoredFeatures(path)


def _allocate(part: Path, source: FrozenFeatures, title: str) -> None:
    """A file of full size at `part`, unless there is one; its size is logged and compared with the disk first."""
    n, widths = len(source), source.widths
    names = [*(f'exit{m}' for m in range(len(widths) - 1)), 'final']
    fields: list[Any] = [(name, np.float32, (width,)) for name, width in zip(names, widths, strict=True)]
    dtype = np.dtype([*fields, ('label', np.int32), ('checksum', np.uint32)])
    try:
        found = np.load(part, mmap_mode='r')
        if found.dtype == dtype and found.shape == (n,):
            _logger.info('%s: continuing the features in %s', title, part)
            return
    except (OSError, ValueError, EOFError):
        pass
    part.unlink(missing_ok=True)
    part.parent.mkdir(parents=True, exist_ok=True)
    size, free = n * dtype.itemsize + HEADER, shutil.disk_usage(part.parent).free
    _logger.info(
        '%s: the features of %d images take %.1f MB in %s (%.1f MB are free)',
        title,
        n,
        size / 1e6,
        part.parent,
        free / 1e6,
    )
    if size > free:
        raise OSError(
            f'the features of {n} images take {size / 1e9:.2f} GB, but {part.parent} has {free / 1e9:.2f} GB free. '
            f'Choose a work_dir on another disk (--work-dir), use heads with a smaller grid, or store no features '
            f'(cache=False, --no-cache): the backbone then runs in every epoch.'
        )
    try:
        np.lib.format.open_memmap(part, mode='w+', dtype=dtype, shape=(n,)).flush()
        if hasattr(os, 'posix_fallocate'):  # a file with holes would end in a bus error on a full disk
            with open(part, 'rb+') as f:
                os.posix_fallocate(f.fileno(), 0, os.fstat(f.fileno()).st_size)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
