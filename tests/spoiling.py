"""How tests of the stages cut a project down, run its first stages, and spoil it."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from ruamel.yaml import YAML
from scipy import sparse

from scforget import artifacts
from scforget.context import Context
from scforget.data.synthetic import PRESETS, simulate

ROOT = Path(__file__).parents[1]
RAW = "data/tiny/tiny.h5ad"
CELLS = "work/prepare/tiny/cells.h5ad"


def shrink(params: Any) -> None:
    """Turn the project's params into those of a tiny simulated set: 2 originals, 3 retrains, 2 epochs, one request."""
    dataset = params["datasets"]["pbmc68k"]
    params["datasets"] = {"tiny": dataset}
    dataset["prepare"].update(min_genes=5, mito_column=None, label_column="cluster")
    dataset["split"].update(n_genes=60, markers_per_label=3)
    dataset["scenarios"] = {"half": {"kind": "subset", "cluster": "0", "fraction": 0.5}}
    dataset["model"].update(hidden=[16], latent=4)
    dataset["training"]["max_epochs"] = 2
    params["pipeline"] = {
        "datasets": ["tiny"], "scenarios": ["half"], "shadow_blocks": [0], "methods": ["ssd", "partial_reset"],
        "classifiers": {**params["pipeline"]["classifiers"], "datasets": []},
    }  # fmt: skip
    params["classifiers"] = {}
    params["train"]["seeds"], params["retrain"]["seeds"] = [0, 1], [0, 1, 2]
    params["audit"].update(bootstrap_draws=50, null_draws=200)
    params["sweep"]["methods"] = []


def tiny_project(root: Path, change: Callable[[Any], None] = shrink) -> None:
    """Lay out a project of raw cells and settings: nothing is made yet."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, root)
    (root / "src").symlink_to(ROOT / "src")
    edit(root, change)
    (root / RAW).parent.mkdir(parents=True)
    simulate(PRESETS["tiny"], seed=0).write_h5ad(root / RAW)


@contextmanager
def stages_in(root: Path) -> Iterator[None]:
    """Run stages there in one process, without MLflow."""
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.setenv("SCFORGET_WORKERS", "1")
        patch.setattr(Context, "track", lambda *_: None)
        yield
    torch.set_num_threads(threads)


def edit(root: Path, change: Callable[[Any], None]) -> None:
    yaml = YAML(typ="safe", pure=True)
    params = yaml.load(root / "params.yaml")
    change(params)
    yaml.dump(params, root / "params.yaml")


def put(*keys: str, value: Any) -> Callable[[Path], None]:
    """Return what sets a value of params.yaml."""

    def change(params: Any) -> None:
        for key in keys[:-1]:
            params = params[key]
        params[keys[-1]] = value

    return lambda root: edit(root, change)


def of_tiny(*keys: str, value: Any) -> Callable[[Path], None]:
    return put("datasets", "tiny", *keys, value=value)


def text(before: str, after: str) -> Callable[[Path], None]:
    """Return what changes the text of the project's own params.yaml."""

    def spoil(root: Path) -> None:
        content = (ROOT / "params.yaml").read_text()
        assert content.count(before) >= 1
        (root / "params.yaml").write_text(content.replace(before, after, 1))

    return spoil


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    return spoil


def both(*spoils: Callable[[Path], None]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        for one in spoils:
            one(root)

    return spoil


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: shutil.rmtree(root / name) if (root / name).is_dir() else (root / name).unlink()


def block(name: str) -> Callable[[Path], None]:
    """Return what puts a file where a folder should be (permissions do not hold back a superuser)."""

    def spoil(root: Path) -> None:
        shutil.rmtree(root / name, ignore_errors=True)
        (root / name).write_text("in the way")

    return spoil


def counts(change: Callable[[AnnData], AnnData | None]) -> Callable[[Path], None]:
    def spoil(root: Path) -> None:
        cells = read_h5ad(root / RAW)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # names that are not unique
            changed = change(cells)
            (cells if changed is None else changed).write_h5ad(root / RAW)

    return spoil


def entry(value: float) -> Callable[[Path], None]:
    def change(cells: AnnData) -> None:
        dense = cells.X.toarray().astype(np.float64)
        dense[3, 4] = value
        cells.X = sparse.csr_matrix(dense)

    return counts(change)


def twins(cells: AnnData) -> None:
    names = list(cells.obs_names)
    names[7] = names[2]
    cells.obs_names = names


def scenario(**settings: Any) -> Callable[[Path], None]:
    return of_tiny("scenarios", "half", value=settings)


def only_unseen(root: Path) -> None:
    sets = artifacts.read_arrays(root / "work/split/tiny/sets.npz")
    names = read_h5ad(root / CELLS).obs_names[sets["unseen"][:3]]
    scenario(kind="query", query=f"index in {list(names)}")(root)
