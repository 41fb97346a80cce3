"""Loads a released cascade, states what accuracy may be lost, and measures what that saves.

Run it in the root of the repository: python scripts/examples/quickstart.py
"""

import timm_cascade

# a folder, or user/name on the Hub
model = timm_cascade.load('hub/releases/cascade_cifar_resnet20.fashion_mnist')
images = timm_cascade.load_data('hub/samples/fashion_mnist_test.parquet')

for max_drop in (0.0025, 0.005, 0.01, 0.02):
    model.set_max_drop(max_drop)
    report = timm_cascade.evaluate(model, images)
    print(
        f'allowed {100 * max_drop:.2f} points: '
        f'accuracy {report.accuracy:.1%}, backbone {report.full_accuracy:.1%}, '
        f'{1 - report.macs_share:.0%} of the computation saved'
    )
