"""Early exits for a network that you fine-tuned with timm.

flowers/ holds train/, validation/ and test/, each with one folder of images per class; the network was trained on
flowers/train, and neither the network nor anything else has seen flowers/validation.
"""

import timm

import timm_cascade  # registers cascade_<name> for every timm model

model = timm.create_model('cascade_resnet50', num_classes=5, exits=5, checkpoint_path='finetuned.safetensors')
train, held_out, test = (timm_cascade.load_data('flowers', split) for split in ('train', 'validation', 'test'))

timm_cascade.train_heads(model, train)  # the backbone stays as it is and runs over the images once
timm_cascade.calibrate(model, held_out)
timm_cascade.save(model, 'cascade_resnet50.flowers')

print(model.set_max_drop(0.01))  # what to expect when one point of accuracy may be lost
report = timm_cascade.evaluate(model, test)
print(f'test: {report.accuracy:.1%} (backbone {report.full_accuracy:.1%}), {report.macs_share:.0%} of its computation')
