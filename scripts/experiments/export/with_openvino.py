"""Runs the stage files of an exported folder with OpenVINO, and compares every exit with what its runner.py gives.

pip install openvino onnxruntime numpy
python scripts/experiments/export/with_openvino.py FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

IMAGES = (5, 1)


def load_runner(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location('exported_runner', folder / 'runner.py')
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules['exported_runner'] = module
    spec.loader.exec_module(module)
    return module.Cascade(folder)


def main() -> None:
    import openvino

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path)
    args = parser.parse_args()
    cascade = load_runner(args.folder)
    core = openvino.Core()
    exact = {'INFERENCE_PRECISION_HINT': 'f32'}  # by default it may compute in bfloat16
    compiled = [core.compile_model(args.folder / stage['file'], 'CPU', exact) for stage in cascade.stages]
    exits, worst = len(cascade.thresholds), 0.0
    for n in IMAGES:
        images = np.random.default_rng(n).standard_normal((n, *cascade.manifest['preprocessing']['input_size']))
        values: dict[str, Any] = {'images': images.astype(np.float32)}
        for k, (stage, model) in enumerate(zip(cascade.stages, compiled, strict=True)):
            found = model({name: values[name] for name in stage['inputs']})
            values |= {name: found[name] for name in stage['outputs']}
            cascade.set_thresholds([0.0 if i == k else None for i in range(exits)])
            want = cascade.predict(values['images'])
            error = np.abs(found['logits'] - want.logits).max() / want.logits.std()
            worst = max(worst, float(error), float(np.abs(found['confidence'] - want.confidence).max()))
    print(f'OpenVINO {openvino.__version__.split("-")[0]} reads {len(compiled)} stages of', end=' ')
    print(f'{cascade.manifest["architecture"]} (opset {cascade.manifest["opset"]}); batches of {IMAGES} images differ')
    print(f"from onnxruntime by at most {worst:.1e} of the logits' deviation, at every exit")
    if worst > 1e-3:
        raise SystemExit('that is more than rounding')


if __name__ == '__main__':
    main()
