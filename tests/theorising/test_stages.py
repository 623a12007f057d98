"""The stages of the theory pipeline on a tiny project: what they leave, what they refuse, and that they repeat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spoiling
from scforget import artifacts
from scforget.context import open_theory
from scforget.errors import ConfigError, EmptyGroupError
from scforget.replay import runs
from scforget.theorising import ablation, arena, overlap


def read(root: Path, *parts: str) -> Any:
    return json.loads((root / "report" / "theory").joinpath(*parts).read_text())


@pytest.fixture(scope="module")
def looked(project: Path) -> Path:
    with spoiling.stages_in(project):
        overlap.overlap_stage("tiny")
    return project


def test_overlap_stage_looks_at_every_kind_of_model(looked: Path) -> None:
    record = read(looked, "overlap", "tiny", "result.json")
    assert set(record["variants"]) == {"nb", "log_mse", "latent_2", "conditional"}
    assert set(record["classifiers"]) == {"probe", "deep", "matched"}
    for name, variant in record["variants"].items():
        found = variant["requests"]["half"]
        assert len(found["models"]) == 2
        assert len(found["factorisation"]) == (2 if name in {"nb", "log_mse"} else 0)
        whole = found["overlap"]["global"]
        assert 0 < whole["cosine"] <= 1
        assert whole["interval"][0] <= whole["interval"][1] <= 1
        assert 0 < whole["same_size"]["p_lower"] <= 1
    assert "scale_condition" in record["variants"]["conditional"]["requests"]["half"]["overlap"]
    assert "dispersion" not in record["variants"]["log_mse"]["requests"]["half"]["models"][0]["exact"]["groups"]
    assert "ladder" in record["variants"]["nb"]["requests"]["half"]["models"][0]
    scatter = artifacts.read_arrays(looked / "report" / "theory" / "overlap" / "tiny" / "scatter.npz")
    assert set(scatter) == {"vae/half", "probe/half", "deep/half", "matched/half"}


def test_overlap_stage_repeats_its_bytes_and_trains_nothing_twice(
    looked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = looked / "report" / "theory" / "overlap" / "tiny" / "result.json"
    before = path.read_bytes()
    monkeypatch.setattr("scforget.families.fit", lambda *_, **__: pytest.fail("a model was trained again"))
    with spoiling.stages_in(looked):
        overlap.overlap_stage("tiny")
    assert path.read_bytes() == before


def test_runs_of_a_theory_item_hold_its_numbers_and_files(looked: Path) -> None:
    with spoiling.stages_in(looked):
        context = open_theory("overlap", "tiny")
    (run,) = runs(context.workspace, context.inputs)
    assert run.tags["kind"] == "theory"
    assert run.metrics["overlap/variants/nb/requests/half/overlap/global/cosine"] > 0
    assert set(run.artifacts()) == {"result.json", "scatter.npz", "cost.json"}


@pytest.mark.parametrize("name", ["theory.models", "a data set"])
def test_overlap_stage_refuses_what_is_not_there_in_one_line(project: Path, tmp_path: Path, name: str) -> None:
    with spoiling.stages_in(project):
        if name == "a data set":
            with pytest.raises(ConfigError, match="nothing is not part of it; it has tiny"):
                overlap.overlap_stage("nothing")
            return
        before = (project / "params.yaml").read_text()
        spoiling.put("theory", "models", value=3)(project)
        try:
            with pytest.raises(EmptyGroupError, match=r"at least 3 \(theory.models\)"):
                overlap.overlap_stage("tiny")
        finally:
            (project / "params.yaml").write_text(before)


def test_unrelated_cells_are_of_the_least_similar_kind(project: Path) -> None:
    with spoiling.stages_in(project):
        found = arena.Arena(open_theory("overlap", "tiny"))
        request = found.requests()["half"]
    (kind,) = set(found.labels[request.unrelated])
    assert kind != "0"
    means = {name: found._mean(np.flatnonzero((found.labels == name) & np.isin(np.arange(240), found.sets.train)))
             for name in np.unique(found.labels) if name != "0"}  # fmt: skip
    own = found._mean(request.forget)
    near = {name: np.corrcoef(mean, own)[0, 1] for name, mean in means.items()}
    assert near[kind] == min(near.values())


@pytest.fixture(scope="module")
def ablated(project: Path) -> Path:
    with spoiling.stages_in(project):
        ablation.ablation_stage("tiny")
    return project


def test_ablation_stage_leaves_a_record_of_each(ablated: Path) -> None:
    curves = read(ablated, "ablation", "tiny", "curves.json")
    assert {row["method"] for row in curves} == {"retrain", "partial_reset"}
    assert len(read(ablated, "ablation", "tiny", "cost.json")["curves"]) == len(curves)
    (grid,) = read(ablated, "ablation", "tiny", "grids.json")
    assert [row["values"] for row in grid] == [{"alpha": 1.0}, {"alpha": 5.0}]
    assert {row["kind"] for row in read(ablated, "ablation", "tiny", "sizes.json")["rows"]} == {
        "cluster_subset", "scattered"
    }  # fmt: skip
    kinds = {(row["variant"], row["method"]) for row in read(ablated, "ablation", "tiny", "conditional.json")["rows"]}
    assert kinds == {(one, other) for one in ("plain", "conditional") for other in ("original", "fisher_scrub")}
    assert "half" in read(ablated, "ablation", "tiny", "features.json")
    assert read(ablated, "ablation", "tiny", "result.json")["original"]["models"] == 2


def test_ablation_refuses_a_request_without_retrained_models(project: Path) -> None:
    before = (project / "params.yaml").read_text()
    spoiling.put("theory", "ablation", "scenario", value="other")(project)
    try:
        with spoiling.stages_in(project), pytest.raises(ConfigError, match=r"'other' is not in pipeline\.scenarios"):
            ablation.ablation_stage("tiny")
    finally:
        (project / "params.yaml").write_text(before)
