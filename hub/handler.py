"""Handler for Inference Endpoints: copy it into the repository of a release, with a requirements.txt that names
timm-cascade[serve].

The endpoint takes {"inputs": an image (in base64, or as the body), "parameters": {"max_drop": 0.01, "topk": 5}} and
answers as `timm-cascade serve` does.
"""

from __future__ import annotations

from typing import Any

import torch

import timm_cascade
from timm_cascade.serving.decode import decode_base64
from timm_cascade.serving.service import Service


class EndpointHandler:
    """Loads the release once, and answers single images.

    Args:
        path: The repository's folder.
    """

    def __init__(self, path: str = '') -> None:
        model = timm_cascade.load(path or '.')
        self.service = Service(model.to('cuda' if torch.cuda.is_available() else 'cpu'))

    def __call__(self, data: dict[str, Any]) -> dict[str, Any]:
        """The answer, or `error` where the image or a parameter cannot be used."""
        image, parameters = data.get('inputs'), data.get('parameters') or {}
        try:
            if isinstance(image, str):
                image = decode_base64(image)
            given = {k: parameters[k] for k in ('max_drop', 'topk') if parameters.get(k) is not None}
            asked = self.service.prepare(image, **given)
            (answer,) = self.service.answers([asked])
            return self.service.describe(asked, answer)
        except (timm_cascade.RequestError, TypeError, AttributeError) as e:
            return {'error': str(e)}
