"""Training exit heads on the features of a frozen backbone, with Accelerate."""

from .train import train_heads

__all__ = ['train_heads']
