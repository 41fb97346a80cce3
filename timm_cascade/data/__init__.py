"""Labelled images from wherever they are, and how the model sees them."""

from ..errors import BadImageError
from .classes import check_classes, check_training_classes
from .images import UNLABELLED, ImageData
from .loading import load_data, read_idx
from .views import View, create_loader, eval_transform, train_transform

__all__ = [
    'UNLABELLED',
    'BadImageError',
    'ImageData',
    'View',
    'check_classes',
    'check_training_classes',
    'create_loader',
    'eval_transform',
    'load_data',
    'read_idx',
    'train_transform',
]
