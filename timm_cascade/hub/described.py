"""The model that a config.json describes, built on the meta device: what its weights file must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from ..backbone import ExitPoint, resolve_exits
from ..errors import ReleaseError
from ..heads import create_heads, head_configs
from ..utils.timm_models import on_meta
from .config import ReleaseConfig

__all__ = ['Plan', 'bounded', 'described_by', 'difference', 'plan', 'shared_memory']

MAX_TENSORS, MAX_MODULES, MAX_NUMBERS = 20_000, 100_000, 50_000_000_000  # timm's largest: 3 thousand, 18 billion


class Plan(NamedTuple):
    """What a config describes.

    Attributes:
        points: The exit points in the backbone.
        tensors: Names and meta tensors of the weights file, `backbone.*` and `heads.*`.
        shared: Groups of names that are one and the same tensor in the model.
    """

    points: Sequence[ExitPoint]
    tensors: dict[str, Tensor]
    shared: list[list[str]]


def plan(config: ReleaseConfig, source: str, size: int | None = None) -> Plan:
    """Builds the model that the config describes on the meta device, where a giant one costs nothing.

    The backbone of a release of heads only must not have more numbers than the published file has bytes (`size`); it
    is not built at all where the config asks for nothing but timm's own model.

    Args:
        config: A checked config.json.
        source: Name of the release, for messages.
        size: Bytes of the published weights; None where they are in the release, or not known.

    Raises:
        ReleaseError: The model cannot be built, or is larger than anything that timm has.
    """
    published, args = config.published, config.model_args
    cfg = {**config.pretrained_cfg, 'architecture': config.base}
    with described_by(source), bounded(size or MAX_NUMBERS), on_meta():
        backbone: Any = None
        if not (published and published.is_plain(config.backbone_args, config.num_classes, config.input_size)):
            backbone = timm.create_model(config.base, pretrained_cfg=cfg, **config.backbone_args)
        points = config.points if config.points is not None else resolve_exits(backbone, args['exits'])
        configs = head_configs(args['head'], points, config.num_classes) if points else []
        heads = create_heads(points, config.num_classes, configs)
    modules = {f'heads.{len(config.fronts) + i}': head for i, head in enumerate(heads)}
    if config.layout == 'full':
        modules['backbone'] = backbone
    with described_by(source), bounded(), on_meta():
        modules |= {f'heads.{k}.network': front.build() for k, front in config.stored_fronts.items()}
    tensors = {
        f'{g}.{name}': t for g, module in modules.items() for name, t in module.state_dict(keep_vars=True).items()
    }
    for k in range(len(config.fronts)):
        for name in ('scale', 'shift'):
            tensors[f'heads.{k}.{name}'] = torch.empty(config.input_size[0], 1, 1, device='meta')
    return Plan(points, tensors, _same(tensors, id))


def difference(state: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> str | None:
    """The first difference between tensors and those that a config describes; None if there is none."""
    for name in [*tensors, *(n for n in state if n not in tensors)]:
        if name not in tensors:
            return f'{name[:200]} is not part of the model that the config describes'
        if name not in state:
            return f'{name} is missing'
        mine, theirs = state[name], tensors[name]
        if tuple(mine.shape) != tuple(theirs.shape):
            return f'{name} is {tuple(mine.shape)}, not {tuple(theirs.shape)}'
        floats = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
        if mine.dtype != theirs.dtype and not (mine.dtype in floats and theirs.dtype in floats):
            return f'{name} holds {mine.dtype}, not {theirs.dtype}'
    return None


def shared_memory(state: Mapping[str, Tensor], wanted: Plan) -> str | None:
    """Tensors that share their memory and would not in a model that is loaded; None if there are none."""
    same = _same(state, lambda t: (t.untyped_storage().data_ptr(), str(t.device)))
    shared = [group for group in same if group not in wanted.shared]
    return f'{" and ".join(shared[0][:3])} share their memory; loaded, each would have its own' if shared else None


def _same(tensors: Mapping[str, Tensor], key: Any) -> list[list[str]]:
    pairs = sorted((key(t), name) for name, t in tensors.items() if t.numel())
    groups = [[name for _, name in group] for _, group in groupby(pairs, key=lambda pair: pair[0])]
    return sorted(group for group in groups if len(group) > 1)


@contextmanager
def described_by(source: str) -> Iterator[None]:
    """What goes wrong while a model is built goes back to the config that describes it."""
    try:
        yield
    except ReleaseError:
        raise
    except Exception as e:  # arguments from outside in a model's constructor: anything may come
        raise ReleaseError(
            f'{source}: the model that config.json and your arguments describe cannot be built, or does not fit its '
            f'weights: {type(e).__name__}: {e}'
        ) from e


@contextmanager
def bounded(most: int = MAX_NUMBERS) -> Iterator[None]:
    """Ends the building of a model with more than `most` numbers, or of a size that nothing in timm has.

    For as long as it lasts, every module that is built in this process is counted.
    """
    tensors = modules = numbers = 0

    def parameter(module: nn.Module, name: str, tensor: Tensor | None) -> None:
        nonlocal tensors, numbers
        tensors += 1
        numbers += tensor.numel() if tensor is not None else 0
        check()

    def child(module: nn.Module, name: str, submodule: nn.Module | None) -> None:
        nonlocal modules
        modules += 1
        check()

    def check() -> None:
        if tensors > MAX_TENSORS or modules > MAX_MODULES or numbers > most:
            raise ReleaseError(
                f'config.json describes a model with more than {MAX_TENSORS:,} tensors, {MAX_MODULES:,} modules or '
                f'{most:,} numbers; it is not built.'
            )

    handles = [
        torch_module.register_module_parameter_registration_hook(parameter),
        torch_module.register_module_module_registration_hook(child),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
