"""What a training keeps in its work_dir: the state to continue from, and a log with one line per epoch."""

from __future__ import annotations

import hashlib
import json
import logging
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..utils.distributed import on_main
from ..utils.files import replacing, write_text
from ..utils.progress import progress

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['WorkDir']

_logger = logging.getLogger(__name__)


class WorkDir:
    """State and log of one training, `NAME.pt` and `NAME.jsonl`; the main process writes, all of them read.

    Args:
        folder: The work_dir; None writes nothing.
        name: Which training it is, such as `heads`.
        accelerator: Tells the main process from the others.
        settings: Everything that the result depends on; a state of other settings is not continued.
    """

    def __init__(self, folder: Path | None, name: str, accelerator: Accelerator, settings: list[Any]) -> None:
        self.name, self.accelerator = name, accelerator
        self.state = None if folder is None else folder / f'{name}.pt'
        self.log = None if folder is None else folder / f'{name}.jsonl'
        settings = [*settings, accelerator.num_processes, str(accelerator.mixed_precision)]
        self.key = hashlib.sha256(json.dumps(settings, default=str).encode()).hexdigest()

    def load(self) -> dict[str, Any] | None:
        """The state after the last epoch of a training of the same settings; the accelerator gets its loss scale."""
        state = self.state
        if state is None or not on_main(self.accelerator, state.is_file):
            return None
        try:
            saved = torch.load(state, map_location='cpu', weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as e:
            raise ValueError(
                f'{state} cannot be read ({e}). Remove it; the training then starts from the first epoch.'
            ) from e
        if not isinstance(saved, dict) or saved.get('key') != self.key:
            if self.accelerator.is_main_process:
                _logger.warning(
                    '%s belongs to a training with other settings, data or processes; starting from the first epoch',
                    state,
                )
            return None
        if self.accelerator.is_main_process:
            _logger.info('continuing after epoch %d, from %s', len(saved['history']), state)
            self._write_log(saved['history'])  # a process killed between the two files left it one line short
        if self.accelerator.scaler and saved['scaler']:
            self.accelerator.scaler.load_state_dict(saved['scaler'])
        return saved

    def run(
        self,
        history: list[dict[str, Any]],
        epochs: int,
        steps: int,
        epoch: Callable[[Any], dict[str, Any]],
        state: Callable[[], dict[str, Any]],
    ) -> None:
        """Runs the epochs that `history` lacks; state and log are replaced after each.

        `epoch` runs one, moves the progress bar by one at each of its `steps`, and returns a line with its number, loss
        and accuracy. `state` returns what `load` has to give a training that continues.
        """
        main = self.accelerator.is_main_process
        with progress(None, self.name, main, total=epochs * steps, initial=len(history) * steps) as bar:
            while len(history) < epochs:
                began = time.monotonic()
                line = epoch(bar)
                line['seconds'] = round(time.monotonic() - began, 2)
                history.append(line)
                self.save(history, **state())
                _track(self.accelerator, line)
                shown = line.get('accuracy', line.get('train_accuracy'))
                accuracy = ' '.join(f'{a:.1%}' for a in (shown if isinstance(shown, list) else [shown]))
                bar.set_postfix_str(f'loss {line["loss"]:.3f}, accuracy {accuracy}')

    def save(self, history: list[dict[str, Any]], **parts: Any) -> None:
        """Replaces state and log by those after the last epoch of `history`, the accelerator's loss scale included."""
        if self.state is None or self.log is None or not self.accelerator.is_main_process:
            return
        for file in self.state.parent.glob(f'.{self.state.name}.*.tmp'):  # of a process that was killed while writing
            file.unlink()
        scaler = self.accelerator.scaler
        state = dict(key=self.key, history=history, scaler=scaler.state_dict() if scaler else None, **parts)
        with replacing(self.state) as temporary:
            torch.save(state, temporary)
        self._write_log(history)

    def _write_log(self, history: list[dict[str, Any]]) -> None:
        assert self.log is not None
        write_text(self.log, ''.join(json.dumps(line) + '\n' for line in history))


def _track(accelerator: Accelerator, line: dict[str, Any]) -> None:
    """Hands a line of the log to Accelerate's trackers, one number per name."""
    flat: dict[str, Any] = {}
    for name, value in line.items():
        flat |= {f'{name}/exit_{i}': v for i, v in enumerate(value)} if isinstance(value, list) else {name: value}
    accelerator.log(flat, step=line['epoch'])
