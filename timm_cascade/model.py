"""The cascade: a timm backbone, its exit heads, and the dial that trades accuracy for computation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from .backbone import ExitPoint, input_size_of, nested_groups, pre_logits_of
from .data import warn_of_other_classes
from .fronts import Front, FrontSpec, check_names, create_exits, exits_digest, heads_macs, refuse_classes
from .heads import HeadSpec, create_heads, head_configs
from .inference.batch import CascadeOutput, empty_output, open_exits
from .inference.engine import Runner, is_recorded, refuse_recording
from .inference.request import Requests, check_images, check_thresholds
from .inference.router import CompiledNetwork, Router
from .inference.stopwatch import measure_soon
from .inference.stream import StreamedModel, StreamOutput, stream
from .inference.weights import CalibrationGuard, calibrated_as, dtype_of, setup_of
from .thresholds.dial import Dial
from .thresholds.operating_point import OperatingPoint
from .utils.timm_models import kept_args

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['CascadeModel']

MIN_LEAVE = 0.01


def _part_of_dial(name: str) -> Any:
    return property(lambda self: getattr(self.dial, name), lambda self, value: setattr(self.dial, name, value))


class CascadeModel(nn.Module):
    """A timm model whose samples may exit early.

    Called, it maps images (N, C, H, W) to logits (N, num_classes) in input order. In training mode, and until
    thresholds are set, it is the backbone and nothing else; its heads need no gradients until `train_heads` trains
    them. Whatever else timm asks of a model (`forward_features`, `feature_info`, ...) the backbone provides.

    Example:
        >>> model = timm.create_model('hf-hub:me/cascade_resnet50.flowers', pretrained=True).eval()
        >>> model.set_max_drop(0.01)
        >>> logits, exit, confidence = model.predict(images)

    Args:
        backbone: A timm classifier.
        exits: Their number, cost fractions or module names, resolved exit points, or None (see `resolve_exits`).
        head: Preset or description of the exit heads (see `heads.head_configs`).
        thresholds: One confidence per exit; inf or None closes it.
        front: Whole networks that become the first exits (see `fronts.create_fronts`).

    Attributes:
        backbone, heads: The timm model and its exit heads, 0..M-1.
        dial: Calibration, table and profiles (also attributes of their own): what thresholds are chosen from.
        min_leave: Share of a batch that must have exited before the batch is cut; less saves no more time than the copy
            takes. Results are the same; 0 cuts always. `timm-cascade profile` prints from which share a cut pays.
    """

    backbone: Any  # a timm model: an nn.Module with timm's methods, which have no type of their own
    calibration, table, profiles = map(_part_of_dial, ('calibration', 'table', 'profiles'))

    def __init__(
        self,
        backbone: nn.Module,
        exits: int | Sequence[float] | Sequence[str] | Sequence[ExitPoint] | None = None,
        head: HeadSpec = 'enhanced',
        thresholds: Sequence[float | None] | None = None,
        front: FrontSpec = None,
    ) -> None:
        super().__init__()  # every check comes before the backbone is touched
        self._head, (self._points, heads, self._head_configs) = head, create_exits(backbone, exits, head, front)
        self.backbone, self.heads = backbone, heads
        self.heads.to(device=next(backbone.parameters()).device, dtype=dtype_of(backbone)).requires_grad_(False)
        self.pretrained_cfg = self.default_cfg = dict(getattr(backbone, 'pretrained_cfg', None) or {})
        self.pretrained_cfg['architecture'] = f'cascade_{self.pretrained_cfg.get("architecture", "model")}'
        self.in_chans = input_size_of(backbone)[0]  # every batch is checked against it
        self.dial = Dial()
        self.published: Any = None  # hub.published.Published: the checkpoint the backbone was loaded from, unadapted
        self.base_model: str | None = None  # Hub id of what the backbone was made from, for model cards
        self._head_macs: list[int] | None = None
        self._router = Router(backbone, self._points)
        self._thresholds, self._open = [math.inf] * len(self._points), False
        self._guard, self._requests, self.min_leave = CalibrationGuard(), Requests(), MIN_LEAVE
        self.train(backbone.training)
        self.thresholds = thresholds

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes), easy images from an early exit; raises as `predict` does."""
        if not self.any_open and (not self.compiled or is_recorded(x)):
            return self.backbone(x)
        return self.predict(x).logits

    def predict(
        self, x: Tensor, *, max_drop: Any = None, thresholds: Any = None, on_answer: Any = None, watch: Any = None
    ) -> CascadeOutput:
        """Logits, exit and confidence for images, in their order.

        Args:
            x: Images (N, C, H, W).
            max_drop: Setting of this call: a number, or one per image (N,), as in `set_max_drop` with its defaults.
            thresholds: Thresholds of this call: M confidences, or a row per image (N, M).
            on_answer: Called as on_answer(exited) when images exit: `ids`, `logits`, `confidence`, `exit`.
            watch: A DriftWatch, which compares the images with those of the calibration.

        Raises:
            ValueError: Images or arguments of another shape than expected, or numbers out of range.
            NotCalibratedError, TableMismatchError: See `set_max_drop`.
            RoutingError: torch.jit.trace, torch.export or an ONNX exporter records it with open exits.

        Example:
            >>> model.predict(images, max_drop=[0, 0.01, 0.05]).exit  # three images, three kinds of patience
        """
        if is_recorded(x) and not (max_drop is None is thresholds and not self.any_open):
            refuse_recording()
        check_images(x, self.in_chans)
        if not x.shape[0]:  # many networks crash on an empty batch
            return empty_output(x, self.num_classes)
        limits = self._request(x.shape[0], max_drop, thresholds)
        self._guard.notice(self)
        first = None if watch is None else watch.begin(not max_drop is None is thresholds)
        output = self._router.route(self.backbone, x, list(self.heads), limits, self.min_leave, on_answer, first)
        if watch is not None and first is not None:
            watch.observe(x, first[0])
        return output

    def stream(
        self,
        batches: Iterable[Any],
        *,
        batch_size: int | None = None,
        ordered: bool = True,
        max_held: int | None = None,
        max_drop: float | None = None,
        thresholds: Any = None,
        accelerator: Accelerator | None = None,
    ) -> Iterator[StreamOutput]:
        """Predicts a long input with full batches in every stage: remaining samples of several batches go on together.

        Gradients are not kept. If the input raises, the results of earlier samples come first. Raises ValueError or
        TypeError for what does not fit the model, RuntimeError if another process failed.

        Args:
            batches: Images, or tuples that begin with them, such as a data loader; a dict as second element may hold
                `max_drop` or `thresholds` of that batch, see `predict`.
            batch_size: Samples that a stage runs on; by default the size of the first batch.
            ordered: Results in the input's order, batch by batch. Otherwise they come as soon as they are known.
            max_held: Most samples that wait; before it is exceeded, stages run with fewer. Default: 32 batches. Up to
                M * `batch_size` of them keep features.
            max_drop, thresholds: Setting of this input only: a number, or M confidences.
            accelerator: With several processes each predicts every P-th batch; `index` counts in the whole input.

        Example:
            >>> for index, logits, exit, confidence in model.stream(loader): ...
        """
        self._guard.notice(self)
        warn_of_other_classes(batches, self.num_classes, self.label_names)
        limits = self._request(None, max_drop, thresholds)
        parts = StreamedModel(self.runner, self.as_images, self._request, list(self.heads), limits)
        return stream(batches, parts, batch_size, ordered, max_held, accelerator)

    def _request(self, count: int | None, max_drop: Any, thresholds: Any) -> Any:
        if max_drop is not None or thresholds is not None:
            return self._requests.limits(self, count, max_drop, thresholds)
        return self._thresholds if self.any_open else [math.inf] * len(self._points)

    def runner(self, images: Tensor, early_exit: bool | None = None) -> Runner:
        """What runs the backbone on images like these (N, C, H, W); by default with early exits if an exit is open."""
        self._router.attach(self.backbone)
        early_exit = self.any_open if early_exit is None else early_exit
        return self._router.runner(self.backbone, images, list(self.heads), self._thresholds, early_exit)

    def as_images(self, x: Tensor) -> Tensor:
        """The batch, checked, on the model's device and in the dtype of its weights."""
        check_images(x, self.in_chans)
        dtype = dtype_of(self.backbone) if x.is_floating_point() else None
        return x.to(next(self.backbone.parameters()).device, dtype, non_blocking=True)

    def compile(  # type: ignore[override]
        self,
        enabled: bool = True,
        *,
        mode: str | None = None,
        batch_sizes: Sequence[int] = (),
        channels_last: bool | None = None,
        choose: bool = True,
        backend: str = 'inductor',
    ) -> CascadeModel:
        """Compiles each stage between the exits, with the heads of open exits, and the networks in front.

        For inference; with gradients and in training mode everything runs as before. New weights are compiled when
        images come. Where compiling fails the cascade runs eagerly, and a warning says why.

        Args:
            enabled: False returns to the eager cascade.
            mode: Mode of torch.compile; default: its own on a CPU, `max-autotune` on a GPU.
            batch_sizes: Batch sizes to compile for at once; others are compiled when they come.
            channels_last: Convolutions in channels-last memory; by default where features are feature maps.
            choose: Measure each stage, and run it eagerly where that is faster; the log says what was chosen.
            backend: Backend of torch.compile.
        """
        self._router.compile(enabled, backend, mode, channels_last, choose)
        for front in self.fronts:
            front.run = CompiledNetwork(front.inner, self._router.options) if self.compiled else None
        for n in (batch_sizes or (2,)) if enabled else ():
            images = self.as_images(torch.zeros(n, *input_size_of(self.backbone)))
            with torch.no_grad():
                self.runner(images)(images, lambda index, boundary: None, wanted=open_exits(self._thresholds))
        return self

    compiled = property(lambda self: self._router.options is not None, doc='Whether the stages are compiled.')

    def forward_exits(self, x: Tensor) -> list[Tensor]:
        """Every exit's logits, M+1 of (N, num_classes); no sample exits early."""
        logits, final = self._router.collect(self.backbone, x, list(self.heads))
        return [*logits, final]

    def forward_pooled(self, x: Tensor, pre_logits: bool = False) -> tuple[list[Tensor], Tensor]:
        """What heads classify, M of (N, in_features), and the backbone's logits or (N, head_hidden_size) before."""
        run = partial(pre_logits_of, self.backbone) if pre_logits else self.backbone
        return self._router.collect(run, x, [head.pool for head in self.heads])  # type: ignore[misc]

    def set_max_drop(
        self,
        max_drop: float,
        rule: str = 'certified',
        level: float = 0.9,
        reference: str | None = None,
        cost: str = 'macs',
        scope: str = 'dial',
    ) -> OperatingPoint:
        """Sets the thresholds from the accuracy that may be given up.

        With rule='certified', with probability `level` over the draw of the calibration images, accuracy on images
        from the same source falls by at most max_drop, for every setting at once. max_drop=0 opens exits only where
        they are certified to be no worse than the network. Warns of exits that save no time, where it was profiled.

        Args:
            max_drop: Acceptable loss of top-1 accuracy, absolute, as a fraction: 0.01 is one percentage point.
            rule: `certified`, `joint` or `per_exit`.
            level: Confidence level of the guarantee: its probability, at least, over the draw of the calibration set.
            reference: What counts as correct: `labels` (the default where there are any), or `backbone` for agreement
                with the full network. `best` counts max_drop from the most accurate thresholds instead.
            cost: What to save: `macs`, or `time` on this machine, measured now if `timm_cascade.profile` was not run.
            scope: `dial` for the guarantee at all settings at once, `setting` for this one alone.

        Raises:
            NotCalibratedError: No calibration or table; for `time`, no calibration.
            TableMismatchError: Weights, dtype, input size or transform have changed since the calibration.

        Example:
            >>> print(model.set_max_drop(0.01))
        """
        point = self._turn(self.dial.choose, max_drop, rule, level, scope, reference, cost)
        for text in self.exits_without_time():
            warnings.warn(text, stacklevel=2)
        return point

    def set_cost(self, fraction: float, reference: str | None = None, cost: str = 'macs') -> OperatingPoint:
        """Sets the most accurate thresholds that spend at most this share of the backbone's MACs, or time, on average.

        Raises NotCalibratedError and TableMismatchError as `set_max_drop` does; its arguments mean the same.
        """
        return self._turn(self.dial.choose_by_cost, fraction, reference, cost)

    def _turn(self, choose: Callable[..., OperatingPoint], *args: Any) -> OperatingPoint:
        self.check_calibration()
        point = choose(*args, setup_of(self), partial(measure_soon, self))
        self.thresholds = point.thresholds
        self._guard.begin(self)
        return point

    def check_calibration(self) -> None:
        """Raises TableMismatchError if weights, dtype, input size or transform have changed since the calibration."""
        self._guard.check(self)

    def exits_without_time(self) -> list[str]:
        """Messages about open exits that save MACs but no time on this machine, by calibration and profile."""
        return self.dial.exits_without_time(self.thresholds, setup_of(self))

    def forget_calibration(self) -> None:
        """Closes all exits and drops calibration, table and profiles."""
        self.dial.clear()
        self.thresholds = None
        self._guard.watch = None

    exits = property(lambda self: self._points, doc='The exit points, 0..M-1.')
    fronts: Any = property(lambda self: [h for h in self.heads if isinstance(h, Front)], doc='Networks in front.')
    any_open = property(lambda self: self._open and not self.training, doc='Whether a sample can exit early now.')

    @property
    def thresholds(self) -> Tensor:
        """(M,) float32 confidences; inf closes an exit."""
        return torch.tensor(self._thresholds, dtype=torch.float32)

    @thresholds.setter
    def thresholds(self, values: Tensor | Sequence[float | None] | None) -> None:
        numbers: Any = check_thresholds([None] * len(self._points) if values is None else values, self._points)
        is_open = not all(map(math.isinf, numbers))
        if is_open and self.num_classes < 2:  # a softmax over one output is always 1
            raise ValueError('a model that has no classes, or one, has no open exits; reset_classifier(2 or more).')
        self._thresholds, self._open = numbers, is_open

    def head_macs(self) -> np.ndarray:
        """(M,) MACs of each head for one image; counted once."""
        if self._head_macs is None:
            self._head_macs = heads_macs(self.heads, self._points)
        return np.array(self._head_macs, dtype=np.float64)

    def stage_macs(self) -> np.ndarray:
        """(M+1,) MACs of each stage for one image, its head included."""
        reached = np.array([0, *(p.macs for p in self._points), self._points[-1].total], dtype=np.float64)
        return np.diff(reached) + np.append(self.head_macs(), 0)

    def heads_hash(self) -> str:
        """Identifies exits, trained heads and fronts: a table made for others does not apply."""
        return exits_digest(self.heads, [p.module for p in self._points])

    def provenance(self) -> dict[str, Any]:
        """What calibrations follow from beside heads and images: digest of the backbone's weights, dtype, transform."""
        return calibrated_as(self)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'backbone' or name.startswith('__'):  # not there yet: unpickling, or an __init__ that failed
                raise
            return getattr(self.backbone, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._guard.watch is not None:
            self._guard.begin(self)

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay, under their names here."""
        return {f'backbone.{name}' for name in getattr(self.backbone, 'no_weight_decay', set)()}

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """The backbone's groups under their names here; a property, as timm asks whether a model `hasattr` it."""
        return nested_groups(self.backbone.group_matcher, 'backbone.')

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes, kept where timm's loader puts them."""
        return list(self.pretrained_cfg.get('label_names') or ()) or None

    @label_names.setter
    def label_names(self, names: Sequence[str] | None) -> None:
        for front in self.fronts:
            check_names(front, names, 'the new label_names')
        self.pretrained_cfg['label_names'] = None if names is None else list(names)

    @property
    def _model_args(self) -> dict[str, Any]:
        """Written to config.json by timm, and passed to the entrypoint again: the backbone's, and the cascade's own."""
        return {
            **kept_args(self.backbone),
            **({'front': [f.name for f in self.fronts]} if self.fronts else {}),
            'exits': [p.module for p in self._points if p.cut != 'input'],
            'head': self._head_configs,
            'thresholds': [None if t > 1 else max(t, 0.0) for t in self._thresholds],  # of a confidence, the same
        }

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        own = ('exits', 'head', 'thresholds', 'front', 'front_pretrained')
        self.backbone._model_args = {k: v for k, v in args.items() if k not in own}

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """New classifier and new heads for `num_classes`; all exits are closed. Refused where there is a front."""
        refuse_classes(self.fronts, num_classes)
        self.backbone.reset_classifier(num_classes, *args, **kwargs)
        old = next(self.heads.parameters())
        if isinstance(self._head, str):  # the width follows the classes; a description stays
            self._head_configs = head_configs(self._head, self._points, num_classes)
        heads = create_heads(self._points, num_classes, self._head_configs).train(self.heads.training)
        self.heads = heads.to(old.device, old.dtype).requires_grad_(old.requires_grad)
        self._head_macs = None
        self._router.forget()
        self.label_names = None
        self.forget_calibration()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a cascade's state, or that of a plain timm model into the backbone."""
        if state_dict and not any(key.startswith(('backbone.', 'heads.')) for key in state_dict):
            return self.backbone.load_state_dict(state_dict, strict=strict, assign=assign)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
