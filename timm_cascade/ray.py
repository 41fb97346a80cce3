"""A cascade inside a Ray Data pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from .data import eval_transform
from .hub import load
from .prediction.inputs import open_image
from .utils.clock import default_device

__all__ = ['Predictor']


class Predictor:
    """Adds `index`, `label`, `prob` and `exit` to batches of a Ray data set.

    Every actor loads the cascade once. A batch is routed on its own and waits for no other batch, so no row depends on
    what Ray does with the others.

    Args:
        where: Release folder (seen by every node) or Hub repository.
        max_drop: Accuracy that may be given up, a fraction; by default the release's active thresholds stay.
        column: Column of the images: encoded bytes, or arrays (H, W) or (H, W, 3) of bytes.
        device: Where the model runs; by default a GPU if the actor has one.
        **dial: Arguments of `model.set_max_drop`.

    Example:
        >>> ds = ray.data.read_images('photos/', include_paths=True)
        >>> ds = ds.map_batches(Predictor, fn_constructor_args=('me/cascade_resnet50.flowers',), concurrency=4)
    """

    def __init__(
        self,
        where: str | Path,
        max_drop: float | None = None,
        column: str = 'image',
        device: str | None = None,
        **dial: Any,
    ) -> None:
        self.model = load(where).eval().to(device or default_device())
        if max_drop is not None:
            self.model.set_max_drop(max_drop, **dial)
        self.column = column
        self.transform = eval_transform(self.model)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of columns, with the answers.

        Raises:
            KeyError: No such column; the message says which there are.
        """
        if self.column not in batch:
            raise KeyError(f"the batch has the columns {sorted(batch)}, not {self.column!r}; name the images': column=")
        images = torch.stack([self.transform(open_image(value)) for value in batch[self.column]])
        with torch.inference_mode():
            output = self.model.predict(images.to(next(self.model.parameters()).device))
        index = output.logits.argmax(1).cpu().numpy()
        names = self.model.label_names
        return {
            **batch,
            'index': index,
            'label': np.array([str(i) if names is None else names[i] for i in index]),
            'prob': output.confidence.cpu().numpy(),
            'exit': output.exit.cpu().numpy(),
        }
