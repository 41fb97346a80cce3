"""The model card of a release, from card_template.md: one for `save`, `push_to_hub` and scripts/releases/release.py."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import timm
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..backbone import input_size_of
from ..fronts import name_of
from ..model import CascadeModel
from ..utils.files import plain
from ..version import __version__

__all__ = ['GENERATED', 'PICTURE', 'PLACEHOLDER', 'members', 'render']

PLACEHOLDER = 'USER/REPOSITORY'  # until it is known where the card is published
PICTURE = 'tradeoff.png'
GENERATED = '<!-- written by timm_cascade, anew at every save; take this line out to keep what you write -->'


def render(
    model: CascadeModel,
    layout: str = 'full',
    name: str | None = None,
    picture: str | None = None,
    results: list[EvalResult] | None = None,
    metadata: Mapping[str, Any] | None = None,
    **measured: Any,
) -> str:
    """README.md from what the model knows: exits, table, calibration, where the backbone is from.

    Args:
        layout: `full` or `heads`.
        name: Name of the release; by default the model's.
        picture: File of the picture of accuracy against MACs, if there is one.
        results: Results in the metadata; by default the table's expectations.
        metadata: Fields of ModelCardData that replace what the model says (license, datasets, ...).
        **measured: Values of the template where there is a report of a test: see scripts/releases/cards.py.
    """
    base = name_of(model.backbone)
    name = name or f'cascade_{base}'
    points = [] if model.table is None else list(model.table.points)
    provenance = dict(model.table.provenance) if model.table else {}
    data = str(provenance.get('data') or '')
    certified = [p for p in points if p.rule == 'certified' and p.max_drop is not None]
    usual = next(iter(certified or [p for p in points if p.max_drop is not None]), None)
    dial = next((p for p in certified if p.max_drop == 0.01), usual)
    active = plain(model.thresholds.tolist())
    accuracy = [None] * (len(active) + 1) if model.calibration is None else model.calibration.correct.mean(0).tolist()
    exits = [
        dict(module=p.module, fraction=p.fraction, threshold=t, accuracy=a)
        for p, t, a in zip(model.exits, active, accuracy, strict=False)
    ]
    exits.append(dict(module='the whole network', fraction=1.0, threshold=0.0, accuracy=accuracy[-1]))
    versions = provenance.get('versions') or dict(timm_cascade=__version__, timm=timm.__version__)
    if results is None and data:
        results = [
            EvalResult(
                task_type='image-classification',
                dataset_type=_hub_id(data) or 'calibration',
                dataset_name=data,
                dataset_split=str(provenance.get('split') or '') or None,
                metric_type=kind,
                metric_name=f'{what}, {p.rule}, max_drop {p.max_drop:g}, expected',
                metric_value=round(100 * value, 2),
            )
            for p in points
            if p.max_drop is not None
            for kind, what, value in (('accuracy', 'top-1 %', p.accuracy), ('macs', 'MACs % of backbone', p.cost_share))
        ]
    fields: dict[str, Any] = dict(
        library_name='timm',
        pipeline_tag='image-classification',
        license=model.pretrained_cfg.get('license'),
        tags=['image-classification', 'timm', 'timm-cascade', 'early-exit'],
        datasets=[data] if _hub_id(data) else None,
        metrics=['accuracy'],
        model_name=name,
        eval_results=results or None,
    )
    if model.base_model:
        fields.update(base_model=model.base_model, base_model_relation='adapter' if layout == 'heads' else 'finetune')
    sizes = provenance.get('input_size')
    values: dict[str, Any] = dict(
        name=name,
        base=base,
        repo=PLACEHOLDER,
        picture=picture,
        marker=f'{GENERATED}\n',
        exits=exits,
        inner=len(model.exits) - len(model.fronts),
        members=members(model) if model.fronts else [],
        layout=layout,
        points=points,
        num_classes=model.num_classes,
        dial=dial,
        published=model.published if layout == 'heads' else None,
        backbone_macs=model.exits[-1].total,
        calibrated=model.calibration is not None,
        calibration_n=points[0].n if points else 0,
        level=(dial.level if dial and dial.level else 0.9),
        interval=100 * (dial.level if dial and dial.level else 0.9),
        data=f'{data} {provenance.get("split") or ""}'.strip(),
        transform='x'.join(map(str, sizes)) + f' in {provenance.get("dtype")}' if sizes else 'unknown transform',
        versions=', '.join(f'{k} {v}' for k, v in sorted(versions.items())),
        loaded_as='No exit fires until you set the dial.'
        if all(t is None for t in active)
        else 'It loads with the thresholds set that stand below.',
        report=None,
        recipe=None,
    )
    content = ModelCard.from_template(
        ModelCardData(**{**fields, **(metadata or {})}),
        **{**values, **measured},
        template_str=files(__package__).joinpath('card_template.md').read_text(encoding='utf-8'),
    ).content
    return re.sub(r'\n{3,}', '\n\n', content).rstrip() + '\n'


def _hub_id(name: str) -> str | None:
    return name if re.fullmatch(r'[\w-][\w.-]*/[\w-][\w.-]*', name) else None


def members(model: CascadeModel) -> list[dict[str, Any]]:
    """A row for each network, those in front first: what it reads and costs, how good it is, and its threshold.

    Returns:
        Dicts of network (name), weights (where they come from), size ('224x224'), parameters and macs (integers), share
        (of the large network's MACs), accuracy (on the calibration images, None without) and threshold (None: closed).
    """
    accuracy: list[float | None] = [None] * (len(model.exits) + 1)
    if model.calibration is not None:
        accuracy = [round(float(a), 4) for a in model.calibration.correct.mean(0)]
    total, size = model.exits[-1].total, input_size_of(model.backbone)[1:]
    networks = [(f.name, f.shared, f.published, f.size, f.inner, f.macs()) for f in model.fronts]
    networks.append((name_of(model.backbone), False, model.published, size, model.backbone, total))
    accuracies = [*accuracy[: len(networks) - 1], accuracy[-1]]
    thresholds = [*plain(model.thresholds.tolist())[: len(networks) - 1], None]
    return [
        dict(
            network=name,
            weights='of the large network' if shared else _source(published),
            size=f'{height}x{width}',
            parameters=0 if shared else sum(p.numel() for p in network.parameters()),
            macs=macs,
            share=round(macs / total, 4),
            accuracy=a,
            threshold=t,
        )
        for (name, shared, published, (height, width), network, macs), a, t in zip(
            networks, accuracies, thresholds, strict=True
        )
    ]


def _source(published: Any) -> str:
    return 'in the release' if published is None else published.hub_id or published.name
