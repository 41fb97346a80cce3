"""Which files of an image folder count, and what classes and splits they belong to."""

from __future__ import annotations

import logging
import os

import numpy as np
import pytest
import timm
import torch
import torchvision
from helpers import as_png
from PIL import Image
from timm.data import ImageDataset

import timm_cascade
from timm_cascade.data import load_data
from timm_cascade.data.folders import natural_key


@pytest.fixture(autouse=True)
def heard(caplog):
    caplog.set_level(logging.INFO, 'timm_cascade')
    return caplog


def draw(root, *paths):
    """Writes a picture of its own to each path."""
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        colour = np.random.default_rng(list(str(path).encode())).integers(0, 255, (6, 5, 3), dtype=np.uint8)
        Image.fromarray(colour).save(root / path, format='PNG')


def names_of(data):
    return [os.path.relpath(data.name_of(i), data.images.root) for i in range(len(data))]


# ---- order of classes and files


@pytest.mark.parametrize(
    'names', [[str(i) for i in range(12)], ['n2', 'n10', 'N1'], ['a b', 'a', 'a1b2', 'a1b10'], ['01', '1', '001']]
)
def test_classes_and_files_are_in_timms_order(tmp_path, names):
    draw(tmp_path, *(f'{name}/{i}.png' for name in names for i in (1, 2, 10)))
    data, theirs = load_data(tmp_path), ImageDataset(str(tmp_path)).reader
    if len({tuple(natural_key(n)[0]) for n in names}) == len(names):  # where timm's own order is defined
        assert data.class_names == list(theirs.class_to_idx)
        assert [data.name_of(i) for i in range(len(data))] == [path for path, _ in theirs.samples]
        assert data.labels.tolist() == [label for _, label in theirs.samples]
    else:
        assert data.class_names == sorted(names)
    by_text = load_data(tmp_path, class_order='text')
    assert by_text.class_names == torchvision.datasets.ImageFolder(str(tmp_path)).classes
    with pytest.raises(ValueError, match='choose natural or text'):
        load_data(tmp_path, class_order='size')


# ---- which files count


def test_words_for_splits_in_names_of_files_and_classes_mean_nothing(tmp_path):
    names = ['train', 'bus', 'test tube']
    draw(tmp_path, *(f'{n}/{f}.png' for n in names for f in ('a train', 'test-1', 'val_2', '3', 'dev/4'[:3] + '5')))
    data = load_data(tmp_path)
    assert data.class_names == sorted(names) and len(data) == 15
    assert len(load_data(tmp_path, 'train')) == 15
    with pytest.raises(ValueError, match=r"no folder for the split 'test'.*by class"):
        load_data(tmp_path, 'test')


def test_links_are_followed_and_circles_end(tmp_path, heard):
    draw(tmp_path, 'far/1.png', 'far/2.png', 'set/dog/3.png')
    (tmp_path / 'set' / 'cat').symlink_to(tmp_path / 'far')
    (tmp_path / 'set' / 'dog' / 'again').symlink_to(tmp_path / 'set')
    (tmp_path / 'set' / 'dog' / 'gone.png').symlink_to(tmp_path / 'nowhere.png')
    data = load_data(tmp_path / 'set')
    assert names_of(data) == ['cat/1.png', 'cat/2.png', 'dog/3.png']
    (line,) = heard.messages
    assert '1 links back to a folder above (dog/again)' in line and '1 links to nothing (dog/gone.png)' in line


def test_hidden_files_and_those_of_systems_are_passed_over(tmp_path, heard):
    draw(tmp_path, 'cat/1.png', 'cat/.2.png', 'cat/._1.png', '.cache/3.png', '__MACOSX/cat/4.png', 'dog/@eaDir/5.png')
    draw(tmp_path, 'dog/6.PNG')
    data = load_data(tmp_path)
    assert names_of(data) == ['cat/1.png', 'dog/6.PNG'] and data.class_names == ['cat', 'dog']
    assert [r.levelname for r in heard.records] == ['INFO']


