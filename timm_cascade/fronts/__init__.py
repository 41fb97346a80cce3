"""Whole timm networks in front of the backbone: exits whose features are the images and whose heads are networks."""

from .all_exits import Exits, create_exits, exits_digest, heads_macs
from .front import Front, name_of
from .resolve import FrontSpec, check_names, create_fronts, network_named, refuse_classes, split_size

__all__ = [
    'Exits',
    'Front',
    'FrontSpec',
    'check_names',
    'create_exits',
    'create_fronts',
    'exits_digest',
    'heads_macs',
    'name_of',
    'network_named',
    'refuse_classes',
    'split_size',
]
