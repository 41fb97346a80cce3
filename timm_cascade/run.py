"""Runs a script that knows nothing of cascades with `cascade_*` names registered.

python -m timm_cascade.run validate.py --model cascade_resnet50 ...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import timm_cascade  # noqa: F401  registers the models


def main() -> None:
    """Runs the script named by the first argument, which sees the others as its own."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit(f'python -m timm_cascade.run SCRIPT [ARGUMENTS]: {sys.argv[1:2] or "no script"} is not a file')
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as python itself does for a script
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
