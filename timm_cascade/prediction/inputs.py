"""What is to be predicted: sources of images that can say how many they hold and read any range of them."""

from __future__ import annotations

import glob
import hashlib
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from timm.data.readers.img_extensions import IMG_EXTENSIONS

from ..data import ImageData, load_data, upright
from ..data.columns import hub_parquet_files
from ..data.idx import is_idx_folder
from ..data.loading import HUB, hub_id
from ..data.splits import parse_splits
from ..data.storage import files_below

__all__ = ['DataSource', 'FileSource', 'Item', 'ParquetSource', 'Source', 'open_image', 'open_sources']


class Item(NamedTuple):
    """One image that is to be predicted.

    Attributes:
        filename: Its name in the results.
        row: Its row in the file or data set; -1 for a file that is one image.
        image: A path, the encoded bytes, or a picture that is decoded already.
    """

    filename: str
    row: int
    image: Path | bytes | Any


def open_image(found: Path | bytes | Any) -> Image.Image:
    """The image in a file, in encoded bytes, or as an array or picture; decoded and upright.

    Raises:
        Exception: Whatever the decoder raises on a damaged image.
    """
    if isinstance(found, (Path, bytes)):
        with Image.open(io.BytesIO(found) if isinstance(found, bytes) else found) as image:
            return upright(image)
    return upright(found)


@dataclass(frozen=True)
class FileSource:
    """Image files in a fixed order, of which any range can be read without the rest.

    Args:
        files: Their paths.
        names: What they are called in the results.
    """

    files: tuple[Path, ...]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.files)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        """The images start..stop-1."""
        for path, name in zip(self.files[start:stop], self.names[start:stop], strict=True):
            yield Item(name, -1, path)

    def identity(self) -> Any:
        """JSON that changes when the input's names, sizes or times change."""
        digest = hashlib.sha256()
        for path, name in zip(self.files, self.names, strict=True):
            digest.update(json.dumps([name, *_size_and_time(path)]).encode())
        return dict(files=len(self.files), digest=digest.hexdigest()[:16])


@dataclass(frozen=True)
class ParquetSource:
    """One parquet file with a column of encoded images; never more than a few rows of it are in memory.

    Args:
        path: The file, or its `hf://` address on the Hub, of which only what is asked for is fetched.
        name: What it is called in the results.
        column: The column of images.
    """

    path: str
    name: str
    column: str

    def __len__(self) -> int:
        return _open_parquet(self.path).metadata.num_rows

    def read(self, start: int, stop: int) -> Iterator[Item]:
        file = _open_parquet(self.path)
        after = 0  # the row after this group
        for group in range(file.num_row_groups):
            row, after = after, after + file.metadata.row_group(group).num_rows
            if row >= stop or after <= start:
                continue
            for batch in file.iter_batches(64, row_groups=[group], columns=[self.column]):
                begin, end = max(start, row), min(stop, row + len(batch))
                for number, value in enumerate(batch.column(0)[begin - row : end - row].to_pylist(), begin):
                    found = value.get('bytes') if isinstance(value, dict) else value
                    yield Item(self.name, number, found if found is not None else b'')
                row += len(batch)
                if row >= stop:
                    break

    def identity(self) -> Any:
        return dict(
            name=self.name,
            column=self.column,
            file=self.path if _remote(self.path) else _size_and_time(Path(self.path)),
        )


@dataclass(frozen=True)
class DataSource:
    """An ImageData, such as a Hub data set or IDX files.

    Args:
        data: The images; a transform of theirs is not used.
    """

    data: ImageData

    def __len__(self) -> int:
        return len(self.data)

    def read(self, start: int, stop: int) -> Iterator[Item]:
        name = f'{self.data.name} {self.data.split}'.strip()
        for row in range(start, min(stop, len(self.data))):
            try:
                image = self.data.images[row]
            except Exception:  # decoders raise whatever they like; `open_image` reports the empty image
                image = b''
            yield Item(name, row, image)

    def identity(self) -> Any:
        return dict(source=self.data.source, split=self.data.split, images=len(self.data))


Source = FileSource | ParquetSource | DataSource