def test_what_is_left_out_is_said_once_with_the_reason(tmp_path, heard):
    draw(tmp_path, 'cat/1.png', 'dog/2.png', 'cat/3.webp', 'dog/4.BMP', 'stray.png')
    for name in ('more.zip', 'cat/note.txt', 'metadata.csv'):
        (tmp_path / name).write_text('x')
    assert len(load_data(tmp_path)) == 2
    (record,) = heard.records
    text = record.getMessage()
    assert record.levelname == 'WARNING' and ': 8 files, 2 images read in 2 classes' in text
    for part in ('1 archives', '2 images of a type that is not read (cat/3.webp, dog/4.BMP)', '1 not images'):
        assert part in text
    assert '1 beside the class folders (stray.png)' in text and 'metadata.csv' in text
    assert len(load_data(tmp_path, extensions=['.webp', 'bmp'])) == 4


def test_an_ordinary_note_is_no_warning(tmp_path, heard):
    draw(tmp_path, 'cat/1.png', 'dog/2.png')
    (tmp_path / 'README.md').write_text('x')
    load_data(tmp_path)
    assert [r.levelname for r in heard.records] == ['INFO'] and 'README.md' in heard.text


def test_a_class_whose_images_are_not_read_does_not_vanish(tmp_path):
    draw(tmp_path, 'cat/1.png', 'dog/2.webp', 'owl/3.png')
    with pytest.raises(ValueError, match=r"dog.*extensions=\['.webp'\]"):
        load_data(tmp_path)
    assert load_data(tmp_path, extensions='.webp').class_names == ['cat', 'dog', 'owl']


@pytest.mark.parametrize(
    'files, message',
    [
        (['cat/1.webp', 'dog/2.webp'], r"images of other types; extensions=\['.webp'\]"),
        (['all.zip'], 'archives .all.zip.. Unpack'),
        (['notes.txt'], 'holds no images'),
        (['1.png', '2.png'], 'no class folders.*--no-labels'),
    ],
)
def test_folders_of_no_classes(tmp_path, files, message):
    draw(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path)


def test_folders_whose_files_have_no_extension_or_are_no_images(tmp_path, heard):
    draw(tmp_path, 'cat/1.png', 'dog/2.png', 'owl/3')
    with pytest.raises(ValueError, match='owl'):
        load_data(tmp_path)
    (tmp_path / 'owl' / '3').rename(tmp_path / 'owl' / '3.txt')
    heard.clear()
    assert load_data(tmp_path).class_names == ['cat', 'dog']
    assert [r.levelname for r in heard.records] == ['WARNING'] and 'become no classes (owl/3.txt)' in heard.text


def test_layouts_in_which_readers_disagree(tmp_path, heard):
    draw(tmp_path, 'pets/cat/1.png', 'pets/dog/2.png', 'cars/bus/3.png')
    assert (
        load_data(tmp_path).class_names
        == ['bus', 'cat', 'dog']
        == list(ImageDataset(str(tmp_path)).reader.class_to_idx)
    )
    assert any('innermost folders' in m and 'torchvision' in m for m in heard.messages)
    draw(tmp_path, 'pets/4.png')
    with pytest.raises(ValueError, match='pets holds images, and so does pets/cat'):
        load_data(tmp_path)


# ---- splits


@pytest.mark.parametrize(
    'folder, asked', [('val', 'validation'), ('valid', 'val'), ('Validation', 'validation'), ('dev', 'valid')]
)
def test_the_names_that_splits_go_by(tmp_path, folder, asked):
    draw(tmp_path, 'Training/cat/1.png', 'Training/dog/2.png', f'{folder}/dog/3.png')
    held = load_data(tmp_path, asked)
    assert held.class_names == ['cat', 'dog'] and held.labels.tolist() == [1] and len(held) == 1
    assert len(load_data(tmp_path, 'train')) == 2 and len(load_data(tmp_path, folder)) == 1
    with pytest.raises(ValueError, match=r"splits \['train', 'validation'\]; asked was 'test'"):
        load_data(tmp_path, 'test')
    with pytest.raises(ValueError, match='none was chosen'):
        load_data(tmp_path)


def test_two_folders_of_one_split_have_to_be_named(tmp_path):
    draw(tmp_path, 'train/cat/1.png', 'val/cat/2.png', 'validation/cat/3.png')
    with pytest.raises(ValueError, match="'val', 'validation'"):
        load_data(tmp_path, 'dev')
    assert names_of(load_data(tmp_path, 'val')) == ['val/cat/2.png']
    assert names_of(load_data(tmp_path, 'validation')) == ['validation/cat/3.png']


