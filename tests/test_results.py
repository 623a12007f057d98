"""Costs of populations as the report and tracking read them: means over models, and ratios to the retrains'."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from scforget import artifacts, results
from scforget.artifacts import Workspace

PLACE = ("pbmc", "nk")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path)


def row(steps: int, relative_change: float | None = 0.25, **more: Any) -> dict[str, Any]:
    forward, backward = {"forget": steps, "retain": 10 * steps}, {"retain": 7 * steps}
    passes = 18 * steps
    own = {"steps": steps, "forward": forward, "backward": backward, "passes": passes}
    return {**own, "relative_change": relative_change, **more}


def write(workspace: Workspace, method: str, *rows: dict[str, Any], seconds: list[float] | None = None) -> None:
    folder = workspace.results(*results.models_stage(*PLACE, method))
    artifacts.write_json(folder / "result.json", {"seeds": dict(enumerate(rows)), "failed": {}})
    if seconds is not None:
        times = {i: {"seconds": time, "peak_memory_mb": 100.0 + i} for i, time in enumerate(seconds)}
        artifacts.write_json(folder / "cost.json", {"seeds": times, "machine": {"cores": 2}})


def test_models_stage_says_where_each_population_was_made() -> None:
    assert results.models_stage("pbmc", "nk", "original") == ("train", "pbmc")
    assert results.models_stage("pbmc", "nk", "retrain") == ("retrain", "pbmc", "nk")
    assert results.models_stage("pbmc", "nk", "ssd") == ("unlearn", "pbmc", "nk", "ssd")


def test_cost_is_the_mean_over_models_and_the_ratio_to_the_retrains(workspace: Workspace) -> None:
    write(workspace, "ssd", row(10), row(20, 0.75), seconds=[1.0, 2.0])
    write(workspace, "retrain", row(50), row(60), row(70), seconds=[5.0, 6.0, 7.0])
    found = results.cost(workspace, *PLACE, "ssd")
    assert found == {
        "models": 2, "steps": 15, "passes": 270, "relative_change": 0.5,
        "forward_forget": 15, "forward_retain": 150, "backward_forget": 0, "backward_retain": 105,
        "seconds": 1.5, "peak_memory_mb": 100.5, "facts": {},
        "passes_ratio": pytest.approx(15 / 60), "seconds_ratio": pytest.approx(1.5 / 6),
    }  # fmt: skip
    target = results.cost(workspace, *PLACE, "retrain")
    assert (target["models"], target["passes_ratio"], target["seconds_ratio"]) == (3, 1.0, 1.0)


def test_cost_leaves_a_change_that_is_unknown_out_of_the_mean(workspace: Workspace) -> None:
    """A mixture's is NaN, which is null on disk."""
    write(workspace, "sisa", row(10, float("nan")), row(20, float("nan")))
    assert results.cost(workspace, *PLACE, "sisa")["relative_change"] is None
    write(workspace, "sisa", row(10, float("nan")), row(20, 0.5))
    assert results.cost(workspace, *PLACE, "sisa")["relative_change"] == 0.5


def test_cost_without_timings_or_retrains_or_anything_is_none(workspace: Workspace) -> None:
    nothing = results.cost(workspace, *PLACE, "ssd")
    assert nothing.pop("facts") == {}
    assert set(nothing.values()) == {None}
    write(workspace, "ssd", row(10))
    found = results.cost(workspace, *PLACE, "ssd")
    unknown = {name for name, value in found.items() if value is None}
    assert unknown == {"seconds", "peak_memory_mb", "passes_ratio", "seconds_ratio"}
    write(workspace, "retrain", row(0), seconds=[0.0])  # of which no ratio can be taken
    assert results.cost(workspace, *PLACE, "ssd")["passes_ratio"] is None


def test_cost_counts_a_set_that_was_never_read_as_0(workspace: Workspace) -> None:
    write(workspace, "ssd", {"steps": 0, "passes": 0, "forward": {}, "backward": {}, "relative_change": 0.0})
    found = results.cost(workspace, *PLACE, "ssd")
    names = [f"{direction}_{cells}" for direction in ("forward", "backward") for cells in ("forget", "retain")]
    assert [found[name] for name in names] == [0, 0, 0, 0]


def test_cost_gives_the_mean_of_number_facts_and_the_words_that_all_share(workspace: Workspace) -> None:
    one = {"epsilon": 9.0, "guarantee": "none", "solver": "cg", "shards": 4, "mixed": "many"}
    other = {"epsilon": 10.0, "guarantee": "none", "solver": "lu", "shards": 8, "mixed": 3.0}
    write(workspace, "dp_sgd", row(10, facts=one), row(10, facts=other))
    assert results.cost(workspace, *PLACE, "dp_sgd")["facts"] == {"epsilon": 9.5, "guarantee": "none", "shards": 6}


def test_cost_of_models_that_say_nothing_of_themselves_has_no_facts(workspace: Workspace) -> None:
    for facts in ({}, {"facts": None}, {"facts": {}}):
        write(workspace, "ssd", row(10, **facts), row(10, **facts))
        assert results.cost(workspace, *PLACE, "ssd")["facts"] == {}


def test_cost_drops_a_number_that_only_some_models_know(workspace: Workspace) -> None:
    """An infinite one is null on disk."""
    write(
        workspace,
        "dp_sgd",
        row(10, facts={"epsilon": float("inf"), "delta": 0.5}),
        row(10, facts={"epsilon": 9.0, "delta": 0.5}),
    )
    assert results.cost(workspace, *PLACE, "dp_sgd")["facts"] == {"delta": 0.5}


def test_audits_are_the_references_and_the_methods_each_with_its_cost(workspace: Workspace) -> None:
    reference = {"original": {"verdict": "NOT_FORGOTTEN"}, "retrain": {"verdict": None}}
    artifacts.write_json(workspace.results("reference", *PLACE) / "result.json", reference)
    for number, method in enumerate(("ssd", "scrub"), 1):
        path = workspace.results("audit", *PLACE, method) / "result.json"
        artifacts.write_json(path, {"verdict": "FORGOTTEN", "n": number})
        write(workspace, method, row(10 * number))
    write(workspace, "retrain", row(40))
    write(workspace, "original", row(50))
    found = results.audits(workspace, *PLACE, ["ssd", "scrub"])
    assert list(found) == ["original", "retrain", "ssd", "scrub"]
    assert {name: audit["cost"]["passes_ratio"] for name, audit in found.items()} == {
        "original": 1.25, "retrain": 1.0, "ssd": 0.25, "scrub": 0.5,
    }  # fmt: skip
    assert (found["scrub"]["n"], found["original"]["verdict"]) == (2, "NOT_FORGOTTEN")
