"""The cascade: a timm backbone, its exit heads, and the dial that trades accuracy for computation."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from timm.data.model_config import resolve_input_data_config
from torch import Tensor, nn

from .backbone import ExitPoint, backbone_macs, input_size_of, nested_groups, resolve_exits
from .heads import ExitHead, HeadSpec, create_heads, head_configs, within_share
from .inference.batch import CascadeOutput
from .inference.engine import Runner
from .inference.router import Router
from .inference.stream import StreamOutput, stream
from .thresholds.calibration import Calibration
from .thresholds.dial import Dial, Setup
from .thresholds.operating_point import OperatingPoint
from .thresholds.table import ThresholdTable
from .thresholds.timing import Profile
from .utils.clock import device_name
from .utils.digest import state_digest

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['CascadeModel']

MIN_LEAVE = 0.01


class CascadeModel(nn.Module):
    """A timm model whose samples may exit early.

    Called, it keeps timm's contract: images (N, C, H, W) to logits (N, num_classes) in input order. In training
    mode, and until thresholds are set, it is the backbone and nothing else. What timm asks of a model beyond that
    (`forward_features`, `feature_info`, `get_classifier`, ...) is answered by the backbone.

    Example:
        >>> model = timm.create_model('hf-hub:me/cascade_resnet50.flowers', pretrained=True).eval()
        >>> model.set_max_drop(0.01)
        >>> logits, exit, confidence = model.predict(images)

    Args:
        backbone: A timm classifier.
        exits: How many, their cost fractions, or module names (see `backbone.resolve_exits`); or points known before.
        head: Preset or description of the exit heads (see `heads.head_configs`).
        thresholds: One confidence per exit; inf or None closes it.

    Attributes:
        backbone: The timm model.
        heads: Its exit heads, 0..M-1.
        dial: Calibration, threshold table and profiles: what thresholds are chosen from.
        min_leave: Share of a batch that must have left before it is cut: less saves no more time than the copy takes.
            What each image gets is the same; 0 cuts always. `timm-cascade profile cascade_resnet18` prints the share
            from which a cut pays as `cut_pays_from`: 1.2, 0.3 and 0.05 % at its exits (CPU, batch 64), less than one
            image of the batch; so by default, at 1 %, only larger batches ever go on uncut.
    """

    backbone: Any  # a timm model: an nn.Module with timm's methods, which have no type of their own

    def __init__(
        self,
        backbone: nn.Module,
        exits: int | Sequence[float] | Sequence[str] | Sequence[ExitPoint] = 3,
        head: HeadSpec = 'enhanced',
        thresholds: Sequence[float | None] | None = None,
    ) -> None:
        super().__init__()
        # every check comes before the backbone is touched
        known = [e for e in exits if isinstance(e, ExitPoint)] if isinstance(exits, Sequence) else []
        self._points = tuple(known) or tuple(resolve_exits(backbone, exits))  # type: ignore[arg-type]
        self._head_configs = head_configs(head, len(self._points))
        self.backbone = backbone
        if head == 'enhanced':  # by default heads stay cheap; a description is used unchanged
            self._head_configs = within_share(self._head_configs, self._points, self.num_classes)
        self.heads = create_heads(self._points, self.num_classes, self._head_configs)
        reference = next(backbone.parameters())
        self.heads.to(device=reference.device, dtype=reference.dtype)
        self.pretrained_cfg = dict(getattr(backbone, 'pretrained_cfg', None) or {})
        self.pretrained_cfg['architecture'] = f'cascade_{self.pretrained_cfg.get("architecture", "model")}'
        self.default_cfg = self.pretrained_cfg
        self.dial = Dial()
        self.published: Any = None  # hub.published.Published: the checkpoint the backbone was loaded from, unadapted
        self.base_model: str | None = None  # Hub id of what the backbone was made from, for model cards
        self._factory_args: dict[str, Any] = {}
        self._head_macs: list[int] | None = None
        self._router = Router(backbone, self._points)
        self._thresholds = [math.inf] * len(self._points)
        self.min_leave = MIN_LEAVE
        self.train(backbone.training)
        if thresholds is not None:
            self.thresholds = thresholds

    # ---- running it

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes), easy images from an early exit."""
        return self.predict(x).logits if self.any_open or self.compiled else self.backbone(x)

    def predict(self, x: Tensor) -> CascadeOutput:
        """Logits, the exit that answered and its confidence, for images (N, C, H, W), in their order.

        Raises:
            ValueError: Images of another shape or number of channels than the backbone's.
        """
        self._check(x)
        if not x.shape[0]:  # many networks crash on an empty batch
            empty = x.new_empty(0, dtype=torch.float32)
            return CascadeOutput(x.new_empty(0, self.num_classes), empty.long(), empty)
        open_exits = self._thresholds if self.any_open else [math.inf] * len(self._points)
        return self._router.route(self.backbone, x, list(self.heads), open_exits, self.min_leave)

    def stream(
        self,
        batches: Iterable[Any],
        *,
        batch_size: int | None = None,
        ordered: bool = True,
        max_held: int | None = None,
        accelerator: Accelerator | None = None,
    ) -> Iterator[StreamOutput]:
        """Predicts a long input with full batches in every stage: remaining samples of several batches go on together.

        Gradients are not kept. What was read before the input raised is answered before it is raised.

        Args:
            batches: Images (N, C, H, W), or tuples that begin with them: a data loader, or any iterable.
            batch_size: Samples that a stage runs on; by default as many as the first batch has.
            ordered: Results in the input's order, one for each batch (in parts where a batch is larger than
                `max_held`). Otherwise samples come as soon as they are answered, which holds none back.
            max_held: Most samples that are kept at once, waiting for a stage or, in order, for others' results; then
                stages run with fewer. By default 32 batches. Never more than M * `batch_size` of them keep a tap.
            accelerator: With several processes, each reads and answers every P-th batch of the same input; `index` is
                that in the whole. Where one of them fails, the others raise at their end.

        Raises:
            ValueError: Images that are not the backbone's, or numbers out of range.
            TypeError: A batch without images.
            RuntimeError: Another process failed.
        """
        thresholds = self._thresholds if self.any_open else [math.inf] * len(self._points)
        return stream(
            batches,
            runner=self.runner,
            prepare=self.as_images,
            heads=list(self.heads),
            thresholds=thresholds,
            batch_size=batch_size,
            ordered=ordered,
            max_held=max_held,
            accelerator=accelerator,
        )

    def runner(self, images: Tensor, early_exit: bool | None = None) -> Runner:
        """How the backbone runs images of this kind; see `inference.engine.Runner`.

        Args:
            images: (N, C, H, W), an example.
            early_exit: Whether samples may exit early; by default, whether an exit is open.
        """
        return self._router.runner(self.backbone, images, self.any_open if early_exit is None else early_exit)

    def as_images(self, x: Tensor) -> Tensor:
        """The batch on the model's device.

        Raises:
            ValueError: Not images of this backbone's kind.
        """
        self._check(x)
        return x.to(next(self.backbone.parameters()).device, non_blocking=True)

    def _check(self, x: Tensor) -> None:
        in_chans = self.in_chans
        if x.ndim != 4 or x.shape[1] != in_chans:
            raise ValueError(
                f'images are {tuple(x.shape)}; expected (N, {in_chans}, H, W). Convert them, or create '
                f'the model with in_chans={x.shape[1] if x.ndim == 4 else "..."}.'
            )

    def compile(  # type: ignore[override]
        self,
        enabled: bool = True,
        *,
        mode: str | None = None,
        batch_sizes: Sequence[int] = (),
        channels_last: bool | None = None,
        fold: bool = False,
        backend: str = 'inductor',
    ) -> CascadeModel:
        """Runs the backbone as stages between its exits, each compiled by itself, from now on.

        For inference: while gradients are asked for, and in training mode, everything runs as before. New weights are
        compiled anew when images come. Where the backbone cannot be exported or compiled it goes on eagerly, and a
        warning says why. Unlike nn.Module.compile this compiles at once, for images of the size the model was made for.

        Args:
            enabled: False goes back to the eager cascade.
            mode: Of torch.compile; by default its own on a CPU, and `max-autotune` on a GPU.
            batch_sizes: Numbers of images to compile for now rather than when they come. On a CPU one form does for all
                but a single image; on a GPU each size is compiled that CUDA graphs are padded to.
            channels_last: Convolutions in channels-last memory; by default where taps are feature maps.
            fold: Compute with the weights while compiling: batch norms go into convolutions. On a CPU it took three
                times as long to compile and ran no faster (resnet18, vit_small_patch16_224), so it is off.
            backend: Of torch.compile.

        Returns:
            The model itself.
        """
        from .inference.compiled import CompileOptions  # torch.export and the compiler are costly imports

        if channels_last is None:
            channels_last = any(p.layout == 'NCHW' for p in self._points)
        self._router.forget()
        self._router.options = CompileOptions(backend, mode, channels_last, fold) if enabled else None
        if enabled:
            weight = next(self.backbone.parameters())
            size = input_size_of(self.backbone)
            for n in batch_sizes or (2,):
                images = torch.zeros(n, *size, dtype=weight.dtype, device=weight.device)
                with torch.no_grad():
                    self.runner(images)(images, lambda index, boundary: None)
        return self

    @property
    def compiled(self) -> bool:
        """Whether `compile` is in force."""
        return self._router.options is not None

    def forward_exits(self, x: Tensor) -> list[Tensor]:
        """Every exit's logits, M+1 of (N, num_classes); no sample exits early."""
        logits, final = self._router.collect(self.backbone, x, list(self.heads))
        return [*logits, final]

    def forward_pooled(self, x: Tensor, pre_logits: bool = False) -> tuple[list[Tensor], Tensor]:
        """What each head classifies, M of (N, in_features), and the backbone's logits; no head's layers run.

        With `pre_logits` what the backbone's classifier gets, (N, head_hidden_size), takes the place of its logits.
        """
        run = self._pre_logits if pre_logits else self.backbone
        return self._router.collect(run, x, [head.pool for head in self._heads()])

    def _pre_logits(self, x: Tensor) -> Tensor:
        return self.backbone.forward_head(self.backbone.forward_features(x), pre_logits=True)

    def _heads(self) -> list[ExitHead]:
        return [head for head in self.heads if isinstance(head, ExitHead)]

    # ---- the dial

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
        from the same source falls by at most max_drop: for every setting of the dial at once, so it may be turned,
        compared and turned again. max_drop=0 opens exits only where they are certified to be no worse than the network.

        Warns of exits that save MACs but no time, where this machine was profiled (`timm_cascade.profile`).

        Args:
            max_drop: Acceptable loss of top-1 accuracy, absolute, as a fraction: 0.01 is one percentage point.
            rule: `certified`, `joint` or `per_exit`.
            level: Confidence level of the guarantee: it holds with at least this probability over the draw of the
                calibration set.
            reference: What counts as correct: `labels`, or `backbone` for the full network's own answers. Default:
                labels, where the calibration had any. `best` counts max_drop from the most accurate point of the path
                of thresholds instead of from the full network, where exits are better than it.
            cost: What to save: `macs`, or `time` as it was profiled on this machine.
            scope: `dial` for the guarantee at all settings at once; `setting` for this one alone, which is a little
                more permissive.

        Returns:
            The thresholds and what to expect of them.

        Raises:
            NotCalibratedError: There is neither a calibration nor a table to choose from; or, for `time`, no
                calibration or no profile of this machine.

        Example:
            >>> print(model.set_max_drop(0.01))
        """
        point = self.dial.choose(max_drop, rule, level, scope, reference, cost, self._setup)
        self.thresholds = point.thresholds
        for text in self.dial.exits_without_time(self.thresholds, self._setup):
            warnings.warn(text, stacklevel=2)
        return point

    def set_cost(self, fraction: float, reference: str | None = None, cost: str = 'macs') -> OperatingPoint:
        """Sets the most accurate thresholds that spend at most this share of the backbone's cost on average.

        Args:
            fraction: Share of the backbone's MACs, or of its time.
            reference: See `set_max_drop`.
            cost: `macs` or `time`.

        Raises:
            NotCalibratedError: As for `set_max_drop`.
        """
        point = self.dial.choose_by_cost(fraction, reference, cost, self._setup)
        self.thresholds = point.thresholds
        return point

    @property
    def calibration(self) -> Calibration | None:
        """What `timm_cascade.calibrate` measured, to choose thresholds from."""
        return self.dial.calibration

    @calibration.setter
    def calibration(self, value: Calibration | None) -> None:
        self.dial.calibration = value

    @property
    def table(self) -> ThresholdTable | None:
        """Operating points chosen before, for where there is no calibration."""
        return self.dial.table

    @table.setter
    def table(self, value: ThresholdTable | None) -> None:
        self.dial.table = value

    @property
    def profiles(self) -> list[Profile]:
        """Times of the model's parts, as `timm_cascade.profile` measured them."""
        return self.dial.profiles

    @profiles.setter
    def profiles(self, value: list[Profile]) -> None:
        self.dial.profiles = value

    def exits_without_time(self) -> list[str]:
        """Messages about open exits that save MACs but no time on this machine, by calibration and profile."""
        return self.dial.exits_without_time(self.thresholds, self._setup)

    def forget_calibration(self) -> None:
        """Closes all exits and drops calibration, table and profiles: they belong to other heads or classes."""
        self.dial.clear()
        self.thresholds = None

    @property
    def _setup(self) -> Setup:
        weight = next(self.parameters())
        return Setup(device_name(weight.device), str(weight.dtype).removeprefix('torch.'), self.compiled)

    @property
    def exits(self) -> tuple[ExitPoint, ...]:
        """The exit points, 0..M-1."""
        return self._points

    @property
    def any_open(self) -> bool:
        """Whether a sample can exit early now."""
        return not self.training and any(not math.isinf(t) for t in self._thresholds)

    @property
    def thresholds(self) -> Tensor:
        """(M,) float32 confidences; inf closes an exit."""
        return torch.tensor(self._thresholds, dtype=torch.float32)

    @thresholds.setter
    def thresholds(self, values: Tensor | Sequence[float | None] | None) -> None:
        if values is None:
            values = [None] * len(self._points)
        if isinstance(values, Tensor):
            values = values.tolist()
        numbers = [math.inf if v is None else float(v) for v in values]
        if not self.num_classes and not all(math.isinf(t) for t in numbers):
            raise ValueError('this model has no classes, so no exit can answer; reset_classifier(num_classes) first.')
        if len(numbers) != len(self._points):
            raise ValueError(
                f'{len(numbers)} thresholds for {len(self._points)} exits; give one an exit '
                f'({", ".join(p.module for p in self._points)}).'
            )
        if any(math.isnan(t) or t == -math.inf for t in numbers):
            raise ValueError(f'thresholds {numbers}: each is a confidence in 0..1, or inf to close the exit.')
        # kept as float32 values: a threshold is one of the confidences that were seen
        self._thresholds = [float(np.float32(t)) for t in numbers]

    # ---- what it costs, and which heads these are

    def head_macs(self) -> np.ndarray:
        """(M,) MACs of each head for one image; counted once."""
        if self._head_macs is None:
            self._head_macs = [backbone_macs(h, p.shape) for h, p in zip(self.heads, self._points, strict=True)]
        return np.array(self._head_macs, dtype=np.float64)

    def stage_macs(self) -> np.ndarray:
        """(M+1,) MACs of each stage for one image, its head included."""
        reached = np.array([0, *(p.macs for p in self._points), self._points[-1].total], dtype=np.float64)
        return np.diff(reached) + np.append(self.head_macs(), 0)

    def heads_hash(self) -> str:
        """Identifies exits and trained heads: a table made for others does not apply."""
        return state_digest(self.heads.state_dict(), also=[p.module for p in self._points])

    def provenance(self) -> dict[str, Any]:
        """What confidences follow from beside heads and images: weights of the backbone, dtype and transform.

        Calibrations and tables keep it, and are refused where it has changed.
        """
        config = resolve_input_data_config(self)
        return dict(
            backbone_digest=state_digest(self.backbone.state_dict()),
            dtype=str(next(self.parameters()).dtype).removeprefix('torch.'),
            input_size=list(config['input_size']),
            mean=list(config['mean']),
            std=list(config['std']),
            interpolation=config['interpolation'],
            crop_pct=config['crop_pct'],
        )

    # ---- timm's contract

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == 'backbone' or name.startswith('__'):  # not there yet: unpickling, or an __init__ that failed
                raise
            return getattr(self.backbone, name)

    @property
    def head_hidden_size(self) -> int:
        """Width of what the backbone's classifier reads."""
        return getattr(self.backbone, 'head_hidden_size', self.backbone.num_features)

    @cached_property  # every batch is checked against it, and timm's way to it takes as long as a small layer
    def in_chans(self) -> int:
        """Channels of the images."""
        return input_size_of(self.backbone)[0]

    def no_weight_decay(self) -> set[str]:
        """The backbone's parameters without weight decay, under their names here."""
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else set()
        return {f'backbone.{name}' for name in names}

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """The backbone's groups, for its parameters under their names here; heads match none, so they come last.

        A property, so that this model has it only where its backbone has: timm asks `hasattr`.
        """
        return nested_groups(self.backbone.group_matcher, 'backbone.')

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes, kept where timm's loader puts them."""
        names = self.pretrained_cfg.get('label_names')
        return list(names) if names else None

    @label_names.setter
    def label_names(self, names: Sequence[str] | None) -> None:
        self.pretrained_cfg['label_names'] = None if names is None else list(names)

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm writes to config.json and hands to the entrypoint again: resolved exits, heads and the dial."""
        return {
            **self._factory_args,
            'exits': [p.module for p in self._points],
            'head': self._head_configs,
            'thresholds': [None if t > 1 else max(t, 0.0) for t in self._thresholds],  # of a confidence, the same
        }

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        self._factory_args = {k: v for k, v in args.items() if k not in ('exits', 'head', 'thresholds')}

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """New classifier and new heads for `num_classes`; all exits are closed."""
        self.backbone.reset_classifier(num_classes, *args, **kwargs)
        reference = next(self.heads.parameters())
        training = self.heads.training
        self.heads = create_heads(self._points, num_classes, self._head_configs)
        self.heads.to(device=reference.device, dtype=reference.dtype).train(training)
        self._head_macs = None
        self._router.forget()
        self.label_names = None
        self.forget_calibration()

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a cascade's state, or the state of a plain timm backbone into `backbone`."""
        if state_dict and not any(key.startswith(('backbone.', 'heads.')) for key in state_dict):
            return self.backbone.load_state_dict(state_dict, strict=strict, assign=assign)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)
