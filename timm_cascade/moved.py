"""Modules of version 0.1 that stand elsewhere now: importing one says where."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

__all__ = ['MOVED']

MOVED = {
    f'timm_cascade.{old}': f'timm_cascade.{new}'.rstrip('.')
    for old, new in {
        'calibration': 'measure.calibrate',
        'compiled': 'inference.compiled',
        'evaluation': 'measure.evaluate',
        'profiling': 'measure.profile',
        'routing': 'inference.batch',
        'stages': 'inference.graph',
        'stream': 'inference.stream',
        'files': 'utils.files',
        'hub.errors': 'errors',
        'hub.loading': 'hub',
        'hub.published': 'hub.pretrained',
        'hub.releases': 'hub',
        'thresholds.certified': 'thresholds',
        'thresholds.errors': 'errors',
        'thresholds.joint': 'thresholds',
        'thresholds.profile': 'thresholds',
        'thresholds.routing': 'thresholds',
    }.items()
}


class _Moved(MetaPathFinder):
    """The last finder: it is asked only for what no other one found."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MOVED:
            raise ModuleNotFoundError(  # without name=: `from timm_cascade import ...` would swallow it
                f'{fullname} is a module of version 0.1; its public names are in {MOVED[fullname]} now. What most '
                f'programs need (train_heads, calibrate, evaluate, profile, load, save and the errors) is in '
                f'timm_cascade itself.'
            )
        return None


if not any(type(finder).__name__ == '_Moved' for finder in sys.meta_path):
    sys.meta_path.append(_Moved())
