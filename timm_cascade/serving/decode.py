"""Bytes that anyone may have sent, to an image or to a refusal that says why."""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from dataclasses import dataclass

from PIL import Image

from ..data import upright
from ..errors import RequestError

__all__ = ['Limits', 'decode_base64', 'decode_image']

FORMATS = ('JPEG', 'PNG', 'WEBP', 'GIF', 'BMP')  # Pillow reads many more, most of which no camera or browser writes


@dataclass(frozen=True)
class Limits:
    """What one request, and all of them together, may take up.

    Attributes:
        image_bytes: Size of an encoded image.
        pixels: Width times height of an image; it is compared before any pixel is decoded.
        queue: Requests that are being decoded, or wait for an answer; more are refused with 503.
        held_bytes: Bytes of all requests that are being received; more are refused with 503.
        body_seconds: Time in which a request must have arrived.
        answer_seconds: Time in which an answer must be there.
    """

    image_bytes: int = 20_000_000
    pixels: int = 50_000_000
    queue: int = 256
    held_bytes: int = 512_000_000
    body_seconds: float = 30.0
    answer_seconds: float = 60.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f'{name} is {value}; expected a number above 0.')


def decode_image(data: bytes, limits: Limits) -> Image.Image:
    """The image that was sent, upright and decoded.

    Raises:
        RequestError: Nothing, too many bytes or pixels, another format, or a damaged file.
    """
    if not data:
        raise RequestError(400, 'empty', 'the request has no image; send the bytes of a JPEG, PNG or WebP file.')
    if len(data) > limits.image_bytes:
        raise RequestError(
            413, 'too_large', f'the image has {len(data):,} bytes; at most {limits.image_bytes:,} are accepted.'
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # the limit here is our own
            image = Image.open(io.BytesIO(data), formats=FORMATS)  # reads the header only
            if image.width * image.height > limits.pixels:
                raise RequestError(
                    413,
                    'too_many_pixels',
                    f'the image has {image.width} x {image.height} pixels; at most {limits.pixels:,} are accepted.',
                )
            return upright(image)
    except RequestError:
        raise
    except Image.DecompressionBombError as e:
        raise RequestError(413, 'too_many_pixels', f'{e}; at most {limits.pixels:,} pixels are accepted.') from None
    except Exception as e:  # decoders raise whatever they like
        reason = str(e).partition(' <_io.BytesIO')[0] or type(e).__name__
        raise RequestError(
            415, 'not_an_image', f'not an image that can be read ({reason}); send a whole {", ".join(FORMATS)} file.'
        ) from None


def decode_base64(text: object) -> bytes:
    """The bytes of an image in a JSON document, as base64 or as a `data:` URL.

    Raises:
        RequestError: Anything else.
    """
    if not isinstance(text, str):
        raise RequestError(
            422, 'bad_request', f'inputs is {type(text).__name__}; expected the image in base64, as a string.'
        )
    if text.startswith('data:'):
        text = text.partition(',')[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as e:
        raise RequestError(422, 'bad_request', f'inputs is not base64 ({e}); encode the bytes of the image.') from None
