"""Passes of a model over the meta device: nothing is computed, no weight is touched or copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from ..errors import BackboneError
from ..utils.timm_models import fault_of

__all__ = ['PROBE_BATCH', 'backbone_macs', 'check_classifier', 'evaluating', 'meta_pass']

# images in a meta pass: a number that divides no other size of a network by accident
PROBE_BATCH = 11


# on the meta device torch runs these step by step, in Python
KEEPS_SHAPE = (F.batch_norm, F.layer_norm, F.group_norm, F.gelu, F.hardswish, F.hardsigmoid)


class _Shapes(TorchFunctionMode):
    """Norms and activations give a tensor like the one they are given."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in KEEPS_SHAPE:
            return torch.empty_like(args[0] if args else kwargs['input'])
        return func(*args, **(kwargs or {}))


class _Counter(TorchDispatchMode):
    """Floating-point operations, as torch's FlopCounterMode has them but for its account of every module."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, packet = kwargs or {}, getattr(func, '_overloadpacket', None)
        if packet is not None and packet not in flop_registry:
            with self:
                found = func.decompose(*args, **kwargs)
            if found is not NotImplemented:
                return found
        output = func(*args, **kwargs)
        if packet in flop_registry:
            self.total += int(flop_registry[packet](*args, **kwargs, out_val=output))
        return output


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode for a while; then each module is in the mode it was in."""
    modes = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _on_meta(model: nn.Module) -> Iterator[None]:
    """Replaces the tensors of all modules by meta tensors, for a while.

    torch.func.functional_call does not: for a module with two names it puts the meta tensors back.
    """
    lent: dict[Tensor, Tensor] = {}
    owned = [(m.__dict__, key, m.__dict__[key]) for m in model.modules() for key in ('_parameters', '_buffers')]
    # plain attributes are caches, such as the relative positions of ConViT before timm 1.0.31
    plain = [(vars(m), {k: v for k, v in vars(m).items() if isinstance(v, Tensor)}) for m in model.modules()]
    try:
        for attributes, caches in plain:
            attributes.update({k: torch.empty_like(v, device='meta') for k, v in caches.items()})
        for attributes, key, tensors in owned:
            attributes[key] = {
                name: t if t is None else lent.setdefault(t, torch.empty_like(t, device='meta'))
                for name, t in tensors.items()
            }
        yield
    finally:
        for attributes, caches in plain:
            attributes.update(caches)
        for attributes, key, tensors in owned:
            attributes[key] = tensors


def meta_pass(
    model: nn.Module, input_size: tuple[int, ...], hooks: Mapping[str, Callable[[int, Any], Any]], count: bool = True
) -> tuple[Any, int]:
    """Runs `model` on PROBE_BATCH meta images (or features) of `input_size`, with forward hooks on named modules.

    A hook is called as hook(macs of one image so far, output); what it returns, if not None, replaces the output.
    MACs are 0 unless `count`, which makes the pass slower.

    Returns:
        The model's output, and its MACs for one image; norms and activations count 0.

    Raises:
        BackboneError: A model that this version of torch cannot run on the meta device.
    """
    counter = _Counter() if count else None

    def macs() -> int:
        return counter.total // 2 // PROBE_BATCH if counter else 0

    def registered(hook: Callable) -> Callable:
        return lambda module, args, output: hook(macs(), output)

    handles = [model.get_submodule(name).register_forward_hook(registered(h)) for name, h in hooks.items()]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    images = torch.empty(PROBE_BATCH, *input_size, device='meta', dtype=dtype)
    try:
        with torch.no_grad(), evaluating(model), _on_meta(model), counter or nullcontext(), _Shapes():
            output = model(images)
        return output, macs()
    except RuntimeError as e:
        if 'scalarType' not in str(e):  # what torch 2.6 says of autocast(device_type='meta', enabled=False)
            raise
        raise BackboneError(
            f'{_name_of(model)} switches autocast off for a part of it, which torch {torch.__version__} cannot do on '
            f'the meta device, where costs are counted. Upgrade torch.'
        ) from e
    finally:
        for handle in handles:
            handle.remove()


def backbone_macs(model: nn.Module, input_size: tuple[int, ...]) -> int:
    """MACs of one forward pass for one image (or the features) of `input_size`."""
    return meta_pass(model, input_size, {})[1]


def _name_of(model: nn.Module) -> str:
    return (getattr(model, 'pretrained_cfg', None) or {}).get('architecture') or type(model).__name__


def check_classifier(backbone: nn.Module, output: Any) -> None:
    """
    Raises:
        BackboneError: The output of a meta pass is not logits, or not of each image alone in this version of timm.
    """
    if (fault := fault_of(backbone)) is not None:
        raise BackboneError(f'{_name_of(backbone)} cannot become a cascade: {fault}')
    classes = getattr(backbone, 'num_classes', None)
    want = (PROBE_BATCH, classes) if classes else (PROBE_BATCH,)
    found = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
    # with num_classes=0 a classifier returns features; a model that can never have classes is not a classifier
    logits = isinstance(output, Tensor) and (output.ndim == 2 if classes else hasattr(backbone, 'reset_classifier'))
    if classes is None or not logits or found[: len(want)] != want:
        shape = ('N', *found[1:]) if isinstance(found, tuple) else found
        raise BackboneError(
            f'{_name_of(backbone)} is an encoder without a classifier: it returns {shape} where a cascade needs logits '
            f'(N, num_classes). Choose a model that classifies; timm often has the same encoder with a head.'
        )
