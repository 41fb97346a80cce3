"""timm models as backbones: where exits may sit, the layout of their taps, MACs; and the paper's CIFAR ResNets."""
from . import cifar_resnet
from .exits import ExitError, ExitPoint, backbone_macs, candidates, cut, resolve_exits, tap_of

__all__ = ['ExitError', 'ExitPoint', 'backbone_macs', 'candidates', 'cifar_resnet', 'cut', 'resolve_exits', 'tap_of']
