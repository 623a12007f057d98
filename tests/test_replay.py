"""What a stage left on disk becomes tracked runs, the same ones live and restored."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scforget import artifacts, replay
from scforget.artifacts import Workspace
from scforget.errors import ArtifactError
from scforget.pipeline import Inputs, Item
from scforget.tracking import Run

CELLS = {"work/prepare/pbmc/cells.h5ad": "c" * 32, "src/scforget/training.py": "t" * 32}


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    return Workspace(tmp_path)


def population(workspace: Workspace, item: Item, failed: dict[str, str], *, rows: bool = True) -> Path:
    """Results of a stage that makes models: seed 3 took 10 steps, seed 7 took 20."""
    folder = workspace.results(item.stage, *item.keys)
    seeds = {
        "3": {
            "steps": 10,
            "passes": 100,
            "forward": {"retain": 50},
            "epochs": 2,
            "stop_elbo": -5.0,
            "facts": {"epsilon": 9.0, "guarantee": "none"},
        },
        "7": {
            "steps": 20,
            "passes": 200,
            "forward": {"retain": 90},
            "epochs": 3,
            "stop_elbo": -7.0,
            "facts": {"epsilon": 10.0, "guarantee": "none"},
        },
    }
    artifacts.write_json(folder / "result.json", {"seeds": seeds, "failed": failed})
    costs = {seed: {"seconds": 0.5 * int(seed), "peak_memory_mb": 400.0} for seed in seeds}
    machine = {"cores": 2, "numerics": "matrix_products mkl"}
    artifacts.write_json(folder / "cost.json", {"seeds": costs, "machine": machine})
    epochs = [(3, 1), (3, 2), (7, 1), (7, 2), (7, 3)]
    history = pd.DataFrame(
        [{"seed": seed, "epoch": epoch, "stop_elbo": -float(epoch * seed), "kl": 0.1} for seed, epoch in epochs]
    )
    artifacts.write_table(folder / "history.csv", history if rows else pd.DataFrame(columns=["seed", "epoch"]))
    return folder


def everyone(runs: list[Run]) -> list[Run]:
    return [one for run in runs for one in (run, *everyone(list(run.children)))]


UNLEARN = Inputs(
    Item("unlearn", ("pbmc", "nk", "ssd")),
    CELLS,
    {"seed": 42, "datasets.pbmc.model": {"hidden": [16], "latent": 4}, "unlearn.ssd": {"lam": 1.0, "alpha": 10.0}},
)


def test_runs_of_models_nest_one_run_for_each_with_its_curve(workspace):
    population(workspace, UNLEARN.item, {"5": "the loss became NaN"})
    (run,) = replay.runs(workspace, UNLEARN)
    assert run.fingerprint == UNLEARN.fingerprint
    assert run.tags == {
        "stage": "unlearn", "dvc.stage": "unlearn@pbmc-nk", "dataset": "pbmc", "scenario": "nk", "method": "ssd",
        "numerics": "matrix_products mkl",
    }  # fmt: skip
    # Without the names of data set and method, so that runs of two methods line up in one column.
    assert run.params == {"seed": 42, "model.hidden": [16], "model.latent": 4, "lam": 1.0, "alpha": 10.0}
    assert run.metrics == {
        "model/steps": 15.0, "model/passes": 150.0, "model/epochs": 2.5, "model/stop_elbo": -6.0,
        "model/forward/retain": 70.0, "model/facts/epsilon": 9.5,
        "cost/seconds": 2.5, "cost/peak_memory_mb": 400.0,
    }  # fmt: skip
    assert run.dataset == ("pbmc", "work/prepare/pbmc/cells.h5ad", "c" * 32, "unlearn")
    three, seven, five = run.children
    assert [child.fingerprint for child in run.children] == [f"{UNLEARN.fingerprint}-{seed}" for seed in (3, 7, 5)]
    assert three.metrics == {
        "model/steps": 10.0, "model/passes": 100.0, "model/epochs": 2.0, "model/stop_elbo": -5.0,
        "model/forward/retain": 50.0, "model/facts/epsilon": 9.0,
        "cost/seconds": 1.5, "cost/peak_memory_mb": 400.0,
    }  # fmt: skip
    assert three.curves == {epoch: {"train/stop_elbo": -3.0 * epoch, "train/kl": 0.1} for epoch in (1, 2)}
    assert sorted(seven.curves) == [1, 2, 3]
    own = {key: value for key, value in run.tags.items() if key != "numerics"}
    assert seven.tags == {**own, "seed": "7", "fact.guarantee": "none"}
    assert five.tags == {**own, "seed": "5", "failed": "the loss became NaN"}
    assert (five.metrics, five.curves) == ({}, {})


def test_runs_of_every_method_are_found_by_the_fingerprint_that_each_left(workspace):
    """Of one method's part ``dvc.lock`` knows less than the stage did: its record says what it was made from."""
    item = Item("unlearn", ("pbmc", "nk"))
    methods = {"scrub": {"epochs": 2}, "ssd": {"alpha": 10.0}}
    for name in methods:
        folder = population(workspace, Item("unlearn", (*item.keys, name)), {})
        record = artifacts.read_json(folder / "result.json")
        artifacts.write_json(folder / "result.json", {**record, "fingerprint": f"of {name}"})
    inputs = Inputs(item, CELLS, {"seed": 42, "pipeline.methods": list(methods), "unlearn": methods})
    scrub, ssd = replay.runs(workspace, inputs)
    assert (scrub.fingerprint, ssd.fingerprint) == ("of scrub", "of ssd")
    assert [child.fingerprint for child in ssd.children] == ["of ssd-3", "of ssd-7"]
    assert ssd.tags == {
        "stage": "unlearn", "dvc.stage": "unlearn@pbmc-nk", "dataset": "pbmc", "scenario": "nk", "method": "ssd",
        "numerics": "matrix_products mkl",
    }  # fmt: skip
    assert ssd.params == {"seed": 42, "alpha": 10.0}
    assert scrub.params == {"seed": 42, "epochs": 2}


