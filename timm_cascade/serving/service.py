"""What every server shares, whatever carries its requests: images in, answers out, each with a dial of its own."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from ..data import eval_transform
from ..errors import CascadeError, RequestError
from ..inference.batch import Exited
from ..model import CascadeModel
from ..thresholds.samples import exit_costs, outcome
from .decode import Limits, decode_image

__all__ = ['Answer', 'Asked', 'Service', 'Setting']

STEP = 10_000  # a max_drop counts in steps of 0.0001, so that clients cannot ask for ever more settings
TOPK = 5


@dataclass(frozen=True, eq=False)
class Setting:
    """What one max_drop means.

    Attributes:
        max_drop: Accuracy given up, a fraction; None for thresholds that were not chosen by it.
        thresholds: (M,) float32; infinity closes an exit.
        macs: (M+1,) MACs of an image that each exit answers.
        expected: (M+1,) share of images that each exit answers, by the calibration; None without one.
    """

    max_drop: float | None
    thresholds: Tensor
    macs: tuple[float, ...]
    expected: tuple[float, ...] | None


class Asked(NamedTuple):
    """An image, ready for the model (C, H, W), the dial's setting for it, and the number of classes to name."""

    image: Tensor
    setting: Setting
    topk: int = TOPK


class Answer(NamedTuple):
    """What one image got: its best classes (K,) with their probabilities (K,), and the exit that answered."""

    classes: list[int]
    probabilities: list[float]
    exit: int


OnAnswer = Callable[[int, Answer], None]


