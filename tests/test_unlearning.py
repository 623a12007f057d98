"""The stage ``unlearn``: every method of the pipeline one after the other, or one by hand; what outlives a failure."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from scforget import context, stages
from scforget.artifacts import Workspace
from scforget.errors import ConfigError, NonFiniteError, TooManyDivergedError
from scforget.methods import METHODS
from scforget.pipeline import Inputs, dvc_md5
from spoiling import put, stages_in, tiny_project

ROOT = Path(__file__).parents[1]
NAMES = ["ssd", "partial_reset"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny project with its originals."""
    root = tmp_path_factory.mktemp("unlearn")
    tiny_project(root)
    with stages_in(root):
        for stage in (stages.prepare, stages.split, stages.train):
            stage("tiny")
    return root


@pytest.fixture
def project(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A copy of it to work in."""
    root = tmp_path / "project"
    shutil.copytree(trained, root, symlinks=True)
    monkeypatch.chdir(root)
    return Workspace(root)


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the methods in the order in which the stage tracked them, in place of MLflow."""
    found: list[str] = []

    def track(_self: Any, part: Inputs | None = None) -> None:
        assert part is not None
        found.append(part.item.keys[-1])

    monkeypatch.setattr(context.Context, "track", track)
    monkeypatch.setattr(context.Context, "warm_up", lambda _: None)
    monkeypatch.setenv("SCFORGET_WORKERS", "1")
    return found


def left(project: Workspace, method: str) -> dict[str, bytes]:
    """What a method left but for its timings."""
    places = project.work("unlearn", "tiny", "half", method), project.results("unlearn", "tiny", "half", method)
    files = [path for place in places for path in sorted(place.glob("*")) if path.name != "cost.json"]
    return {path.relative_to(project.root).as_posix(): path.read_bytes() for path in files}


def diverging(*_: object, **__: object) -> None:
    raise NonFiniteError(3, "the loss")


def test_unlearn_makes_and_tracks_every_method_in_the_order_of_the_pipeline(
    project: Workspace, tracked: list[str]
) -> None:
    stages.unlearn("tiny", "half")
    assert tracked == NAMES
    assert all(len(left(project, name)) == 2 + 2 for name in NAMES)  # two models, record and curves


def test_a_method_depends_on_the_siblings_that_it_imports_and_on_no_other(trained: Path) -> None:
    found = context.sources(trained, "gisa")
    assert {Path(path).stem for path in found} == {"gisa", "adv_neg_grad"}
    assert {Path(path).stem for path in context.sources(trained, "ssd")} == {"ssd"}
    assert all(digest == dvc_md5(trained / path) for path, digest in found.items())


def test_unlearn_of_one_method_makes_what_the_whole_stage_makes_of_it(project: Workspace, tracked: list[str]) -> None:
    stages.unlearn("tiny", "half", "partial_reset")
    assert tracked == ["partial_reset"]
    assert not left(project, "ssd")
    alone = left(project, "partial_reset")
    shutil.rmtree(project.root / "work" / ".resume")
    stages.unlearn("tiny", "half")
    assert left(project, "partial_reset") == alone


def test_unlearn_takes_the_other_methods_from_where_they_were_kept(
    project: Workspace, tracked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC deletes the outs of all methods when one setting of one of them changes."""
    stages.unlearn("tiny", "half")
    before = {name: left(project, name) for name in NAMES}
    shutil.rmtree(project.work("unlearn", "tiny"))
    shutil.rmtree(project.results("unlearn", "tiny"))
    put("unlearn", "ssd", "alpha", value=1.5)(project.root)
    monkeypatch.setitem(METHODS, "partial_reset", METHODS["partial_reset"]._replace(run=diverging))
    stages.unlearn("tiny", "half")
    assert left(project, "partial_reset") == before["partial_reset"]
    assert left(project, "ssd") != before["ssd"]


def test_unlearn_goes_on_to_the_other_methods_when_one_diverges(
    project: Workspace, tracked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "ssd", METHODS["ssd"]._replace(run=diverging))
    with pytest.raises(TooManyDivergedError, match="unlearn@tiny-half-ssd"):
        stages.unlearn("tiny", "half")
    assert tracked == ["partial_reset"]
    assert not left(project, "ssd")
    assert len(left(project, "partial_reset")) == 4


def test_unlearn_refuses_a_method_that_the_pipeline_lacks(project: Workspace, tracked: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"pipeline\.methods: scrub is not part of it; it has ssd, partial_reset"):
        stages.unlearn("tiny", "half", "scrub")
