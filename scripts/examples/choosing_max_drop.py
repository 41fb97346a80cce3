"""Compares settings of the dial before any of them is used: what each may lose, and what it is expected to save.

The figures come from the calibration that travels with the release; no image is read.
"""

import warnings

import timm_cascade

model = timm_cascade.load('hub/releases/cascade_cifar_resnet20.fashion_mnist')
warnings.simplefilter('ignore')  # a setting too strict to be certified opens no exit, which the table shows

print('allowed   expected   computation   exit shares')
for max_drop in (0.001, 0.0025, 0.005, 0.01, 0.02, 0.05):
    point = model.set_max_drop(max_drop)
    shares = ' '.join(f'{share:4.0%}' for share in point.exit_shares)
    print(f'{max_drop:7.2%} {point.drop:10.2%} {point.cost_share:13.1%}   {shares}')

point = model.set_cost(0.25)  # or the other way round: spend at most a quarter of the backbone's computation
print(f'a quarter of the computation: {point.drop:.2%} expected to be lost')