def open_sources(
    data: ImageData | str | Path | Sequence[str | Path], split: str | None = None, image_column: str | None = None
) -> list[Source]:
    """Sources of images, in a fixed order.

    Args:
        data: An ImageData; or one or several of: image files, folders of them (with all below), globs, parquet files,
            folders of IDX files, Hub data set ids. Parquet files of a Hub data set are streamed: a part of the file is
            fetched when its images are read, and nothing is stored. Other formats are fetched first.
        split: Split of a Hub data set or IDX folder.
        image_column: Column with the images, where a parquet file has several.

    Raises:
        FileNotFoundError: A path or glob that matches nothing.
        ValueError: A folder without images, or a parquet file without a column of images.
    """
    if isinstance(data, ImageData):
        return [DataSource(data)]
    named = [str(d) for d in (data if isinstance(data, (list, tuple)) else [data])]
    sources: list[Source] = []
    files: list[tuple[Path, str]] = []
    for text in named:
        path = Path(text).expanduser()
        if path.exists():
            found = [path]
        elif any(c in text for c in '*?['):
            found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
            if not found:
                raise FileNotFoundError(f'{text} matches no file.')
        elif repo := hub_id(text):
            sources += _on_hub(text, repo, split, image_column)
            continue
        else:
            raise FileNotFoundError(f'{text} does not exist.')
        for each in found:
            prefix = f'{text.rstrip("/")}/' if len(named) > 1 and each == path else ''
            if each.is_dir() and is_idx_folder(each):
                sources.append(DataSource(load_data(each, split, labels=False)))
            elif each.is_dir():
                below = list(files_below(each))
                images = [p for p in below if p.suffix.lower() in IMG_EXTENSIONS]
                tables = [p for p in below if p.suffix.lower() == '.parquet']
                if not images and not tables:
                    raise ValueError(
                        f'{each} holds no images: no file below it ends in {", ".join(sorted(IMG_EXTENSIONS))} or '
                        f'.parquet.'
                    )
                files += [(p, prefix + p.relative_to(each).as_posix()) for p in images]
                sources += [_parquet(str(p), prefix + p.relative_to(each).as_posix(), image_column) for p in tables]
            elif each.suffix.lower() == '.parquet':
                sources.append(_parquet(str(each), str(each), image_column))
            else:
                files.append((each, str(each)))
    if files:
        sources.append(FileSource(tuple(p for p, _ in files), tuple(n for _, n in files)))
    return sources


def _on_hub(text: str, repo: str, split: str | None, column: str | None) -> list[Source]:
    """A Hub data set: its parquet files where it consists of them, otherwise what `datasets` makes of it."""
    parts = parse_splits(split)
    whole = len(parts) == 1 and parts[0].is_whole  # a slice of a split, or several, are read as one data set
    files = hub_parquet_files(repo, parts[0].name) if whole else None
    if files is None:
        return [DataSource(load_data(text, split, labels=False, image_column=column))]
    # user/name/data/test.parquet of hf://datasets/user/name@commit/data/test.parquet
    return [_parquet(f, re.sub('@[^/]*', '', f.removeprefix(HUB), count=1), column) for f in files]


def _remote(path: str) -> bool:
    return path.startswith('hf://')


def _parquet(path: str, name: str, column: str | None) -> ParquetSource:
    import pyarrow as pa

    try:
        schema = _open_parquet(path).schema_arrow
    except (pa.ArrowInvalid, OSError) as e:
        if _remote(path) and isinstance(e, OSError):
            raise OSError(f'{path} cannot be read from the Hub ({e}); parts that are done stay, try again.') from e
        raise ValueError(f'{path} is not a parquet file that can be read ({e}); fetch it again.') from e
    found = [f.name for f in schema if _holds_images(f)]
    if column is None and len(found) == 1:
        return ParquetSource(path, name, found[0])
    if column is not None and column in schema.names:
        return ParquetSource(path, name, column)
    raise ValueError(
        f'{path} has the columns {", ".join(schema.names)}, of which {found or "none"} look like encoded images. Name '
        f'one: image_column=, --image-column.'
    )


def _holds_images(field: Any) -> bool:
    import pyarrow as pa

    kind = field.type
    if pa.types.is_struct(kind):
        return any(kind.field(i).name == 'bytes' for i in range(kind.num_fields))
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _open_parquet(path: str) -> Any:
    return _opened_parquet(path, os.getpid())


@lru_cache(maxsize=4)
def _opened_parquet(path: str, process: int) -> Any:
    """An open file belongs to one process: a worker that shared its parent's would move the place where it reads."""
    import pyarrow.parquet as pq

    if not _remote(path):
        return pq.ParquetFile(path)
    from huggingface_hub import HfFileSystem

    return pq.ParquetFile(HfFileSystem().open(path), pre_buffer=True)  # one request for what lies side by side


def _size_and_time(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]
