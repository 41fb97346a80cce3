"""Export: a cascade as files that run without torch, and still skip what they need not compute."""

from .assemble import export
from .manifest import Manifest, read_manifest

__all__ = ['Manifest', 'export', 'read_manifest']
