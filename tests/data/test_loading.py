import gzip

import numpy as np
import pytest
import timm
import torch
from helpers import as_png, write_idx
from PIL import Image

from timm_cascade.data import BadImageError, ImageData, create_loader, eval_transform, load_data, match_classes


@pytest.fixture
def idx(tmp_path):
    pictures = np.arange(12 * 5 * 4, dtype=np.uint8).reshape(12, 5, 4)
    labels = np.arange(12, dtype=np.uint8) % 3
    for name in ('train', 't10k'):
        write_idx(tmp_path / f'{name}-images-idx3-ubyte.gz', pictures)
        write_idx(tmp_path / f'{name}-labels-idx1-ubyte.gz', labels)
    return tmp_path, pictures, labels


def test_idx_and_slices(idx):
    folder, pictures, labels = idx
    data = load_data(folder, 'train[2:9]')
    assert len(data) == 7 and data.class_names == ['0', '1', '2']
    assert np.array_equal(np.asarray(data[0][0]), pictures[2]) and data[0][1] == labels[2]
    assert len(load_data(folder, 'test')) == 12
    assert data.name == folder.name and '/' not in data.name


@pytest.mark.parametrize(
    'split, message',
    [
        (None, r"\['test', 'train'\]"),
        ('validation', r"\['test', 'train'\]"),
        ('train[a:b]', 'NAME'),
        ('train[50:]', 'no images'),
    ],
)
def test_wrong_splits(idx, split, message):
    with pytest.raises(ValueError, match=message):
        load_data(idx[0], split)


def test_damaged_idx(idx):
    folder, pictures, _ = idx
    path = folder / 'train-images-idx3-ubyte.gz'
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match='truncated'):
        load_data(folder, 'train')
    write_idx(path, pictures[:5])
    with pytest.raises(ValueError, match='5 images but 12 labels'):
        load_data(folder, 'train')
    path.write_bytes(gzip.compress(b'not an idx file'))
    with pytest.raises(ValueError, match='not an IDX'):
        load_data(folder, 'train')
    path.unlink()
    with pytest.raises(FileNotFoundError, match='train-images'):
        load_data(folder, 'train')


