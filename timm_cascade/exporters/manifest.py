"""cascade.json of an exported folder: its files, how they fit together, and the thresholds that belong to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from ..errors import ExportError, ThresholdError
from ..formats import parse
from ..formats.fields import ImageSize, Open, known_version
from ..thresholds import ThresholdTable
from ..utils.files import readable_json

__all__ = ['MANIFEST', 'LiveTensor', 'Manifest', 'Preprocessing', 'StageEntry', 'read_manifest']

MANIFEST = 'cascade.json'
MAX_BYTES = 64 << 20

FileName = Annotated[str, Field(pattern=r'^[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}$')]
Sha256 = Annotated[str, Field(pattern=r'^[0-9a-f]{64}$')]
Name = Annotated[str, Field(min_length=1, max_length=500)]
Count = Annotated[int, Field(ge=0)]
Cost = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class LiveTensor(Open):
    """A tensor that crosses an exit; `rows` of it belong to each sample, 0 if all samples share it."""

    name: Name
    rows: Count


class StageEntry(Open):
    """One stage's file.

    Attributes:
        file: Name in the folder.
        sha256: Hash of the file.
        bytes: Size of the file.
        inputs: Tensors it reads; the first stage reads `images` (N, C, H, W) float32.
        outputs: Tensors it makes for later stages. After them come `logits` and `confidence`.
        live: All tensors that later stages need once this one is done.
        exit: Module after which the exit stands; None for the last stage.
        macs: MACs of the stage for one sample, its head included.
        head_macs: MACs of the stage's head, 0 for the last stage.
        cuts: Offsets in an ONNX file at which the graph, each input, the body, the head, each output, and logits and
            confidence begin: with them the runner joins stages around a closed exit. Empty: this file stays alone.
    """

    file: FileName
    sha256: Sha256
    bytes: Count
    inputs: list[Name]
    outputs: list[Name]
    live: list[LiveTensor]
    exit: Name | None
    macs: Cost
    head_macs: Cost
    cuts: list[Count] = []


class Preprocessing(Open):
    """How an image becomes the first stage's input: resize, centre crop, then (pixel / 255 - mean) / std."""

    input_size: ImageSize
    mean: list[float]
    std: list[Annotated[float, Field(gt=0)]]
    interpolation: str
    crop_pct: Annotated[float, Field(gt=0)]
    crop_mode: str


class Manifest(Open):
    """The whole of cascade.json.

    Attributes:
        kind: `onnx` or `pt2`.
        precision: Number format in which the files compute: `float32`, `float16` or `int8`.
        batch_size: Samples that every stage takes; None for any number.
        thresholds: (M,) that are active by default; None closes an exit.
        table: Operating points as `ThresholdTable.to_json` writes them; None if the cascade is not calibrated.
        table_precision: Precision that the table was measured in. Thresholds of one precision never serve another.
        others: sha256 of the other files in the folder that this library wrote.
    """

    format: Literal['timm-cascade-export'] = 'timm-cascade-export'
    format_version: known_version(1) = 1  # type: ignore[valid-type]
    kind: Literal['onnx', 'pt2']
    architecture: Name
    precision: Literal['float32', 'float16', 'int8']
    opset: int | None
    batch_size: Annotated[int, Field(gt=0)] | None
    num_classes: Annotated[int, Field(gt=0)]
    label_names: list[str] | None
    preprocessing: Preprocessing
    stages: list[StageEntry] = Field(min_length=2)
    backbone_macs: Cost
    heads_hash: Name
    thresholds: list[Annotated[float, Field(ge=0)] | None]
    table: dict[str, Any] | None
    table_precision: str | None
    others: dict[FileName, Sha256] = {}
    versions: dict[str, str]

    @model_validator(mode='after')
    def _fits(self) -> Manifest:
        exits = len(self.stages) - 1
        if len(self.thresholds) != exits:
            raise ValueError(f'{len(self.thresholds)} thresholds for {exits} exits')
        available = {'images'}
        for number, stage in enumerate(self.stages):
            missing = [name for name in stage.inputs if name not in available]
            if missing:
                raise ValueError(f'stage {number} reads {missing[0]!r}, which no stage before it hands on')
            available = (available | set(stage.outputs)) & {tensor.name for tensor in stage.live}
            parts = len(stage.inputs) + len(stage.outputs) + 4
            if stage.cuts and (
                len(stage.cuts) != parts or sorted([*stage.cuts, stage.bytes]) != [*stage.cuts, stage.bytes]
            ):
                raise ValueError(f'stage {number} has the cuts {stage.cuts}; expected {parts} ascending offsets')
        if (self.table is None) != (self.table_precision is None):
            raise ValueError('table and table_precision go together')
        if self.table_precision not in (None, self.precision) and any(t is not None for t in self.thresholds):
            raise ValueError(f'thresholds of {self.table_precision} do not serve {self.precision}; expected are null')
        channels = self.preprocessing.input_size[0]
        if not {len(self.preprocessing.mean), len(self.preprocessing.std)} <= {1, channels}:
            raise ValueError(f'preprocessing has mean and std for other images than those of {channels} channels')
        if self.label_names is not None and len(self.label_names) != self.num_classes:
            raise ValueError(f'{len(self.label_names)} label_names for {self.num_classes} classes')
        return self

    @property
    def exits(self) -> tuple[str, ...]:
        """Module names of the M exits."""
        return tuple(stage.exit or '' for stage in self.stages[:-1])

    def to_json(self) -> str:
        """JSON with lists of numbers on one line."""
        return readable_json(self.model_dump())


def read_manifest(folder: str | Path) -> Manifest:
    """Reads and checks the cascade.json of a folder.

    Raises:
        ExportError: There is none, or it is not one; the message names the entry, such as `stages.0.sha256`.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise ExportError(
            f'{folder} is not an exported cascade: it has no {MANIFEST}. Write one with timm-cascade export.'
        )
    if path.stat().st_size > MAX_BYTES:
        raise ExportError(f'{path} has {path.stat().st_size} bytes; expected at most {MAX_BYTES}.')
    try:
        manifest = parse(Manifest, path.read_text(encoding='utf-8'), str(path), ExportError)
        if manifest.table is not None:
            table = ThresholdTable.from_json(json.dumps(manifest.table), 'table')
            input_size = manifest.preprocessing.input_size
            table.check(manifest.exits, manifest.num_classes, manifest.heads_hash, input_size)
    except UnicodeDecodeError as e:
        raise ExportError(f'{path}: it is not text in UTF-8 ({e}). Export the cascade again.') from e
    except ThresholdError as e:
        raise ExportError(f'{path}: {e}') from e
    return manifest
