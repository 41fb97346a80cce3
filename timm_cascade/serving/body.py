"""Reads a request: the bytes of an image, a form, or a JSON document, each with the dial's setting."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from ..errors import RequestError
from .decode import Limits, decode_base64
from .service import TOPK

__all__ = ['Body', 'Held', 'read_body']

PARAMETERS = ('max_drop', 'topk')
NAMES = {'top_k': 'topk'}  # as Inference Endpoints call it


class Body(NamedTuple):
    """What was asked: the encoded image, and the dial's setting."""

    image: bytes
    max_drop: float | None
    topk: int


class Held:
    """Bytes of all requests that are being received or decoded."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.bytes = 0

    @contextmanager
    def share(self) -> Iterator[Callable[[int], None]]:
        """A function that counts bytes of one request, until the end of the block; raises RequestError at the limit."""
        mine = 0

        def take(count: int) -> None:
            nonlocal mine
            if self.bytes + count > self.most:
                raise RequestError(503, 'busy', 'too many bytes are being received; try again.')
            self.bytes += count
            mine += count

        try:
            yield take
        finally:
            self.bytes -= mine


async def read_body(request: Request, limits: Limits, take: Callable[[int], None]) -> Body:
    """Receives and parses a request.

    Args:
        request: What comes in.
        limits: What it may take up.
        take: Counts bytes that are kept, see `Held`.

    Raises:
        RequestError: Too large, too slow, or not one of the three kinds.
        starlette.requests.ClientDisconnect: The client hung up.
    """
    given = _parameters(request.query_params.multi_items(), 'the query')
    kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
    wrapped = kind in ('application/json', 'multipart/form-data')
    most = limits.image_bytes * 7 // 5 + 65_536 if wrapped else limits.image_bytes  # base64 takes a third more
    try:
        data = await asyncio.wait_for(_receive(request, most, take), limits.body_seconds)
    except asyncio.TimeoutError:
        raise RequestError(
            408, 'slow', f'the request had not arrived after {limits.body_seconds:g} seconds; send it faster.'
        ) from None
    if kind == 'application/json':
        image, more = _from_json(data)
    elif kind == 'multipart/form-data':
        image, more = await _from_form(request, data)
    else:
        image, more = data, {}
    given = {**more, **given}
    return Body(image, _number(given, 'max_drop', float, None), _number(given, 'topk', int, TOPK))


async def _receive(request: Request, most: int, take: Callable[[int], None]) -> bytes:
    too_large = RequestError(413, 'too_large', f'the request has more than {most:,} bytes, which is the limit.')
    length = request.headers.get('content-length', '')
    if length.isdigit() and (len(length) > 18 or int(length) > most):
        raise too_large
    chunks: list[bytes] = []
    count = 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > most:
            raise too_large
        take(len(chunk))
        chunks.append(chunk)
    return b''.join(chunks)


def _from_json(data: bytes) -> tuple[bytes, dict[str, Any]]:
    """{"inputs": base64, "parameters": {...}}, as the handlers of Inference Endpoints take it."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise RequestError(422, 'bad_request', f'the JSON document cannot be read ({e}).') from None
    if not isinstance(found, dict) or 'inputs' not in found or set(found) - {'inputs', 'parameters'}:
        raise RequestError(
            422, 'bad_request', 'expected {"inputs": the image in base64, "parameters": {"max_drop": 0.01, "topk": 5}}.'
        )
    parameters = found.get('parameters') or {}
    if not isinstance(parameters, dict):
        raise RequestError(422, 'bad_request', f'parameters is {type(parameters).__name__}; expected an object.')
    return decode_base64(found['inputs']), _parameters(parameters.items(), 'parameters')


async def _from_form(request: Request, data: bytes) -> tuple[bytes, dict[str, Any]]:
    async def stream() -> AsyncIterator[bytes]:
        yield data

    try:
        form = await MultiPartParser(request.headers, stream(), max_files=1, max_fields=8).parse()
    except (MultiPartException, KeyError, ValueError) as e:
        detail = getattr(e, 'message', str(e))
        raise RequestError(422, 'bad_request', f'the form cannot be read ({detail}); send one file.') from None
    files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
    try:
        if len(files) != 1:
            raise RequestError(422, 'bad_request', f'the form has {len(files)} files; send one, such as image=@a.jpg.')
        fields = [(name, value) for name, value in form.multi_items() if isinstance(value, str)]
        return await files[0].read(), _parameters(fields, 'the form')
    finally:
        await form.close()


def _parameters(items: Any, place: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in items:
        name = NAMES.get(key, key)
        if name not in PARAMETERS:
            raise RequestError(422, 'bad_request', f'{place} has {key!r}; known are {" and ".join(PARAMETERS)}.')
        if name in found:
            raise RequestError(422, 'bad_request', f'{place} has {name} twice; give one.')
        found[name] = value
    return found


def _number(given: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = given.get(name, default)
    if value is None or value is default:
        return default
    try:
        if isinstance(value, bool) or (kind is int and isinstance(value, float)):
            raise ValueError
        return kind(value)
    except (TypeError, ValueError, OverflowError):
        expected = 'a fraction such as 0.01' if kind is float else 'a whole number'
        raise RequestError(422, 'bad_request', f'{name} is {str(value)[:40]!r}; expected {expected}.') from None
