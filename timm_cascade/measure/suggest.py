"""Which networks would save the most in front of a large one, told from one pass of each over labelled images."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import timm
import torch
from torch.utils.data import Dataset

from ..data import ImageData, check_labels, fingerprint_of, prepare_data
from ..errors import FrontError
from ..fronts import Front, check_names, create_fronts, network_named
from ..inference.request import unwrap
from ..inference.weights import calibrated_as, dtype_of
from ..model import CascadeModel
from ..thresholds.path import Choice
from ..thresholds.rule_certified import SETTINGS, certify
from ..thresholds.rule_joint import cross_fit, joint_choice
from ..thresholds.samples import FloatArray, Samples, check_max_drop
from ..utils.distributed import create_accelerator, on_main
from ..utils.files import replacing
from ..utils.progress import progress
from ..utils.timm_models import resolve_input_data_config
from .calibrate import Observed, observe

if TYPE_CHECKING:
    from accelerate import Accelerator

__all__ = ['MAX_DROPS', 'RULES', 'Suggestion', 'suggest']

MAX_DROPS = (0.005, 0.01, 0.02)
RULES = ('certified', 'joint')
FORMAT = 1  # of the files in a work_dir


@dataclass(frozen=True)
class Suggestion:
    """Networks in front and exits behind them, and what the dial would save with them.

    Attributes:
        front: The candidates as they were given, cheapest first: what `front=` of timm.create_model takes.
        names: Their names, with sizes.
        exits: Modules of the exits behind them.
        macs: MACs of each network in front, for one image.
        backbone_macs: MACs of the large network.
        accuracy: Share of all images that each network in front, each exit and the large network get right.
        saved: (rule, max_drop) to the share of the large network's MACs that is saved on average.
        drop: (rule, max_drop) to the loss of accuracy to be expected, a fraction.
    """

    front: tuple[Any, ...]
    names: tuple[str, ...]
    exits: tuple[str, ...]
    macs: tuple[int, ...]
    backbone_macs: int
    accuracy: tuple[float, ...]
    saved: Mapping[tuple[str, float], float]
    drop: Mapping[tuple[str, float], float]

    def rank(self) -> tuple[float, ...]:
        """What suggestions are ordered by: certified savings over all settings, then those of `joint`, then size."""
        totals = [sum(share for (rule, _), share in self.saved.items() if rule == r) for r in RULES]
        return (*totals, -len(self.names) - len(self.exits))


def suggest(
    model: Any,
    candidates: Sequence[Any],
    held_out: Dataset,
    *,
    exits: Sequence[str] | None = None,
    max_drops: Sequence[float] = MAX_DROPS,
    level: float = 0.9,
    pretrained: bool = True,
    cache_dir: str | Path | None = None,
    batch_size: int = 256,
    workers: int = 0,
    work_dir: str | Path | None = None,
    accelerator: Accelerator | None = None,
) -> list[Suggestion]:
    """What the dial would save with each candidate, each pair of them, and each of these with the model's own exits.

    The model runs once over the images, and so does each candidate, as a front runs: on the images that the large
    network reads, resized and normalised again. Everything else follows from the confidences. Nothing is trained and
    the model is not changed.

    What is certified holds for each suggestion by itself, not for the best of many: calibrate the one that you choose
    on other images before you rely on it.

    Args:
        model: A cascade without fronts; its backbone is the large network.
        candidates: Fronts as timm.create_model(..., front=) takes them: names with or without a size, timm models, or
            (model, size).
        held_out: Labelled images that none of the networks was trained on.
        exits: Modules of those of the model's exits that may be used too; by default all where their heads are trained,
            else none. Exits that do not pay are closed in any case.
        max_drops: Settings to compare, fractions of accuracy.
        level: Confidence level of `certified`.
        pretrained: Load the published weights of candidates that are named.
        cache_dir: See timm.create_model.
        batch_size: Images per batch, over all processes together.
        workers: Processes that decode images.
        work_dir: Folder for what each network said; a call that was interrupted continues there, and one with further
            candidates runs only these. None keeps nothing.
        accelerator: Yours, or one with defaults.

    Returns:
        Suggestions, best first.

    Raises:
        FrontError: A candidate that is not known, cannot be loaded or does not fit; the message says which and why.
            All are checked before the first runs.
        ValueError: No labels, other classes, a candidate that is given twice, numbers out of range.

    Example:
        >>> best = timm_cascade.suggest(model, ['mobilenetv3_small_100.lamb_in1k', 'resnet18.a1_in1k'], held_out)[0]
        >>> cascade = timm.create_model('cascade_resnet50.a1_in1k', pretrained=True, front=list(best.front), exits=0)
    """
    model = unwrap(model, CascadeModel)
    drops = sorted({check_max_drop(d) for d in max_drops})
    if model.fronts:
        raise FrontError(
            f'{model.fronts[0].name} stands in front of this cascade already; suggest compares networks in front of '
            f'one that has none. Pass CascadeModel(model.backbone, ...), and name that front among the candidates.'
        )
    inner = _chosen(model, exits)
    held_out = prepare_data(model, held_out)
    if isinstance(held_out, ImageData):  # before anything runs
        check_labels(held_out.labels, model.num_classes)
    title = getattr(held_out, 'title', type(held_out).__name__)

    def build(candidate: Any) -> Front:
        def named(name: str, size: tuple[int, int] | None) -> Any:
            return network_named(name, model.backbone, size, pretrained, cache_dir)

        (front,) = create_fronts([candidate], model.backbone, named)
        check_names(front, model.label_names or getattr(held_out, 'class_names', None), title)
        return front

    fronts = [_Candidate(c, build) for c in candidates]  # a network that is named is dropped again: many may be large
    if not fronts and not inner:
        raise ValueError('there is nothing to compare: no candidates, and no exits with trained heads.')
    for i, f in enumerate(fronts):
        if any(f.identity == other.identity for other in fronts[:i]):
            raise ValueError(f'{f.name} is among the candidates twice; give each network once.')
        if others := [x for x in fronts[:i] if x.name.partition('#')[0] == f.name]:  # two trained networks of one kind
            f.name += f'#{len(others) + 1}'
    fronts.sort(key=lambda f: f.macs)

    accelerator = accelerator or create_accelerator()
    store = _Store(None if work_dir is None else Path(work_dir), model, held_out, accelerator)

    def run(forward: Callable[[Any], Any], what: str, identity: list[Any]) -> Observed:
        return store.get(identity, lambda: observe(model, forward, held_out, batch_size, workers, accelerator, what))

    heads = model.heads_hash() if inner else ''
    last = run(model.forward_exits if inner else lambda x: [model.backbone(x)], 'the large network', [heads])
    check_labels(last.label, model.num_classes)
    seen = [run(f.forward_on(model), f.name, f.identity) for f in fronts]
    sets = [s for k in (0, 1, 2) for s in combinations(range(len(fronts)), k)]
    wanted = [(s, e) for s in sets for e in ([()], [(), inner])[bool(inner)] if s or e]
    return sorted(
        (
            _judge(model, [fronts[i] for i in s], e, [seen[i] for i in s], last, drops, level)
            for s, e in progress(wanted, 'the dial', accelerator.is_main_process)
        ),
        key=Suggestion.rank,
        reverse=True,
    )


class _Candidate:
    """A network that may stand in front: checked, and built again when it runs.

    Args:
        given: As the user gave it.
        build: Returns the checked front.
    """

    def __init__(self, given: Any, build: Callable[[Any], Front]) -> None:
        front = build(given)
        self.given, self.build = given, build
        self.name, self.macs = front.name, front.macs()
        images = [*front.size, front.interpolation, front.scale.flatten().tolist(), front.shift.flatten().tolist()]
        self.identity = [front.digest(), *images]

    def forward_on(self, model: CascadeModel) -> Callable[[torch.Tensor], list[torch.Tensor]]:
        """Images to its logits, on the model's device and in its precision; the network is built at the first call."""
        made: list[Front] = []

        def forward(images: torch.Tensor) -> list[torch.Tensor]:
            if not made:
                made.append(self.build(self.given).to(images.device, dtype_of(model.backbone)).eval())
            return [made[0](images)]

        return forward


