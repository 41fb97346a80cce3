"""Runs this folder's cascade with numpy and onnxruntime: python runner.py image.jpg --max-drop 0.01 (needs PIL too)."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort


class Output(NamedTuple):
    """In input order: logits (N, C) float32, the exit that answered (N,) int64, confidence (N,) float32."""

    logits: np.ndarray
    exit: np.ndarray
    confidence: np.ndarray


class Cascade:
    """The stages in `folder`; samples leave between them. `threads` and `providers` are onnxruntime's."""

    def __init__(self, folder: str | Path, threads: int = 0, providers: Sequence[Any] = ('CPUExecutionProvider',)):
        self.manifest: dict[str, Any] = json.loads((Path(folder) / 'cascade.json').read_text(encoding='utf-8'))
        kind = tuple(self.manifest.get(key) for key in ('format', 'format_version', 'kind'))
        if kind != ('timm-cascade-export', 1, 'onnx'):
            raise ValueError(f'{folder}/cascade.json is {kind}, not an ONNX export that this runner can read.')
        self.stages: list[dict[str, Any]] = self.manifest['stages']
        options, self._needed = ort.SessionOptions(), ort.RunOptions()
        options.intra_op_num_threads = threads
        self._needed.only_execute_path_to_fetches = True  # so that a closed exit's head is not run
        self.sessions = []
        for stage in self.stages:
            data = (Path(folder) / stage['file']).read_bytes()
            if hashlib.sha256(data).hexdigest() != stage['sha256']:
                raise ValueError(f'{folder}/{stage["file"]} is damaged or another file (sha256). Copy it again.')
            try:
                self.sessions.append(ort.InferenceSession(data, options, providers=list(providers)))
            except Exception as e:
                raise ValueError(f'onnxruntime {ort.__version__} cannot load {stage["file"]}: {e}') from e
        self.set_thresholds(self.manifest['thresholds'])

    def set_thresholds(self, values: Sequence[float | None]) -> None:
        """(M,) confidences from which samples leave; None or inf closes an exit."""
        found = np.array([math.inf if v is None else v for v in values], np.float32)
        if found.shape != (len(self.stages) - 1,) or np.isnan(found).any():
            raise ValueError(f'thresholds {list(values)}: expected {len(self.stages) - 1} numbers, None for closed.')
        self.thresholds = found

    def set_max_drop(self, max_drop: float, rule: str = 'certified', level: float = 0.9) -> dict[str, Any]:
        """Sets the thresholds of the table's point with the largest max_drop up to this one, and returns the point."""
        table, precision = self.manifest['table'], self.manifest['precision']
        if table is None or self.manifest['table_precision'] != precision:
            what = f'no table for {precision}, only {self.manifest["table_precision"]}; thresholds of one precision do'
            raise ValueError(f'{what} not serve another. Run timm-cascade calibrate FOLDER --data DATA on this folder.')
        reference = 'labels' if table['provenance'].get('labelled', True) else 'backbone'
        points = [p for p in table['points'] if p['rule'] == rule and p['reference'] == reference]
        points = [p for p in points if rule != 'certified' or p['level'] >= level]
        known = sorted({p['max_drop'] for p in points})
        points = [p for p in points if p['max_drop'] <= max_drop]
        if not points:
            raise ValueError(f'no {rule} point for max_drop {max_drop}, level {level}; the table has {known}.')
        point = max(points, key=lambda p: (p['max_drop'], -(p['level'] or 0)))
        self.set_thresholds(point['thresholds'])
        return point

    def preprocess(self, image: Any) -> np.ndarray:
        """PIL image to (C, H, W) float32, as timm's evaluation transform makes it."""
        from PIL import Image

        p = self.manifest['preprocessing']
        (channels, height, width), size = p['input_size'], (image.height, image.width)
        scale = [math.floor(side / p['crop_pct']) for side in (height, width)]
        if p['crop_mode'] == 'center' and scale[0] == scale[1]:
            scale = [scale[0] if side == min(size) else int(scale[0] * side / min(size)) for side in size]
        elif p['crop_mode'] != 'squash':
            ratio = (max if p['crop_mode'] == 'border' else min)(size[0] / scale[0], size[1] / scale[1])
            scale = [round(side / ratio) for side in size]
        method = getattr(Image.Resampling, p['interpolation'].upper(), Image.Resampling.BILINEAR)
        image = image.convert('L' if channels == 1 else 'RGB').resize((scale[1], scale[0]), method)
        border = [round(255 * v) for v in p['mean']] if p['crop_mode'] == 'border' else [0] * channels
        canvas = Image.new(image.mode, (width, height), tuple(border) if channels > 1 else border[0])
        canvas.paste(image, (-round((scale[1] - width) / 2), -round((scale[0] - height) / 2)))
        pixels = np.asarray(canvas, np.float32).reshape(height, width, channels) / np.float32(255)
        return np.ascontiguousarray(((pixels - np.float32(p['mean'])) / np.float32(p['std'])).transpose(2, 0, 1))

    def predict(self, images: np.ndarray) -> Output:
        """Logits, exit and confidence of preprocessed images (N, C, H, W) float32."""
        size, n, fixed = self.manifest['preprocessing']['input_size'], len(images), self.manifest['batch_size']
        if images.dtype != np.float32 or images.ndim != 4 or list(images.shape[1:]) != size:
            raise ValueError(f'images are {images.dtype} {images.shape}; expected float32 (N, {str(size)[1:-1]}).')
        logits = np.empty((n, self.manifest['num_classes']), np.float32)
        out = Output(logits, np.empty(n, np.int64), np.empty(n, np.float32))
        for start in range(0, n, fixed or max(n, 1)):
            self._route(images, np.arange(start, min(n, start + (fixed or n))), out)
        return out

    def _route(self, images: np.ndarray, ids: np.ndarray, out: Output) -> None:
        fixed = self.manifest['batch_size']  # stages of a fixed size get some samples twice, whose answers are dropped
        images = images if len(ids) == len(images) and not fixed else images[np.resize(ids, fixed or len(ids))]
        values = {'images': ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(images))}
        for k, (stage, session) in enumerate(zip(self.stages, self.sessions, strict=True)):
            threshold = -math.inf if k == len(self.thresholds) else self.thresholds[k]
            answers = ['logits', 'confidence'] if threshold < math.inf else []
            if names := [*stage['outputs'], *answers]:
                feeds = {name: values[name] for name in stage['inputs']}
                values |= zip(names, session.run_with_ort_values(names, feeds, self._needed), strict=True)
            if not answers:
                continue
            logits, confidence = (values[name].numpy()[: len(ids)] for name in answers)
            leaves = (confidence >= threshold) | (k == len(self.thresholds))  # a NaN leaves at the end only
            gone, keep = ids[leaves], np.flatnonzero(~leaves)
            out.logits[gone], out.exit[gone], out.confidence[gone] = logits[leaves], k, confidence[leaves]
            if not len(keep):
                return
            if len(gone):
                ids, rows = ids[keep], np.resize(keep, fixed or len(keep))
                values = {t['name']: _select(values[t['name']], rows, t['rows']) for t in stage['live']}


