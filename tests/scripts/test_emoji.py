"""scripts/datasets/emoji.py on small fake packages: no network, no npm."""

from __future__ import annotations

import io
import json
import sys
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from scripts.datasets import emoji
from timm_cascade.data import load_data

ALL, FACEBOOK = 30, 25  # facebook draws fewer than all
VENDORS = ('google', 'facebook')


def fake_package(folder: Path, vendor: str, category: str = 'Flags') -> Path:
    """A package folder: emoji in two categories, half transparent, and a component that must be dropped."""
    (folder / f'img/{vendor}/64').mkdir(parents=True)
    entries = []
    for i in range(ALL + 1):
        kind = 'Component' if i == ALL else (category, 'Objects')[i % 2]
        entry = {'unified': f'1F{i:03X}', 'image': f'1f{i:03x}.png', 'category': kind}
        entry |= {'has_img_google': True, 'has_img_facebook': i < FACEBOOK, 'skin_variations': {'1F3FB': {}}}
        entries.append(entry)
        if entry[f'has_img_{vendor}']:
            image = Image.new('RGBA', (64, 64), (i, 0, len(vendor), 255))
            image.paste((9, 9, 9, 0), (0, 0, 64, 32))
            image.save(folder / f'img/{vendor}/64' / entry['image'])
    (folder / 'emoji.json').write_text(json.dumps(entries))
    return folder


def pack(folder: Path, tarball: Path, leave_out: str | None = None) -> None:
    with tarfile.open(tarball, 'w:gz') as tar:
        tar.add(folder, 'package', filter=lambda m: None if leave_out and m.name.endswith(leave_out) else m)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    return {vendor: fake_package(tmp_path / vendor, vendor) for vendor in VENDORS}


def names(path: Path) -> list[str]:
    return list(load_data(path).images.dataset['name'])


def test_split_keeps_all_drawings_of_an_emoji_together(folders, tmp_path):
    summary = emoji.build(folders, tmp_path / 'out', seed=0, fraction=0.6)
    rows = {name: names(tmp_path / 'out' / f'{name}.parquet') for name in summary}
    codes = {name: {r.split('_')[0] for r in part} for name, part in rows.items()}
    assert len(codes['train']) == 18
    assert codes['train'].isdisjoint(codes['test'])
    assert codes['test_calibration'].isdisjoint(codes['test_report'])
    assert sorted(rows['test']) == sorted(rows['test_calibration'] + rows['test_report'])
    expected = [f'1F{i:03X}_{v}' for v in VENDORS for i in range(ALL if v == 'google' else FACEBOOK)]
    assert sorted(rows['train'] + rows['test']) == sorted(expected)
    assert rows['train'] != sorted(rows['train'])
    for name, part in summary.items():
        assert part['pictures'] == len(rows[name]) == sum(c['pictures'] for c in part['categories'].values())
        assert part['emoji'] == len(codes[name]) == sum(c['emoji'] for c in part['categories'].values())
    assert summary['test']['pictures_also_in_train'] == 0


def test_rows_hold_the_picture_over_white_and_its_category(folders, tmp_path):
    emoji.build(folders, tmp_path / 'out', seed=0, fraction=0.6)
    data = load_data(tmp_path / 'out' / 'train.parquet')
    assert data.class_names == ['Flags', 'Objects']
    for name, (image, label) in zip(names(tmp_path / 'out' / 'train.parquet'), data, strict=True):
        code, vendor = name.split('_')
        i = int(code, 16) - 0x1F000
        assert image.mode == 'RGB' and label == i % 2
        assert image.getpixel((5, 5)) == (255, 255, 255) and image.getpixel((5, 60)) == (i, 0, len(vendor))


def test_split_depends_on_seed_and_codes_alone():
    codes = {f'{i:04X}' for i in range(100)}
    first = emoji.split_codes(codes, 1, 0.6)
    assert first == emoji.split_codes({f'{i:04X}' for i in reversed(range(100))}, 1, 0.6)
    assert first != emoji.split_codes(codes, 2, 0.6)
    assert [len(v) for v in first.values()] == [60, 40, 20, 20]