def test_runs_of_models_carry_their_files_and_a_figure(workspace):
    folder = population(workspace, UNLEARN.item, {})
    (run,) = replay.runs(workspace, UNLEARN)
    contents = run.artifacts()
    assert set(contents) == {"result.json", "history.csv", "cost.json", "training_curves.png"}
    assert contents["history.csv"] == (folder / "history.csv").read_bytes()
    assert contents["training_curves.png"].startswith(b"\x89PNG")


def test_runs_of_a_method_without_epochs_have_no_curves(workspace):
    population(workspace, UNLEARN.item, {}, rows=False)
    (run,) = replay.runs(workspace, UNLEARN)
    assert [child.curves for child in run.children] == [{}, {}]
    assert set(run.artifacts()) == {"result.json", "history.csv", "cost.json"}


@pytest.mark.parametrize("stage", ["prepare", "split"])
def test_runs_of_prepare_and_split_hold_every_number_of_the_result(workspace, stage):
    inputs = Inputs(Item(stage, ("pbmc",)), {"data/pbmc": "d.dir", **CELLS}, {"datasets.pbmc.split": {"n_genes": 5}})
    record = {"cells": {"read": 9}, "labels": {"CD4.T": 3, "B": 2}, "ok": True, "none": None, "text": "x", "l": [1]}
    artifacts.write_json(workspace.results(stage, "pbmc") / "result.json", record)
    (run,) = replay.runs(workspace, inputs)
    assert run.metrics == {
        f"{stage}/cells/read": 9.0, f"{stage}/labels/CD4/T": 3.0, f"{stage}/labels/B": 2.0, f"{stage}/ok": 1.0,
    }  # fmt: skip
    assert run.params == {"split.n_genes": 5}
    assert run.dataset == ("pbmc", "data/pbmc", "d.dir", stage)
    assert json.loads(run.artifacts()["result.json"]) == record


