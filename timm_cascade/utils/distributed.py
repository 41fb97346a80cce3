"""On how many processes a training really runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ..errors import LaunchError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['check_launch', 'create_accelerator', 'on_main']

T = TypeVar('T')


def create_accelerator(**kwargs: Any) -> Accelerator:
    """An Accelerator for the launch at hand: gloo where several processes share a machine without a GPU.

    Args:
        **kwargs: Arguments of Accelerator.

    Raises:
        LaunchError: See check_launch.
        ValueError: `log_with` names a tracker that is not installed; Accelerate alone would go on without it.
    """
    from accelerate import Accelerator
    from accelerate.tracking import GeneralTracker, get_available_trackers

    trackers = kwargs.get('log_with') or []
    for tracker in trackers if isinstance(trackers, (list, tuple)) else [trackers]:
        if not isinstance(tracker, GeneralTracker) and str(tracker) not in map(str, get_available_trackers()):
            raise ValueError(
                f'the tracker {str(tracker)!r} is not installed or not known to Accelerate; available '
                f'are {sorted(map(str, get_available_trackers())) or "none"}. Install its package.'
            )
    if 'LOCAL_RANK' in os.environ and not torch.cuda.is_available():
        kwargs.setdefault('cpu', True)  # without it Accelerate leaves each process to itself
    accelerator = Accelerator(**kwargs)
    check_launch(accelerator)
    return accelerator


def check_launch(accelerator: Accelerator) -> None:
    """Refuses a launch that fell back to one process.

    Raises:
        LaunchError: The environment speaks of more processes than the accelerator knows.
    """
    known = accelerator.num_processes
    asked = int(os.environ.get('WORLD_SIZE', 1))
    if asked > known:
        raise LaunchError(
            f'this launch has {asked} processes, but each runs for itself ({known} known to Accelerate). '
            f'Without a GPU give Accelerator(cpu=True), or none.'
        )
    # `accelerate launch --cpu --num_processes N` starts one process, and says N nowhere; it only sets an address to
    # meet the others at, which a launch of one does without
    launched = {'ACCELERATE_MIXED_PRECISION', 'MASTER_ADDR'} <= set(os.environ) and 'LOCAL_RANK' not in os.environ
    if known == 1 and launched:
        raise LaunchError(
            'accelerate launch was asked for several processes but started one (it does so with --cpu). Use '
            '`torchrun --standalone --nproc_per_node N -m timm_cascade ...`, or `accelerate launch --multi_gpu '
            '--num_processes N --num_machines 1 --main_process_port 0 ...`, which runs N on a CPU too.'
        )


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Runs `work` on the main process; every process gets its result, or raises its error."""
    if accelerator.num_processes == 1:
        return work()
    from accelerate.utils import broadcast_object_list

    outcome: list[Any] = [None, None]
    if accelerator.is_main_process:
        try:
            outcome[0] = work()
        except Exception as e:
            outcome[1] = e
    outcome = broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
