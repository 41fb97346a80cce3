"""Writes a cascade as a folder that runs without this library, and without torch."""

from __future__ import annotations

import copy
import json
import math
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm
import torch

from ..backbone import input_size_of
from ..data import ImageData
from ..errors import ExportError
from ..model import CascadeModel
from ..utils.files import beside, sha256_of
from ..utils.timm_models import resolve_input_data_config
from ..version import __version__
from .layout import lay_out
from .manifest import MANIFEST, LiveTensor, Manifest, Preprocessing, StageEntry
from .onnx_int8 import quantise_stages
from .onnx_single import SINGLE, SINGLE_BATCH, write_single
from .stage_files import require, write_program, write_stage
from .stage_module import StageModule
from .web_page import write_page

__all__ = ['export']

FORMATS = ('onnx', 'pt2')
RUNNER = 'runner.py'


def export(
    model: CascadeModel,
    folder: str | Path,
    format: str = 'onnx',
    *,
    opset: int | None = None,
    batch_size: int | None = None,
    fp16: bool = False,
    int8: ImageData | None = None,
    single_file: str | None = 'image',
    web: bool = False,
    samples: Sequence[str | Path] = (),
) -> Path:
    """Writes a cascade as one file per stage, with all that is needed to run it elsewhere.

    Each stage reads the tensors that cross the exit before it and gives those that cross the next one, logits and
    confidence; weights are written once. The folder also holds `cascade.json` and `runner.py`, which routes samples
    with numpy and onnxruntime alone.

    Args:
        model: A cascade in eval mode. Its active thresholds and its table go with it; without a calibration all exits
            are closed, and a warning says so.
        folder: Must not exist. It is written beside and renamed, so it is there as a whole or not at all.
        format: `onnx`; or `pt2` for torch.export programs, which AOTInductor and ExecuTorch read; they have no runner.
        opset: Version of the ONNX operators; by default 18.
        batch_size: Number of samples that each stage takes, for runtimes that need fixed shapes; by default any.
        fp16: Compute in half precision. Thresholds of one precision do not serve another: the runner refuses them
            until the exported files have been calibrated (`timm-cascade calibrate FOLDER`).
        int8: Images to quantise with, like those to come (up to 256 are used; labels are not). The thresholds do not
            serve the quantised files, as with `fp16`.
        single_file: Also write all stages as one file, whose later stages stand in branches that are not run:
            `image` for `cascade.onnx`, which takes one image, `batch` for `cascade_batch.onnx`, which takes any number
            as well, None for neither. Each holds all weights once more. Left out with a warning where it cannot be
            written.
        web: Also write `index.html`, which runs the cascade in a browser, with onnxruntime-web, which npm fetches now.
        samples: Images that the page shows: files or folders of them, up to 60 are copied.

    Returns:
        The folder.

    Raises:
        ExportError: The folder exists, a package is missing, the model is in training mode, or a stage cannot be
            written; nothing is left behind.

    Example:
        >>> model = timm.create_model('hf-hub:me/cascade_resnet50.flowers', pretrained=True).eval()
        >>> timm_cascade.export(model, 'exported')
        >>> # python exported/runner.py image.jpg --max-drop 0.01
    """
    folder = Path(folder)
    if format not in FORMATS:
        raise ExportError(f'format is {format!r}; expected {" or ".join(FORMATS)}.')
    if not isinstance(model, CascadeModel):
        raise ExportError(f'{type(model).__name__} is not a cascade; create one with timm.create_model("cascade_...").')
    if model.training:
        raise ExportError('the model is in training mode; call model.eval() first.')
    if not model.num_classes:
        raise ExportError('this model has no classes, so its exits cannot answer; reset_classifier(num_classes) first.')
    if model.label_names is not None and len(model.label_names) != model.num_classes:
        raise ExportError(
            f'{len(model.label_names)} label_names for {model.num_classes} classes; set model.label_names.'
        )
    if batch_size is not None and batch_size < 1:
        raise ExportError(f'batch_size is {batch_size}; expected at least 1, or None for any number of samples.')
    if (web and (format != 'onnx' or batch_size not in (None, 1))) or (samples and not web):
        raise ExportError('web goes with format="onnx" and stages that take one image; samples go with web.')
    if single_file not in (None, 'image', 'batch'):
        raise ExportError(f'single_file is {single_file!r}; expected image, batch or None.')
    if single_file == 'batch' and (format != 'onnx' or batch_size is not None):
        raise ExportError('single_file="batch" goes with format="onnx" and stages of any batch size.')
    if opset is not None and format != 'onnx':
        raise ExportError(f'opset is {opset}, but format="{format}" has none; leave it out.')
    if format == 'onnx':
        require('onnx', 'onnxscript', *(['onnxruntime'] if int8 is not None else []))
    dtype = next(model.parameters()).dtype
    if dtype not in (torch.float32, torch.float16):
        raise ExportError(
            f'the model computes in {dtype}; call model.float() first, and give fp16=True for half precision.'
        )
    if int8 is not None and (fp16 or format != 'onnx' or dtype != torch.float32):
        raise ExportError('int8 goes with format="onnx", a float32 model and without fp16; leave one of them out.')
    computes = torch.float16 if fp16 or dtype == torch.float16 else torch.float32
    precision = 'int8' if int8 is not None else str(computes).removeprefix('torch.')
    if model.table is not None:  # before minutes of work
        model.table.check(
            [p.module for p in model.exits], model.num_classes, model.heads_hash(), input_size_of(model.backbone)
        )
    with new_folder(folder) as temporary:
        stages = stage_modules(model, computes)
        for stage in stages:
            path = temporary / f'stage_{stage.index}.{format}'
            if format == 'onnx':
                opset = write_stage(stage, path, opset, batch_size)
            else:
                write_program(stage, path, batch_size)
        manifest = describe(model, stages, temporary, kind=format, precision=precision, opset=opset, size=batch_size)
        if int8 is not None:
            write_manifest(manifest, temporary, [])
            quantise_stages(temporary, int8)
        elif format == 'onnx':  # integers would round otherwise where stages are joined, and the table is of each alone
            lay_out(manifest, temporary)
        for entry in manifest.stages:
            path = temporary / entry.file
            entry.sha256, entry.bytes = sha256_of(path), path.stat().st_size
        others = []
        if format == 'onnx':
            shutil.copyfile(Path(__file__).with_name(RUNNER), temporary / RUNNER)
            others = [RUNNER, *_single_files(manifest, temporary, single_file)]
        if web:
            others += write_page(temporary, [Path(path) for path in samples])
        write_manifest(manifest, temporary, others)
    return folder