def audited(seeds: list[int]) -> dict[str, Any]:
    n = len(seeds)
    row = {"auc": 0.6, "signed": 0.1, "advantage": 0.2, "per_seed": [seed / 10 for seed in seeds]}
    row["per_seed_intervals"] = [[0.1, 0.8]] * n
    return {
        "seeds": seeds,
        "verdict": "NOT_FORGOTTEN",
        "published_criterion": False,
        "attacks": {"threshold": {"same_group": {**row, "distance_to_retrain": 0.05}, "all_unseen": row}},
        "primary": {
            "membership": {
                "mean": 0.6, "target_mean": 0.5, "difference": 0.1, "interval": [0.05, 0.15], "p_tost": 0.9,
                "power": None, "noise_floor": 0.01, "side": "outside",
            }
        },
        "worst_attack": {"worst": {"name": "lira_online", "auc": 0.9, "p_adjusted": 0.01}},
        "population": {"klom": {"excess": 0.5}, "epsilon_bounds": {"membership": {"epsilon": 0.3}}},
        "exposure": {"above_null": 0.25},
        "trace_per_seed": [float(seed) for seed in seeds],
        "utility": {
            "verdict": "KEPT",
            "outside": {"elbo": {"mean": -100.0, "per_seed": [-99.0] * (n - 1) + [None]}},
            "inside": {"elbo": {"mean": -120.0, "per_seed": [-120.0] * n}},
        },
    }  # fmt: skip


RECORD = {**audited([3, 7]), "fingerprint": "f"}
AUDIT = Inputs(
    Item("audit", ("pbmc", "nk")), CELLS,
    {"seed": 42, "audit": {"level": 0.9}, "pipeline.methods": ["ssd"], "unlearn": {"ssd": {"alpha": 5.0}, "scrub": {}}},
)  # fmt: skip


def test_runs_of_an_audit_are_a_row_to_compare_by(workspace):
    folder = workspace.results("audit", "pbmc", "nk", "ssd")
    artifacts.write_json(folder / "result.json", RECORD)
    population(workspace, UNLEARN.item, {})
    population(workspace, Item("retrain", ("pbmc", "nk")), {})
    (run,) = replay.runs(workspace, AUDIT)
    assert run.tags == {
        "stage": "audit", "dvc.stage": "audit@pbmc-nk", "dataset": "pbmc", "scenario": "nk", "method": "ssd",
        "kind": "comparison",
        "verdict": "NOT_FORGOTTEN", "utility_verdict": "KEPT", "published_criterion": "False",
        "worst_attack": "lira_online",
    }  # fmt: skip
    expected = {
        "audit/threshold/auc": 0.6, "audit/threshold/signed": 0.1, "audit/threshold/advantage": 0.2,
        "audit/threshold/distance_to_retrain": 0.05, "other_controls/all_unseen/threshold/auc": 0.6,
        "audit/membership/mean": 0.6, "audit/membership/low": 0.05, "audit/membership/high": 0.15,
        "audit/membership/p_tost": 0.9, "utility/elbo": -100.0, "utility/inside/elbo": -120.0,
        "audit/worst_attack/auc": 0.9, "audit/worst_attack/p_adjusted": 0.01,
        "audit/klom/excess": 0.5,
        "audit/epsilon_bound/membership": 0.3, "audit/exposed_share": 0.25,
        "cost/steps": 15.0, "cost/passes_ratio": 1.0, "cost/seconds": 2.5, "cost/seconds_ratio": 1.0,
    }  # fmt: skip
    assert expected.items() <= run.metrics.items()
    assert all(isinstance(value, float) for value in run.metrics.values())
    assert "audit/membership/power" not in run.metrics  # null: not known
    assert run.fingerprint == "f"
    assert run.params == {
        "method": "ssd", "scenario": "nk", "seed": 42, "audit.level": 0.9, "alpha": 5.0,
    }  # fmt: skip
    three, seven = run.children
    assert three.fingerprint == "f-3"
    assert three.metrics == {
        "audit/threshold/auc": 0.3, "audit/threshold/low": 0.1, "audit/threshold/high": 0.8, "audit/trace": 3.0,
        "utility/elbo": -99.0,
    }  # fmt: skip
    assert seven.metrics["audit/threshold/auc"] == 0.7
    assert "utility/elbo" not in seven.metrics
    assert three.tags["seed"] == "3"


