"""Publishes a cascade on the Hub, and loads it again with timm alone.

python scripts/examples/sharing.py ME/cascade_cifar_resnet20.fashion_mnist     (needs a token: hf auth login)
"""

import sys

import timm

import timm_cascade

name = sys.argv[1]
model = timm_cascade.load('hub/releases/cascade_cifar_resnet20.fashion_mnist')
model.set_max_drop(0.01)  # the setting travels with the release

pushed = timm_cascade.push_to_hub(model, name, private=True)
print(f'{pushed.url}: {", ".join(pushed.files)}')
print('again:', timm_cascade.push_to_hub(model, name).files or 'nothing differs')

loaded = timm.create_model(f'hf-hub:{name}', pretrained=True).eval()
print(f'loaded with {len(loaded.exits)} exits; thresholds {[round(t, 3) for t in loaded.thresholds.tolist()]}')