def _select(value: ort.OrtValue, keep: np.ndarray, rows: int) -> ort.OrtValue:
    """The rows of samples `keep`: each owns `rows` consecutive ones, 0 if all share the tensor."""
    index = (keep[:, None] * rows + np.arange(rows)).ravel()
    return ort.OrtValue.ortvalue_from_numpy(np.from_dlpack(value).take(index, axis=0)) if rows else value


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Classifies images with the exported cascade of this folder.')
    parser.add_argument('images', nargs='+')
    parser.add_argument('--max-drop', type=float, help='accuracy that may be given up; 0.01 is one percentage point')
    args, cascade = parser.parse_args(), Cascade(Path(__file__).parent)
    from PIL import Image

    if args.max_drop is not None:
        cascade.set_max_drop(args.max_drop)
    spent = np.cumsum([stage['macs'] for stage in cascade.stages]) / cascade.manifest['backbone_macs']
    for path in args.images:
        x, begin = cascade.preprocess(Image.open(path))[None], time.perf_counter()
        answer = cascade.predict(x)
        took, best, at = time.perf_counter() - begin, int(answer.logits[0].argmax()), int(answer.exit[0])
        label = (cascade.manifest['label_names'] or {best: f'class {best}'})[best]
        print(f'{path}: {label}, confidence {answer.confidence[0]:.3f}, exit {at}, {1e3 * took:.1f} ms', end=', ')
        print(f'{100 * (1 - spent[at]):.0f} % of MACs saved')
