"""Runs this folder's cascade with numpy and onnxruntime: python runner.py image.jpg --max-drop 0.01 (needs PIL too)."""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

Output = NamedTuple('Output', [('logits', np.ndarray), ('exit', np.ndarray), ('confidence', np.ndarray)])  # noqa: UP014


class Entry(dict[str, Any]):
    def __missing__(self, key: str) -> Any:
        raise ValueError(f'cascade.json is not as it was exported: no {key!r} beside {", ".join(self) or "nothing"}')


class Cascade:
    """The stages in `folder`; samples leave between them. `threads` and `providers` are onnxruntime's."""

    def __init__(self, folder: str | Path, threads: int = 0, providers: tuple[Any, ...] = ('CPUExecutionProvider',)):
        try:
            self.manifest = json.loads((Path(folder) / 'cascade.json').read_text(encoding='utf-8'), object_hook=Entry)
            if [self.manifest[k] for k in ('format', 'format_version', 'kind')] != ['timm-cascade-export', 1, 'onnx']:
                raise TypeError('it is not an ONNX export of format version 1, which this runner can read')
            self.folder, self.stages, self._sessions = Path(folder), self.manifest['stages'], dict[Any, Any]()
            self._single_hash = (self.folder / 'cascade.onnx').is_file() and self.manifest['others'].get('cascade.onnx')
            self._settings, self._single = (ort.SessionOptions(), list(providers)), list[Any]()
            self._settings[0].intra_op_num_threads, self._settings[0].log_severity_level = threads, 3
            self.set_thresholds(self.manifest['thresholds'])
        except (TypeError, AttributeError, ValueError) as e:
            raise ValueError(f'{folder}/cascade.json: {e} (copy the folder again, or export it)') from e

    def set_thresholds(self, values: list[float | None] | np.ndarray) -> None:
        """(M,) confidences from which samples leave; None or inf closes an exit, which then costs nothing."""
        found = np.array([np.inf if v is None else v for v in values], np.float32)
        if found.shape != (len(self.stages) - 1,) or np.isnan(found).any():
            raise ValueError(f'thresholds {list(values)}: expected {len(self.stages) - 1} numbers, None for closed.')
        ends = [k for k, s in enumerate(self.stages) if k == len(found) or found[k] < np.inf or not s['cuts']]
        runs = zip([0, *(k + 1 for k in ends)], ends, strict=False)  # of stages without an open exit in between
        self._sessions = {(a, b): self._sessions.get((a, b)) or self.session(self.stages[a : b + 1]) for a, b in runs}
        self.thresholds = found

    def session(self, stages: list[dict[str, Any]]) -> ort.InferenceSession:
        """Stages that follow each other as one; its last two outputs are logits (N, C) and confidence (N,)."""
        files = {s['file']: (self.folder / Path(s['file']).name).read_bytes() for s in stages}
        if damaged := [s['file'] for s in stages if hashlib.sha256(files[s['file']]).hexdigest() != s['sha256']]:
            raise ValueError(f'{self.folder}/{damaged[0]} is damaged or another file: cascade.json has another sha256.')
        try:
            data = _join(stages, files) if stages[1:] else files[stages[0]['file']]
            return ort.InferenceSession(data, *self._settings)
        except Exception as e:
            raise ValueError(f'onnxruntime {ort.__version__} cannot load {stages[0]["file"]}: {e}') from e

    def set_max_drop(self, max_drop: float, rule: str = 'certified', level: float = 0.9) -> dict[str, Any]:
        """Sets the thresholds of the table's point with the largest max_drop up to this one, and returns the point."""
        table, precision, measured = (self.manifest[key] for key in ('table', 'precision', 'table_precision'))
        if table is None or measured != precision:  # thresholds of one precision do not serve another
            raise ValueError(f'no table for {precision}, only {measured}: timm-cascade calibrate FOLDER --data DATA.')
        kind = rule, 'labels' if table['provenance'].get('labelled', True) else 'backbone'
        points = [p for p in table['points'] if (p['rule'], p['reference']) == kind and (p['level'] or level) >= level]
        if not (allowed := [p for p in points if p['max_drop'] is not None and p['max_drop'] <= max_drop <= 1]):
            raise ValueError(f'no {rule} point for max_drop {max_drop}; there are {[p["max_drop"] for p in points]}.')
        point = max(allowed, key=lambda p: (p.get('scope') != 'setting', p['max_drop'], -(p['level'] or 0), -p['cost']))
        self.set_thresholds(point['thresholds'])
        return point

    def preprocess(self, image: Any) -> np.ndarray:
        """A file, or a PIL image (of 16 bits, too), to (C, H, W) float32, as timm's evaluation transform makes it."""
        from PIL import Image, ImageOps

        image = ImageOps.exif_transpose(image if hasattr(image, 'convert') else Image.open(image))
        image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8)) if image.mode[:2] == 'I;' else image
        channels, height, width = (p := self.manifest['preprocessing'])['input_size']
        size, scale = image.size[::-1], [int(side / p['crop_pct']) for side in (height, width)]
        if p['crop_mode'] == 'center' and scale[0] == scale[1]:
            scale = [scale[0] if side == min(size) else int(scale[0] * side / min(size)) for side in size]
        elif p['crop_mode'] != 'squash':
            ratio = (max if p['crop_mode'] == 'border' else min)(size[0] / scale[0], size[1] / scale[1])
            scale = [round(side / ratio) for side in size]
        method = getattr(Image.Resampling, p['interpolation'].upper(), Image.Resampling.BILINEAR)
        image = image.convert('L' if channels == 1 else 'RGB').resize((scale[1], scale[0]), method)
        border = tuple(round(255 * v) if p['crop_mode'] == 'border' else 0 for v in (p['mean'] * channels)[:channels])
        canvas = Image.new(image.mode, (width, height), border)
        canvas.paste(image, (-round((scale[1] - width) / 2), -round((scale[0] - height) / 2)))
        pixels = np.asarray(canvas, np.float32).reshape(height, width, channels) / np.float32(255)
        return np.ascontiguousarray(((pixels - np.float32(p['mean'])) / np.float32(p['std'])).transpose(2, 0, 1))

    def predict(self, images: np.ndarray) -> Output:
        """Logits (N, C), exit (N,) and confidence (N,) of preprocessed images (N, C, H, W) float32, in their order."""
        n, fixed, size = len(images), self.manifest['batch_size'], tuple(self.manifest['preprocessing']['input_size'])
        if images.dtype != np.float32 or images.shape[1:] != size:
            raise ValueError(f'images are {images.dtype} {images.shape}; expected float32 (N, {str(size)[1:-1]}).')
        if n == 1 and self._single_hash and len(self._sessions) == len(self.stages):  # all exits are open: one call
            self._single = self._single or [self.session([dict(file='cascade.onnx', sha256=self._single_hash)])]
            return Output(*self._single[0].run(None, {'images': images, 'thresholds': self.thresholds}))
        out = Output(np.empty((n, self.manifest['num_classes']), np.float32), np.empty(n, int), np.empty(n, np.float32))
        for start in range(0, n, step := fixed or max(n, 1)):
            ids, some = np.arange(start, min(start + step, n)), images[start : start + step]
            values = Entry(images=some if len(some) == step else np.resize(some, (step, *size)))
            for (_, k), session in self._sessions.items():
                found = session.run(None, {value.name: values[value.name] for value in session.get_inputs()})
                logits, confidence, final = found[-2][: len(ids)], found[-1][: len(ids)], k == len(self.thresholds)
                if len(ids) == n and (final or confidence.min() >= self.thresholds[k]):
                    return Output(logits, np.full(n, k), confidence)
                values.update(zip((value.name for value in session.get_outputs()), found, strict=True))
                if final or not confidence.max() < self.thresholds[k]:  # a NaN leaves in the end
                    leaves = np.full(len(ids), True) if final else confidence >= self.thresholds[k]
                    gone, keep = ids[leaves], np.flatnonzero(~leaves)
                    out.logits[gone], out.exit[gone], out.confidence[gone] = logits[leaves], k, confidence[leaves]
                    if not len(keep):
                        break
                    ids, rows = ids[keep], np.resize(keep, fixed or len(keep))
                    for name, r in ((t['name'], t['rows']) for t in self.stages[k]['live'] if t['rows']):
                        values[name] = values[name][(rows[:, None] * r + np.arange(r)).ravel()]  # r rows per sample
        return out


