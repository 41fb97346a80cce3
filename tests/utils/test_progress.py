import io
import sys

import datasets
from huggingface_hub.utils import are_progress_bars_disabled

from timm_cascade.utils.progress import bars_on_terminal_only, progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_on_a_terminal_and_not_in_a_pipe(monkeypatch):
    for stream, shows in ((Terminal(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, 'stderr', stream)
        assert list(progress(range(3), 'counting', file=stream)) == [0, 1, 2]
        assert ('counting' in stream.getvalue()) is shows
    stream = Terminal()
    assert list(progress(range(3), 'counting', show=False, file=stream)) == [0, 1, 2] and not stream.getvalue()


def test_third_parties_are_silent_in_a_pipe_and_only_meanwhile(monkeypatch):
    def silent():
        return datasets.are_progress_bars_disabled(), are_progress_bars_disabled()

    datasets.enable_progress_bars()
    before = silent()
    monkeypatch.setattr(sys, 'stderr', io.StringIO())
    with bars_on_terminal_only():
        assert silent() == (True, True)
    assert silent() == before
    monkeypatch.setattr(sys, 'stderr', Terminal())
    with bars_on_terminal_only():
        assert silent() == before