def test_a_folder_that_is_itself_a_split(tmp_path):
    draw(tmp_path, 'val/cat/1.png', 'val/dog/2.png')
    assert len(load_data(tmp_path / 'val')) == len(load_data(tmp_path / 'val', 'validation')) == 2
    with pytest.raises(ValueError, match='itself the split validation'):
        load_data(tmp_path / 'val', 'train')


@pytest.mark.parametrize(
    'files, message',
    [
        (['cat/train/1.png', 'cat/test/2.png', 'dog/train/3.png'], 'splits inside of class folders'),
        (['set/train/cat/1.png', 'set/test/cat/2.png'], "folder 'train' further down|folder 'test' further down"),
        (['train/1.png', 'test/2.png'], 'no class folders'),
        (['train/cat/1.png', 'test/cat/2.png', 'test/emu/3.png'], 'classes that the training split does not have: emu'),
    ],
)
def test_split_folders_in_other_places(tmp_path, files, message):
    draw(tmp_path, *files)
    with pytest.raises(ValueError, match=message):
        load_data(tmp_path, 'test' if 'test/emu/3.png' in files else None)


def test_flat_splits_without_labels(tmp_path):
    draw(tmp_path, 'train/1.png', 'test/2.png', 'test/3.png')
    data = load_data(tmp_path, 'test', labels=False)
    assert len(data) == 2 and (data.labels == -1).all()


def test_folders_beside_the_splits_are_said(tmp_path, heard):
    draw(tmp_path, 'train/cat/1.png', 'test/cat/2.png', 'backup/cat/3.png', 'cover.png')
    assert len(load_data(tmp_path, 'train')) == 1
    assert '2 outside of the split folders (cover.png, backup/cat/3.png)' in heard.text


@pytest.mark.parametrize('how', ['copy', 'link', 'hard link', 'folder'])
def test_an_image_in_two_splits_is_an_error(tmp_path, how):
    draw(tmp_path, 'train/cat/1.png', 'train/dog/2.png', 'test/cat/3.png')
    source, target = tmp_path / 'train' / 'cat' / '1.png', tmp_path / 'test' / 'cat' / 'x.png'
    if how == 'copy':
        target.write_bytes(source.read_bytes())
    elif how == 'link':
        target.symlink_to(source)
    elif how == 'hard link':
        target.hardlink_to(source)
    else:
        (tmp_path / 'test' / 'dog').symlink_to(tmp_path / 'train' / 'dog')
    for split in ('train', 'test'):
        with pytest.raises(ValueError, match=r'1 of the images of .* are in (test|train) too: t\S+\.png is t\S+\.png'):
            load_data(tmp_path, split)


def test_images_of_the_same_size_are_no_leak(tmp_path):
    for split, value in (('train', 10), ('test', 11)):
        (tmp_path / split / 'cat').mkdir(parents=True)
        Image.new('L', (50, 50), value).save(tmp_path / split / 'cat' / 'a.png', compress_level=0)
    assert len(load_data(tmp_path, 'train')) == 1


# ---- slices


def test_percentages_are_drawn_by_class(tmp_path):
    draw(tmp_path, *(f'{c}/{i}.png' for c, n in (('a', 10), ('b', 30), ('c', 5)) for i in range(n)))
    train, held = load_data(tmp_path, 'train[:80%]'), load_data(tmp_path, 'train[80%:]')
    assert np.bincount(train.labels).tolist() == [8, 24, 4] and np.bincount(held.labels).tolist() == [2, 6, 1]
    assert sorted(names_of(train) + names_of(held)) == sorted(names_of(load_data(tmp_path)))
    assert (
        names_of(train)
        == names_of(load_data(tmp_path, 'train[:80%]'))
        != names_of(load_data(tmp_path, 'train[:80%]', seed=1))
    )
    assert names_of(train)[:8] != [f'a/{i}.png' for i in range(8)]  # drawn, not the first ones
    assert names_of(held) == names_of(load_data(tmp_path, 'train[80%:]', labels=False))
    assert names_of(held) == names_of(load_data(tmp_path, 'train[-20%:]'))
    parts = load_data(tmp_path, 'train[:20%]+train[80%:]')
    assert len(parts) == 9 + 9 and parts.split == 'train[:20%]+train[80%:]' and parts[0][0].size == (5, 6)
    assert names_of(load_data(tmp_path, 'train[-2:]')) == ['c/3.png', 'c/4.png']


