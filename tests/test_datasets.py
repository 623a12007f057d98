"""A person's own data into ``data/`` and under DVC, and the hashes of public sets into params.yaml."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData, read_h5ad
from scipy import sparse

from picturing import lay, packed, pixels, png
from scforget import config, datasets, schema
from scforget.data import images
from scforget.data.public import FetchResult
from scforget.data.synthetic import PRESETS, simulate
from scforget.errors import ArtifactError, ConfigError, DataError
from scforget.pipeline import dvc_md5

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def counts() -> AnnData:
    return simulate(PRESETS["tiny"], seed=0)


@pytest.fixture
def project(tmp_path) -> Path:
    """A project that holds one data set already."""
    root = tmp_path / "project"
    (root / "data/old").mkdir(parents=True)
    (root / "data/old/cells.csv").write_text("old")
    shutil.copy(ROOT / "params.yaml", root)
    return root


@pytest.fixture
def added(monkeypatch) -> list[list[str]]:
    """What would have been run; DVC itself takes seconds."""
    ran: list[list[str]] = []

    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        ran.append(command)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(datasets.subprocess, "run", run)
    return ran


@pytest.fixture
def h5ad(counts, tmp_path) -> Path:
    path = tmp_path / "mine.h5ad"
    counts.write_h5ad(path)
    return path


def tree(root: Path) -> set[str]:
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_add_copies_the_file_and_puts_data_under_dvc(project, h5ad, capsys):
    command = [sys.executable, "-m", "dvc", "init", "-q", "--no-scm"]
    subprocess.run(command, cwd=project, check=True, env={**os.environ, "DVC_NO_ANALYTICS": "1"})
    datasets.add(project, h5ad, "mine", None)
    assert (project / "data/mine/mine.h5ad").read_bytes() == h5ad.read_bytes()
    (recorded,) = config.read_yaml(project / "data.dvc")["outs"]
    assert (recorded["path"], recorded["nfiles"]) == ("data", 2)
    assert recorded["md5"] == dvc_md5(project / "data")
    said = capsys.readouterr().err
    assert "data/mine is there; `dvc add data` done: commit data.dvc to record it" in said
    assert "next: describe it under datasets.mine in params.yaml" in said
    # What DVC knows of must be there before it is asked to forget the rest.
    (project / "data/old/cells.csv").write_text("changed")
    with pytest.raises(ArtifactError, match=r"data: is not as data\.dvc records it; `dvc pull"):
        datasets.add(project, h5ad, "more", None)
    shutil.rmtree(project / "data")
    with pytest.raises(ArtifactError, match=r"data: is not as data\.dvc records it; `dvc pull"):
        datasets.add(project, h5ad, "more", None)
    assert not (project / "data").exists()


def test_add_outside_dvc_says_what_was_done_and_what_not(project, h5ad):
    with pytest.raises(ArtifactError, match=r"data\.dvc: written to data/mine, but `dvc add data` failed: ") as caught:
        datasets.add(project, h5ad, "mine", None)
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_add_copies_a_folder_whole(project, tmp_path, added):
    folder = ROOT / "data" / "pbmc68k"
    if not folder.exists():
        from scforget.data.sources import write_bundled

        folder = tmp_path / "bundled"
        write_bundled(folder)
    datasets.add(project, folder, "blood", None)
    assert tree(project / "data/blood") == tree(folder)
    assert len(added) == 1
    assert added[0][1:] == ["-m", "dvc", "add", "-q", "data"]


def test_add_reads_the_layer_that_holds_the_counts(project, counts, tmp_path, added):
    normalised = counts.copy()
    normalised.layers["raw"] = counts.X
    normalised.X = sparse.csr_matrix(counts.X.astype(np.float64).log1p())
    normalised.write_h5ad(tmp_path / "n.h5ad")
    with pytest.raises(DataError, match=r"non-integer values.*raw counts \(layers in the file: raw\)"):
        datasets.add(project, tmp_path / "n.h5ad", "mine", None)
    datasets.add(project, tmp_path / "n.h5ad", "mine", "raw")
    assert tree(project / "data/mine") == {"n.h5ad"}


def test_add_joins_the_runs_of_a_public_set(project, counts, tmp_path, monkeypatch, added):
    home = project / "downloads" / "tabula_muris"
    runs = [home / "Lung-10X_P7_8", home / "Heart-10X_P7_4"]
    for run, cells in zip(runs, (counts[:100], counts[100:]), strict=True):
        run.mkdir(parents=True)
        cells.copy().write_h5ad(run / "cells.h5ad")
    asked = []

    def fetch(name: str, folder: Path, *, sha256: str | None) -> FetchResult:
        asked.append((name, folder, sha256))
        return FetchResult(tuple(runs), "ab" * 32)

    monkeypatch.setattr(datasets.public, "fetch", fetch)
    config.set_value(project / "params.yaml", ("downloads", "tabula_muris"), "ab" * 32, schema.Params)
    datasets.add(project, home, "mouse", None)
    joined = read_h5ad(project / "data/mouse/mouse.h5ad")
    assert joined.shape == counts.shape
    assert set(joined.obs["tissue"]) == {"Lung", "Heart"}


@pytest.mark.parametrize("name", ["a b", "a-b", "../up", "", ".", "..", "a/b", "a.b", "é"])
def test_add_refuses_a_bad_name(project, h5ad, added, name):
    with pytest.raises(ConfigError, match="a name has letters, digits and '_' only") as caught:
        datasets.add(project, h5ad, name, None)
    assert caught.value.exit_code == 2
    assert tree(project) == {"params.yaml", "data/old/cells.csv"}
    assert not added


def test_add_refuses_a_taken_name(project, h5ad, added):
    with pytest.raises(ConfigError, match="exists already; choose another --name or delete it first"):
        datasets.add(project, h5ad, "old", None)
    assert tree(project) == {"params.yaml", "data/old/cells.csv"}
    assert not added


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda x: x.__setitem__((0, 0), -1), "negative"),
        (lambda x: x.__setitem__((0, 0), 0.5), "non-integer"),
        (lambda x: x.__setitem__((0, 0), np.nan), "NaN"),
        (lambda x: x.__setitem__((0, 0), np.inf), "infinite"),
    ],
    ids=["negative", "fraction", "nan", "infinity"],
)
def test_add_refuses_what_are_no_counts_and_leaves_nothing(project, counts, tmp_path, added, spoil, said):
    dense = counts.X.toarray().astype(np.float64)
    spoil(dense)
    AnnData(dense, obs=counts.obs, var=counts.var).write_h5ad(tmp_path / "bad.h5ad")
    with pytest.raises(DataError, match=said) as caught:
        datasets.add(project, tmp_path / "bad.h5ad", "mine", None)
    assert caught.value.exit_code == 3
    assert tree(project) == {"params.yaml", "data/old/cells.csv"}
    assert not added


def test_add_refuses_what_is_not_there_or_not_readable(project, tmp_path, added):
    (tmp_path / "bad.h5ad").write_bytes(b"garbage")
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    for name, said in (("none", "no such file"), ("bad.h5ad", "OSError"), ("notes.txt", "kind"), ("empty", "none")):
        with pytest.raises(DataError, match=said):
            datasets.add(project, tmp_path / name, "mine", None)
    assert tree(project) == {"params.yaml", "data/old/cells.csv"}
    assert not added


def test_add_on_a_full_disk_leaves_nothing_half_copied(project, h5ad, monkeypatch, added):
    def full(_source: Path, target: Path) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(datasets.shutil, "copyfile", full)
    with pytest.raises(ArtifactError, match=r"data/mine: cannot write: No space left on device") as caught:
        datasets.add(project, h5ad, "mine", None)
    assert caught.value.exit_code == 3
    assert [path.name for path in (project / "data").iterdir()] == ["old"]
    assert not added


# images

GREY = pixels(4, 3, 5)
PICTURES = {f"{name}/{i}.png": png(GREY[i]) for i, name in enumerate("aabb")}


@pytest.mark.parametrize("put", [lay, lambda folder, files: packed(folder / "set.zip", files)])
def test_add_copies_an_image_set_and_says_where_to_describe_it(project, tmp_path, added, capsys, put):
    path = put(tmp_path / "mine", PICTURES)
    datasets.add(project, path, "clothes", None)
    said = capsys.readouterr().err
    assert "next: describe it under classifiers.clothes in params.yaml" in said
    assert "not be used" not in said
    assert tree(project / "data/clothes") == ({"set.zip"} if path.is_file() else set(PICTURES))
    found = images.read(project / "data/clothes")
    np.testing.assert_array_equal(found.inputs[:, 0], GREY)
    assert len(added) == 1


def test_add_says_how_many_images_will_not_be_used(project, tmp_path, added, capsys):
    people = "p", "q", "r", "r", "s"
    table = "\n".join(["file,identity", *(f"{name},{who}" for name, who in zip([*PICTURES, "b/9.png"], people))])  # noqa: B905
    files = PICTURES | {"a/1.png": png(GREY[0]), "b/3.png": png(GREY[2]), "b/9.png": png(GREY[3])}
    datasets.add(project, lay(tmp_path / "mine", files | {"metadata.csv": table.encode()}), "faces", None)
    said = "3 of the images will not be used: 1 repetitions, 2 images of more than one person"
    assert said in capsys.readouterr().err


def test_add_refuses_images_that_no_classifier_can_use_and_leaves_nothing(project, tmp_path, added):
    small = PICTURES | {"b/9.png": png(pixels(1, 2, 2)[0])}
    for files, said in ((small, r"'b/9\.png' of 2 x 2 pixels"), ({"a/1.png": png(GREY[0])}, "a single class")):
        with pytest.raises(DataError, match=said):
            datasets.add(project, lay(tmp_path / said[1:4], files), "mine", None)
    with pytest.raises(DataError, match="--layer raw: found an image set; wanted no layer"):
        datasets.add(project, lay(tmp_path / "whole", PICTURES), "mine", "raw")
    assert tree(project) == {"params.yaml", "data/old/cells.csv"}
    assert not added


def test_add_copies_a_public_image_set_alone(project, tmp_path, monkeypatch, added):
    """Not the package that it came in."""
    home = lay(project / "downloads/fashion_mnist", {"fashion_mnist.deb": b"large"})
    inner = lay(home / "fashion_mnist/usr/share", PICTURES)
    monkeypatch.setattr(datasets.public, "fetch", lambda *_, **__: FetchResult((inner,), "ab" * 32))
    datasets.add(project, home, "clothes", None)
    assert tree(project / "data/clothes") == set(PICTURES)


def test_bundled_makes_what_is_missing_and_leaves_what_is_there(tmp_path):
    (tmp_path / "data/pbmc68k").mkdir(parents=True)
    datasets.bundled(tmp_path)
    assert tree(tmp_path) == {"data/digits/images.npz", "data/digits/ATTRIBUTION.md"}
    shutil.rmtree(tmp_path / "data/pbmc68k")
    (tmp_path / "data/digits/images.npz").write_bytes(b"mine")
    datasets.bundled(tmp_path)
    assert len(tree(tmp_path / "data/pbmc68k")) == 5
    assert (tmp_path / "data/digits/images.npz").read_bytes() == b"mine"


# simulate


def test_simulate_writes_a_set_that_the_seed_of_params_draws(project, added):
    datasets.simulate(project, "tiny", "planted")
    datasets.simulate(project, "tiny", "again")
    first, again = (read_h5ad(project / f"data/{name}/{name}.h5ad") for name in ("planted", "again"))
    assert first.shape == (240, 60)
    assert (first.X != again.X).nnz == 0
    config.set_value(project / "params.yaml", ("seed",), 43, schema.Params)
    datasets.simulate(project, "tiny", "other")
    assert (first.X != read_h5ad(project / "data/other/other.h5ad").X).nnz > 0
    assert len(added) == 3


def test_simulate_refuses_an_unknown_preset_and_a_taken_name(project, added):
    with pytest.raises(DataError, match="preset: found 'huge'; wanted one of paper_shape, tiny"):
        datasets.simulate(project, "huge", "planted")
    with pytest.raises(ConfigError, match="exists already"):
        datasets.simulate(project, "tiny", "old")
    assert tree(project) == {"params.yaml", "data/old/cells.csv"}
    assert not added


# fetch


@pytest.fixture
def fetched(monkeypatch) -> list[tuple[str, Path, str | None]]:
    asked: list[tuple[str, Path, str | None]] = []

    def fetch(name: str, folder: Path, *, sha256: str | None) -> FetchResult:
        asked.append((name, folder, sha256))
        return FetchResult((folder / name,), "ab" * 32)

    monkeypatch.setattr(datasets.public, "fetch", fetch)
    return asked


def test_fetch_records_the_hash_and_checks_it_ever_after(project, fetched, capsys):
    before = (project / "params.yaml").read_text()
    assert "pbmc3k: null" in before
    datasets.fetch(project, "pbmc3k")
    assert fetched == [("pbmc3k", project / "downloads", None)]
    assert (project / "params.yaml").read_text() == before.replace("pbmc3k: null", f"pbmc3k: {'ab' * 32}")
    said = capsys.readouterr().err
    assert f"params.yaml: downloads.pbmc3k = {'ab' * 32}" in said
    assert "10x Genomics" in said
    assert "next: scforget data add downloads/pbmc3k --name pbmc3k" in said
    datasets.fetch(project, "pbmc3k")
    assert fetched[1] == ("pbmc3k", project / "downloads", "ab" * 32)
    assert schema.load(project / "params.yaml").downloads["pbmc3k"] == "ab" * 32
    assert "params.yaml:" not in capsys.readouterr().err


def test_fetch_that_fails_records_nothing(project, monkeypatch):
    def fetch(*_: object, **__: object) -> FetchResult:
        raise DataError("public set pbmc3k", "sha256 0", "1")

    monkeypatch.setattr(datasets.public, "fetch", fetch)
    before = (project / "params.yaml").read_bytes()
    with pytest.raises(DataError):
        datasets.fetch(project, "pbmc3k")
    assert (project / "params.yaml").read_bytes() == before


def test_fetch_names_the_known_sets_for_an_unknown_one(project, fetched):
    with pytest.raises(DataError, match="found 'pbmc4k'; wanted one of fashion_mnist, pbmc33k, pbmc3k, tabula_muris"):
        datasets.fetch(project, "pbmc4k")
    assert not fetched
