"""Image sets of single pictures: class folders, plain or in one zip, with or without a table of what they are."""

from __future__ import annotations

import io
import lzma
import os
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from scforget.data.image_files import PICTURES, Found, innermost, one_line
from scforget.errors import DataError
from scforget.progress import Progress

METADATA = "metadata.csv"
_COLUMNS = ("label", "identity", "split")
_PARTS = ("train", "test")
_NOBODY = ("na", "n/a", "nan", "none", "null", "unknown")  # of an identity; a class may be called so
# Pillow's name of how a picture is stored -> as what it is read.
_MODES = {"1": "L", "L": "L", "LA": "L", "RGB": "RGB", "RGBA": "RGB", "P": "RGB", "CMYK": "RGB", "YCbCr": "RGB"}
_AT_ONCE = 512
_LARGEST = 2**28  # bytes of one unpacked file of a zip
_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, zlib.error, lzma.LZMAError, zipfile.BadZipFile, RuntimeError,
    NotImplementedError,
)  # fmt: skip


class _Store:
    """Files by name, ``/`` between folders, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder
        files = (Path(home) / name for home, _, names in os.walk(folder) for name in names)
        self.names = sorted(file.relative_to(folder).as_posix() for file in files)

    def bytes_of(self, name: str) -> bytes:
        return (self.path / name).read_bytes()


class _Zip(_Store):
    """Files by name in a zip."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        self.path, self._archive = path, archive
        self.names = sorted(entry.filename for entry in archive.infolist() if not entry.is_dir())

    def bytes_of(self, name: str) -> bytes:
        if (size := self._archive.getinfo(name).file_size) > _LARGEST:
            raise ValueError(f"{size} bytes unpacked")
        return self._archive.read(name)


class _Item(NamedTuple):
    """A picture: its name in the store, its name without what wraps the set, and what is known of it."""

    place: str
    name: str
    label: str
    identity: str
    test: bool


@contextmanager
def _opened(path: Path) -> Iterator[_Store]:
    """A folder, the one zip in a folder without pictures of its own, or a zip."""
    if path.is_dir():
        folder = innermost(path)
        zips = sorted(file for file in folder.iterdir() if file.suffix.lower() == ".zip")
        if not zips:
            yield _Store(path)
            return
        if len(zips) > 1 or any(file.suffix.lower() in PICTURES for file in folder.rglob("*")):
            found = f"{', '.join(file.name for file in zips)} and maybe pictures"
            raise DataError(str(folder), found, "one .zip, or pictures")
        path = zips[0]
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(str(path), f"{type(error).__name__}: {one_line(error)}", "a whole .zip") from error
    with archive:
        yield _Zip(path, archive)


def read_pictures(path: Path) -> Found:
    """Read pictures and what their folders, or a ``metadata.csv``, say of them.

    Raises
    ------
    DataError
        If a picture cannot be read, is of another size than the first, has no class, or the table names one that is
        not there or leaves one out.
    """
    with _opened(path) as store:
        beside = store.path.parent / METADATA if path.is_dir() and store.path.is_file() else None
        items = _items(store, beside)
        inputs = _decode(store, items)
    return Found(
        inputs=inputs,
        labels=[item.label for item in items],
        identities=[item.identity for item in items],
        names=[item.name for item in items],
        test=np.array([item.test for item in items], dtype=bool),
    )


def _items(store: _Store, beside: Path | None) -> list[_Item]:
    """Pictures in the order of their names, with class, identity and part."""
    what = str(store.path)
    names = [name for name in store.names if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]
    pictures = [name for name in names if name.lower().endswith(PICTURES)]
    if not pictures:
        raise DataError(what, "no picture", f"{', '.join(PICTURES)} in class folders")
    twice = [name for name, times in Counter(pictures).items() if times > 1]
    if twice:
        raise DataError(what, f"{one_line(twice[0])!r} more than once", "unique names")
    tables = [name for name in names if name.rpartition("/")[2] == METADATA]
    if len(tables) > 1:
        raise DataError(what, ", ".join(map(one_line, tables)), f"one {METADATA}")
    root = tables[0].removesuffix(METADATA) if tables else _wrapper(pictures)
    outside = [name for name in pictures if not name.startswith(root)]
    if outside:
        raise DataError(f"{what}: {METADATA}", f"{one_line(outside[0])!r} outside its folder", "all pictures below it")
    short = [name.removeprefix(root) for name in pictures]
    table: pd.DataFrame | None = None
    if beside is not None and beside.is_file():
        if tables:
            raise DataError(str(beside), f"another one in {store.path.name}", "one of them")
        table = _table(str(beside), beside.read_bytes(), short)
    elif tables:
        try:
            content = store.bytes_of(tables[0])
        except _UNREADABLE as error:
            found = f"{one_line(tables[0])!r}, {type(error).__name__} on reading"
            raise DataError(what, found, f"a whole {METADATA}") from error
        table = _table(f"{what}: {tables[0]}", content, short)
    parted = {name.split("/")[0].lower() for name in short} <= set(_PARTS)
    rows = [("", "", "")] * len(short) if table is None else list(table.itertuples(index=False, name=None))
    return [_item(what, place, name, row, parted) for place, name, row in zip(pictures, short, rows, strict=True)]


