"""Runs a script with `cascade_*` names registered, without changes to the script.

python -m timm_cascade.run validate.py --model cascade_resnet50 ...
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import timm_cascade  # noqa: F401  registers the models


def main() -> None:
    """Runs the script named by the first argument, with the remaining arguments as its own."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        given = f'{sys.argv[1]} is not a file' if sys.argv[1:] else 'no script was given'
        sys.exit(f'python -m timm_cascade.run SCRIPT [ARGUMENTS]: {given}.')
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as python itself does for a script
    runpy.run_path(sys.argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
