"""Image sets that lie in a few large files: MNIST's IDX, CIFAR-10's pickles, NumPy's npz."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import re
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from scforget.arrays import BoolArray
from scforget.errors import DataError

PICTURES = (".png", ".jpg", ".jpeg")
Kind = Literal["idx", "cifar", "npz", "pictures"]
_BY_ENDING: dict[str, Kind] = {".npz": "npz", ".zip": "pictures"}
_IDX = re.compile(r"(train|t10k|test)-(images|labels)[-.]idx[13]-ubyte(\.gz)?")
_CIFAR = re.compile(r"data_batch_\d+|test_batch")
_CELLS = (".h5ad", ".h5", "matrix.mtx", "matrix.mtx.gz")
_IMAGES_MAGIC, _LABELS_MAGIC = 0x803, 0x801
_FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
# Of Fashion-MNIST's file of training labels, unpacked: its files are named as MNIST's are.
_FASHION_LABELS = "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9"


@dataclass(frozen=True)
class Found:
    """What a reader found, one of each for every image; ``inputs`` is ``[N, channels, H, W]`` uint8."""

    inputs: npt.NDArray[np.uint8]
    labels: Sequence[object]
    identities: Sequence[object]
    names: Sequence[object]
    test: BoolArray


def one_line(text: object) -> str:
    """``text`` without line breaks: names in an archive may hold any character."""
    return " ".join(str(text).split())


def innermost(folder: Path) -> Path:
    """Return the folder itself, or that which it only wraps, however often."""
    entries = [entry for entry in folder.iterdir() if not entry.name.startswith((".", "__MACOSX"))]
    return innermost(entries[0]) if len(entries) == 1 and entries[0].is_dir() else folder


def kind(path: Path) -> Kind | None:
    """Which reader is for ``path``; ``None`` if there is none."""
    if path.is_file():
        return _BY_ENDING.get(path.suffix.lower())
    if not path.is_dir():
        return None
    folder = innermost(path)
    names = [entry.name for entry in folder.iterdir()]
    if any(name.endswith(_CELLS) for name in names):
        return None  # with pictures of them perhaps
    patterns: tuple[tuple[re.Pattern[str], Kind], ...] = (_IDX, "idx"), (_CIFAR, "cifar")
    for pattern, found in patterns:
        if any(pattern.fullmatch(name) for name in names):
            return found
    endings = {Path(name).suffix.lower() for name in names}
    by_ending = (_BY_ENDING[ending] for ending in (".npz", ".zip") if ending in endings)
    pictures: Kind | None = "pictures" if any(file.suffix.lower() in PICTURES for file in folder.rglob("*")) else None
    return next(by_ending, pictures)


def read_idx(path: Path) -> Found:
    """Read MNIST's four files, or the two of the training images (Y. LeCun's IDX format, big-endian).

    Raises
    ------
    DataError
        If a file is missing, cut short, longer than it says, or of another kind.
    """
    folder = innermost(path)
    files: dict[tuple[str, str], Path] = {}
    for file in sorted(folder.iterdir()):
        if match := _IDX.fullmatch(file.name):
            key = "train" if match[1] == "train" else "test", match[2]
            if key in files:
                raise DataError(str(folder), f"both {files[key].name} and {file.name}", "one of them")
            files[key] = file
    parts: list[tuple[str, npt.NDArray[np.uint8], npt.NDArray[np.uint8]]] = []
    classes: Sequence[str] = ()
    for part in sorted({part for part, _ in files} | {"train"}, reverse=True):
        for what in ("images", "labels"):
            if (part, what) not in files:
                raise DataError(str(folder), f"no file of the {part} {what}", f"{part}-{what}-idx…-ubyte[.gz]")
        images = _idx(files[part, "images"], _IMAGES_MAGIC)[0]
        labels, digest = _idx(files[part, "labels"], _LABELS_MAGIC)
        if len(images) != len(labels):
            raise DataError(str(folder), f"{len(images)} {part} images, {len(labels)} labels", "as many of each")
        if parts and images.shape[1:] != parts[0][1].shape[1:]:
            raise DataError(str(files[part, "images"]), f"images {images.shape[1:]}", f"{parts[0][1].shape[1:]}")
        if part == "train" and digest == _FASHION_LABELS:
            classes = _FASHION
        parts.append((part, images, labels))
    return Found(
        inputs=np.concatenate([images for _, images, _ in parts])[:, None],
        labels=[classes[code] if classes else int(code) for *_, labels in parts for code in labels],
        identities=[""] * sum(len(labels) for *_, labels in parts),
        names=[f"{part}-{i}" for part, images, _ in parts for i in range(len(images))],
        test=np.concatenate([np.full(len(labels), part == "test") for part, _, labels in parts]),
    )


def _idx(file: Path, magic: int) -> tuple[npt.NDArray[np.uint8], str]:
    """One IDX file's bytes in their shape, and the hash of the file unpacked."""
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(str(file), f"{type(error).__name__} on reading", "a whole file") from error
    dimensions = magic & 0xFF
    start = 4 * (1 + dimensions)
    found = int.from_bytes(content[:4], "big")
    if len(content) < start or found != magic:
        raise DataError(str(file), f"{len(content)} bytes that begin with 0x{found:08x}", f"IDX, 0x{magic:08x}")
    shape = np.frombuffer(content[4:start], ">u4").astype(int).tolist()
    if len(content) - start != np.prod(shape, dtype=object):
        wanted = f"{' x '.join(map(str, shape))}, as it says; fetch it again"
        raise DataError(str(file), f"{len(content) - start} bytes of values", wanted)
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape), hashlib.sha256(content).hexdigest()


