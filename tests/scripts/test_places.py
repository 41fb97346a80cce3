"""Every script starts from its place, and none hides an installed package of the same name."""

from __future__ import annotations

from helpers import ROOT

COMMANDS = """
demo.py datasets/emoji.py releases/release.py releases/publish.py
experiments/ablation experiments/benchmark experiments/coverage experiments/every_backbone experiments/fronts
""".split()
# as `python PLACE --help` runs it: the folder of the script stands first on the path
CODE = """
import os, runpy, sys
before = [p for p in sys.path if p != ROOT]
for place in PLACES:
    sys.path[:] = [place if os.path.isdir(place) else os.path.dirname(place), *before]
    sys.argv = [place, '--help']
    try:
        runpy.run_path(place, run_name='__main__')
    except SystemExit as end:
        assert not end.code, place
    else:
        raise AssertionError(f'{place} does not know --help')
import datasets
assert hasattr(datasets, 'load_dataset'), datasets
"""


def test_every_script_starts_and_the_package_datasets_is_the_installed_one(interpreter, tmp_path):
    places = [str(ROOT / 'scripts' / place) for place in COMMANDS]
    done = interpreter.run(f'ROOT, PLACES = {str(ROOT)!r}, {places}\n{CODE}', tmp_path, ours=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for place in COMMANDS:
        assert f'usage: {place.rpartition("/")[2]}' in done.stdout
