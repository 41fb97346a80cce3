"""Runs this folder's cascade with numpy and onnxruntime: python runner.py image.jpg --max-drop 0.01 (needs PIL too)."""

import argparse
import hashlib
import json
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

# what is read of cascade.json: a value, a type, {key: what it holds}, [what each item is], or (one, of, several)
NULL, NUMBER, LIMIT, TENSOR = type(None), (int, float), (int, float, type(None)), dict(name=str, rows=int)
STAGE = dict(file=str, sha256=str, inputs=[str], outputs=[str], live=[TENSOR], cuts=[int], macs=NUMBER)
IMAGE = dict(input_size=[int], mean=[NUMBER], std=[NUMBER], crop_pct=NUMBER, crop_mode=str, interpolation=str)
POINT = dict(rule=str, reference=str, max_drop=LIMIT, level=LIMIT, cost=NUMBER, thresholds=[LIMIT])
FORM = dict(format='timm-cascade-export', format_version=1, kind='onnx', stages=[STAGE], preprocessing=IMAGE, others={})
FORM |= dict(num_classes=int, label_names=([str], NULL), batch_size=(int, NULL), backbone_macs=NUMBER, precision=str)
FORM |= dict(thresholds=[LIMIT], table=(dict(points=[POINT], provenance={}), NULL), table_precision=(str, NULL))
Output = namedtuple('Output', 'logits exit confidence')  # (N, C) float32, (N,) whole numbers, (N,) float32


class Cascade:
    """The stages in `folder`; samples leave between them. `threads` and `providers` are onnxruntime's."""

    def __init__(self, folder: str | Path, threads: int = 0, providers: tuple[Any, ...] = ('CPUExecutionProvider',)):
        try:
            self.manifest: dict[str, Any] = json.loads((Path(folder) / 'cascade.json').read_text(encoding='utf-8'))
            _check(self.manifest, FORM)
            stages, p = self.manifest['stages'], self.manifest['preprocessing']
            for before, stage in zip([dict(live=[dict(name='images')]), *stages], stages, strict=False):
                if lost := {*stage['inputs']} - {tensor['name'] for tensor in before['live']}:
                    raise ValueError(f'{stage["file"]} reads {min(lost)!r}, which the stage before does not hand on')
            size, mean, std = p['input_size'], p['mean'], p['std']
            if len(size) != 3 or min(*size, *std, p['crop_pct']) <= 0 or not {len(mean), len(std)} <= {1, size[0]}:
                raise ValueError(f'preprocessing is {p}, expected positive (C, H, W), and 1 or C means and stds')
        except ValueError as e:
            raise ValueError(f'{folder}/cascade.json cannot be used: {e}. Copy the folder again, or export it.') from e
        self.folder, self.stages, self._sessions = Path(folder), self.manifest['stages'], dict[tuple[int, int], Any]()
        self._single_hash = (self.folder / 'cascade.onnx').is_file() and self.manifest['others'].get('cascade.onnx')
        self._settings, self._single = (ort.SessionOptions(), list(providers)), list[Any]()
        self._settings[0].intra_op_num_threads, self._settings[0].log_severity_level = threads, 3
        self.set_thresholds(self.manifest['thresholds'])

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
            data = files[stages[0]['file']] if len(stages) == 1 else _join(stages, files)
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
        """A file, or a PIL image, to (C, H, W) float32, as timm's evaluation transform makes it."""
        from PIL import Image, ImageOps

        p, image = self.manifest['preprocessing'], image if hasattr(image, 'convert') else Image.open(image)
        image = ImageOps.exif_transpose(image) if image.format else image  # from a file
        if image.mode[:2] == 'I;':  # 16 bits, which Pillow would cut off at 255
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).astype(np.uint8))
        elif image.mode in ('I', 'F'):
            raise ValueError(f'the image has 32 bits per pixel (mode {image.mode}); bring it to 8 or 16 bits first.')
        (channels, height, width), size = p['input_size'], (image.height, image.width)
        scale = [int(side / p['crop_pct']) for side in (height, width)]
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
            values = {'images': some if len(some) == step else np.resize(some, (step, *size))}
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


def _check(value: Any, form: Any, place: str = '') -> None:
    """Raises ValueError where a value from JSON does not have the form."""
    forms = {f if isinstance(f, type) else type(f): f for f in (form if isinstance(form, tuple) else (form,))}
    found: Any = forms.get(type(value))
    if type(value) not in forms or (isinstance(found, (str, int)) and value != found):
        wanted = ' or '.join(repr(f) if isinstance(f, (str, int)) else kind.__name__ for kind, f in forms.items())
        raise ValueError(f'{place or "it"} is {"missing" if value is ... else repr(value)[:80]}, expected {wanted}')
    for key in found if isinstance(found, dict) else range(len(value)) if isinstance(found, list) else ():
        item, inner = (value[key], found[0]) if isinstance(found, list) else (value.get(key, ...), found[key])
        _check(item, inner, f'{place}.{key}'.lstrip('.'))


def _join(stages: list[Any], files: dict[str, bytes]) -> bytes:
    """One ONNX file of several stages, with the last one's head: a graph's parts may be put together as bytes."""
    inputs, outputs, bodies = dict[str, bytes](), dict[str, bytes](), list[bytes]()
    for stage, data in zip(stages, files.values(), strict=True):
        cuts, n = stage['cuts'], len(stage['inputs'])
        parts = [data[a:b] for a, b in zip(cuts[1:], [*cuts[2:], None], strict=True)]
        inputs |= {name: part for name, part in zip(stage['inputs'], parts[:n], strict=True) if name not in outputs}
        outputs |= zip(stage['outputs'], parts[n + 2 : -1], strict=True)
        bodies.append(parts[n])
    live = [outputs[tensor['name']] for tensor in stages[-1]['live'] if tensor['name'] in outputs]
    graph = b''.join([*inputs.values(), *bodies, parts[n + 1], *live, parts[-1]])
    length = [*(len(graph) >> shift & 127 | 128 for shift in (0, 7, 14, 21)), len(graph) >> 28]  # as protobuf has it
    return data[: cuts[0]] + bytes([0x3A, *length]) + graph


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description='Classifies images with the exported cascade of this folder.')
    parser.add_argument('images', nargs='+')
    parser.add_argument('--max-drop', type=float, help='accuracy that may be given up; 0.01 is one percentage point')
    try:
        args, cascade = parser.parse_args(), Cascade(Path(__file__).parent)
        names = dict(enumerate(cascade.manifest['label_names'] or ()))
        if args.max_drop is not None:
            cascade.set_max_drop(args.max_drop)
        for path in args.images:
            logits, (at,), (sure,) = cascade.predict(cascade.preprocess(path)[None])
            spent = sum(s['macs'] for s in cascade.stages[: at + 1]) / cascade.manifest['backbone_macs']
            label = names.get(best := int(logits.argmax()), f'class {best}')
            print(f'{path}: {label}, confidence {sure:.3f}, exit {at}, {spent:.0%} of all MACs')
    except (ImportError, OSError, ValueError) as e:
        parser.error(str(e))
