"""Fashion-MNIST (Zalando SE, MIT licence), from the first place that has it.

    python scripts/datasets/fashion_mnist.py

writes the 1,000 test images that the repository ships for machines that have neither package nor network.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from timm_cascade.data import ImageData, load_data
from timm_cascade.utils.files import replacing

CLASSES = ['T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot']
DEBIAN = Path('/usr/share/datasets/fashion-mnist')  # where Debian's package dataset-fashion-mnist puts it
NAME = 'Fashion-MNIST'
HUB = 'zalando-datasets/fashion_mnist'
SAMPLE = Path(__file__).resolve().parents[2] / 'hub' / 'samples' / 'fashion_mnist_test.parquet'


def load(split: str) -> ImageData:
    """`train` or `test`, with an optional slice, from Debian's package or else the Hub."""
    data = load_data(DEBIAN if DEBIAN.is_dir() else HUB, split)
    data.class_names = CLASSES
    return data


def load_test() -> ImageData:
    """The test images: Debian's package, the Hub, or the 1,000 of them that the repository ships."""
    if not DEBIAN.is_dir():
        from huggingface_hub import HfApi

        try:  # one quick question, so that a machine without network does not wait for retries
            HfApi().dataset_info(HUB, timeout=5)
        except Exception:
            data = load_data(SAMPLE)
            data.source, data.split = f'{NAME}, sample in the repository', 'test'
            return data
    return load('test')


def write_sample(n: int = 1000, seed: int = 0) -> None:
    """`n` test images, drawn without replacement, as one parquet file."""
    import datasets

    data = load('test')
    chosen = np.sort(np.random.default_rng(seed).permutation(len(data))[:n])
    features = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=CLASSES)))
    columns = dict(image=[data[i][0] for i in chosen], label=data.labels[chosen].tolist())
    with replacing(SAMPLE) as path:
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)


if __name__ == '__main__':
    write_sample()
    print(SAMPLE)