class _Store:
    """What networks said about the images, one file per network, in the folder `suggest` of a work_dir."""

    def __init__(self, folder: Path | None, model: CascadeModel, data: Any, accelerator: Accelerator) -> None:
        self.folder, self.accelerator = None if folder is None else folder / 'suggest', accelerator
        if folder is None:
            return
        fingerprint = fingerprint_of(data)
        if fingerprint is None:
            raise ValueError(
                f'{type(data).__name__} has no attribute `fingerprint`, so what is stored in work_dir could not be '
                f'recognised as its own. Give it one (a text that changes with its images and its transform), or leave '
                f'work_dir out.'
            )
        self.common = dict(
            format=FORMAT,
            images=str(fingerprint),
            transform=str(resolve_input_data_config(model)),
            model=calibrated_as(model),
            precision=str(accelerator.mixed_precision),
            device=accelerator.device.type,
            versions=[timm.__version__, torch.__version__],
        )

    def get(self, identity: list[Any], run: Callable[[], Observed]) -> Observed:
        """What is stored under this identity; else what `run` returns, stored."""
        if self.folder is None:
            return run()
        key = hashlib.sha256(json.dumps([self.common, identity], sort_keys=True, default=str).encode()).hexdigest()
        path = self.folder / f'{key[:24]}.npz'
        if on_main(self.accelerator, path.is_file):
            try:
                with np.load(path, allow_pickle=False) as arrays:
                    return Observed(*(arrays[name] for name in Observed._fields))
            except Exception:  # half a file, or another's: whatever reading it raises, the network runs again
                pass
        found = run()
        if self.accelerator.is_main_process:
            with replacing(path) as temporary, open(temporary, 'wb') as file:
                np.savez(file, **found._asdict())
        return found


