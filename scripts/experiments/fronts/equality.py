"""With a network in front, remaining images get the large network's own logits: ten pairs of real sizes."""

from __future__ import annotations

from typing import Any

import timm
import torch

import timm_cascade  # noqa: F401  registers the cascades
from timm_cascade.inference.batch import confidence

# the large network, and what stands in front of it
PAIRS = [
    ('resnet50', 'mobilenetv3_small_100'),
    ('resnet50', 'resnet50@160'),
    ('tf_efficientnet_lite2', 'tf_efficientnet_lite0'),
    ('vit_small_patch16_224', 'vit_tiny_patch16_224'),
    ('vit_small_patch16_224', 'efficientnet_b0'),
    ('convnext_tiny', 'resnet18'),
    ('swin_tiny_patch4_window7_224', 'mobilenetv4_conv_small'),
    ('regnety_032', 'regnety_004@160'),
    ('densenet121', 'ghostnetv2_100'),
    ('caformer_s18', 'levit_128s'),
]


def equality(pairs: list[tuple[str, str]] | None = None, images: int = 6) -> list[dict[str, Any]]:
    """For each pair, with random weights, the images that remain, and how far their logits are from those alone.

    Returns:
        Dicts of large, front, remaining (images), deviation (largest difference, as a share of the standard deviation
        over images) and equal (below 1e-3).
    """
    rows = []
    for large, front in pairs or PAIRS:
        torch.manual_seed(0)
        model = timm.create_model(f'cascade_{large}', front=front, exits=0).eval()
        size = timm.data.resolve_model_data_config(model)['input_size']
        x = torch.randn(images, *size) * torch.linspace(0.2, 3, images)[:, None, None, None]
        with torch.no_grad():
            ordered = confidence(model.fronts[0](x)).sort().values
            model.thresholds = [float(ordered[images // 2 - 1 : images // 2 + 1].double().mean())]
            out = model.predict(x)
            alone = model.backbone(x)
        stays = out.exit == 1
        spread = alone.std(0).mean()
        worst = float((out.logits - alone)[stays].abs().max() / spread)
        rows.append(
            dict(large=large, front=front, remaining=int(stays.sum()), deviation=worst, equal=worst < 1e-3, of=images)
        )
    return rows
