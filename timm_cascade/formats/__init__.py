"""Every file that may come from outside, described once; an error names the file and the place in it.

Only what loads and saves imports this package: it needs pydantic, which nothing else here does.
"""

from .config_file import CONFIG_VERSION, ConfigFile, FrontEntry, HeadsEntry, PublishedEntry
from .dial_files import (
    CALIBRATION_VERSION,
    PATH_VERSION,
    PROFILES_VERSION,
    TABLE_VERSION,
    CalibrationEntry,
    PathFile,
    PointEntry,
    ProfilesFile,
    TableFile,
)
from .fields import parse, values_of

__all__ = [
    'CALIBRATION_VERSION',
    'CONFIG_VERSION',
    'PATH_VERSION',
    'PROFILES_VERSION',
    'TABLE_VERSION',
    'CalibrationEntry',
    'ConfigFile',
    'FrontEntry',
    'HeadsEntry',
    'PathFile',
    'PointEntry',
    'ProfilesFile',
    'PublishedEntry',
    'TableFile',
    'parse',
    'values_of',
]
