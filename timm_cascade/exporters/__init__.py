"""Export: a cascade as files that run without torch, and still skip what they need not compute."""

from .assemble import export
from .exported import ExportedCascade
from .manifest import MANIFEST, Manifest, read_manifest
from .recalibrate import calibrate_exported

__all__ = ['MANIFEST', 'ExportedCascade', 'Manifest', 'calibrate_exported', 'export', 'read_manifest']