def _chosen(model: CascadeModel, exits: Sequence[str] | None) -> tuple[int, ...]:
    """Positions of the exits that may be used."""
    modules = [p.module for p in model.exits]
    if exits is None:
        trained = model.dial.path is not None or model.calibration is not None or 'trained_on' in vars(model)
        return tuple(range(len(modules))) if trained else ()
    if strange := [e for e in exits if e not in modules]:
        raise ValueError(f'exits has {strange[0]!r}; this cascade has {", ".join(modules)}.')
    return tuple(k for k, m in enumerate(modules) if m in exits)


def _judge(
    model: CascadeModel,
    fronts: Sequence[_Candidate],
    inner: tuple[int, ...],
    seen: Sequence[Observed],
    last: Observed,
    drops: Sequence[float],
    level: float,
) -> Suggestion:
    """What the dial would save with these fronts and exits."""
    columns = [*inner, -1]
    confidence = np.concatenate([*(s.confidence for s in seen), last.confidence[:, columns]], 1)
    answer = np.concatenate([*(s.answer for s in seen), last.answer[:, columns]], 1)
    points, macs, total = model.exits, [f.macs for f in fronts], model.exits[-1].total
    head = [*macs, *model.head_macs()[list(inner)]]
    reached = [0.0] * (1 + len(fronts)) + [float(points[k].macs) for k in inner] + [float(total)]
    samples = Samples(
        confidence=confidence,
        correct=answer == last.label[:, None],
        stage_cost=np.diff(reached) + np.array([*head, 0.0]),
        head_cost=np.array(head, dtype=np.float64),
        agreement=answer == answer[:, -1:],
    )
    alone = len(inner) == len(points) and not fronts  # then the path of the training features applies
    found = dict(_choices(samples, drops, level, model.dial.path if alone else None))
    return Suggestion(
        front=tuple(f.given for f in fronts),
        names=tuple(f.name for f in fronts),
        exits=tuple(points[k].module for k in inner),
        macs=tuple(macs),
        backbone_macs=total,
        accuracy=tuple(samples.correct.mean(0).tolist()),
        saved={key: 1 - c.measured.cost / total for key, c in found.items()},
        drop={key: c.measured.drop for key, c in found.items()},
    )


def _choices(
    samples: Samples, drops: Sequence[float], level: float, path: FloatArray | None
) -> Iterator[tuple[tuple[str, float], Choice]]:
    """What the dial chooses for each rule and setting, as `Calibration.point` does."""
    # settings above the largest that is asked for do not change what is certified below, and take the longest
    settings = {d: share for d, share in SETTINGS.items() if d <= max(drops)}
    certificate, fit = certify(samples, level, settings, path), cross_fit(samples, 0)
    for d in drops:
        yield ('certified', d), certificate.choice(d)
        yield ('joint', d), joint_choice(samples, d, 0, fit)
