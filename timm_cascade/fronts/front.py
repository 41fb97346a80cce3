"""A whole network as the head of an exit that reads the images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..backbone import backbone_macs, input_size_of
from ..utils.digest import state_digest
from ..utils.timm_models import resolve_input_data_config

__all__ = ['Front']

SHARED = 'the backbone'  # in place of a digest, where the weights are the backbone's


class Front(nn.Module):
    """Turns the cascade's images into those that a network was trained on, and classifies them with it.

    The images are the ones that the backbone reads: they are resized (antialiased) and normalised again on their
    device, so each image is decoded and cropped once. The network stays in evaluation mode; it is never trained here.

    Args:
        network: A timm classifier.
        backbone: The large network; its mean and standard deviation are undone.
        size: Height and width of the images that the network gets; by default those that it was made for.
        name: Where it comes from, for tables and messages; by default its architecture and tag.

    Attributes:
        name: With the size, such as `mobilenetv3_small_100.lamb_in1k@224`.
        shared: Whether the network is the backbone itself, whose weights are then not held twice.
        published: hub.pretrained.Published: the checkpoint that the network was loaded from, unadapted; None if none.
        run: What runs in place of the network once the cascade is compiled; None until then.

    Example:
        >>> front = Front(timm.create_model('resnet18.a1_in1k', pretrained=True), backbone, size=(160, 160))
        >>> front(images).shape  # images as the backbone reads them
        torch.Size([8, 1000])
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self, network: nn.Module, backbone: nn.Module, size: tuple[int, int] | None = None, name: str | None = None
    ) -> None:
        super().__init__()
        own, outer = resolve_input_data_config(network), resolve_input_data_config(backbone)
        _, height, width = input_size_of(network)
        self.size = (height, width) if size is None else (int(size[0]), int(size[1]))
        self.name = f'{name or name_of(network)}@{shown(self.size)}'
        self.shared = network is backbone
        self._shared = (network,) if self.shared else ()  # in a tuple: the weights stay the backbone's alone
        if not self.shared:
            self.network = network
        self.num_classes = int(network.num_classes)  # type: ignore[arg-type]
        self.in_chans = input_size_of(network)[0]
        self.in_features = self.num_classes  # what is stored of an image while other heads are trained: its logits
        self.interpolation = 'bicubic' if own['interpolation'] in ('bicubic', 'lanczos') else 'bilinear'
        means, stds = ([tuple(map(float, c[key])) for c in (own, outer)] for key in ('mean', 'std'))
        self._scale = [b / a for a, b in zip(*stds, strict=True)]
        self._shift = [(b - a) / s for a, b, s in zip(*means, stds[0], strict=True)]
        self._same = means[0] == means[1] and stds[0] == stds[1]
        self.register_buffer('scale', torch.tensor(self._scale)[:, None, None])
        self.register_buffer('shift', torch.tensor(self._shift)[:, None, None])
        self.published: Any = None
        self.run: Callable[[Tensor], Tensor] | None = None

    @property
    def inner(self) -> nn.Module:
        """The network."""
        return next(iter(self._shared), None) or self.network

    def prepare(self, images: Tensor) -> Tensor:
        """Images (N, C, H, W) as the backbone reads them to images (N, C, h, w) as the network does."""
        # in single precision: half precision would round twice, and no CPU resizes in it
        x = images if images.dtype in (torch.float32, torch.float64) else images.float()
        if x.shape[-2:] != self.size:
            x = F.interpolate(x, self.size, mode=self.interpolation, antialias=True, align_corners=False)
        if not self._same:
            x = x * self.scale + self.shift
        return x.to(images.dtype) if images.is_floating_point() else x

    def forward(self, images: Tensor) -> Tensor:
        return (self.run or self.inner)(self.prepare(images))

    # a head is asked for what it pools and how it classifies that: nothing of a front is trained

    def pool(self, images: Tensor) -> Tensor:
        """Images to logits: what is kept of them in stored features."""
        return self(images)

    def classify(self, logits: Tensor) -> Tensor:
        """The logits themselves."""
        return logits

    def macs(self) -> int:
        """Multiply-accumulates for one image; resizing counts 0."""
        return backbone_macs(self.inner, (self.in_chans, *self.size))

    def digest(self) -> str:
        """Identifies the network's weights; a shared front has those of the backbone, which has its own digest."""
        return SHARED if self.shared else state_digest(self.network.state_dict())

    def train(self, mode: bool = True) -> Front:
        """Stays in evaluation mode."""
        return super().train(False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Front:
        super()._apply(fn, recurse)
        for name, values in (('scale', self._scale), ('shift', self._shift)):
            moved = getattr(self, name)
            if moved.dtype != torch.float32:  # half precision would change the images more than the weights
                setattr(self, name, torch.tensor(values, device=moved.device)[:, None, None])
        return self

    def extra_repr(self) -> str:
        return f'{self.name}, {self.interpolation}{", weights of the backbone" if self.shared else ""}'


def name_of(network: nn.Module) -> str:
    """Architecture and tag of a timm model."""
    cfg: Any = getattr(network, 'pretrained_cfg', None) or {}
    return '.'.join(str(p) for p in (cfg.get('architecture') or type(network).__name__, cfg.get('tag')) if p)


def shown(size: tuple[int, int]) -> str:
    """224 or 224x160: height and width."""
    return str(size[0]) if size[0] == size[1] else f'{size[0]}x{size[1]}'
