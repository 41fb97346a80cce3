"""Parquet files, saved data sets, hidden labels, wrong paths: what is opened, and which argument helps where not."""

from __future__ import annotations

import datasets
import numpy as np
import pytest
from PIL import Image

from timm_cascade.data import load_data

PICTURES = [Image.new('RGB', (6, 5), (20 * k, 0, 0)) for k in range(8)]
CLASS = datasets.ClassLabel(names=['n9', 'n10'])


def table(features=None, **columns):
    return datasets.Dataset.from_dict(
        dict(image=PICTURES, **columns), features=datasets.Features(dict(image=datasets.Image(), **(features or {})))
    )


@pytest.fixture
def two():
    return table(dict(fine=CLASS, coarse=CLASS), fine=[0, 1] * 4, coarse=[0] * 4 + [1] * 4)


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """Whoever asks for a path must not be asked about on the Hub."""

    def asked(path, *args, **kwargs):
        if path != 'parquet':
            raise AssertionError(f'the Hub was asked for {path}')
        return load(path, *args, **kwargs)

    load = datasets.load_dataset
    monkeypatch.setattr(datasets, 'load_dataset', asked)


def test_columns_are_named(two, tmp_path):
    two.to_parquet(tmp_path / 'a.parquet')
    for source in (tmp_path / 'a.parquet', two, datasets.DatasetDict(train=two)):
        with pytest.raises(ValueError, match=r'2 columns that may be labels \(fine, coarse\).*label_column='):
            load_data(source)
        assert load_data(source, label_column='coarse').labels.tolist() == [0] * 4 + [1] * 4
        with pytest.raises(ValueError, match="no column 'medium'; its columns: image"):
            load_data(source, label_column='medium')
    pair = table(dict(left=datasets.Image(), fine=CLASS), left=PICTURES, fine=[0, 1] * 4)
    with pytest.raises(ValueError, match=r'2 image columns \(image, left\).*image_column='):
        load_data(pair, label_column='fine')
    assert len(load_data(pair, label_column='fine', image_column='left')) == 8
    with pytest.raises(ValueError, match=r'column fine of .* holds no images'):
        load_data(two, image_column='fine')
    with pytest.raises(ValueError, match=r'0 columns that may be labels.*labels=False'):
        load_data(table())
    assert len(load_data(table(), labels=False)) == 8


@pytest.mark.parametrize(
    'feature, values, names, labels',
    [
        (datasets.Value('string'), ['b10', 'b9'] * 4, ['b9', 'b10'], [1, 0] * 4),
        (datasets.Value('bool'), [True, False] * 4, ['False', 'True'], [1, 0] * 4),
        (datasets.Value('uint8'), [0, 2] * 4, ['0', '1', '2'], [0, 2] * 4),
        (datasets.Value('int64'), [1, 0] * 4, ['0', '1'], [1, 0] * 4),
    ],
)
def test_labels_of_other_types(feature, values, names, labels):
    data = load_data(table(dict(label=feature), label=values))
    assert data.class_names == names and data.labels.tolist() == labels


@pytest.mark.parametrize(
    'feature, values, message',
    [
        (CLASS, [-1] * 8, r'every label .* is -1: .*hidden.*--no-labels'),
        (datasets.Value('int64'), [-1] * 8, 'hidden'),
        (CLASS, [0] * 7 + [-1], 'labels from -1 to 0'),
        (CLASS, [0] * 7 + [None], '1 of 8 values in the column label .* are missing'),
        (datasets.Value('float32'), [0.5] * 8, 'one class per image'),
        (datasets.List(datasets.Value('int64')), [[0, 1]] * 8, 'Several or soft labels'),
        (datasets.Value('int64'), [10**9] * 8, 'numbers up to 1000000000'),
    ],
)
def test_labels_that_are_no_classes(feature, values, message):
    data = table(dict(label=feature), label=values)
    with pytest.raises(ValueError, match=message):
        load_data(data, label_column='label')
    assert len(load_data(data, labels=False)) == 8


def test_a_folder_of_parquet(tmp_path):
    rows = table(dict(label=CLASS), label=[0, 1] * 4)
    for name in ('train-00000-of-00002', 'train-00001-of-00002', 'test-00000-of-00001'):
        (tmp_path / 'data').mkdir(exist_ok=True)
        rows.to_parquet(tmp_path / 'data' / f'{name}.parquet')
    assert len(load_data(tmp_path, 'train')) == 16 and len(load_data(tmp_path, 'test')) == 8
    with pytest.raises(ValueError, match=r"\['test', 'train'\]; none was chosen"):
        load_data(tmp_path)
    with pytest.raises(ValueError, match="asked was 'validation'"):
        load_data(tmp_path, 'validation')
    (tmp_path / 'data' / 'train-00001-of-00002.parquet').rename(tmp_path / 'data' / 'more.parquet')
    with pytest.raises(ValueError, match=r'more\.parquet is not'):
        load_data(tmp_path, 'train')
    (tmp_path / 'data' / 'more.parquet').unlink()
    with pytest.raises(ValueError, match='1 of the 2 parts of train; part 1 is missing'):
        load_data(tmp_path, 'train')