def test_runs_of_the_reference_are_two_rows_of_the_same_table(workspace):
    inputs = Inputs(Item("reference", ("pbmc", "nk")), CELLS, {"seed": 42})
    target = {**audited([0, 1, 2]), "verdict": None, "primary": None, "noise_floor": {"membership": 0.01}}
    folder = workspace.results("reference", "pbmc", "nk")
    artifacts.write_json(folder / "result.json", {"original": audited([3, 7]), "retrain": target})
    original, retrain = replay.runs(workspace, inputs)
    assert [run.tags["method"] for run in (original, retrain)] == ["original", "retrain"]
    assert original.tags["stage"] == retrain.tags["stage"] == "audit"
    assert original.tags["kind"] == retrain.tags["kind"] == "comparison"
    assert len(retrain.children) == 3
    assert retrain.metrics["audit/noise_floor/membership"] == 0.01
    # No run is another's double: every fingerprint differs.
    fingerprints = [run.fingerprint for run in everyone([original, retrain])]
    assert len(set(fingerprints)) == len(fingerprints) == 7


def test_runs_of_an_audit_without_timings_say_nothing_of_them(workspace):
    artifacts.write_json(
        workspace.results("audit", "pbmc", "nk", "ssd") / "result.json", {**audited([3, 7]), "fingerprint": "f"}
    )
    (run,) = replay.runs(workspace, AUDIT)
    assert not [key for key in run.metrics if key.startswith("cost/")]


def test_runs_of_an_audit_carry_its_figures(workspace):
    rng = np.random.default_rng(0)
    artifacts.write_json(
        workspace.results("audit", "pbmc", "nk", "ssd") / "result.json", {**audited([3, 7]), "fingerprint": "f"}
    )
    scores = {"original/elbo": rng.normal(size=(2, 9)), "retrain/elbo": rng.normal(size=(3, 9))}
    forget = np.arange(9) < 4
    reference = workspace.results("reference", "pbmc", "nk") / "scores.npz"
    artifacts.write_arrays(reference, {"forget": forget, "same_group": ~forget, **scores})
    own = workspace.results("audit", "pbmc", "nk", "ssd") / "scores.npz"
    artifacts.write_arrays(own, {"ssd/elbo": rng.normal(size=(2, 9))})
    (run,) = replay.runs(workspace, AUDIT)
    contents = run.artifacts()
    assert set(contents) == {"result.json", "roc.png", "score_histograms.png"}
    assert contents["roc.png"].startswith(b"\x89PNG")


def test_runs_of_the_report_carry_all_its_files(workspace):
    for name in ("summary.json", "figures/pbmc-nk/roc.png", "tables/t.csv", ".gitignore", "tables/.gitignore"):
        artifacts.write_bytes(workspace.report / name, name.encode())
    (run,) = replay.runs(workspace, Inputs(Item("report"), {"results": "r.dir"}, {"seed": 42}))
    contents = {name: name.encode() for name in ("summary.json", "figures/pbmc-nk/roc.png", "tables/t.csv")}
    assert dict(run.artifacts()) == contents


def test_runs_of_track_are_none(workspace):
    assert replay.runs(workspace, Inputs(Item("track"), {"results": "r.dir"}, {})) == []


@pytest.mark.parametrize("inputs", [UNLEARN, AUDIT, Inputs(Item("split", ("pbmc",)), CELLS, {})])
def test_runs_without_their_results_say_which_file_is_missing(workspace, inputs):
    with pytest.raises(ArtifactError, match=r"result\.json: no such file; run the stage that makes it"):
        replay.runs(workspace, inputs)
