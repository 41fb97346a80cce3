"""Image folders: which files are images, which classes and splits they belong to.

All image files are found here, as timm's and torchvision's readers find them: links are followed, hidden files
passed over, the extensions are timm's, and a class is the name of the folder that an image lies in.
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from timm.data.readers.img_extensions import get_img_extensions

from .images import ImageData
from .leaks import File, check_leaks
from .splits import canonical, choose_split
from .storage import Files

__all__ = ['CLASS_ORDERS', 'load_folder', 'natural_key']

_logger = logging.getLogger(__name__)
SYSTEM = {'__MACOSX', '@eaDir', '$RECYCLE.BIN', 'System Volume Information', 'lost+found'}
NOTES = {'README', 'LICENSE', 'NOTICE', 'COPYING', 'CHANGELOG'}
ARCHIVES = {'.zip', '.tar', '.gz', '.tgz', '.bz2', '.xz', '.zst', '.7z', '.rar'}
PICTURES = {'.heic', '.heif', '.avif', '.svg', '.raw', '.dng', '.cr2', '.nef', '.webp', '.bmp', '.gif', '.tif', '.tiff'}
NO_IMAGE, ARCHIVE = 'not images', 'archives, which are not opened'
NO_EXTENSION, NO_CLASS = 'files without an extension', 'not images, in folders that become no classes'
STRAY, OUTSIDE = 'beside the class folders', 'outside of the split folders'
OTHER_TYPE = 'images of a type that is not read'
LABEL_FILE = 'files of labels, which are not read: classes are folders'
BROKEN, CYCLE = 'links to nothing', 'links back to a folder above'


def natural_key(text: str) -> tuple[list[Any], str]:
    """timm's order of classes and files: numbers by value, letters in any case; the text itself where that ties."""
    parts = re.split(r'([0-9]+)', text.lower())
    return [int(p) if i % 2 else p for i, p in enumerate(parts)], text


CLASS_ORDERS: dict[str, Callable[[str], Any]] = {'natural': natural_key, 'text': str}


class _Tree:
    """What lies below a folder: images, what is left out and why, and the folders."""

    def __init__(self, root: Path, extensions: frozenset[str]) -> None:
        self.root, self.extensions = root, extensions
        self.images: list[File] = []
        self.left_out: dict[str, list[str]] = defaultdict(list)
        self.folders: list[str] = []
        self.hidden = 0
        self._walk('', (self._identity(os.stat(root)),))
        self.images.sort(key=lambda f: natural_key(f.path))

    @staticmethod
    def _identity(state: os.stat_result) -> tuple[int, int]:
        return state.st_dev, state.st_ino

    def _walk(self, below: str, above: tuple[tuple[int, int], ...]) -> None:
        with os.scandir(self.root / below) as entries:  # a folder that may not be read is an error, not an empty one
            found = sorted(entries, key=lambda e: e.name)
        for entry in found:
            path = f'{below}/{entry.name}' if below else entry.name
            if entry.name.startswith('.') or entry.name in SYSTEM:
                self.hidden += 1
                continue
            try:
                state = entry.stat()
            except OSError:
                self.left_out[BROKEN].append(path)
                continue
            identity = self._identity(state)
            if entry.is_dir():
                if identity in above:
                    self.left_out[CYCLE].append(path)
                else:
                    self.folders.append(path)
                    self._walk(path, (*above, identity))
            elif (reason := self._reason(entry)) is not None:
                self.left_out[reason].append(path)
            else:
                self.images.append(File(path, state.st_size, identity))

    def _reason(self, entry: os.DirEntry[str]) -> str | None:
        extension = os.path.splitext(entry.name)[1].lower()
        if not entry.is_file():
            return NO_IMAGE
        if extension in self.extensions:
            return None
        if extension in ARCHIVES:
            return ARCHIVE
        if extension in ('.csv', '.jsonl', '.parquet') and entry.name.lower().startswith(('metadata', 'labels')):
            return LABEL_FILE
        if not extension and entry.name.upper() not in NOTES:
            return NO_EXTENSION
        return OTHER_TYPE if extension in PICTURES or extension in Image.registered_extensions() else NO_IMAGE


def _report(title: str, read: int, classes: int, left_out: dict[str, list[str]], extensions: Iterable[str]) -> None:
    """One line: found, read, left out and why."""
    found = read + sum(map(len, left_out.values()))
    text = f'{title}: {found} files, {read} images read' + (f' in {classes} classes' if classes else '')
    if left_out:
        text += '; left out: ' + '; '.join(
            f'{len(paths)} {reason} ({", ".join(paths[:3])}{", ..." if len(paths) > 3 else ""})'
            for reason, paths in left_out.items()
        )
    if types := _types(left_out.get(OTHER_TYPE, [])):
        text += f'. Read are {", ".join(sorted(extensions))}; extensions={types} (--extensions) adds these'
    _logger.log(logging.WARNING if set(left_out) - {NO_IMAGE} else logging.INFO, '%s', text)


