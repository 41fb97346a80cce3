"""What the descriptions of all files share: how one is read, its limits, and types of single values."""

from __future__ import annotations

import json
import math
import reprlib
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import ErrorDetails

__all__ = [
    'MAX_CLASSES',
    'MAX_EXITS',
    'MAX_LENGTH',
    'MAX_NUMBER',
    'MAX_POINTS',
    'MAX_SIDE',
    'SHOWN',
    'Classes',
    'Count',
    'Described',
    'Digest',
    'Exits',
    'Fraction',
    'ImageSize',
    'Open',
    'Positive',
    'Side',
    'Text',
    'Thresholds',
    'known_version',
    'parse',
    'show',
    'values_of',
]

MAX_DEPTH = 16
MAX_LENGTH = 1000  # of texts, and of lists of values
MAX_NUMBER = 1 << 20
MAX_CLASSES = 1 << 20
MAX_EXITS = 256
MAX_SIDE = 1 << 14  # pixels
MAX_POINTS = 10_000
SHOWN = 100  # characters of a value in a message

_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = SHOWN

M = TypeVar('M', bound=BaseModel)


def parse(model: type[M], content: str | dict[str, Any], source: str, error: type[Exception]) -> M:
    """A file's content as `model` describes it.

    Args:
        model: Description of the file, such as TableFile.
        content: JSON, or what JSON was read as.
        source: Name of the file, with which the message begins.
        error: Class of the exception that is raised.

    Raises:
        error: Not JSON, or values that cannot be right. The message names the file, the first places that are wrong,
            and what is expected there: `config.json: cascade.exits.0.layout is 'NCWH'; it should be ...`.

    Example:
        >>> parse(TableFile, '{"format_version": 1}', 'thresholds.json', TableFormatError)
        TableFormatError: thresholds.json: exits is missing; num_classes is missing; ...
    """
    values: Any = content
    if isinstance(content, str):
        try:
            values = json.loads(content)
        except RecursionError:
            raise error(f'{source}: it is nested more than {MAX_DEPTH} deep.') from None
        except ValueError as e:
            raise error(f'{source}: it is not a JSON object ({str(e)[:SHOWN]}).') from e
    if not isinstance(values, dict):
        raise error(f'{source}: it is not a JSON object, but a {type(values).__name__}.')
    fault = _fault(values)
    if fault is not None:
        raise error(f'{source}: {fault}.')
    try:
        return model.model_validate(values)
    except ValidationError as e:
        found = e.errors(include_url=False, include_context=False)
        versions = [x for x in found if x['loc'][-1:] == ('format_version',)]  # explains all others
        said = [_message(x) for x in (versions or found)[:3]]
        more = f'; and {len(found) - 3} more' if len(found) > 3 and not versions else ''
        raise error(f'{source}: {"; ".join(said)}{more}.') from e


def _fault(value: Any, place: str = '', depth: int = MAX_DEPTH) -> str | None:
    """The first place that is nested too deep, or holds no finite number: JSON itself allows both."""
    if isinstance(value, float) and not math.isfinite(value):
        return f'{place} is {value}; expected are finite numbers, and null for a closed exit'
    if not isinstance(value, (dict, list)):
        return None
    if not depth:
        return f'{place[:SHOWN]} is nested more than {MAX_DEPTH} deep'
    items = value.items() if isinstance(value, dict) else enumerate(value)
    faults = (_fault(child, f'{place}.{str(key)[:SHOWN]}'.lstrip('.'), depth - 1) for key, child in items)
    return next((fault for fault in faults if fault), None)


def show(value: Any) -> str:
    """The value as a message shows it: at most SHOWN characters."""
    text = _short.repr(value)  # of a list of a million, only the beginning is looked at
    return text if len(text) <= SHOWN else f'{text[:SHOWN]}...'


def _message(found: ErrorDetails) -> str:
    place = '.'.join(str(part)[:SHOWN] for part in found['loc'] if part not in ('full', 'heads'))  # tags of a union
    if found['type'] == 'missing':
        return f'{place} is missing'
    if found['type'] == 'extra_forbidden':
        return f'{place} is not a known key'
    if found['type'].startswith('union_tag'):
        return f"{place}.layout is {show(found['input'].get('layout'))}; it should be 'full' or 'heads'"
    said = found['msg'].removeprefix('Value error, ')
    if found['type'] == 'value_error' and not isinstance(found['input'], (str, int, float)):  # says itself what it saw
        return f'{place}: {said}' if place else said
    return f'{place} is {show(found["input"])}; {said.replace("Input", "it", 1)}'


class Described(BaseModel):
    """Values must have the right type: no text is taken for a number, no number for a truth value."""

    model_config = ConfigDict(strict=True, extra='forbid', allow_inf_nan=False, protected_namespaces=())


def values_of(entry: BaseModel) -> dict[str, Any]:
    """The values of a description, with tuples for lists, as the library's own objects hold them."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in entry.model_dump().items()}


class Open(Described):
    """Unknown keys are kept: a later version may add some, and they travel on."""

    model_config = ConfigDict(extra='allow')


def known_version(version: int) -> Any:
    """Type of a file's format_version: a whole number from 1 to `version`."""

    def check(value: int) -> int:
        if not 1 <= value <= version:
            raise ValueError(
                f'known here is {version}: the file is newer; upgrade timm_cascade, or ask for a file in the older '
                f'format'
                if value > version
                else 'it should be a whole number from 1'
            )
        return value

    return Annotated[int, AfterValidator(check)]


Text = Annotated[str, Field(max_length=MAX_LENGTH)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Thresholds = Annotated[list[Fraction | None], Field(min_length=1, max_length=MAX_EXITS)]  # null: a closed exit
Positive = Annotated[int, Field(ge=1, le=MAX_NUMBER)]
Count = Annotated[int, Field(ge=0, le=MAX_NUMBER)]
Classes = Annotated[int, Field(ge=0, le=MAX_CLASSES)]
Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Exits = Annotated[list[Text], Field(min_length=1, max_length=MAX_EXITS)]
ImageSize = Annotated[list[Side], Field(min_length=3, max_length=3)]
Digest = Annotated[str, Field(pattern='^[0-9a-f]{16}$')]