class Service:
    """A cascade that answers single images, and the settings of its dial. Threads may share it.

    Args:
        model: The cascade, with the thresholds for requests that name no max_drop.
        max_drop: What those thresholds were chosen by, to be told to clients.
        limits: What a request may take up.
        predict_options: Passed to `model.predict` with every batch.

    Example:
        >>> service = Service(timm_cascade.load('me/cascade_resnet50.flowers'))
        >>> asked = service.prepare(open('photo.jpg', 'rb').read(), max_drop=0.01)
        >>> service.describe(asked, *service.answers([asked]))
    """

    def __init__(
        self, model: CascadeModel, max_drop: float | None = None, limits: Limits | None = None, **predict_options: Any
    ) -> None:
        if not model.num_classes:
            raise ValueError('this model has no classes, so it labels nothing; load one that classifies.')
        self.model = model.eval()
        self.limits = limits or Limits()
        self.transform = eval_transform(model)
        self.total = float(model.exits[-1].total)
        self.options = predict_options
        self._lock = threading.Lock()
        self._settings: dict[int, Setting] = {}
        thresholds, calibration = model.thresholds.tolist(), model.calibration
        expected = None if calibration is None else outcome(calibration.samples(), thresholds).exit_shares
        self.default = self._setting(max_drop, thresholds, expected)

    def prepare(self, image: bytes | Image.Image, max_drop: float | None = None, topk: int = TOPK) -> Asked:
        """Decodes an image and looks up its setting.

        Raises:
            RequestError: An image that cannot be read or is too large, or numbers out of range.
        """
        if not 1 <= topk:
            raise RequestError(422, 'bad_request', f'topk is {topk}; expected the number of classes to name, from 1.')
        setting = self.setting(max_drop)
        try:
            if isinstance(image, bytes):
                image = decode_image(image, self.limits)
            elif not isinstance(image, Image.Image):
                raise RequestError(422, 'bad_request', f'the image is {type(image).__name__}; expected its bytes.')
            return Asked(self.transform(image), setting, min(topk, self.model.num_classes))
        except RequestError:
            raise
        except (CascadeError, ValueError, OSError) as e:
            raise RequestError(415, 'not_an_image', f'the image cannot be prepared for the model: {e}') from e

    def setting(self, max_drop: float | None) -> Setting:
        """The thresholds for a max_drop, rounded down to a step of 0.0001: never bolder than what was asked.

        Raises:
            RequestError: A number outside 0..1, or a model that is not calibrated.
        """
        if max_drop is None:
            return self.default
        if not 0 <= max_drop <= 1:  # NaN too
            raise RequestError(
                422, 'bad_request', f'max_drop is {max_drop}; expected a fraction in 0..1, such as 0.01 for one point.'
            )
        step = math.floor(max_drop * STEP + 1e-9)
        with self._lock:  # the first choice from a calibration takes seconds, all others follow from it
            if step not in self._settings:
                try:
                    point = self.model.dial.choose(step / STEP)
                except CascadeError as e:
                    raise RequestError(422, 'not_calibrated', f'max_drop cannot be chosen here: {e}') from e
                self._settings[step] = self._setting(step / STEP, point.thresholds, point.exit_shares)
            return self._settings[step]

    def run(self, batch: Sequence[Asked], on_answer: OnAnswer) -> None:
        """Answers a batch; `on_answer(place, answer)` is called for each image as soon as it exits.

        Images of different settings go through the network together. Images that exit early are answered before the
        rest of the network runs for the others.
        """
        images = self.model.as_images(torch.stack([asked.image for asked in batch]))
        settings = {id(asked.setting): asked.setting for asked in batch}
        if len(settings) == 1:
            thresholds = batch[0].setting.thresholds
        else:
            thresholds = torch.stack([asked.setting.thresholds for asked in batch])

        def tell(exited: Exited) -> None:
            ids = exited.ids.tolist()
            most = max(batch[i].topk for i in ids)
            found, classes = exited.logits.float().softmax(-1).topk(most)
            for i, p, c in zip(ids, found.tolist(), classes.tolist(), strict=True):
                on_answer(i, Answer(c[: batch[i].topk], p[: batch[i].topk], exited.exit))

        with torch.inference_mode():
            self.model.predict(images, thresholds=thresholds, on_answer=tell, **self.options)

    def answers(self, batch: Sequence[Asked]) -> list[Answer]:
        """The answers to a batch, in its order, for callers that batch requests themselves."""
        found: dict[int, Answer] = {}
        self.run(batch, found.__setitem__)
        return [found[i] for i in range(len(batch))]

    def describe(self, asked: Asked, answer: Answer) -> dict[str, Any]:
        """The answer as JSON values.

        Raises:
            RequestError: The network's output is not a number.
        """
        if not math.isfinite(answer.probabilities[0]):
            raise RequestError(500, 'not_a_number', "the network's output for this image is not a number.")
        names = self.model.label_names
        labels = [str(c) if names is None else names[c] for c in answer.classes]
        return dict(
            label=labels[0],
            index=answer.classes[0],
            confidence=answer.probabilities[0],
            exit=answer.exit,
            max_drop=asked.setting.max_drop,
            macs_fraction=asked.setting.macs[answer.exit] / self.total,
            scores=[dict(label=n, score=p) for n, p in zip(labels, answer.probabilities, strict=True)],
        )

    def info(self) -> dict[str, Any]:
        """What a client may want to know before it asks, as JSON values."""
        model = self.model
        return dict(
            model=model.pretrained_cfg['architecture'],
            num_classes=model.num_classes,
            exits=[p.module for p in model.exits],
            calibrated=model.calibration is not None or model.table is not None,
            max_drop=self.default.max_drop,
            exit_costs=[m / self.total for m in self.default.macs],
            expected_exit_shares=self.default.expected,
            limits=dict(image_bytes=self.limits.image_bytes, pixels=self.limits.pixels),
        )

    def warm_up(self, batch_size: int) -> None:
        """Runs the network and all heads once, and has the dial ready, so that no client waits for it."""
        shape = self.transform(Image.new('RGB', (8, 8))).shape
        thresholds = torch.full((len(self.model.exits),), 1.1)  # every head runs, and no image exits
        with torch.inference_mode():
            for n in sorted({1, batch_size}):
                self.model.predict(self.model.as_images(torch.zeros(n, *shape)), thresholds=thresholds)
        if self.model.calibration is not None:
            with contextlib.suppress(RequestError):  # requests that name a max_drop will be told
                self.setting(0.01)

    def _setting(
        self, max_drop: float | None, thresholds: Sequence[float], expected: Sequence[float] | None
    ) -> Setting:
        macs = exit_costs(self.model.stage_macs(), self.model.head_macs(), thresholds)
        return Setting(
            max_drop,
            torch.tensor(thresholds, dtype=torch.float32),
            tuple(macs.tolist()),
            None if expected is None else tuple(expected),
        )
