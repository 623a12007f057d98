"""Every path under ``work/``, ``results/`` and ``report/``, and deterministic files in and out.

The same content gives the same bytes, whatever the machine, so that DVC sees no change where there is none. Files
appear whole or not at all: they are written beside their place and moved into it.
"""

from __future__ import annotations

import io
import json
import math
import os
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import h5py
import numpy as np
import numpy.typing as npt
import pandas as pd
from anndata import AnnData, read_h5ad
from anndata.io import write_elem
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from scforget.errors import ArtifactError

Arrays = Mapping[str, npt.NDArray[Any]]


class Workspace:
    """The folders of one project.

    Parameters
    ----------
    root
        The folder that holds ``params.yaml`` and ``dvc.yaml``.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def params(self) -> Path:
        """The settings file."""
        return self.root / "params.yaml"

    @property
    def report(self) -> Path:
        """Tables, figures and the page."""
        return self.root / "report"

    def raw(self, dataset: str) -> Path:
        """Raw data of a data set."""
        return self.root / "data" / dataset

    def work(self, stage: str, *keys: str) -> Path:
        """Folder for the large outs of a stage item: cells, splits, models."""
        return self.root.joinpath("work", stage, *keys)

    def results(self, stage: str, *keys: str) -> Path:
        """Folder for the small outs of a stage item: JSON, curves, scores."""
        return self.root.joinpath("results", stage, *keys)

    def theory(self, stage: str, *keys: str) -> Path:
        """Folder for what a stage of the theory pipeline found: outside ``results/``, all of which the report reads."""
        return self.report.joinpath("theory", stage, *keys)

    def studies(self, *keys: str) -> Path:
        """Folder for what a sweep of one's own found; the pipeline's are under ``results/sweep``."""
        return self.root.joinpath("studies", *keys)

    def resume(self, fingerprint: str) -> Path:
        """Folder outside every out where one model's checkpoints live until its stage is done."""
        return self.root / "work" / ".resume" / fingerprint


@contextmanager
def _errors(path: Path, deed: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise ArtifactError(path, f"cannot {deed}: {why}; check free space and permissions, then run again") from error


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; raises :class:`ArtifactError` naming it if the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _errors(path, "write"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            if temporary.exists():
                temporary.unlink()


def read_bytes(path: Path) -> bytes:
    """Read a file; raises :class:`ArtifactError` naming it, and the stage to run, if it is not there."""
    if not path.exists():
        raise ArtifactError(path, "no such file; run the stage that makes it, or `dvc repro`")
    with _errors(path, "read"):
        return path.read_bytes()


def _plain(value: Any) -> Any:
    """Turn NumPy scalars, tuples and non-finite floats into what JSON knows; NaN and infinity become null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def write_json(path: Path, content: Any) -> None:
    """Write sorted, indented JSON; NaN and infinities as null."""
    write_bytes(path, (json.dumps(_plain(content), sort_keys=True, indent=1, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read JSON; raises :class:`ArtifactError` if it is not."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise ArtifactError(path, f"not valid JSON ({error}); delete it and run its stage again") from error


def write_arrays(path: Path, arrays: Arrays) -> None:
    """Write arrays as a compressed npz, sorted by name."""
    buffer = io.BytesIO()
    np.savez_compressed(buffer, allow_pickle=False, **{name: arrays[name] for name in sorted(arrays)})
    write_bytes(path, buffer.getvalue())


def read_arrays(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Read an npz written by :func:`write_arrays`."""
    try:
        with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        raise ArtifactError(path, f"not a readable npz ({error}); delete it and run its stage again") from error


def write_table(path: Path, table: pd.DataFrame) -> None:
    """Write CSV without the row index; floats in their shortest exact form."""
    write_bytes(path, table.to_csv(index=False, lineterminator="\n").encode())


def read_table(path: Path) -> pd.DataFrame:
    """Read a CSV written by :func:`write_table`."""
    try:
        return pd.read_csv(io.BytesIO(read_bytes(path)), float_precision="round_trip")
    except ValueError as error:
        raise ArtifactError(path, f"not a readable CSV ({error}); delete it and run its stage again") from error


def write_cells(path: Path, cells: AnnData) -> None:
    """Write an AnnData as h5ad, by way of memory: on a full disk HDF5 crashes the process instead of raising."""
    cells.strings_to_categoricals()
    buffer = io.BytesIO()
    with h5py.File(buffer, "w") as file:
        write_elem(file, "/", cells, dataset_kwargs={"compression": "gzip"})
    write_bytes(path, buffer.getvalue())


def read_cells(path: Path) -> AnnData:
    """Read an h5ad written by :func:`write_cells`."""
    if not path.exists():
        raise ArtifactError(path, "no such file; run `dvc repro prepare`")
    try:
        return read_h5ad(path)
    except Exception as error:  # a damaged file can break its reader in any way
        why = " ".join(str(error).split())[:200]
        raise ArtifactError(path, f"not a readable h5ad ({why}); delete it and run its stage again") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], note: Mapping[str, str] | None = None) -> None:
    """Write tensors as safetensors (no code on loading, the same bytes for the same values)."""
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    write_bytes(path, save(plain, dict(note) if note else None))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file and its note.

    Raises
    ------
    ArtifactError
        If it is missing or damaged.
    """
    if not path.exists():
        raise ArtifactError(path, "no such file; run the stage that makes it, or `dvc repro`")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArtifactError(path, f"damaged ({error}); delete it and run its stage again") from error


def copy(source: Path, target: Path) -> None:
    """Copy a file, whole or not at all."""
    write_bytes(target, read_bytes(source))


class FileCheckpoint:
    """State of one training run between epochs, in one safetensors file; remembers the seconds spent before a kill.

    Parameters
    ----------
    folder
        Where the file lies; one run only.
    every : seconds, >= 0
        A state that comes sooner after the last one is not written: epochs of small models are shorter than the
        writing. Resuming is exact from any epoch, so this costs a killed run that much time and nothing else.
    """

    def __init__(self, folder: Path, every: float = 5.0) -> None:
        self._path = folder / "checkpoint.safetensors"
        self._every = every
        self._started = self._saved = time.perf_counter()
        self._before = 0.0

    @property
    def seconds(self) -> float:
        """Wall time of this run so far, over all its sittings."""
        return self._before + time.perf_counter() - self._started

    def restart_clock(self) -> None:
        """Count seconds from here: what went before was preparation, not the method's cost."""
        self._before, self._started = 0.0, time.perf_counter()

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return what was saved last, or ``None``."""
        if not self._path.exists():
            return None
        tensors, note = read_tensors(self._path)
        try:
            self._before = float(note["seconds"])
            return tensors, json.loads(note["state"])
        except (KeyError, ValueError) as error:
            why = f"not a checkpoint of ours ({error}); delete it and run its stage again"
            raise ArtifactError(self._path, why) from error

    def save(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Replace what is saved, atomically, unless it was saved just now."""
        if time.perf_counter() - self._saved >= self._every:
            write_tensors(self._path, tensors, {"state": json.dumps(state), "seconds": repr(self.seconds)})
            self._saved = time.perf_counter()
