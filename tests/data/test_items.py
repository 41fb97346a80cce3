"""What data sets of other libraries yield, and what is said of it."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset, random_split

import timm_cascade
from timm_cascade.data import ImageData, create_loader, fingerprint_of, prepare_data
from timm_cascade.data.items import class_names_of, resolve

GREY = (1, 16, 16)


class Listed(torch.utils.data.Dataset):
    def __init__(self, *items):
        self.items = items

    def __getitem__(self, index):
        return self.items[index]

    def __len__(self):
        return len(self.items)


class Streamed(IterableDataset):
    def __init__(self, *items):
        self.items = items

    def __iter__(self):
        return iter(self.items)


# ---- parts and joins of our own


@pytest.mark.parametrize(
    'part',
    [
        lambda d: Subset(d, [5, 3, 1]),
        lambda d: Subset(Subset(d, range(9, -1, -1)), [4, 6, 8]),
        lambda d: Subset(ConcatDataset([Subset(d, range(5)), Subset(d, range(5, 96))]), np.array([5, 3, 1])),
        lambda d: ConcatDataset([Subset(d, [5]), ConcatDataset([Subset(d, [3, 1])])]),
    ],
)
def test_parts_and_joins_are_what_they_are_parts_of(small, images, part):
    data = resolve(part(images))
    assert isinstance(data, ImageData) and data.class_names == images.class_names and data.source == images.source
    assert data.labels.tolist() == images.labels[[5, 3, 1]].tolist()
    assert all(np.array_equal(np.asarray(data[i][0]), images.images[k]) for i, k in enumerate((5, 3, 1)))
    assert data.fingerprint is not None and data.fingerprint != images.fingerprint
    x, y = next(iter(create_loader(small, part(images))))
    assert x.shape == (3, *GREY) and y.tolist() == data.labels.tolist()


def test_the_transform_stays_with_a_part(images):
    seen = images.with_transform(lambda image: torch.full(GREY, 7.0))
    assert resolve(Subset(ConcatDataset([seen, seen]), [100]))[0][0].mean() == 7


def test_random_split_through_every_function(small, images, tmp_path):
    train, held = random_split(images, [0.5, 0.5], generator=torch.Generator().manual_seed(0))
    timm_cascade.train_heads(small, train, held, epochs=1, views=2, cache=tmp_path)
    assert small.label_names == images.class_names
    timm_cascade.calibrate(small, held)
    assert timm_cascade.evaluate(small.eval(), held).n == 48


def test_a_subclass_of_subset_may_do_more_than_select(small, images):
    class Inverted(Subset):
        def __getitem__(self, index):
            image, label = super().__getitem__(index)
            return image.point(lambda v: 255 - v), label

        def __getitems__(self, indices):
            return [self[i] for i in indices]

    plain = next(iter(create_loader(small, Subset(images, [0]))))[0]
    inverted = next(iter(create_loader(small, Inverted(images, [0]))))[0]
    assert not torch.equal(plain, inverted)


def test_joins_of_other_classes(images):
    other = ImageData(images.images, images.labels, list('abce'), 'others')
    fewer = ImageData(images.images[:2], [0, 1], ['d', 'b'], 'fewer')
    with pytest.raises(ValueError, match='others has the classes e'):
        resolve(ConcatDataset([images, other]))
    assert resolve(ConcatDataset([images, fewer])).labels[-2:].tolist() == [3, 1]
    seen = [d.with_transform(lambda image: torch.zeros(GREY)) for d in (images, other)]
    with pytest.raises(ValueError, match='different classes are joined'):
        prepare_data(timm.create_model('cascade_test_resnet', num_classes=4), ConcatDataset(seen))


# ---- folders and data sets of others


@pytest.fixture
def folder(tmp_path):
    for name in ('b2', 'b10'):
        (tmp_path / name).mkdir()
        Image.new('RGB', (20, 20), (len(name) * 50, 0, 0)).save(tmp_path / name / '1.png')
    return tmp_path


def test_folders_of_torchvision_and_timm(folder):
    model = timm.create_model('cascade_test_resnet', num_classes=2)
    transform = timm_cascade.data.eval_transform(model)
    for make, order in ((torchvision.datasets.ImageFolder, ['b10', 'b2']), (ImageDataset, ['b2', 'b10'])):
        raw, seen = make(str(folder)), make(str(folder), transform=transform)
        assert class_names_of(raw) == class_names_of(seen) == class_names_of(Subset(seen, [0])) == order
        assert isinstance(resolve(raw), ImageData) and resolve(raw).fingerprint and resolve(seen) is seen
        (x, y), (x2, y2) = (next(iter(create_loader(model, d))) for d in (raw, seen))
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_data_sets_of_the_hubs_library(small):
    features = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=list('abcd'))))
    pictures = [Image.new('L', (16, 16), 60 * k) for k in range(4)]
    table = datasets.Dataset.from_dict(dict(image=pictures, label=[0, 1, 2, 3]), features=features)
    data = prepare_data(small, table)
    assert data.class_names == list('abcd') and data.labels.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r'splits .*train'):
        prepare_data(small, datasets.DatasetDict(train=table))
    assert len(timm_cascade.load_data(datasets.DatasetDict(train=table, test=table), 'test[1:]')) == 3
    formed = table.with_transform(
        lambda rows: dict(pixel_values=[torch.zeros(GREY)] * len(rows['label']), label=rows['label'])
    )
    assert next(iter(create_loader(small, prepare_data(small, formed))))[1].tolist() == [0, 1, 2, 3]
    assert class_names_of(formed) == list('abcd')
    streamed = prepare_data(small, table.to_iterable_dataset())
    x, y = next(iter(create_loader(small, streamed)))
    assert x.shape == (4, *GREY) and y.tolist() == [0, 1, 2, 3]


# ---- one look at what comes


X, PIL = torch.zeros(GREY), Image.new('RGB', (9, 7), (1, 2, 3))


@pytest.mark.parametrize(
    'item, label',
    [
        ((X, 2), 2),
        ([X.double(), torch.tensor(2)], 2),
        ((X.half(), np.int64(2)), 2),
        ((X.numpy(), np.array([2])), 2),
        ((PIL, True), 1),
        ((PIL, None), -1),
        ((np.zeros((9, 7), np.uint8), 3), 3),
        ((np.zeros((9, 7, 3), np.uint8), torch.tensor([3])), 3),
        ((np.zeros((9, 7, 1), np.uint8), 3), 3),
        ((X, 1, dict(path='a')), 1),
        (dict(image=PIL, label=2), 2),
        (dict(pixel_values=X, labels=2, id=17), 2),
        (dict(img=X, fine=2), 2),
    ],
)
def test_items_that_are_understood(small, item, label):
    x, y = next(iter(create_loader(small, prepare_data(small, Listed(item)))))
    assert x.shape == (1, *GREY) and x.dtype == torch.float32 and y.tolist() == [label] and y.dtype == torch.int64


@pytest.mark.parametrize(
    'item, message',
    [
        ((X, torch.rand(4)), r'float32 tensor of shape \(4,\) as label.*no class has a confidence'),
        ((X, [0, 1, 0, 1]), 'list as label.*argmax'),
        ((X, 1.0), r'float 1.0 as label.*int\(label\)'),
        ((X, 'cat'), "the text 'cat' as label.*names.index"),
        ((X, 4), r'first label of Listed is 4; the model has the classes 0\.\.3'),
        ((X, -2), 'first label of Listed is -2'),
        ((X,), 'without a label.*yield -1'),
        (X, r'shape \(1, 16, 16\) without a label'),
        ((X.expand(3, 16, 16), 1), r'shape \(3, 16, 16\) as image.*in_chans='),
        ((X[None], 1), 'These are batches'),
        (((X * 255).byte(), 1), 'uint8 tensor.*Normalise'),
        ((np.zeros((3, 9, 7), np.uint8), 1), 'channels last'),
        (('a.png', 1), "str 'a.png' as image.*Decode"),
        ((PIL, PIL, 1), '3 values .*Yield the two'),
        (dict(image=PIL, left=1, right=2), 'a dict with image .*left .*label_column'),
        (dict(a=X, b=X, label=1), 'cannot be told'),
    ],
)
def test_items_that_are_not_say_what_was_seen(small, images, item, message):
    before = [p.clone() for p in small.parameters()]
    for call in (timm_cascade.train_heads, timm_cascade.calibrate, timm_cascade.evaluate):
        with pytest.raises(ValueError, match=f'(?s){message}'):
            call(small, Listed(item, item))
    assert all(torch.equal(a, b) for a, b in zip(before, small.parameters(), strict=True))
    assert small.calibration is None


@pytest.mark.parametrize(
    'data, message',
    [
        (DataLoader(TensorDataset(X[None], torch.tensor([0]))), r'loader\.dataset'),
        (torch.zeros(4, *GREY), 'TensorDataset'),
        ('flowers', 'load_data'),
        (None, 'NoneType is not a data set'),
        (Listed(), 'holds no images'),
        (Streamed(), 'holds no images'),
    ],
)
def test_what_is_no_data_set(small, data, message):
    with pytest.raises(ValueError, match=message):
        timm_cascade.calibrate(small, data)


def test_data_that_only_stream(small):
    data = Streamed(*((torch.randn(GREY), k % 4) for k in range(8)))
    timm_cascade.calibrate(small, data, batch_size=4)
    assert timm_cascade.evaluate(small.eval(), data).n == 8
    with pytest.raises(ValueError, match='front to back'):
        timm_cascade.train_heads(small, data, epochs=1)


def test_images_of_different_sizes_in_one_batch(small):
    with pytest.raises(ValueError, match=r'different shapes: \(1, 16, 16\), \(1, 8, 8\)'):
        timm_cascade.calibrate(small, Listed((X, 0), (torch.zeros(1, 8, 8), 1)))


def test_labels_that_are_missing_or_of_other_classes_later_on(small):
    with pytest.raises(ValueError, match='some images have no label'):
        timm_cascade.evaluate(small, TensorDataset(torch.randn(3, *GREY), torch.tensor([0, -1, 2])))
    with pytest.raises(ValueError, match='labels go from 0 to 9'):
        timm_cascade.evaluate(small, TensorDataset(torch.randn(3, *GREY), torch.tensor([0, 9, 2])))


@pytest.mark.parametrize('call', [timm_cascade.train_heads, timm_cascade.calibrate, timm_cascade.evaluate])
def test_a_single_output_is_refused_with_the_reason(call):
    one = timm.create_model('cascade_test_resnet', num_classes=1)
    with pytest.raises(ValueError, match=r'softmax is always 1.*num_classes=2'):
        call(one, TensorDataset(torch.randn(4, 3, 160, 160), torch.zeros(4, dtype=torch.long)))


def test_fingerprints_of_parts_of_others(images):
    class Known(Listed):
        fingerprint = 'known'

    data = Known(*range(9))
    parts = [Subset(data, [1, 2]), Subset(data, [2, 1]), ConcatDataset([Subset(data, [1]), Subset(data, [2])]), data]
    assert len({fingerprint_of(p) for p in parts}) == 4 and None not in map(fingerprint_of, parts)
    assert fingerprint_of(Subset(Listed(1), [0])) is None
    moved = images.with_classes(['d', *'abc'])
    assert moved.fingerprint != images.fingerprint  # features are stored with their labels