def _types(paths: Iterable[str]) -> list[str]:
    return sorted({os.path.splitext(p)[1].lower() for p in paths})


def _parts(path: str) -> list[str]:
    return path.split('/')


def _split_folders(tree: _Tree, labels: bool) -> dict[str, str]:
    """Split names and their folders: those directly below the root, if one of them is named as a split."""
    depth: dict[str, set[int]] = defaultdict(set)
    for file in tree.images:
        parts = _parts(file.path)
        if len(parts) > 1:
            depth[parts[0]].add(min(len(parts), 3))
    named = [top for top in depth if canonical(top)]
    if not any(3 in depth[top] for top in named):  # train/cat/a.png is a split; train/a.png may be a class of its own
        if not named or len(named) < len(depth):
            return {}
        if labels:
            raise ValueError(
                f'{tree.root} has {", ".join(sorted(named))} with images in them but no class folders. An image folder '
                f'has one sub-folder per class: {named[0]}/cat/1.png. Without labels pass labels=False (--no-labels).'
            )
    names = Counter(canonical(top) for top in named)
    return {(canonical(top) or top) if names[canonical(top)] == 1 else top: top for top in sorted(depth)}


def _choose(root: Path, splits: dict[str, str], split: str | None) -> tuple[str, str]:
    """The split that is asked for: its name and its folder ('' for the root)."""
    if not splits:
        own = canonical(root.resolve().name)
        if split is None or canonical(split) == (own or 'train'):
            return split or own or '', ''
        raise ValueError(
            f'{root} has no folder for the split {split!r}'
            + (f': it is itself the split {own}.' if own else ', nor for any other: its sub-folders are classes.')
            + " Slices of one folder are drawn by class: 'train[:80%]' and 'train[80%:]'."
        )
    by_folder = {folder: name for name, folder in splits.items()}
    name = by_folder.get(split or '') or choose_split(splits, split, str(root))
    return name, splits[name]


def _class_of(file: File) -> str:
    return _parts(file.path)[-2]


def _check_layout(root: Path, below: str, files: Sequence[File]) -> None:
    """Refuses layouts in which folders cannot be told to be classes, and says where readers disagree.

    Raises:
        ValueError: Splits inside of classes or one folder further down, a class folder with folders of images in it.
    """
    base = len(_parts(below)) if below else 0
    where = root / below
    for file in files:
        inner = _parts(file.path)[base:-2]
        if word := next((p for p in inner if canonical(p)), None):
            raise ValueError(
                f'{where} has a folder {word!r} further down ({file.path}). Splits are folders directly below the one '
                f'that is given: {where}/{word}/CLASS/IMAGE. Give the folder that holds them, or move them.'
            )
    names = {_class_of(f) for f in files}
    if all(canonical(name) for name in names) and any(len(_parts(f.path)) - base > 2 for f in files):
        raise ValueError(
            f'{where} has splits inside of class folders ({files[0].path}). The split comes first: '
            f'{where}/train/CLASS/IMAGE. Move the folders.'
        )
    holders = {f.path.rpartition('/')[0] for f in files}
    for holder in sorted(holders):
        above = holder.rpartition('/')[0]
        while above:
            if above in holders:
                raise ValueError(
                    f'{above} holds images, and so does {holder} inside of it; whether that is one class or two '
                    f'cannot be told (timm takes two, torchvision one). Move the images to one level.'
                )
            above = above.rpartition('/')[0]
    outer = {_parts(h)[base] for h in holders}
    if any(len(_parts(h)) - base > 1 for h in holders):
        _logger.warning(
            '%s: classes are the innermost folders, as timm reads them: %d (%s, ...); torchvision would take the '
            'outermost, %d (%s, ...)',
            where,
            len(names),
            min(names, key=natural_key),
            len(outer),
            min(outer, key=natural_key),
        )


def _check_empty(tree: _Tree, below: str, files: Iterable[File], known: set[str]) -> None:
    """A class folder none of whose images is read would vanish from the classes, and move the labels of all others.

    Raises:
        ValueError: There is one that is not a class of another split.
    """
    used = {f.path.rpartition('/')[0] for f in files}
    filled = {above for path in used for above in _above(path)}
    doubtful = {
        above for reason, paths in tree.left_out.items() if reason != NO_IMAGE for p in paths for above in _above(p)
    }
    occupied = {above for paths in tree.left_out.values() for p in paths for above in _above(p)}
    empty = [
        folder
        for folder in tree.folders
        if (not below or folder.startswith(f'{below}/'))
        and folder not in filled
        and not used.intersection(_above(folder))
        and (folder in doubtful or folder not in occupied)
        and _parts(folder)[-1] not in known
    ]
    if empty:
        types = _types(p for p in tree.left_out.get(OTHER_TYPE, []) if set(empty).intersection(_above(p)))
        raise ValueError(
            f'{len(empty)} class folders hold no files that are read: '
            f'{", ".join(str(tree.root / e) for e in empty[:5])}. Add images or remove the folders'
            + (f'; extensions={types} (--extensions) reads the files that they hold.' if types else '.')
        )


