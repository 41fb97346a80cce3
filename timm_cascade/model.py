"""The cascade: a timm backbone, its exit heads, and the dial that trades accuracy for computation."""
from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .backbone import ExitPoint, backbone_macs, input_size_of, resolve_exits
from .heads import ExitHead, HeadSpec, create_heads, head_configs, within_share
from .routing import CascadeOutput, Router
from .thresholds import Calibration, OperatingPoint, ThresholdTable

__all__ = ['CascadeModel', 'NotCalibratedError']

_ANCHOR = re.compile(r'(?<![\[\\])\^')


class NotCalibratedError(RuntimeError):
    """The dial was turned on a model that has neither a calibration nor a threshold table."""


class CascadeModel(nn.Module):
    """A timm model whose samples may leave early.

    Called, it keeps timm's contract: images (N, C, H, W) to logits (N, num_classes) in input order. In training
    mode, and until thresholds are set, it is the backbone and nothing else.

    Args:
        backbone: A timm classifier.
        exits: How many, their cost fractions, or module names (see `backbone.resolve_exits`); or points known before.
        head: Preset or description of the exit heads (see `heads.head_configs`).
        thresholds: One confidence an exit; inf or None closes it.
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
        if head == 'enhanced':  # by default heads stay cheap; a description is taken at its word
            self._head_configs = within_share(self._head_configs, self._points, self.num_classes)
        self.heads = create_heads(self._points, self.num_classes, self._head_configs)
        reference = next(backbone.parameters())
        self.heads.to(device=reference.device, dtype=reference.dtype)
        self.pretrained_cfg = dict(getattr(backbone, 'pretrained_cfg', None) or {})
        self.pretrained_cfg['architecture'] = f'cascade_{self.pretrained_cfg.get("architecture", "model")}'
        self.default_cfg = self.pretrained_cfg
        self.calibration: Calibration | None = None
        self.table: ThresholdTable | None = None
        self.published: Any = None  # hub.published.Published: the checkpoint the backbone was loaded from, unadapted
        self.base_model: str | None = None  # Hub id of what the backbone was made from, for model cards
        self._factory_args: dict[str, Any] = {}
        self._head_macs: list[int] | None = None
        self._router = Router(backbone, self._points)
        self._thresholds = [math.inf] * len(self._points)
        self.train(backbone.training)
        if thresholds is not None:
            self.thresholds = thresholds

    # ---- running it

    def forward(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) to logits (N, num_classes), easy images from an early exit."""
        return self.predict(x).logits if self.any_open else self.backbone(x)

    def predict(self, x: Tensor) -> CascadeOutput:
        """Logits, the exit that answered and its confidence, for images (N, C, H, W), in their order.

        Raises:
            ValueError: Images of another shape or number of channels than the backbone's.
        """
        in_chans = input_size_of(self.backbone)[0]
        if x.ndim != 4 or x.shape[1] != in_chans:
            raise ValueError(f'images are {tuple(x.shape)}; expected (N, {in_chans}, H, W). Convert them, or create '
                             f'the model with in_chans={x.shape[1] if x.ndim == 4 else "..."}.')
        if not len(x):  # many networks crash on an empty batch
            empty = x.new_empty(0, dtype=torch.float32)
            return CascadeOutput(x.new_empty(0, self.num_classes), empty.long(), empty)
        open_exits = self._thresholds if self.any_open else [math.inf] * len(self._points)
        return self._router.route(self.backbone, x, list(self.heads), open_exits)

    def forward_exits(self, x: Tensor) -> list[Tensor]:
        """Every exit's logits, M+1 of (N, num_classes); nobody leaves."""
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

    @property
    def exits(self) -> tuple[ExitPoint, ...]:
        """The exit points, 0..M-1."""
        return self._points

    @property
    def any_open(self) -> bool:
        """Whether a sample can leave early now."""
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
            raise ValueError(f'{len(numbers)} thresholds for {len(self._points)} exits; give one an exit '
                             f'({", ".join(p.module for p in self._points)}).')
        if any(math.isnan(t) or t == -math.inf for t in numbers):
            raise ValueError(f'thresholds {numbers}: each is a confidence in 0..1, or inf to close the exit.')
        # kept as float32 values: a threshold is one of the confidences that were seen
        self._thresholds = [float(np.float32(t)) for t in numbers]

    def set_max_drop(
            self,
            max_drop: float,
            rule: str = 'certified',
            level: float = 0.9,
            reference: str | None = None,
    ) -> OperatingPoint:
        """Sets the thresholds from the accuracy that may be given up.

        Args:
            max_drop: Acceptable loss of top-1 accuracy, absolute, as a fraction: 0.01 is one point.
            rule: `certified`, `joint` or `per_exit`.
            level: Confidence of the certificate.
            reference: What is right: `labels`, or `backbone` for what the full network answers. Default: labels,
                where the calibration had any.

        Raises:
            NotCalibratedError: There is neither a calibration nor a table to choose from.
        """
        dial = self._dial()
        point = dial.point(max_drop, rule=rule, level=level, reference=_reference(dial, reference))
        self.thresholds = point.thresholds
        return point

    def set_cost(self, fraction: float, reference: str | None = None) -> OperatingPoint:
        """Sets the most accurate thresholds that spend at most this share of the backbone's MACs on average.

        Raises:
            NotCalibratedError: There is neither a calibration nor a table to choose from.
        """
        dial = self._dial()
        point = dial.at_cost(fraction, reference=_reference(dial, reference))
        self.thresholds = point.thresholds
        return point

    def _dial(self) -> Calibration | ThresholdTable:
        dial = self.calibration if self.calibration is not None else self.table
        if dial is None:
            raise NotCalibratedError(
                'this cascade is not calibrated. Run timm_cascade.calibrate(model, held_out) or '
                '`timm-cascade calibrate FOLDER --data DATA` on images it was not trained on.')
        return dial

    def forget_calibration(self) -> None:
        """Closes all exits and drops calibration and table: they belong to other heads or classes."""
        self.calibration = self.table = None
        self.thresholds = None

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
        return hash_heads([p.module for p in self._points], self.heads.state_dict())

    # ---- timm's contract

    @property
    def label_names(self) -> list[str] | None:
        """Names of the classes, kept where timm's loader puts them."""
        names = self.pretrained_cfg.get('label_names')
        return list(names) if names else None

    @label_names.setter
    def label_names(self, names: Sequence[str] | None) -> None:
        self.pretrained_cfg['label_names'] = None if names is None else list(names)

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return getattr(self.backbone, 'head_hidden_size', self.num_features)

    @property
    def feature_info(self) -> Any:
        return self.backbone.feature_info

    @property
    def in_chans(self) -> int:
        return input_size_of(self.backbone)[0]

    @property
    def _traits(self) -> dict[str, Any]:
        return getattr(self.backbone, '_traits', {})

    @property
    def _model_args(self) -> dict[str, Any]:
        """What timm writes to config.json and hands to the entrypoint again: resolved exits, heads and the dial."""
        return {
            **self._factory_args,
            'exits': [p.module for p in self._points],
            'head': self._head_configs,
            'thresholds': [None if t > 1 else max(t, 0.) for t in self._thresholds],  # of a confidence, the same
        }

    @_model_args.setter
    def _model_args(self, args: Mapping[str, Any]) -> None:
        self._factory_args = {k: v for k, v in args.items() if k not in ('exits', 'head', 'thresholds')}

    def forward_features(self, x: Tensor) -> Tensor:
        return self.backbone.forward_features(x)

    def forward_head(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.backbone.forward_head(x, *args, **kwargs)

    def forward_intermediates(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.backbone.forward_intermediates(x, *args, **kwargs)

    def get_classifier(self) -> nn.Module:
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, *args: Any, **kwargs: Any) -> None:
        """New classifier and new heads for `num_classes`; the dial goes back to "nobody leaves"."""
        self.backbone.reset_classifier(num_classes, *args, **kwargs)
        reference = next(self.heads.parameters())
        training = self.heads.training
        self.heads = create_heads(self._points, num_classes, self._head_configs)
        self.heads.to(device=reference.device, dtype=reference.dtype).train(training)
        self._head_macs = None
        self._router.forget()
        self.label_names = None
        self.forget_calibration()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        names = self.backbone.no_weight_decay() if hasattr(self.backbone, 'no_weight_decay') else set()
        return {f'backbone.{name}' for name in names}

    @property
    def group_matcher(self) -> Callable[..., Any]:
        """The backbone's groups, for its parameters under their names here; heads match none, so they come last.

        A property, so that this model has it only where its backbone has: timm asks `hasattr`.
        """
        matcher = self.backbone.group_matcher

        def renamed(pattern: str) -> str:
            # timm matches from the start of a name, so anchors say nothing; behind a prefix they would never hold
            return rf'^backbone\.(?:{_ANCHOR.sub("", pattern)})'

        def group(coarse: bool = False) -> dict[str, Any] | Callable[[str], Any]:
            groups = matcher(coarse=coarse)
            if callable(groups):
                return lambda name: groups(name.removeprefix('backbone.')) if name.startswith('backbone.') else math.inf
            return {
                key: renamed(spec) if isinstance(spec, str) else spec and [(renamed(p), order) for p, order in spec]
                for key, spec in groups.items()}

        return group

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Loads a cascade's state, or the state of a plain timm backbone into `backbone`."""
        if state_dict and not any(key.startswith(('backbone.', 'heads.')) for key in state_dict):
            return self.backbone.load_state_dict(state_dict, strict=strict, assign=assign)
        return super().load_state_dict(state_dict, strict=strict, assign=assign)


def _reference(dial: Calibration | ThresholdTable, asked: str | None) -> str:
    labelled = dial.provenance.get('labelled', True)
    if asked == 'labels' and not labelled:
        raise ValueError('this cascade was calibrated without labels: accuracy cannot be promised, only agreement with '
                         'the full network. Use reference="backbone", or calibrate with labels.')
    return asked or ('labels' if labelled else 'backbone')


def hash_heads(exits: Sequence[str], state: Mapping[str, Tensor]) -> str:
    """Identifies exits (names of modules) and the state of their heads."""
    digest = hashlib.sha256(repr(list(exits)).encode())
    for name, tensor in sorted(state.items()):
        digest.update(f'{name} {tuple(tensor.shape)}'.encode())
        digest.update(tensor.detach().to('cpu', torch.float64).numpy().tobytes())
    return digest.hexdigest()[:16]