def _join(stages: list[Any], files: dict[str, bytes]) -> bytes:
    """One ONNX file of several stages, with the last one's head: a graph's parts may be put together as bytes."""
    ins, outs, nodes = dict[str, bytes](), dict[str, bytes](), list[bytes]()
    for stage, data in zip(stages, files.values(), strict=True):
        cuts, n = stage['cuts'], len(stage['inputs'])
        part = [data[a:b] for a, b in zip(cuts[1:], [*cuts[2:], None], strict=True)]
        ins |= {name: value for name, value in zip(stage['inputs'], part[:n], strict=True) if name not in outs}
        outs |= zip(stage['outputs'], part[n + 2 : -1], strict=True)
        nodes.append(part[n])
    graph = b''.join([*ins.values(), *nodes, part[n + 1], *(outs.get(t['name'], b'') for t in stage['live']), part[-1]])
    length = [*(len(graph) >> shift & 127 | 128 for shift in (0, 7, 14, 21)), len(graph) >> 28]  # as protobuf has it
    return data[: cuts[0]] + bytes([0x3A, *length]) + graph


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Classifies images with the exported cascade of this folder.')
    parser.add_argument('images', nargs='+')
    parser.add_argument('--max-drop', type=float, help='accuracy that may be given up; 0.01 is one percentage point')
    try:
        args, cascade = parser.parse_args(), Cascade(Path(__file__).parent)
        labels = cascade.manifest['label_names'] or [f'class {i}' for i in range(cascade.manifest['num_classes'])]
        if args.max_drop is not None:
            cascade.set_max_drop(args.max_drop)
        for path in args.images:
            logits, (at,), (sure,) = cascade.predict(cascade.preprocess(path)[None])
            spent = sum(s['macs'] for s in cascade.stages[: at + 1]) / cascade.manifest['backbone_macs']
            print(f'{path}: {labels[logits.argmax()]}, confidence {sure:.3f}, exit {at}, {spent:.0%} of all MACs')
    except (ImportError, OSError, ValueError) as e:
        parser.error(str(e))