@pytest.mark.parametrize('split', ['train[:80%', 'train[10:20%]', 'train[:1.5]', 'train[:120%]', '[:5]', 'train[::2]'])
def test_slices_that_are_none(tmp_path, split):
    draw(tmp_path, 'a/1.png', 'b/2.png')
    with pytest.raises(ValueError, match='split'):
        load_data(tmp_path, split)


# ---- class names stay with the model


@pytest.fixture
def coloured(tmp_path):
    """A folder of four classes that a head can tell apart, and a cascade trained on it."""
    for split, seed in (('train', 0), ('test', 1)):
        for k in range(4):
            (tmp_path / split / f'c{k + 8}').mkdir(parents=True)  # c8, c9, c10, c11
            for i in range(8):
                picture = np.random.default_rng([seed, k, i]).integers(0, 60, (16, 16, 3), dtype=np.uint8)
                picture[8 * (k // 2) :][:8, 8 * (k % 2) :][:, :8] += 150
                as_png(picture, tmp_path / split / f'c{k + 8}' / f'{i}.png')
    model = timm.create_model(
        'cascade_cifar_resnet20',
        num_classes=4,
        exits=['layer1', 'layer2'],
        pretrained_cfg_overlay=dict(input_size=(3, 16, 16)),
    )
    timm_cascade.train_heads(model, load_data(tmp_path, 'train'), epochs=30, lr=3e-2, classifier=True)
    return tmp_path, model.eval()


def test_held_out_images_meet_the_models_classes_by_name(coloured, heard, tmp_path):
    root, model = coloured
    assert model.label_names == ['c8', 'c9', 'c10', 'c11']
    whole = timm_cascade.evaluate(model, load_data(root, 'test')).full_accuracy
    assert whole > 0.9
    heard.clear()
    for data in (
        load_data(root, 'test', class_order='text'),
        torchvision.datasets.ImageFolder(root / 'test'),
        load_data(root / 'test', class_order='text').select(range(8, 32)),
    ):
        heard.clear()
        assert timm_cascade.evaluate(model, data).full_accuracy > 0.9
        assert any('matched to the classes of the model by name' in m for m in heard.messages)
    (root / 'test' / 'c9').rename(root / 'away')
    part = load_data(root / 'test')
    assert part.class_names == ['c8', 'c10', 'c11']
    assert timm_cascade.calibrate(model, part).correct[:, -1].mean() > 0.9
    assert 'c9 not among them' in heard.text
    transformed = torchvision.datasets.ImageFolder(root / 'test', timm_cascade.data.eval_transform(model))
    with pytest.raises(ValueError, match='label 0 is not the same class in both'):
        timm_cascade.calibrate(model, transformed)
    timm_cascade.save(model, tmp_path / 'release')
    assert timm_cascade.load(tmp_path / 'release').label_names == model.label_names


def test_images_that_were_trained_on_are_called_out(coloured, heard):
    root, model = coloured
    heard.clear()
    timm_cascade.calibrate(model, load_data(root, 'test'))
    assert 'trained on' not in heard.text
    overlapping = load_data(root, 'train[75%:]')
    timm_cascade.calibrate(model, torch.utils.data.ConcatDataset([overlapping, load_data(root, 'test')]))
    assert '8 of the 40 images of' in heard.text and 'were trained on' in heard.text


def test_a_backbone_that_knows_other_labels_is_called_out(coloured, heard):
    root, model = coloured
    with_heads = timm_cascade.load_data(root, 'train')
    model.label_names = None
    order = [1, 2, 3, 0]
    with_heads.labels = np.array(order)[with_heads.labels]
    timm_cascade.train_heads(model, with_heads, epochs=30, lr=3e-2)
    timm_cascade.calibrate(model, with_heads)
    (line,) = [m for m in heard.messages if m.startswith('The backbone is right on')]
    assert 'another order' in line and 'exit' in line


def test_a_model_without_names_refuses_fewer_classes(small, tmp_path):
    draw(tmp_path, 'a/1.png', 'c/2.png', 'd/3.png')
    with pytest.raises(ValueError, match=r'has 3 classes .*the model 4.*model\.label_names'):
        timm_cascade.calibrate(small, load_data(tmp_path))