def _single_files(manifest: Manifest, folder: Path, which: str | None) -> list[str]:
    wanted = {None: {}, 'image': {SINGLE: False}, 'batch': {SINGLE: False, SINGLE_BATCH: True}}[which]
    if manifest.batch_size not in (None, 1):
        wanted = {}  # an image alone does not fit stages of a larger size
    elif manifest.batch_size == 1:
        wanted.pop(SINGLE_BATCH, None)
    written = []
    for name, batch in wanted.items():
        try:
            write_single(manifest, folder, folder / name, batch)
            written.append(name)
        except ExportError as e:
            warnings.warn(f'{name} was left out: {e}', stacklevel=3)
    return written


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a folder beside `folder` to write to; renames it on success, removes it on failure.

    Raises:
        ExportError: `folder` exists.
    """
    if os.path.lexists(folder):
        raise ExportError(f'{folder} exists already; give a new folder, or remove it first.')
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = beside(folder)
    temporary.mkdir()
    try:
        yield temporary
        if os.path.lexists(folder):  # a rename would replace an empty one
            raise ExportError(f'{folder} was made by another program meanwhile; nothing was written.')
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def stage_modules(model: CascadeModel, dtype: torch.dtype) -> list[StageModule]:
    """The stages of a cascade, on the CPU.

    Raises:
        ExportError: The backbone cannot be exported as one graph.
    """
    weight = next(model.parameters())
    if weight.dtype != dtype or weight.device.type != 'cpu':
        model = copy.deepcopy(model).to(device='cpu', dtype=dtype)
    images = torch.zeros(2, *input_size_of(model.backbone), dtype=dtype)
    try:
        staged = model._router.export(model.backbone, images)
        return [StageModule(staged, k, model.backbone, head) for k, head in enumerate([*model.heads, None])]
    except RuntimeError as e:
        raise ExportError(str(e)) from e


def describe(
    model: CascadeModel,
    stages: list[StageModule],
    folder: Path,
    *,
    kind: Any,
    precision: Any,
    opset: int | None,
    size: int | None,
) -> Manifest:
    """The manifest of stage files that lie in a folder."""
    config = resolve_input_data_config(model)
    stage_macs, head_macs = model.stage_macs(), [*model.head_macs(), 0.0]
    entries = []
    for stage in stages:
        path = folder / f'stage_{stage.index}.{kind}'
        entries.append(
            StageEntry(
                file=path.name,
                sha256=sha256_of(path),
                bytes=path.stat().st_size,
                inputs=stage.inputs,
                outputs=stage.outputs,
                live=[LiveTensor(name=name, rows=rows) for name, rows in stage.live],
                exit=model.exits[stage.index].module if stage.index < len(model.exits) else None,
                macs=float(stage_macs[stage.index]),
                head_macs=float(head_macs[stage.index]),
            )
        )
    table = None if model.table is None else json.loads(model.table.to_json())
    measured = None if table is None else str(table['provenance'].get('dtype', 'float32'))
    weights = str(next(model.parameters()).dtype).removeprefix('torch.')
    thresholds = [None if math.isinf(t) else max(t, 0.0) for t in model.thresholds.tolist()]
    if precision != weights and any(t is not None for t in thresholds):
        warnings.warn(
            f'the thresholds were chosen in {weights} and do not serve {precision}: all exits are closed until the '
            f'exported files are calibrated (timm-cascade calibrate FOLDER --data DATA).',
            stacklevel=3,
        )
        thresholds = [None] * len(thresholds)
    elif table is None:
        warnings.warn(
            'this cascade is not calibrated: the exported folder has no table, and set_max_drop has nothing to choose '
            'from. Calibrate the model, or the folder: timm-cascade calibrate FOLDER --data DATA.',
            stacklevel=3,
        )
    elif any(t is not None for t in thresholds) and not model.table.points_at(model.thresholds):
        warnings.warn(
            'the active thresholds are those of no point in the table, so the folder does not say what they promise. '
            'Choose some with set_max_drop, in the model or in the folder.',
            stacklevel=3,
        )
    return Manifest(
        kind=kind,
        architecture=str(model.pretrained_cfg['architecture']),
        precision=precision,
        opset=opset,
        batch_size=size,
        num_classes=model.num_classes,
        label_names=model.label_names,
        preprocessing=Preprocessing(
            input_size=list(input_size_of(model.backbone)),
            mean=list(config['mean']),
            std=list(config['std']),
            interpolation=str(config['interpolation']),
            crop_pct=float(config['crop_pct']),
            crop_mode=str(config.get('crop_mode', 'center')),
        ),
        stages=entries,
        backbone_macs=float(model.exits[-1].total),
        heads_hash=model.heads_hash(),
        thresholds=thresholds,
        table=table,
        table_precision=measured,
        versions=dict(
            timm_cascade=__version__,
            timm=timm.__version__,
            torch=str(torch.__version__),
            **({'onnx': version('onnx'), 'onnxscript': version('onnxscript')} if kind == 'onnx' else {}),
        ),
    )


def write_manifest(manifest: Manifest, folder: Path, others: list[str]) -> None:
    """Writes cascade.json, with the hashes of the other files."""
    manifest.others = {name: sha256_of(folder / name) for name in others}
    (folder / MANIFEST).write_text(manifest.to_json(), encoding='utf-8')
