"""The CIFAR ResNets of the cascade paper, as ordinary timm models.

He et al. 2016 (arXiv 1512.03385), section 4.2: 6n+2 layers, three groups of n basic blocks with 16, 32 and 64
channels, shortcuts without parameters. Berestizshevsky & Even 2019 (arXiv 1805.10982) build CI-ResNet(n) on it;
as in their code the shortcut that halves the resolution is an average pool, padded with zero channels.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import create_classifier
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from timm.models._manipulate import checkpoint_seq
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

from ..utils.timm_models import keep_args

__all__ = ['CifarResNet']


class PadShortcut(nn.Module):
    """(N, C, H, W) to (N, out_chans, ceil(H/stride), ceil(W/stride)), without parameters."""

    def __init__(self, out_chans: int, stride: int) -> None:
        super().__init__()
        self.out_chans = out_chans
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        if self.stride > 1:
            x = F.avg_pool2d(x, self.stride, ceil_mode=True, count_include_pad=False)
        return F.pad(x, (0, 0, 0, 0, 0, self.out_chans - x.shape[1]))


class CifarResNet(nn.Module):
    """ResNet for small images: a 3x3 stem at full resolution, then three groups of `depth` basic blocks.

    Args:
        depth: Blocks in each group (n of 6n+2).
        width: Channels of the first group; each group after it has twice as many.
        num_classes: Outputs of the classifier, 0 for none.
        in_chans: Channels of the input images.
        global_pool: Pooling before the classifier.
        drop_rate: Dropout before the classifier.
    """

    def __init__(
        self,
        depth: int,
        width: int = 16,
        num_classes: int = 10,
        in_chans: int = 3,
        global_pool: str = 'avg',
        drop_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__()
        # only what is given: timm's blocks take neither before 1.0.23
        dd = {k: v for k, v in dict(device=device, dtype=dtype).items() if v is not None}
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate
        self.grad_checkpointing = False

        chans = width
        self.conv1 = nn.Conv2d(in_chans, chans, 3, padding=1, bias=False, **dd)
        self.bn1 = nn.BatchNorm2d(chans, **dd)
        self.act1 = nn.ReLU(inplace=True)
        self.feature_info: list[dict[str, Any]] = [dict(num_chs=chans, reduction=1, module='act1')]
        for i, (out_chans, stride) in enumerate(((width, 1), (2 * width, 2), (4 * width, 2)), start=1):
            blocks = []
            for b in range(depth):
                s = stride if b == 0 else 1
                shortcut = PadShortcut(out_chans, s) if s > 1 or chans != out_chans else None
                blocks.append(BasicBlock(chans, out_chans, stride=s, downsample=shortcut, **dd))
                chans = out_chans
            self.add_module(f'layer{i}', nn.Sequential(*blocks))
            self.feature_info.append(dict(num_chs=out_chans, reduction=2 ** (i - 1), module=f'layer{i}'))

        self.num_features = chans
        self.global_pool, self.fc = create_classifier(chans, num_classes, pool_type=global_pool, **dd)
        self.head_hidden_size = chans * self.global_pool.feat_mult()
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode='fan_out', nonlinearity='relu')

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        return dict(stem=r'^conv1|bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        self.num_classes = num_classes
        self.global_pool, self.fc = create_classifier(
            self.num_features, num_classes, pool_type=global_pool or self.global_pool.pool_type
        )
        self.fc.to(self.conv1.weight)  # its device and dtype
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()
        self.fc.train(self.training)

    def _groups(self) -> list[nn.Sequential]:
        return [getattr(self, info['module']) for info in self.feature_info[1:]]

    def _run(self, group: nn.Sequential, x: Tensor) -> Tensor:
        return checkpoint_seq(group, x) if self.grad_checkpointing and not torch.jit.is_scripting() else group(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        assert output_fmt == 'NCHW', 'Output shape must be NCHW.'
        take_indices, max_index = feature_take_indices(len(self.feature_info), indices)
        x = self.act1(self.bn1(self.conv1(x)))
        intermediates = [x] if 0 in take_indices else []
        groups = self._groups()
        for i, group in enumerate(groups[:max_index] if stop_early else groups, start=1):
            x = self._run(group, x)
            if i in take_indices:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def forward_features(self, x: Tensor) -> Tensor:
        x = self.act1(self.bn1(self.conv1(x)))
        for group in self._groups():
            x = self._run(group, x)
        return x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))


_cfg = dict(
    num_classes=10,
    input_size=(3, 32, 32),
    pool_size=(8, 8),
    crop_pct=1.0,
    interpolation='bilinear',
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    first_conv='conv1',
    classifier='fc',
    license='apache-2.0',
)
default_cfgs = generate_default_cfgs({f'cifar_resnet{layers}': dict(_cfg) for layers in (20, 32, 44, 56, 110)})


def _create_cifar_resnet(variant: str, pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    depth = (int(variant.removeprefix('cifar_resnet')) - 2) // 6
    model = build_model_with_cfg(CifarResNet, variant, pretrained, **dict(dict(depth=depth), **kwargs))
    keep_args(model, kwargs)
    return model


@register_model
def cifar_resnet20(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-20 for small images, 0.27 M parameters."""
    return _create_cifar_resnet('cifar_resnet20', pretrained, **kwargs)


@register_model
def cifar_resnet32(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-32 for small images."""
    return _create_cifar_resnet('cifar_resnet32', pretrained, **kwargs)


@register_model
def cifar_resnet44(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-44 for small images."""
    return _create_cifar_resnet('cifar_resnet44', pretrained, **kwargs)


@register_model
def cifar_resnet56(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-56 for small images."""
    return _create_cifar_resnet('cifar_resnet56', pretrained, **kwargs)


@register_model
def cifar_resnet110(pretrained: bool = False, **kwargs: Any) -> CifarResNet:
    """ResNet-110 for small images, the backbone of the paper's CI-ResNet(18)."""
    return _create_cifar_resnet('cifar_resnet110', pretrained, **kwargs)
