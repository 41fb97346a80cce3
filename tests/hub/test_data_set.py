"""A data set of the Hub as the input of predictions: its parquet files are read in part, and nothing is stored."""

import io

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from .server import Repository

PREDICT = """
model = tiny()
model.thresholds = [0.3, 0.3]
def rows(folder):
    import pyarrow.parquet as pq
    parts = sorted(Path(folder).glob('part-*.parquet'))
    return [row for part in parts for row in pq.read_table(part).to_pylist()]
def run(data, out, **options):
    return timm_cascade.predict(model, data, out, unit=20, batch_size=10, **options)
"""


def table(count: int, seed: int) -> bytes:
    """A parquet file in row groups of 20 pictures, which compress badly."""
    rng, pictures = np.random.default_rng(seed), []
    for _ in range(count):
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (64, 64), dtype=np.uint8)).save(file, 'PNG')
        pictures.append(dict(bytes=file.getvalue(), path=None))
    file = io.BytesIO()
    pq.write_table(pa.table({'image': pictures, 'label': [0] * count}), file, row_group_size=20)
    return file.getvalue()


@pytest.fixture
def repository(server, tmp_path) -> Repository:
    """60 and 30 pictures of the split `test`, and a split that nobody asks for; the former also as files here."""
    repo = server.repos['datasets/maker/photos'] = Repository()
    files = {
        'data/test-00000-of-00002.parquet': table(60, 0),
        'data/test-00001-of-00002.parquet': table(30, 1),
        'data/train-00000-of-00001.parquet': table(40, 2),
    }
    repo.put(**files)
    for number, content in enumerate(list(files.values())[:2]):
        (tmp_path / f'{number}.parquet').write_bytes(content)
    return repo


def test_it_is_streamed(server, repository, client, tmp_path):
    result = client(
        PREDICT,
        """
        here = run(['0.parquet', '1.parquet'], 'here')
        there = run('maker/photos', 'there', split='test')
        same = [{k: v for k, v in row.items() if k != 'filename'} for row in rows('here')] == [
            {k: v for k, v in row.items() if k != 'filename'} for row in rows('there')]
        first = run('maker/photos', 'shard', split='test', shard='1/5')
        stored = [p.name for p in Path(os.environ['HF_HOME']).rglob('*.parquet')]
        result = dict(same=same, images=there.images, names=sorted({r['filename'] for r in rows('there')}),
                      first=first.images, stored=stored, again=run('maker/photos', 'there', split='test').parts_written)
        """,
    )
    assert result['same'] and result['images'] == 90 and result['first'] == 20
    assert result['names'] == [f'maker/photos/data/test-0000{i}-of-00002.parquet' for i in range(2)]
    assert not result['stored'] and result['again'] == 0
    size = (tmp_path / '0.parquet').stat().st_size
    assert server.ranges and all(stop - start < size for start, stop in server.ranges)  # never a whole file
    assert not any('data/train' in line for line in server.log if 'resolve' in line)
    repository.put(**{'README.md': b'# Photos'})  # a new commit is another input
    kind, message = client(PREDICT, "result = error(run, 'maker/photos', 'there', split='test')")
    assert kind == 'PlanError' and 'input was' in message


def test_a_connection_that_ends_keeps_the_finished_parts(server, repository, client):
    server.fault('GET /storage/.*', 403, times=1)
    whole = "run('maker/photos', 'whole', split='test')\nrun('maker/photos', 'out', split='test', shard='1/2')"
    kind, message = client(PREDICT, f'result = error(run, "maker/photos", "out", split="test")\n{whole}')
    assert kind == 'OSError' and 'from the Hub' in message
    server.fault('GET /storage/.*', 'cut')
    result = client(PREDICT, "result = *error(run, 'maker/photos', 'out', split='test'), len(rows('out'))")
    assert result[0] != 'nothing' and result[2] == 50
    server.faults.clear()
    assert client(PREDICT, "run('maker/photos', 'out', split='test'); result = rows('out') == rows('whole')")


def test_what_is_asked_for_wrongly(server, repository, client):
    result = client(
        PREDICT,
        """
        result = [
            error(run, 'maker/photos', 'out', split='validation'),
            error(run, 'maker/photos', 'out'),
            error(run, 'maker/nothing', 'out', split='test'),
            error(run, 'maker/photos', 'out', split='test', image_column='picture'),
        ]
        result.append(Path('out').exists())
        """,
    )
    kinds, messages = zip(*result[:-1], strict=True)
    assert kinds == ('ValueError', 'ValueError', 'FileNotFoundError', 'ValueError')
    for message, words in zip(
        messages, ("has the splits ['test', 'train']", 'Choose one with split=', 'maker/nothing', 'image'), strict=True
    ):
        assert words in message
    assert not result[-1]


def test_files_that_are_not_parquet_are_fetched(server, client):
    repo, picture = Repository(), io.BytesIO()
    server.repos['datasets/maker/folder'] = repo
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(picture, 'PNG')
    repo.put(**{f'test/{i}.png': picture.getvalue() for i in range(5)})
    assert client(PREDICT, "result = run('maker/folder', 'out', split='test').images") == 5
