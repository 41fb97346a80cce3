"""Gradio Space: copy it into a Space of the Gradio kind, with a requirements.txt that names timm-cascade[serve].

Set the variable RELEASE of the Space to the repository of a release.
"""

from __future__ import annotations

import os
from typing import Any

import gradio as gr

import timm_cascade
from timm_cascade.serving.service import Service

service = Service(timm_cascade.load(os.environ['RELEASE']))


def classify(image: Any, max_drop: float) -> tuple[dict[str, float], str]:
    """The best classes, and which exit answered."""
    if image is None:
        return {}, 'Choose an image.'
    try:
        asked = service.prepare(image, max_drop)
        answer = service.describe(asked, *service.answers([asked]))
    except timm_cascade.RequestError as e:
        return {}, str(e)
    scores = {s['label']: s['score'] for s in answer['scores']}
    last = answer['exit'] == len(service.model.exits)
    who = 'The whole network' if last else f'Exit {answer["exit"]}'
    return scores, f"{who} answered, for {answer['macs_fraction']:.1%} of the network's computation."


demo = gr.Interface(
    classify,
    [gr.Image(type='pil', label='Image'), gr.Slider(0, 0.05, 0.01, step=0.0025, label='Accuracy that may be given up')],
    [gr.Label(label='Classes'), gr.Textbox(label='Who answered')],
    title=service.model.pretrained_cfg['architecture'],
    flagging_mode='never',
)

if __name__ == '__main__':
    demo.launch()
