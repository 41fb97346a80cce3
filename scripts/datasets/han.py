"""Builds the Han data set: 1,000 characters at 64 pixels, rendered from fonts that are installed, split by font.

    apt-get install fonts-noto-cjk-extra fonts-lxgw-wenkai fonts-klee fonts-reggae fonts-yusei-magic fonts-smiley-sans \
        fonts-rampart                                                   # all under the OFL
    python scripts/datasets/han.py --out runs/han

Characters are those that Chinese and Japanese schools share (level 1 of GB 2312 and of JIS X 0208, and Big5): every
font has to have all of them, whatever its language. About 60 % of the font files are train.parquet, which also has
every character in other sizes, at other places and a little turned. The pictures of all other fonts are divided at
random between calibration.parquet and test.parquet, so that a certificate from one holds for the other. All faces of a
family are on one side. Give the folders of fonts with open licences (OFL) where a network that was trained on them is
to be published: --fonts.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the repository, so that scripts.* is found

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from scripts.datasets.parquet import load_split, png, write_split
from timm_cascade.data import ImageData

SIZE, CHARACTERS, VARIATIONS, LEAST_FONTS = 64, 1000, 3, 12
SUFFIXES = ('.ttf', '.otf', '.ttc')
BUILT = Path(__file__).resolve().parents[2] / 'runs' / 'han'


def characters(count: int = CHARACTERS) -> list[str]:
    """`count` characters of level 1 of GB 2312 and JIS X 0208 that Big5 has too, spread evenly over their codes."""
    shared = []
    for code in range(0x4E00, 0xA000):
        try:
            gb, jis, _ = (chr(code).encode(name) for name in ('gb2312', 'euc_jp', 'big5'))
        except UnicodeEncodeError:
            continue
        if gb[0] - 0xA0 <= 55 and len(jis) == 2 and jis[0] - 0xA0 <= 47:  # rows of level 1
            shared.append(chr(code))
    shared.remove('牙')  # several Japanese fonts draw only its other form
    return [shared[i] for i in np.linspace(0, len(shared) - 1, count).astype(int)]


def usable_fonts(folders: Sequence[Path], wanted: Sequence[str], least: int = LEAST_FONTS) -> list[Path]:
    """Font files below `folders` that have all the characters; monospaced twins draw the same ones and are left out.

    Raises:
        RuntimeError: Fewer than `least`; the message says what was found and which packages bring fonts.
    """
    from fontTools.ttLib import TTFont, TTLibError

    found = sorted(p for folder in folders for p in folder.rglob('*') if p.suffix.lower() in SUFFIXES)
    found = [p for p in found if 'Mono' not in p.stem]
    codes, fonts = {ord(c) for c in wanted}, []
    for path in found:
        try:
            with TTFont(path, fontNumber=0, lazy=True) as font:
                if codes <= set(font.getBestCmap() or ()):
                    fonts.append(path)
        except (TTLibError, OSError) as e:
            print(f'{path} cannot be read as a font ({e}); it is left out', file=sys.stderr)
    if len(fonts) < least:
        raise RuntimeError(
            f'{len(fonts)} of {len(found)} font files below {", ".join(map(str, folders))} have all {len(codes)} '
            f"characters; expected at least {least}. Install more, for example Debian's fonts-noto-cjk-extra, "
            f'fonts-lxgw-wenkai, fonts-klee, fonts-reggae, fonts-yusei-magic, fonts-smiley-sans, fonts-rampart.'
        )
    return fonts


def split_fonts(fonts: Sequence[Path], seed: int = 0) -> dict[str, list[Path]]:
    """Font files to train with and to hold out; files of one family (the name up to the first - or _) stay together."""
    families: dict[str, list[Path]] = {}
    for path in sorted(fonts):
        families.setdefault(path.stem.replace('_', '-').partition('-')[0].lower(), []).append(path)
    if len(families) < 2:
        raise RuntimeError(f'the fonts are of {len(families)} families ({", ".join(families)}); expected at least two.')
    order = [sorted(families)[i] for i in np.random.default_rng(seed).permutation(len(families))]
    parts: dict[str, list[Path]] = dict(train=[], held_out=[])
    for name in order:  # each to the side that has least of its share
        share = dict(train=0.6, held_out=0.4)
        parts[min(parts, key=lambda part: len(parts[part]) / share[part])] += families[name]
    return parts


def render(path: Path, wanted: Sequence[str], variations: int, seed: int = 0) -> list[list[np.ndarray]]:
    """Grey (SIZE, SIZE) pictures of each character: one in the middle, then `variations` others.

    Raises:
        RuntimeError: A character that leaves no mark.
    """
    random, pictures = np.random.default_rng(seed), []
    for character in wanted:
        each = []
        for variation in range(variations + 1):
            points, angle, shift = 52, 0.0, np.zeros(2)
            if variation:
                points, angle, shift = int(random.integers(38, 57)), random.uniform(-8, 8), random.uniform(-4, 4, 2)
            canvas = Image.new('L', (SIZE, SIZE), 255)
            place = tuple(SIZE / 2 + shift)
            ImageDraw.Draw(canvas).text(place, character, fill=0, font=_font(path, points), anchor='mm')
            picture = np.asarray(canvas.rotate(angle, Image.Resampling.BILINEAR, fillcolor=255))
            if picture.min() > 128:
                raise RuntimeError(f'{path} draws nothing for {character} (U+{ord(character):04X}).')
            each.append(picture)
        pictures.append(each)
    return pictures


_fonts: dict[tuple[Path, int], ImageFont.FreeTypeFont] = {}


def _font(path: Path, points: int) -> ImageFont.FreeTypeFont:
    if (path, points) not in _fonts:
        _fonts[path, points] = ImageFont.truetype(str(path), points)
    return _fonts[path, points]


def build(out: Path, folders: Sequence[Path], wanted: Sequence[str], least: int = LEAST_FONTS) -> dict[str, list[str]]:
    """Writes the three parquet files; returns the names of the font files on each side."""
    parts = split_fonts(usable_fonts(folders, wanted, least))
    for side, fonts in parts.items():
        variations = itertools.repeat(VARIATIONS if side == 'train' else 0)
        with ProcessPoolExecutor() as pool:
            drawn = list(pool.map(render, fonts, itertools.repeat(wanted), variations, range(len(fonts))))
        rows = [(png(picture), label) for font in drawn for label, each in enumerate(font) for picture in each]
        rows = [rows[i] for i in np.random.default_rng(1).permutation(len(rows))]
        half = len(rows) // 2
        splits = dict(train=rows) if side == 'train' else dict(calibration=rows[:half], test=rows[half:])
        for split, part in splits.items():
            write_split(out / f'{split}.parquet', [r[0] for r in part], [r[1] for r in part], list(wanted))
    return {side: [path.name for path in fonts] for side, fonts in parts.items()}


def load(split: str, folder: Path = BUILT) -> ImageData:
    """`train`, `calibration` or `test`; raises FileNotFoundError where the set is not built yet."""
    return load_split(folder, split, 'Han characters', 'python scripts/datasets/han.py')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('runs/han'), help='folder of the parquet files')
    parser.add_argument('--fonts', type=Path, nargs='+', default=[Path('/usr/share/fonts')], help='folders of fonts')
    args = parser.parse_args()
    try:
        parts = build(args.out, args.fonts, characters())
    except (RuntimeError, ModuleNotFoundError) as e:
        sys.exit(f'han: {e}')
    for side, names in parts.items():
        print(f'{side.replace("_", " ")}: {CHARACTERS} characters from {", ".join(names)}')


if __name__ == '__main__':
    main()
