"""On how many processes a training runs, and what these tell each other."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from ..errors import LaunchError

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['check_launch', 'create_accelerator', 'on_main', 'share_gradients', 'share_values', 'sum_over_processes']

T = TypeVar('T')


def create_accelerator(**kwargs: Any) -> Accelerator:
    """An Accelerator for the launch at hand: gloo where several processes share a machine without a GPU.

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


def sum_over_processes(accelerator: Accelerator, tensor: Tensor) -> Tensor:
    """The sum of a tensor that every process has, on its own device."""
    if accelerator.num_processes == 1:
        return tensor
    return accelerator.reduce(tensor.to(accelerator.device), 'sum').to(tensor.device)


def share_gradients(accelerator: Accelerator, module: nn.Module) -> None:
    """Sums the gradients of all processes, in one piece.

    DistributedDataParallel would split them differently after its first step, and so add in another order in a
    training that is continued.
    """
    if accelerator.num_processes == 1:
        return
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    total = accelerator.reduce(torch.cat([g.flatten() for g in gradients]), 'sum')
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def share_values(accelerator: Accelerator, tensors: Iterable[Tensor]) -> None:
    """Gives all processes the values that these tensors have on the main one."""
    if accelerator.num_processes > 1:
        from accelerate.utils import broadcast

        for tensor in tensors:
            tensor.copy_(broadcast(tensor.clone()))
