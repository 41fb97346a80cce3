"""Labelled images from wherever they are, and how the model sees them."""

from ..errors import BadImageError
from .classes import check_labels, check_training_classes, match_classes, warn_of_other_classes, weak_backbone
from .idx import read_idx
from .images import UNLABELLED, ImageData, upright
from .items import collate, fingerprint_of
from .leaks import Seen
from .loading import load_data
from .views import View, create_loader, eval_transform, prepare_data

__all__ = [
    'UNLABELLED',
    'BadImageError',
    'ImageData',
    'Seen',
    'View',
    'check_labels',
    'check_training_classes',
    'collate',
    'create_loader',
    'eval_transform',
    'fingerprint_of',
    'load_data',
    'match_classes',
    'prepare_data',
    'read_idx',
    'upright',
    'warn_of_other_classes',
    'weak_backbone',
]
