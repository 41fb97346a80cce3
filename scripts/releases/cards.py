"""A release's model card: the library's own, with what was measured on test images."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import EvalResult

from timm_cascade import CascadeModel
from timm_cascade.hub.card import PICTURE, render
from timm_cascade.utils.files import write_text


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
            task_type='image-classification',
            dataset_type=data['dataset'],
            dataset_name=data['name'],
            dataset_split='test',
            metric_type=kind,
            metric_name=f'{name}, {r["rule"]}, max_drop {r["max_drop"]:g}',
            metric_value=round(100 * value, 2),
        )
        for r in report['rows']
        if r['rule'] == dial['rule']
        for kind, name, value in (
            ('accuracy', 'top-1 %', r['accuracy']),
            ('macs', 'MACs % of backbone', r['macs_share']),
        )
    ]
    exits = [
        dict(module=p.module, fraction=p.fraction, threshold=t, accuracy=a, share=s, answered=x)
        for p, t, a, s, x in zip(
            model.exits,
            active['thresholds'],
            report['every_exit']['accuracy'],
            active['exit_shares'],
            active['exit_accuracy'],
            strict=False,
        )
    ]
    exits.append(
        dict(
            module='the whole network',
            fraction=1.0,
            threshold=0.0,
            accuracy=active['full_accuracy'],
            share=active['exit_shares'][-1],
            answered=active['exit_accuracy'][-1],
        )
    )
    write_text(
        path,
        render(
            model,
            layout='heads' if model.published else 'full',
            name=recipe['name'],
            picture=PICTURE if (path.parent / PICTURE).exists() else None,
            results=results,
            # only an id is a data set to the Hub
            metadata=dict(
                license=recipe['model']['licence'], datasets=[data['dataset']] if '/' in data['dataset'] else None
            ),
            marker='',
            dial=dial,
            report=report,
            exits=exits,
            points=[],
            recipe=yaml.safe_dump({k: v for k, v in recipe.items() if k != 'about'}, sort_keys=False).strip(),
            about=recipe.get('about', '').strip(),
            finetuned='finetune' in recipe['backbone'],
            dataset=data['dataset'],
            test_split=data['test'],
            train_split=data['train'],
            calibration_split=data['calibration'],
            full_accuracy=active['full_accuracy'],
            device=device_name(),
            loaded_as=f'It loads with `max_drop={dial["max_drop"]}`, rule `{dial["rule"]}`, already set.',
        ),
    )