def test_names_in_parquet_files_that_mean_no_split(tmp_path):
    rows = table(dict(label=CLASS), label=[0, 1] * 4)
    for name in ('photos of a train', 'test bench'):
        rows.to_parquet(tmp_path / f'{name}.parquet')
    assert len(load_data(tmp_path)) == len(load_data(tmp_path, 'train')) == 16


def test_a_saved_data_set(tmp_path):
    rows = table(dict(label=CLASS), label=[0, 1] * 4)
    rows.save_to_disk(tmp_path / 'one')
    datasets.DatasetDict(train=rows, valid=rows).save_to_disk(tmp_path / 'several')
    assert load_data(tmp_path / 'one').class_names == ['n9', 'n10']
    assert len(load_data(tmp_path / 'several', 'validation[2:]')) == 6
    with pytest.raises(ValueError, match=r"\['train', 'valid'\]; none was chosen"):
        load_data(tmp_path / 'several')


def test_characters_in_paths(tmp_path, monkeypatch):
    rows = table(dict(label=CLASS), label=[0, 1] * 4)
    home = tmp_path / 'a [1] * {b} ?'
    for name in ('cat', 'dog[2]'):
        (home / 'set' / name).mkdir(parents=True)
        Image.new('RGB', (5, 5), (len(name), 0, 0)).save(home / 'set' / name / '[x]*.png')
    rows.to_parquet(home / 'x[0].parquet')
    monkeypatch.setenv('HOME', str(home))
    for source in (home / 'set', '~/set'):
        assert load_data(source).class_names == ['cat', 'dog[2]']
    for source in (home / 'x[0].parquet', '~/x[0].parquet', ['~/x[0].parquet']):
        assert len(load_data(source)) == 8


@pytest.mark.parametrize(
    'source',
    ['flowers', './a/b', 'data/flowrs', '/no/where', '~/x', 'a/b/c', 'x/pets.zip', 'a/b.parquet', 'data/', '../x/y'],
)
def test_a_wrong_path_is_a_wrong_path(tmp_path, monkeypatch, source):
    (tmp_path / 'data' / 'flowers').mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises((FileNotFoundError, ValueError), match=r'does not exist|no such file|holds no images') as e:
        load_data(source)
    assert source != 'data/flowrs' or 'did you mean data/flowers?' in str(e.value)


def test_ids_of_the_hub_are_asked_for(monkeypatch):
    asked = []

    def none(path, name=None, split=None):
        asked.append((path, name, split))
        raise datasets.exceptions.DatasetNotFoundError('no such data set')

    monkeypatch.setattr(datasets, 'load_dataset', none)
    for source in ('user/flowers', 'user/flowers:large', 'hf://datasets/user/flowers'):
        with pytest.raises(FileNotFoundError, match=r'user/flowers is neither a folder .* no such data set'):
            load_data(source, 'train[:5]')
    assert asked == [
        ('user/flowers', None, 'train'),
        ('user/flowers', 'large', 'train'),
        ('user/flowers', None, 'train'),
    ]


@pytest.mark.parametrize('name, content', [('a.csv', b'x'), ('a.zip', b'PK'), ('a.png', b'x')])
def test_files_that_are_no_data_set(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match='is a file that is not read here'):
        load_data(tmp_path / name)
    with pytest.raises(ValueError, match='no columns to choose from'):
        (tmp_path / 's' / 'c').mkdir(parents=True)
        Image.new('L', (4, 4)).save(tmp_path / 's' / 'c' / '1.png')
        load_data(tmp_path / 's', label_column='label')


def test_a_pipe_gets_no_bars_and_folders_do_without_the_library_for_data_sets(interpreter, tmp_path):
    for name in 'cd':
        (tmp_path / 'set' / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), ord(name), np.uint8)).save(tmp_path / 'set' / name / '1.png')
    table(dict(label=CLASS), label=[0, 1] * 4).to_parquet(tmp_path / 'a.parquet')
    code = (
        f'import sys, timm_cascade; d = timm_cascade.load_data({str(tmp_path / "set")!r}); d[1], d.fingerprint, '
        f'd.name_of(0); assert "datasets" not in sys.modules; '
        f'print(len(timm_cascade.load_data({str(tmp_path / "a.parquet")!r})))'
    )
    done = interpreter.run(code, tmp_path)
    assert done.returncode == 0 and done.stdout == '8\n' and 'split' not in done.stderr and 'it/s' not in done.stderr