def test_same_seed_same_bytes(folders, tmp_path):
    for out in ('a', 'b'):
        emoji.build(folders, tmp_path / out, seed=3, fraction=0.5)
    assert (tmp_path / 'a/train.parquet').read_bytes() == (tmp_path / 'b/train.parquet').read_bytes()


def test_categories_that_disagree_are_refused(tmp_path):
    folders = {v: fake_package(tmp_path / v, v, category) for v, category in zip(VENDORS, 'XY', strict=True)}
    with pytest.raises(RuntimeError, match='different categories'):
        emoji.build(folders, tmp_path / 'out', seed=0, fraction=0.6)


def test_pictures_of_another_size_and_damaged_ones_are_refused(tmp_path):
    path = tmp_path / 'x.png'
    Image.new('RGBA', (32, 32)).save(path)
    with pytest.raises(RuntimeError, match='not 64 x 64'):
        emoji.over_white(path)
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, 'PNG')
    path.write_bytes(buffer.getvalue()[:200])
    with pytest.raises(RuntimeError, match='does not open'):
        emoji.over_white(path)


def test_fetch_extracts_what_is_needed_from_a_cached_package(folders, tmp_path, monkeypatch):
    tarball = tmp_path / f'emoji-datasource-google-{emoji.VERSION}.tgz'
    pack(folders['google'], tarball)
    monkeypatch.setitem(emoji.DIGESTS, 'google', emoji.digest(tarball))
    folder = emoji.fetch('google', tmp_path)
    assert len(list(folder.rglob('*.png'))) == ALL  # the component stays behind
    tarball.unlink()
    assert emoji.fetch('google', tmp_path) == folder


@pytest.mark.parametrize('leave_out, message', [('emoji.json', 'no package/emoji.json'), ('1f003.png', 'lacks 1 pic')])
def test_package_without_the_expected_files_is_refused(folders, tmp_path, monkeypatch, leave_out, message):
    tarball = tmp_path / f'emoji-datasource-google-{emoji.VERSION}.tgz'
    pack(folders['google'], tarball, leave_out)
    monkeypatch.setitem(emoji.DIGESTS, 'google', emoji.digest(tarball))
    with pytest.raises(RuntimeError, match=message):
        emoji.fetch('google', tmp_path)
    assert [p for p in tmp_path.iterdir() if p.is_dir() and p.name not in VENDORS] == []


def test_missing_npm_and_another_package_than_the_pinned_one_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    with pytest.raises(RuntimeError, match='npm is not installed'):
        emoji.fetch('google', tmp_path)
    npm = tmp_path / 'npm'
    tarball = tmp_path / f'emoji-datasource-google-{emoji.VERSION}.tgz'
    npm.write_text(f'#!{sys.executable}\nopen({str(tarball)!r}, "w").close()\n')
    npm.chmod(0o755)
    with pytest.raises(RuntimeError, match='sha512 differs'):
        emoji.fetch('google', tmp_path)
    npm.write_text(f'#!{sys.executable}\nraise SystemExit("E404")\n')
    tarball.unlink()
    with pytest.raises(RuntimeError, match=r'gave no .*E404'):
        emoji.fetch('google', tmp_path)


def test_second_run_is_skipped_and_another_seed_is_not(folders, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, 'DIGESTS', dict.fromkeys(VENDORS, ''))
    monkeypatch.setattr(emoji, 'fetch', lambda vendor, cache: folders[vendor])
    built = []
    build = emoji.build
    monkeypatch.setattr(emoji, 'build', lambda *a: built.append(a[2]) or build(*a))
    for seed in ('0', '0', '1'):
        monkeypatch.setattr(sys, 'argv', ['emoji.py', '--out', str(tmp_path / 'out'), '--seed', seed])
        emoji.main()
        assert json.loads(capsys.readouterr().out)['made_by']['seed'] == int(seed)
    assert built == [0, 1]
