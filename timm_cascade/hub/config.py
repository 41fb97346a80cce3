"""config.json of a release, checked: it comes from outside, and timm hands its model_args to a model's constructor.

The file is timm's own, so timm's loader opens it. What this library adds stands under `cascade`; a repository that
timm's own `push_to_hf_hub` made has no such key, and loads too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import timm
from timm.models import PretrainedCfg

from ..backbone import ExitPoint
from ..errors import ReleaseError
from .front_networks import FrontConfig
from .pretrained import NO_SOURCE, Published

__all__ = ['LAYOUTS', 'OWN_ARGS', 'ReleaseConfig', 'parse_config']

LAYOUTS = ('full', 'heads')
OWN_ARGS = ('exits', 'head', 'thresholds', 'front')  # model_args that are the cascade's and not the backbone's


@dataclass(frozen=True)
class ReleaseConfig:
    """A checked config.json.

    Attributes:
        base: timm's name of the backbone.
        num_classes: Number of classes of the classifier and the heads.
        model_args: Arguments for the model, `exits`, `head` and `thresholds` among them.
        pretrained_cfg: timm's, with the labels and without where weights come from.
        layout: `full` or `heads`.
        version: Format version; None in a repository that this library did not write.
        files: sha256 and size of every file that is loaded; None in older formats.
        points: Exit points in the backbone; None in a repository that this library did not write.
        fronts: Networks in front of it.
        heads_hash: Identifies the heads in the weights file; None likewise.
        digest: Identifies the backbone's weights in a full release; None likewise.
        published: The backbone of a release of heads only.
        base_model: Hub id of what the backbone was made from, if that is known.
    """

    base: str
    num_classes: int
    model_args: dict[str, Any]
    pretrained_cfg: dict[str, Any]
    layout: str
    version: int | None
    files: Mapping[str, tuple[str, int]] | None
    points: tuple[ExitPoint, ...] | None
    fronts: tuple[FrontConfig, ...]
    heads_hash: str | None
    digest: str | None
    published: Published | None
    base_model: str | None

    @property
    def input_size(self) -> tuple[int, ...]:
        """(channels, height, width) of the images it was made for."""
        return tuple(self.pretrained_cfg['input_size'])

    @property
    def exit_names(self) -> list[str]:
        """The module of each exit, fronts first."""
        return [*(f'front:{f.name}' for f in self.fronts), *self.model_args['exits']]

    @property
    def stored_fronts(self) -> dict[int, FrontConfig]:
        """By number, the fronts whose weights are in the release."""
        return {k: f for k, f in enumerate(self.fronts) if f.is_stored(self.layout)}

    @property
    def backbone_args(self) -> dict[str, Any]:
        """What stands in model_args for the backbone."""
        return {k: v for k, v in self.model_args.items() if k not in OWN_ARGS}


def parse_config(text: str, source: str = 'config.json') -> ReleaseConfig:
    """Reads config.json.

    Raises:
        ReleaseError: Not a cascade's, of a newer format, or with values that cannot be right.
    """
    from ..formats import ConfigFile, HeadsEntry, parse, values_of

    file = parse(ConfigFile, text, source, ReleaseError)
    architecture = file.architecture[:100]
    if not architecture.startswith('cascade_'):
        raise ReleaseError(f'{source}: architecture is {architecture!r}, which is not a cascade.')
    if not timm.is_model(architecture):
        raise ReleaseError(
            f'{source}: architecture is {architecture!r}, which this version of timm does not know; upgrade timm.'
        )
    base = architecture.removeprefix('cascade_')
    cfg = file.pretrained_cfg.model_dump(exclude_unset=True)
    unknown = sorted(set(cfg) - {f.name for f in fields(PretrainedCfg)})
    if unknown:
        raise ReleaseError(f'{source}: pretrained_cfg has keys that timm does not know: {str(unknown)[:200]}.')
    args = file.model_args.model_dump(exclude_unset=True)
    cfg['num_classes'] = file.num_classes
    channels = args.get('in_chans')
    if file.cascade is None and isinstance(channels, int) and 0 < channels < 10_000:
        cfg['input_size'] = (channels, *cfg['input_size'][1:])  # before 1.0.31 timm itself saves the checkpoint's
    labels = {key: getattr(file, key) or cfg.get(key) for key in ('label_names', 'label_descriptions')}
    cascade = file.cascade
    published = base_model = digest = None
    if isinstance(cascade, HeadsEntry):
        published = Published.from_entry(cascade.backbone, base, source)
        base_model = published.hub_id
    elif cascade is not None:
        digest, base_model = cascade.backbone.digest, cascade.backbone.base_model
    return ReleaseConfig(
        fronts=tuple(FrontConfig.from_entry(f, source) for f in cascade.fronts) if cascade else (),
        base=base,
        num_classes=file.num_classes,
        model_args=args,
        layout=cascade.layout if cascade else 'full',
        version=cascade.format_version if cascade else None,
        files={k: (f.sha256, f.size) for k, f in cascade.files.items()} if cascade and cascade.files else None,
        pretrained_cfg={
            **{k: v for k, v in cfg.items() if k not in NO_SOURCE},
            **{k: v for k, v in labels.items() if v},
        },
        points=tuple(ExitPoint(**values_of(e)) for e in cascade.exits) if cascade else None,
        heads_hash=cascade.heads_hash if cascade else None,
        digest=digest,
        published=published,
        base_model=base_model,
    )