def test_image_folder(tmp_path):
    for name in ('cat', 'dog'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        for k in range(2):
            as_png(np.full((6, 5, 3), 40 * k, np.uint8), tmp_path / 'train' / name / f'{k}.png')
    data = load_data(tmp_path, 'train')
    assert data.class_names == ['cat', 'dog'] and len(data) == 4
    assert data[0][0].size == (5, 6) and sorted(data.labels) == [0, 0, 1, 1]
    assert len(load_data(tmp_path)) == 4  # one split: no need to name it


def test_parquet(tmp_path):
    import datasets

    features = datasets.Features(dict(image=datasets.Image(), label=datasets.ClassLabel(names=['x', 'y'])))
    pictures = [np.full((6, 5), 50 * k, np.uint8) for k in range(3)]
    datasets.Dataset.from_dict(dict(image=pictures, label=[0, 1, 1]), features=features).to_parquet(
        tmp_path / 'a.parquet'
    )
    data = load_data(tmp_path / 'a.parquet')
    assert len(data) == 3 and data.class_names == ['x', 'y'] and data[2][1] == 1
    assert np.array_equal(np.asarray(data[2][0]), pictures[2])
    assert len(load_data(tmp_path / 'a.parquet', 'test[1:]')) == 2
    assert len(load_data([tmp_path / 'a.parquet', tmp_path / 'a.parquet'])) == 6
    with pytest.raises(FileNotFoundError, match=r'b\.parquet'):
        load_data(tmp_path / 'b.parquet')


def test_a_source_that_is_nothing():
    with pytest.raises(FileNotFoundError, match='neither an IDX folder'):
        load_data('/no/such/place')


def test_labels_outside_the_classes():
    with pytest.raises(ValueError, match='labels from 0 to 5, but there are 3 classes'):
        ImageData(np.zeros((2, 4, 4), np.uint8), [0, 5], ['a', 'b', 'c'])


@pytest.mark.parametrize('in_chans', [1, 3])
def test_grey_and_colour_meet_the_model(in_chans):
    model = timm.create_model('test_resnet', in_chans=in_chans)
    transform = eval_transform(model)
    grey = ImageData(np.zeros((2, 30, 40), np.uint8), [0, 1], ['a', 'b'])
    colour = ImageData(np.zeros((2, 30, 40, 3), np.uint8), [0, 1], ['a', 'b'])
    for data in (grey, colour):
        assert transform(data[0][0]).shape == (in_chans, 160, 160)
    x, y = next(iter(create_loader(model, grey)))
    assert x.shape == (2, in_chans, 160, 160) and y.tolist() == [0, 1]


def test_other_channel_counts_ask_for_a_transform():
    with pytest.raises(ValueError, match='the model takes 4'):
        eval_transform(timm.create_model('test_resnet', in_chans=4))


def test_any_data_set_of_tensors_is_taken_as_it_is(small):
    data = torch.utils.data.TensorDataset(torch.zeros(3, 1, 16, 16), torch.tensor([0, 1, 2]))
    x, _ = next(iter(create_loader(small, data)))
    assert x.shape == (3, 1, 16, 16)


def test_images_without_labels(idx, tmp_path_factory):
    data = load_data(idx[0], 'test', labels=False)
    assert len(data) == 12 and data[3][1] == -1 and data.class_names == []
    folder = tmp_path_factory.mktemp('flat')
    for k in range(3):
        as_png(np.full((6, 5, 3), 40 * k, np.uint8), folder / f'{k}.png')
    flat = load_data(folder, labels=False)
    assert len(flat) == 3 and flat[0][1] == -1


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """An image folder with grey, palette, RGBA and 16-bit pictures, a text and a truncated file."""
    folder = tmp_path_factory.mktemp('mixed')
    noise = np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8)
    for name in ('cat', 'dog'):
        (folder / name).mkdir()
        for mode in ('L', 'P', 'RGBA', 'CMYK', '1'):
            Image.fromarray(noise).convert(mode).save(folder / name / f'{mode}.{"tif" if mode == "CMYK" else "png"}')
    whole = (folder / 'cat' / 'RGBA.png').read_bytes()
    (folder / 'cat' / 'cut.png').write_bytes(whole[: len(whole) // 2])
    (folder / 'dog' / 'text.png').write_text('no image')
    return folder


def test_pictures_of_any_mode(mixed):
    data = load_data(mixed, on_bad_image='skip', extensions=['.tif'])
    for in_chans in (1, 3):
        transform = eval_transform(timm.create_model('cifar_resnet20', in_chans=in_chans))
        assert {tuple(transform(data[i][0]).shape) for i in range(len(data))} == {(in_chans, 32, 32)}


def test_bad_images_are_counted_named_and_left_out(mixed, caplog):
    data = load_data(mixed, on_bad_image='skip', extensions=['.tif'])
    assert len(data) == 10 and sorted(data.labels) == [0] * 5 + [1] * 5
    (message,) = [r.getMessage() for r in caplog.records if r.name.endswith('data.images')]
    assert message.startswith('2 of 12 images') and 'cut.png' in message and 'text.png' in message
    assert data.fingerprint != load_data(mixed, extensions='tif').fingerprint
    with pytest.raises(BadImageError, match=r'(cut|text)\.png is not an image that can be read .*--on-bad-image skip'):
        list(create_loader(timm.create_model('cifar_resnet20'), load_data(mixed)))
    with pytest.raises(ValueError, match='choose fail or skip'):
        load_data(mixed, on_bad_image='ignore')


def test_a_folder_of_bad_images_only(tmp_path):
    (tmp_path / 'cat').mkdir()
    (tmp_path / 'cat' / 'a.png').write_text('no image')
    with pytest.raises(ValueError, match='holds no images'):
        load_data(tmp_path, on_bad_image='skip')


def test_a_class_folder_without_images(tmp_path):
    for name in ('cat', 'dog', 'owl'):
        (tmp_path / 'train' / name).mkdir(parents=True)
    for k, name in enumerate(('cat', 'dog')):
        as_png(np.full((6, 5, 3), k, np.uint8), tmp_path / 'train' / name / 'a.png')
    with pytest.raises(ValueError, match=r'1 class folders hold no files that are read: .*owl'):
        load_data(tmp_path, 'train')
    as_png(np.full((6, 5, 3), 9, np.uint8), tmp_path / 'train' / 'owl' / 'a.png')
    (tmp_path / 'test' / 'owl').mkdir(parents=True)  # not all classes need be in the test images
    (tmp_path / 'test' / 'cat').mkdir()
    as_png(np.full((6, 5, 3), 90, np.uint8), tmp_path / 'test' / 'cat' / 'a.png')
    assert load_data(tmp_path, 'test').class_names == ['cat', 'dog', 'owl']


@pytest.mark.parametrize(
    'names, known, message',
    [
        (list('abcd'), list('abc'), '4 classes, the model 3'),
        (list('acb'), list('abc'), None),
        (list('ax'), list('abc'), "class 1 is 'x' there"),
        (list('ab'), list('abc'), None),
        (list('012'), list('abc'), None),
        (list('abc'), list('012'), None),
        (list('abc'), None, None),
    ],
)
def test_classes_of_data_and_model(names, known, message):
    data = ImageData(np.zeros((2, 4, 4), np.uint8), [0, 1], names, 'pictures')
    if message is None:
        match_classes(data, 3, known)
    else:
        with pytest.raises(ValueError, match=message):
            match_classes(data, 3, known)


def test_fingerprints(idx):
    folder = idx[0]
    first = load_data(folder, 'train')
    assert first.fingerprint == load_data(folder, 'test').fingerprint  # the same pictures
    assert first.fingerprint != load_data(folder, 'train[:5]').fingerprint
    transform = eval_transform(timm.create_model('cifar_resnet20'))
    assert first.with_transform(transform).fingerprint not in (None, first.fingerprint)
    assert first.with_transform(lambda image: image).fingerprint is None