def _above(path: str) -> list[str]:
    """The path and the folders it lies in."""
    parts = _parts(path)
    return ['/'.join(parts[:i]) for i in range(1, len(parts) + 1)]


def load_folder(
    root: Path,
    split: str | None,
    labels: bool = True,
    class_order: str = 'natural',
    extensions: Sequence[str] | None = None,
) -> ImageData | None:
    """The images of a folder, or of one of its splits; None where there are no files that look like images.

    The classes are those of the training split, where there is one, for all splits.

    Raises:
        ValueError: No such split, a layout that cannot be read as classes, a class without images, or images that are
            in several splits.
    """
    types = extensions if extensions is not None else []
    read = frozenset(get_img_extensions(as_set=True)) | {f'.{t.lower().lstrip(".")}' for t in types}
    tree = _Tree(root, read)
    if not tree.images:
        if other := _types(tree.left_out.get(OTHER_TYPE, [])):
            raise ValueError(
                f'{root} holds no {", ".join(sorted(read))} files, but images of other types; extensions={other} '
                f'(--extensions) reads these too.'
            )
        if packed := tree.left_out.get(ARCHIVE):
            raise ValueError(f'{root} holds no images but archives ({", ".join(packed[:3])}). Unpack them first.')
        return None
    splits = _split_folders(tree, labels)
    name, below = _choose(root, splits, split)
    title = f'{root} {name}'.strip()
    members = {
        folder: [f for f in tree.images if not folder or f.path.startswith(f'{folder}/')]
        for folder in {below, *splits.values()}
    }
    files, names = members[below], []
    left_out = {
        reason: paths
        for reason, all_paths in tree.left_out.items()
        if (paths := [p for p in all_paths if not splits or '/' not in p or p.startswith(f'{below}/')])
    }
    outside = [f.path for f in tree.images if splits and '/' not in f.path]
    outside += [
        f.path for folder in splits.values() if not canonical(folder) and folder != below for f in members[folder]
    ]
    if outside:
        left_out[OUTSIDE] = outside
    if labels:
        depth = 2 if below else 1
        files = [f for f in files if len(_parts(f.path)) > depth]
        if not files:
            raise ValueError(
                f'{root / below} holds images but no class folders: an image folder has one sub-folder per class. '
                f'Without labels pass labels=False (--no-labels).{_instead_of_labels(root, tree)}'
            )
        if stray := [f.path for f in members[below] if len(_parts(f.path)) == depth]:
            left_out[STRAY] = stray
        _check_layout(tree.root, below, files)
        train = splits.get('train')
        reference = [train] if train else [f for f in splits.values() if canonical(f)] if canonical(below) else [below]
        known = {_class_of(f) for folder in reference for f in members[folder] if len(_parts(f.path)) > depth}
        mine = {_class_of(f) for f in files}
        _check_empty(tree, below, files, known - mine)
        if extra := sorted(mine - known, key=natural_key):
            raise ValueError(
                f'{title} has images of {len(extra)} classes that the training split does not have: '
                f'{", ".join(extra[:5])}. Take them out, or add the classes to the training images.'
            )
        names = sorted(known, key=CLASS_ORDERS[class_order])
        classes = {'/'.join(_parts(f.path)[:depth]) for f in files}
        idle = [p for p in left_out.get(NO_IMAGE, []) if '/'.join(_parts(p)[:depth]) not in classes | {p}]
        if idle:
            left_out[NO_IMAGE] = [p for p in left_out[NO_IMAGE] if p not in set(idle)]
            left_out = {reason: paths for reason, paths in left_out.items() if paths} | {NO_CLASS: idle}
        _check_twice(title, files)
    check_leaks(root, name, files, {n: members[f] for n, f in splits.items() if f != below and canonical(f)})
    _report(title, len(files), len(names), left_out, read)
    place = {name: i for i, name in enumerate(names)}
    images = Files(str(root), [f.path for f in files])
    return ImageData(images, [place[_class_of(f)] for f in files] if labels else None, names, str(root), name)


def _instead_of_labels(root: Path, tree: _Tree) -> str:
    """What opens a folder whose labels stand in a file, for an error message; nothing where there is no such file."""
    if not (files := tree.left_out.get(LABEL_FILE)):
        return ''
    return (
        f' Labels in {files[0]} are not read here; datasets reads a metadata.csv: save_to_disk(FOLDER) of '
        f'datasets.load_dataset("imagefolder", data_dir={str(root)!r}), and give FOLDER.'
    )


def _check_twice(title: str, files: Sequence[File]) -> None:
    classes: dict[tuple[int, int], set[str]] = defaultdict(set)
    for file in files:
        classes[file.identity].add(_class_of(file))
    if twice := [c for c in classes.values() if len(c) > 1]:
        _logger.warning(
            '%s: %d files are in several classes at once, by links: %s',
            title,
            len(twice),
            ' and '.join(sorted(twice[0])),
        )