def _latin1(text: str, encoding: str) -> bytes:
    """What Python 2's bytes are made of in a pickle of Python 3, and nothing else that a codec can do."""
    if encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"codec {encoding!r}")
    return text.encode("latin1")


class _Plain(pickle.Unpickler):
    """Unpickles arrays, bytes and plain containers; whatever else a file asks for is refused, not run."""

    def find_class(self, module: str, name: str) -> Any:
        from numpy._core import multiarray, numeric

        allowed = {
            ("multiarray", "_reconstruct"): multiarray._reconstruct,
            ("multiarray", "scalar"): multiarray.scalar,
            ("numeric", "_frombuffer"): numeric._frombuffer,  # type: ignore[attr-defined]
            ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype, ("_codecs", "encode"): _latin1,
        }  # fmt: skip
        short = re.sub(r"^numpy\._?core\.", "", module)
        if (short, name) in allowed:
            return allowed[short, name]
        raise pickle.UnpicklingError(f"{module}.{name}, which is no array, bytes or plain container")


def _unpickle(file: Path) -> dict[bytes, Any]:
    try:
        # names of NumPy's inner modules have moved, and the pickles of the original are of Python 2
        content = _Plain(io.BytesIO(file.read_bytes()), encoding="bytes").load()
    except Exception as error:  # a foreign pickle can break in any way
        raise DataError(str(file), one_line(f"{type(error).__name__}: {error}"), "one of CIFAR-10's batches") from error
    if not isinstance(content, dict):
        raise DataError(str(file), f"a {type(content).__name__}", "a dict, as CIFAR-10's batches are")
    return {key if isinstance(key, bytes) else str(key).encode(): value for key, value in content.items()}


def read_cifar(path: Path) -> Found:
    """Read CIFAR-10's python batches: ``data_batch_1`` … ``data_batch_5``, ``test_batch``, ``batches.meta``.

    Raises
    ------
    DataError
        If a file is missing or damaged, or would run code.
    """
    folder = innermost(path)
    files = sorted(file for file in folder.iterdir() if _CIFAR.fullmatch(file.name))
    if not (folder / "batches.meta").is_file():
        raise DataError(str(folder), "no batches.meta", "the names of the classes")
    meta = _unpickle(folder / "batches.meta").get(b"label_names")
    if not isinstance(meta, list):
        raise DataError(str(folder / "batches.meta"), "no list 'label_names'", "the names of the classes")
    classes = [name.decode("utf-8", "replace") if isinstance(name, bytes) else str(name) for name in meta]
    inputs, labels, names, test = [], [], [], []
    for file in files:
        batch = _unpickle(file)
        data, codes = batch.get(b"data"), batch.get(b"labels")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3072:
            raise DataError(str(file), "no array 'data' of bytes", "[N, 3072] uint8")
        if not isinstance(codes, list | np.ndarray) or len(codes) != len(data):
            raise DataError(str(file), "not one label for each image", f"{len(data)} labels")
        if any(not isinstance(code, int | np.integer) or not 0 <= code < len(classes) for code in codes):
            raise DataError(str(file), "a label that batches.meta does not name", f"0 to {len(classes) - 1}")
        inputs.append(data.reshape(-1, 3, 32, 32))
        labels += [classes[code] for code in codes]
        names += [f"{file.name}-{i}" for i in range(len(data))]
        test += [file.name == "test_batch"] * len(data)
    return Found(np.concatenate(inputs), labels, [""] * len(labels), names, np.array(test, dtype=bool))


def read_npz(path: Path) -> Found:
    """Read arrays ``images``, ``labels`` and optional ``identities``, ``names``, ``test`` from one npz; no pickles.

    Raises
    ------
    DataError
        If an array is missing or of another kind, or the file cannot be read.
    """
    if path.is_dir():
        files = sorted(file for file in innermost(path).iterdir() if file.suffix == ".npz")
        if len(files) != 1:
            raise DataError(str(path), ", ".join(file.name for file in files), "one .npz")
        path = files[0]
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, TypeError, EOFError, KeyError, zlib.error, zipfile.BadZipFile) as error:
        raise DataError(str(path), one_line(f"{type(error).__name__}: {error}"), "arrays of plain values") from error
    for name in ("images", "labels"):
        if name not in arrays:
            raise DataError(str(path), f"arrays {', '.join(arrays) or 'none'}", f"an array {name!r}")
    inputs = _channels_first(path, arrays["images"])
    columns = {}
    for name in ("labels", "identities", "names"):
        values = arrays.get(name, np.arange(len(inputs)) if name == "names" else np.full(len(inputs), ""))
        if values.ndim != 1 or values.dtype.kind not in "iuU":
            raise DataError(str(path), f"{name} {values.dtype} {list(values.shape)}", "whole numbers or text, [N]")
        columns[name] = values.tolist()
    test = arrays.get("test", np.zeros(len(inputs), dtype=bool))
    if test.dtype != bool or test.shape != (len(inputs),):
        raise DataError(str(path), f"test {test.dtype} {list(test.shape)}", f"bool [{len(inputs)}]")
    return Found(inputs, **columns, test=test)


def _channels_first(path: Path, images: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    if images.dtype == np.uint8 and images.ndim == 3:
        return images[:, None]
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[3] in (1, 3):
        return np.ascontiguousarray(images.transpose(0, 3, 1, 2))
    if images.dtype == np.uint8 and images.ndim == 4 and images.shape[1] in (1, 3):
        return images
    wanted = "uint8 [N, H, W] or [N, H, W, channels], of 1 or 3 channels"
    raise DataError(str(path), f"images {images.dtype} {list(images.shape)}", wanted)
