"""Labels many images with full batches in every stage: samples that go on wait for company from later batches."""

from collections import Counter

import timm_cascade
from timm_cascade.data import create_loader

model = timm_cascade.load('hub/releases/cascade_cifar_resnet20.fashion_mnist').eval()
model.set_max_drop(0.005)
images = timm_cascade.load_data('hub/samples/fashion_mnist_test.parquet')

exits, labels = Counter(), Counter()
for part in model.stream(create_loader(model, images, batch_size=64)):
    # one part per batch, in the order of the input: index, logits, exit and confidence of its images
    labels.update(model.label_names[i] for i in part.logits.argmax(1).tolist())
    exits.update(part.exit.tolist())

names = [*(f'exit {m}' for m in range(len(model.exits))), 'the whole network']
print('answered by', {names[m]: exits[m] for m in sorted(exits)})
print('labels', dict(labels.most_common(3)))