def _wrapper(pictures: list[str]) -> str:
    """The folders that all pictures lie in, and that wrap class folders or ``train`` and ``test``."""
    root: list[str] = []
    split = [PurePosixPath(name).parts for name in pictures]
    # a folder of pictures is a class; what holds only folders is a wrapper, unless it is the name of a part
    while min(map(len, split)) > 2 and len({parts[0] for parts in split}) == 1 and split[0][0].lower() not in _PARTS:
        root.append(split[0][0])
        split = [parts[1:] for parts in split]
    return "".join(f"{part}/" for part in root)


def _item(what: str, place: str, name: str, row: tuple[str, str, str], parted: bool) -> _Item:
    """One picture, by its line in the table where that says something, else by its folders."""
    *folders, _ = name.split("/")
    part = folders.pop(0).lower() if parted and folders else "train"
    label, identity, split = row
    if not label:
        if len(folders) != 1:
            wanted = f"CLASS/picture, train/CLASS/picture and test/CLASS/picture, or its label in {METADATA}"
            raise DataError(what, f"{one_line(name)!r}, of no class", wanted)
        label = folders[0]
    if split not in ("", *_PARTS):
        raise DataError(what, f"split {one_line(split)!r} of {one_line(name)!r}", "train or test")
    return _Item(place, name, label, identity, (split or part) == "test")


def _table(what: str, content: bytes, names: list[str]) -> pd.DataFrame:
    """Label, identity and split of each picture in order, ``''`` where the table does not say."""
    try:
        table = pd.read_csv(io.BytesIO(content), dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (ValueError, pd.errors.ParserError) as error:  # the former covers other encodings and an empty file
        raise DataError(what, one_line(error), "a table in UTF-8 with commas") from error
    if "file" not in table:
        raise DataError(what, f"columns {one_line(', '.join(map(str, table.columns)))}", "a column 'file'")
    files = table["file"].str.replace("\\", "/", regex=False)
    if files.duplicated().any():
        raise DataError(what, f"{one_line(files[files.duplicated()].iloc[0])!r} more than once", "one line a picture")
    if missing := set(files) - set(names):
        raise DataError(what, f"{one_line(min(missing))!r}, which is not there", "names of pictures beside it")
    if left := set(names) - set(files):
        raise DataError(what, f"no line for {one_line(min(left))!r}", "one line a picture")
    alike = [str(name) for name in table if str(name).strip().lower() in _COLUMNS and name not in _COLUMNS]
    if alike:
        raise DataError(what, f"column {one_line(alike[0])!r}", f"{alike[0].strip().lower()!r}, or another name")
    known = table.set_index(files).reindex(columns=list(_COLUMNS), fill_value="").fillna("")
    known = known.apply(lambda column: column.str.strip())  # " p" and "p" are one person
    known["identity"] = known["identity"].mask(known["identity"].str.lower().isin(_NOBODY), "")
    return known.loc[names]


def _decode(store: _Store, items: list[_Item]) -> npt.NDArray[np.uint8]:
    """``[N, channels, H, W]``: grey if every picture is."""
    parts: list[npt.NDArray[np.uint8]] = []
    size: tuple[int, int] | None = None
    with Progress(store.path.name, len(items), "images") as progress, ThreadPoolExecutor() as pool:
        for start in range(0, len(items), _AT_ONCE):
            some = [(store, item, size or _look(store, items[0])) for item in items[start : start + _AT_ONCE]]
            size = some[0][2]
            for one in pool.map(_one, some):
                parts.append(one)
                progress.advance()
    channels = max(part.shape[0] for part in parts)
    inputs = np.empty((len(parts), channels, *parts[0].shape[1:]), np.uint8)
    for i, part in enumerate(parts):
        inputs[i] = part  # a grey one gets three equal channels
    return inputs


def _opened_picture(store: _Store, item: _Item) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(store.bytes_of(item.place)), formats=("PNG", "JPEG"))


def _look(store: _Store, item: _Item) -> tuple[int, int]:
    """Width and height of a picture."""
    with _readable(store, item), _opened_picture(store, item) as picture:
        return picture.size


@contextmanager
def _readable(store: _Store, item: _Item) -> Iterator[None]:
    from PIL import Image

    try:
        yield
    except (*_UNREADABLE, Image.DecompressionBombError) as error:
        found = f"{one_line(item.name)!r}, {type(error).__name__} on reading"
        raise DataError(str(store.path), found, "whole PNG and JPEG pictures") from error


def _one(job: tuple[_Store, _Item, tuple[int, int]]) -> npt.NDArray[np.uint8]:
    """One picture's bytes, ``[channels, H, W]``."""
    store, item, size = job
    with _readable(store, item), _opened_picture(store, item) as picture:
        found, mode = picture.size, picture.mode
        # told before it is decoded: another size may be a huge one
        if found == size and mode in _MODES:
            pixels = np.asarray(picture if mode == _MODES[mode] else picture.convert(_MODES[mode]))
            return np.atleast_3d(pixels).transpose(2, 0, 1)
    if found != size:
        what = f"{one_line(item.name)!r} of {found[0]} x {found[1]} pixels"
        raise DataError(str(store.path), what, f"{size[0]} x {size[1]} as the first has; bring all to one size")
    wanted = "8 bits a channel, grey or colours"
    raise DataError(str(store.path), f"{one_line(item.name)!r} of Pillow's mode {mode}", wanted)
