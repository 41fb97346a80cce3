"""A program that was written for version 0.1 works, or is told what to import."""

import importlib

import pytest

import timm_cascade
from timm_cascade.moved import MOVED


def test_names_of_the_package_itself_stay():
    from timm_cascade import CascadeModel, CascadeOutput, Report, StreamOutput, ThresholdTable, train_heads
    from timm_cascade.heads import ExitHead
    from timm_cascade.hub import ReleaseError, load
    from timm_cascade.thresholds import ThresholdError, certified, joint, per_exit
    from timm_cascade.training import train_heads as same

    assert same is train_heads and load is timm_cascade.load and issubclass(ReleaseError, ValueError)
    assert all((CascadeModel, CascadeOutput, Report, StreamOutput, ThresholdTable, ExitHead, ThresholdError))
    assert callable(certified) and callable(joint) and callable(per_exit)


@pytest.mark.parametrize('old', sorted(MOVED))
def test_a_moved_module_says_where_its_names_are(old):
    with pytest.raises(ModuleNotFoundError, match=f'its public names are in {MOVED[old]} now'):
        importlib.import_module(old)
    importlib.import_module(MOVED[old])


@pytest.mark.parametrize(
    'line',
    ['from timm_cascade.evaluation import evaluate', 'import timm_cascade.routing', 'from timm_cascade import stream'],
)
def test_so_does_every_form_of_import(line):
    with pytest.raises(ImportError, match=r'timm_cascade\.(measure\.evaluate|inference\.(batch|stream)) now'):
        exec(line)


def test_other_missing_modules_stay_python_s_own_errors():
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'timm_cascade\.nothing'"):
        importlib.import_module('timm_cascade.nothing')
    with pytest.raises(ImportError, match='cannot import name'):
        exec('from timm_cascade import nothing')


def test_what_the_package_exports_is_imported_when_it_is_asked_for():
    for name in timm_cascade.__all__:
        assert getattr(timm_cascade, name) is not None and name in dir(timm_cascade)
    assert set(timm_cascade._MODULES) <= set(timm_cascade.__all__)
    assert timm_cascade.thresholds.Calibration is timm_cascade.Calibration  # rooms, too, need no import of their own
    with pytest.raises(AttributeError, match="'timm_cascade' has no attribute 'nothing'"):
        timm_cascade.nothing  # noqa: B018
