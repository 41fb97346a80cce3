"""timm models as backbones: where exits may sit, the layout of their features, MACs; and the paper's CIFAR ResNets."""

from ..errors import BackboneError, ExitError
from ..utils.timm_models import input_size_of
from . import cifar_resnet
from .exits import ExitPoint, candidates, cut, features_of, input_point, pre_logits_of, resolve_exits
from .groups import nested_groups
from .probe import backbone_macs, check_classifier, evaluating, meta_pass
from .rows import merge_rows, select_rows

__all__ = [
    'BackboneError',
    'ExitError',
    'ExitPoint',
    'backbone_macs',
    'candidates',
    'check_classifier',
    'cifar_resnet',
    'cut',
    'evaluating',
    'features_of',
    'input_point',
    'input_size_of',
    'merge_rows',
    'meta_pass',
    'nested_groups',
    'pre_logits_of',
    'resolve_exits',
    'select_rows',
]
