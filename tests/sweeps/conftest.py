"""The smallest project in which a sweep can run: six originals, two requests of which one is the other's sibling."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from scforget import stages
from scforget.artifacts import Workspace
from scforget.context import Context
from spoiling import edit, stages_in, tiny_project


def searchable(params: Any) -> None:
    params["datasets"]["tiny"]["scenarios"] |= {
        "part": {"kind": "subset", "cluster": "0", "fraction": 0.3}, "part_dev": {"kind": "sibling", "of": "part"},
    }  # fmt: skip
    params["pipeline"]["scenarios"] = ["part"]
    params["train"]["seeds"], params["retrain"]["seeds"] = [0, 1, 2, 3, 4, 5], [0, 1, 2, 3, 4]
    params["unlearn"]["partial_reset"]["max_epochs"] = params["unlearn"]["partial_reset"]["patience"] = 2
    params["sweep"] |= {
        "methods": ["ssd"], "scenarios": ["part"], "trials": 4, "startup_trials": 2, "retrains": 4,
        "development": {"part": "part_dev"}, "ranges": {"partial_reset": {"max_epochs": one_to(4)}},
    }  # fmt: skip
    params["sweep"]["full"]["scenarios"] = ["part"]


def one_to(high: int) -> dict[str, Any]:
    return {"low": 1, "high": high, "log": False}


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project with what a sweep needs of the pipeline."""
    root = tmp_path_factory.mktemp("sweep")
    tiny_project(root)
    edit(root, searchable)
    with stages_in(root):
        for stage in (stages.prepare, stages.split, stages.train):
            stage("tiny")
        stages.retrain("tiny", "part")
    return root


@pytest.fixture
def no_tracking(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Context, "track", lambda *_, **__: None)


@pytest.fixture
def copied(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Workspace]]:
    """Makes copies of the project, of which the last one is the folder that commands run in."""
    monkeypatch.setenv("SCFORGET_WORKERS", "1")
    threads = torch.get_num_threads()

    def make(name: str) -> Workspace:
        shutil.copytree(trained, tmp_path / name, symlinks=True)
        monkeypatch.chdir(tmp_path / name)
        return Workspace(tmp_path / name)

    yield make
    torch.set_num_threads(threads)


@pytest.fixture
def project(copied: Callable[[str], Workspace]) -> Workspace:
    """A copy to work in."""
    return copied("project")
