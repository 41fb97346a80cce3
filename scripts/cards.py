"""Writes a release's model card from hub/card_template.md."""
from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from timm_cascade import CascadeModel
from timm_cascade.files import write_text

TEMPLATE = Path(__file__).parent.parent / 'hub' / 'card_template.md'


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f'{torch.get_num_threads()} CPU cores ({platform.machine()})'


def write_card(model: CascadeModel, recipe: dict[str, Any], report: dict[str, Any], path: Path) -> None:
    """The card, with the measured operating points in its metadata too."""
    dial, data = recipe['dial'], recipe['data']
    active = next(r for r in report['rows'] if r['rule'] == dial['rule'] and r['max_drop'] == dial['max_drop'])
    results = [
        EvalResult(
            task_type='image-classification', dataset_type=data['dataset'], dataset_name=data['name'],
            dataset_split='test', metric_type=kind, metric_name=f'{name}, {r["rule"]}, max_drop {r["max_drop"]:g}',
            metric_value=round(100 * value, 2))
        for r in report['rows'] if r['rule'] == dial['rule']
        for kind, name, value in (
            ('accuracy', 'top-1 %', r['accuracy']), ('macs', 'MACs % of backbone', r['macs_share']))]
    card_data = ModelCardData(
        library_name='timm', pipeline_tag='image-classification', license=recipe['model']['licence'],
        tags=['image-classification', 'timm', 'timm-cascade', 'early-exit'], datasets=[data['dataset']],
        metrics=['accuracy'], model_name=recipe['name'], eval_results=results)
    exits = [
        dict(module=p.module, fraction=p.fraction, threshold=t, accuracy=a, share=s, answered=x)
        for p, t, a, s, x in zip(model.exits, active['thresholds'], report['every_exit']['accuracy'],
                                 active['exit_shares'], active['exit_accuracy'], strict=False)]
    exits.append(dict(module='the whole network', fraction=1., threshold=math.nan, accuracy=active['full_accuracy'],
                      share=active['exit_shares'][-1], answered=active['exit_accuracy'][-1]))
    exits[-1]['threshold'] = 0.
    assert model.calibration is not None
    card = ModelCard.from_template(
        card_data, template_path=str(TEMPLATE), name=recipe['name'], repo=f'USER/{recipe["name"]}',
        base=recipe['model']['base'], recipe_name=recipe['name'], max_drop=dial['max_drop'], rule=dial['rule'],
        num_classes=model.num_classes, n=report['n'], dataset=data['dataset'], test_split=data['test'],
        train_split=data['train'], calibration_split=data['calibration'],
        calibration_n=len(model.calibration.confidence), full_accuracy=active['full_accuracy'],
        backbone_macs=model.exits[-1].total, device=device_name(), rows=report['rows'], exits=exits,
        recipe=yaml.safe_dump(recipe, sort_keys=False).strip(),
        versions=', '.join(f'{k} {v}' for k, v in model.calibration.provenance['versions'].items()))
    write_text(path, card.content.rstrip() + '\n')
