"""Files in and out: the same bytes for the same content, whole or not at all, and damage said in one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

from scforget import artifacts
from scforget.artifacts import FileCheckpoint, Workspace
from scforget.errors import ArtifactError

FULL = OSError(28, "No space left on device")


def cells() -> AnnData:
    counts = sparse.csr_matrix(np.arange(12, dtype=np.int32).reshape(4, 3))
    obs = pd.DataFrame({"label": pd.Categorical(["b", "a", "b", "a"]), "total": [1.5, 2.0, 3.0, 4.0]}, list("wxyz"))
    return AnnData(X=counts, obs=obs, var=pd.DataFrame(index=["g1", "g2", "g3"]))


def backwards(content: dict[str, Any]) -> dict[str, Any]:
    return dict(reversed(content.items()))


JSON = {"b": [1, 2.5, None, True], "a": {"z": "é", "y": np.float32(0.5)}}
ARRAYS = {"scores": np.linspace(0, 1, 7), "cells": np.arange(5), "labels": np.array(["B", "T cell"])}
TABLE = pd.DataFrame({"seed": [0, 1], "elbo": [0.1 + 0.2, 1e-300]})
TENSORS = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.tensor([True, False]), "step": torch.tensor(3.0)}

WRITERS: dict[str, tuple[Callable[[Path], None], Callable[[Path], None]]] = {
    "json": (lambda p: artifacts.write_json(p, JSON), lambda p: artifacts.write_json(p, backwards(JSON))),
    "npz": (lambda p: artifacts.write_arrays(p, ARRAYS), lambda p: artifacts.write_arrays(p, backwards(ARRAYS))),
    "csv": (lambda p: artifacts.write_table(p, TABLE), lambda p: artifacts.write_table(p, TABLE.set_index([[7, 3]]))),
    "h5ad": (lambda p: artifacts.write_cells(p, cells()), lambda p: artifacts.write_cells(p, cells())),
    "safetensors": (
        lambda p: artifacts.write_tensors(p, TENSORS, {"seconds": "1.5"}),
        lambda p: artifacts.write_tensors(p, backwards(TENSORS), {"seconds": "1.5"}),
    ),
}


# the same bytes


@pytest.mark.parametrize("kind", WRITERS)
def test_write_gives_the_same_bytes_whatever_name_and_order(tmp_path, kind):
    one, other = WRITERS[kind]
    one(tmp_path / "a" / f"first.{kind}")
    other(tmp_path / "b" / f"second.{kind}")
    assert (tmp_path / "a" / f"first.{kind}").read_bytes() == (tmp_path / "b" / f"second.{kind}").read_bytes()


def test_write_arrays_and_cells_record_no_time(tmp_path):
    artifacts.write_arrays(tmp_path / "a.npz", ARRAYS)
    with ZipFile(tmp_path / "a.npz") as archive:
        assert [item.filename for item in archive.infolist()] == ["cells.npy", "labels.npy", "scores.npy"]
        assert {item.date_time for item in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    artifacts.write_cells(tmp_path / "a.h5ad", cells())
    with h5py.File(tmp_path / "a.h5ad") as file:
        assert {h5py.h5o.get_info(file[name].id).mtime for name in ("X/data", "obs/total", "var/_index")} == {0}


def test_write_tensors_depends_on_values_not_on_memory_layout(tmp_path):
    artifacts.write_tensors(tmp_path / "a", {"w": torch.arange(6.0).reshape(2, 3).T})
    artifacts.write_tensors(tmp_path / "b", {"w": torch.arange(6.0).reshape(2, 3).T.contiguous().requires_grad_()})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    whole = torch.arange(6.0)
    artifacts.write_tensors(tmp_path / "c", {"one": whole[:3], "two": whole[:3]})  # shared memory
    found, note = artifacts.read_tensors(tmp_path / "c")
    assert torch.equal(found["one"], whole[:3])
    assert torch.equal(found["two"], whole[:3])
    assert note == {}


# there and back


numbers = st.integers(-(2**53), 2**53) | st.floats()
content = st.recursive(
    st.none() | st.booleans() | numbers | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


def nulled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: nulled(item) for key, item in value.items()}
    if isinstance(value, list):
        return [nulled(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(content)
@settings(deadline=None, max_examples=40)
def test_write_json_brings_back_everything_and_null_for_what_is_not_finite(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("json") / "a.json"
    artifacts.write_json(path, value)
    assert artifacts.read_json(path) == nulled(value)
    json.loads(path.read_text(), parse_constant=pytest.fail)  # no NaN, which no other reader knows


def test_write_json_turns_numpy_into_plain_values(tmp_path):
    array = np.array([[1.0, np.nan], [np.inf, -0.0]])
    artifacts.write_json(tmp_path / "a", {"x": array, "n": np.int64(3), "t": (np.bool_(True), np.float32(0.5)), 4: "k"})
    assert artifacts.read_json(tmp_path / "a") == {
        "x": [[1.0, None], [None, -0.0]], "n": 3, "t": [True, 0.5], "4": "k",
    }  # fmt: skip


def test_write_json_refuses_what_json_does_not_know_and_leaves_nothing(tmp_path):
    with pytest.raises(TypeError):
        artifacts.write_json(tmp_path / "a.json", {"x": {1, 2}})
    assert not list(tmp_path.iterdir())


def test_arrays_come_back_as_they_were(tmp_path):
    artifacts.write_arrays(tmp_path / "a.npz", ARRAYS)
    found = artifacts.read_arrays(tmp_path / "a.npz")
    assert list(found) == sorted(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array, strict=True)


@given(st.lists(st.floats(allow_nan=False), min_size=1, max_size=20))
@settings(deadline=None, max_examples=30)
def test_tables_come_back_to_the_last_bit(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    table = pd.DataFrame({"seed": range(len(values)), "elbo": np.array(values, dtype=np.float64)})
    artifacts.write_table(path, table)
    pd.testing.assert_frame_equal(artifacts.read_table(path), table, check_exact=True)


def test_tables_without_rows_keep_their_columns(tmp_path):
    artifacts.write_table(tmp_path / "a.csv", pd.DataFrame(columns=["seed", "epoch"]))
    assert list(artifacts.read_table(tmp_path / "a.csv").columns) == ["seed", "epoch"]


def test_cells_come_back_as_they_were(tmp_path):
    artifacts.write_cells(tmp_path / "a.h5ad", cells())
    found = artifacts.read_cells(tmp_path / "a.h5ad")
    assert (found.X != cells().X).nnz == 0
    assert found.X.dtype == np.int32
    pd.testing.assert_frame_equal(found.obs, cells().obs)


def test_cells_equal_those_that_anndata_writes_itself(tmp_path):
    made = cells()
    made.obs["donor"] = ["d1", "d2", "d1", "d2"]  # text, which anndata turns into categories
    made.layers["raw"] = made.X.copy()
    artifacts.write_cells(tmp_path / "ours.h5ad", made.copy())
    made.copy().write_h5ad(tmp_path / "theirs.h5ad")
    ours, theirs = artifacts.read_cells(tmp_path / "ours.h5ad"), artifacts.read_cells(tmp_path / "theirs.h5ad")
    pd.testing.assert_frame_equal(ours.obs, theirs.obs)
    pd.testing.assert_frame_equal(ours.var, theirs.var)
    assert (ours.X != theirs.X).nnz == (ours.layers["raw"] != theirs.layers["raw"]).nnz == 0
    assert (ours.uns, list(ours.obsm), list(ours.layers)) == (theirs.uns, list(theirs.obsm), list(theirs.layers))


def test_tensors_come_back_with_type_and_note(tmp_path):
    tensors = {**TENSORS, "half": torch.ones(2, dtype=torch.bfloat16), "long": torch.tensor([2**60])}
    artifacts.write_tensors(tmp_path / "a", tensors, {"state": "{}"})
    found, note = artifacts.read_tensors(tmp_path / "a")
    assert note == {"state": "{}"}
    assert set(found) == set(tensors)
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor)


# whole or not at all


@pytest.mark.parametrize("kind", WRITERS)
@pytest.mark.parametrize("old", [True, False])
def test_write_to_a_full_disk_leaves_the_old_file_and_no_temporary(tmp_path, monkeypatch, kind, old):
    path = tmp_path / f"a.{kind}"
    if old:
        path.write_bytes(b"old")
    half = Path.write_bytes

    def full(self: Path, content: bytes) -> int:
        half(self, content[: len(content) // 2])
        raise FULL

    def refused(_self: Path, _target: Path) -> None:
        raise FULL

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(Path, "replace", refused)
    with pytest.raises(ArtifactError, match="cannot write: No space left on device; check free space") as caught:
        WRITERS[kind][0](path)
    assert caught.value.exit_code == 3
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == ([(path.name, b"old")] if old else [])


@pytest.mark.parametrize("kind", WRITERS)
def test_write_where_a_file_stands_for_the_folder_is_an_artifact_error(tmp_path, kind):
    (tmp_path / "work").write_text("in the way")
    with pytest.raises(ArtifactError, match="cannot write"):
        WRITERS[kind][0](tmp_path / "work" / "train" / f"a.{kind}")
    assert (tmp_path / "work").read_text() == "in the way"


def test_copy_copies_bytes_and_names_what_is_missing(tmp_path):
    (tmp_path / "a").write_bytes(b"\0\1")
    artifacts.copy(tmp_path / "a", tmp_path / "deep/er/b")
    assert (tmp_path / "deep/er/b").read_bytes() == b"\0\1"
    with pytest.raises(ArtifactError, match="no such file; run the stage that makes it, or `dvc repro`"):
        artifacts.copy(tmp_path / "none", tmp_path / "b")


READERS = {
    "json": artifacts.read_json,
    "npz": artifacts.read_arrays,
    "csv": artifacts.read_table,
    "h5ad": artifacts.read_cells,
    "safetensors": artifacts.read_tensors,
}

#: Values without a checksum, and lines without a count, can be damaged so that no reader knows.
UNKNOWABLE = {("overwritten", "safetensors"), ("overwritten", "h5ad"), ("truncated", "csv")}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("damage", ["missing", "empty", "garbage", "truncated", "overwritten"])
def test_read_says_in_one_line_what_is_damaged_and_what_to_do(tmp_path, kind, damage):
    path = tmp_path / f"a.{kind}"
    WRITERS[kind][0](path)
    whole = path.read_bytes()
    middle = len(whole) // 2
    damaged = {
        "empty": b"",
        "garbage": b"\x93garbage\xff" * 5,
        "truncated": whole[: len(whole) * 2 // 3],
        "overwritten": whole[: middle - 20] + b"\xee" * 40 + whole[middle + 20 :],
    }
    path.unlink() if damage == "missing" else path.write_bytes(damaged[damage])
    if (damage, kind) in UNKNOWABLE:
        return
    with pytest.raises(ArtifactError) as caught:
        READERS[kind](path)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)
    assert "dvc repro" in str(caught.value) if damage == "missing" else "run its stage again" in str(caught.value)


# paths


def test_workspace_keeps_large_and_small_outs_apart(tmp_path):
    workspace = Workspace(tmp_path)
    assert workspace.work("train", "pbmc") == tmp_path / "work/train/pbmc"
    assert workspace.results("audit", "pbmc", "nk", "ssd") == tmp_path / "results/audit/pbmc/nk/ssd"
    assert workspace.resume("f00") == tmp_path / "work/.resume/f00"
    assert (workspace.params, workspace.report) == (tmp_path / "params.yaml", tmp_path / "report")
    assert workspace.raw("pbmc") == tmp_path / "data/pbmc"


# checkpoints


class Clock:
    """Stands for the module ``time``."""

    now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(artifacts, "time", made)
    return made


def test_checkpoint_brings_back_tensors_state_and_seconds(tmp_path, clock):
    first = FileCheckpoint(tmp_path / "run", every=0)
    assert first.load() is None
    clock.now += 5
    first.save(TENSORS, {"history": [{"epoch": 1, "elbo": -0.1 - 0.2}], "best_elbo": None})
    clock.now += 1000  # killed; started again much later
    second = FileCheckpoint(tmp_path / "run", every=0)
    tensors, state = second.load()
    assert state == {"history": [{"epoch": 1, "elbo": -0.1 - 0.2}], "best_elbo": None}
    assert all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    clock.now += 2
    assert second.seconds == 5 + 2


def test_checkpoint_writes_no_oftener_than_every(tmp_path, clock):
    checkpoint = FileCheckpoint(tmp_path, every=1.0)
    path = tmp_path / "checkpoint.safetensors"

    def saved(epoch: int) -> int | None:
        checkpoint.save(TENSORS, {"epoch": epoch})
        found = FileCheckpoint(tmp_path).load()
        return found and found[1]["epoch"]

    clock.now += 0.9
    assert saved(1) is None
    assert not path.exists()
    clock.now += 0.2
    assert saved(2) == 2
    clock.now += 0.9
    assert saved(3) == 2
    clock.now += 0.1
    assert saved(4) == 4
    assert [file.name for file in tmp_path.iterdir()] == [path.name]


def test_checkpoint_that_is_damaged_is_an_artifact_error(tmp_path):
    (tmp_path / "checkpoint.safetensors").write_bytes(b"garbage")
    with pytest.raises(ArtifactError, match=r"damaged .*; delete it and run its stage again"):
        FileCheckpoint(tmp_path).load()


@pytest.mark.parametrize("note", [None, {"state": "{}"}, {"seconds": "1.0"}, {"state": "{", "seconds": "1.0"}])
def test_checkpoint_without_its_note_is_an_artifact_error(tmp_path, note):
    artifacts.write_tensors(tmp_path / "checkpoint.safetensors", TENSORS, note)
    with pytest.raises(ArtifactError, match="delete it and run its stage again"):
        FileCheckpoint(tmp_path).load()
