"""timm models as backbones: where exits may sit, the layout of their taps, MACs; and the paper's CIFAR ResNets."""
from . import cifar_resnet
from .exits import (
    BackboneError,
    ExitError,
    ExitPoint,
    candidates,
    cut,
    input_size_of,
    resolve_exits,
    tap_of,
)
from .probe import backbone_macs
from .rows import merge_rows, select_rows

__all__ = ['BackboneError', 'ExitError', 'ExitPoint', 'backbone_macs', 'candidates', 'cifar_resnet', 'cut',
           'input_size_of', 'merge_rows', 'resolve_exits', 'select_rows', 'tap_of']
