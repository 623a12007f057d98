"""Tables and figures of a comparison: what MLflow's UI shows of all methods of a scenario, and of single cells."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow import MlflowClient

from scforget import artifacts, measures, replay, tracking
from scforget.artifacts import Workspace
from scforget.pipeline import Inputs, Item
from scforget.tracking import Run, Store

# MLflow's own tables use what SQLAlchemy is about to drop; it is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

PLACE = ("pbmc", "nk")
METHODS = ["ssd", "scrub"]
INPUTS = Inputs(
    Item("audit", PLACE), {"work/prepare/pbmc/cells.h5ad": "c" * 32},
    {"seed": 42, "audit": {"level": 0.9}, "pipeline.methods": METHODS, "unlearn": {"ssd": {"alpha": 5.0}, "scrub": {}}},
)  # fmt: skip
N_FORGET, N_CONTROLS = 4, 6


def record(auc: float, trace: float, verdict: str, utility: str, **more: Any) -> dict[str, Any]:
    def equivalence(difference: float, margin: float) -> dict[str, Any]:
        ends = [difference - margin / 4, difference + margin / 4]
        return {"difference": difference, "interval": ends, "margin": margin, "noise_floor": margin / 10}

    means = {"elbo": -100.123456, "marker_r": 0.5}
    outside = {key: {"mean": mean, "per_seed": [mean, mean]} for key, mean in means.items()}
    return {
        "seeds": [3, 7],
        "verdict": verdict,
        "attacks": {"elbo": {"same_group": {"auc": auc, "advantage": 0.2, "null": None, "per_seed": [auc, auc]}}},
        "primary": {"membership": equivalence(auc - 0.5, 0.02), "trace": equivalence(trace, 1.0)},
        "worst_attack": {"worst": {"name": "lira_online", "auc": 0.98766}},
        "exposure": {"null_band": [-2.0, 2.0], "above_null": 0.5},
        "trace_per_seed": [trace, trace],
        "utility": {"verdict": utility, "outside": outside},
        **more,
    }


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    """Results of a scenario with two methods, of which the far one comes first in params.yaml."""
    made = Workspace(tmp_path)
    rng = np.random.default_rng(0)
    cells = N_FORGET + N_CONTROLS
    forget = np.arange(cells) < N_FORGET
    reference = {
        "original": record(0.9, 9.0, "NOT_FORGOTTEN", "kept"),
        "retrain": record(0.5, 0.0, "TARGET", "kept", primary=None, worst_attack=None),
    }
    reference["retrain"]["utility"]["verdict"] = None
    folder = made.results("reference", *PLACE)
    artifacts.write_json(folder / "result.json", reference)
    scores = {f"{name}/elbo": rng.normal(size=(2, cells)) for name in reference}
    artifacts.write_arrays(folder / "scores.npz", {"forget": forget, "same_group": ~forget, **scores})
    found = {
        "ssd": record(0.8, 8.12345678, "NOT_FORGOTTEN", "kept", fingerprint="of ssd"),
        "scrub": record(0.51, -0.1, "FORGOTTEN", "kept", fingerprint="of scrub"),
    }
    for name, own in found.items():
        folder = made.results("audit", *PLACE, name)
        artifacts.write_json(folder / "result.json", own)
        artifacts.write_arrays(folder / "scores.npz", {f"{name}/elbo": rng.normal(size=(2, cells))})
        artifacts.write_table(folder / "cells.csv", cell_rows())
    for steps, place in enumerate((("retrain", *PLACE), *(("unlearn", *PLACE, name) for name in found)), start=1):
        seeds = {"3": {"passes": 100.0 * steps}, "7": {"passes": 100.0 * steps}}
        artifacts.write_json(made.results(*place) / "result.json", {"seeds": seeds, "failed": {}})
        times = {seed: {"seconds": float(steps)} for seed in seeds}
        artifacts.write_json(made.results(*place) / "cost.json", {"seeds": times, "machine": {}})
    return made


def cell_rows() -> pd.DataFrame:
    rows = {"cell": ["AC-1", "GT-2", "TT-3"], "label": ["NK", "B", None], "donor": [None] * 3}
    return pd.DataFrame(
        {**rows, "z": [1.00004, 2.5, -0.5], "low": [0.5, np.nan, -1.0], "high": [1.5, np.nan, 0.0], "rank": [2, 1, 3]}
    )


def comparison(workspace: Workspace, inputs: Inputs = INPUTS) -> Run:
    (run,) = [run for run in replay.runs(workspace, inputs) if run.tags["kind"] == "comparison_table"]
    return run


# the run


def test_runs_of_an_audit_end_with_one_that_compares_the_methods(workspace):
    runs = replay.runs(workspace, INPUTS)
    assert [run.name for run in runs] == ["ssd nk audit", "scrub nk audit", "comparison pbmc nk"]
    run = runs[-1]
    assert run.tags == {
        "stage": "audit", "dvc.stage": "audit@pbmc-nk", "dataset": "pbmc", "scenario": "nk",
        "kind": "comparison_table", "forgotten_and_kept": "scrub",
    }  # fmt: skip
    assert run.metrics == {"comparison/forgotten": 1.0, "comparison/not_forgotten": 1.0}  # of methods alone
    assert run.params == {"scenario": "nk", "seed": 42, "audit.level": 0.9, "pipeline.methods": METHODS}
    assert run.children == ()
    assert run.dataset == ("pbmc", "work/prepare/pbmc/cells.h5ad", "c" * 32, "audit")


def test_runs_of_a_comparison_carry_a_table_and_pictures_that_are_the_same_each_time(workspace):
    run, again = comparison(workspace), comparison(workspace)
    contents = run.artifacts()
    assert set(contents) == {
        "distance_against_passes.png", "distance_to_target.png", "attack_grid.png", "roc_overlay.png"
    }  # fmt: skip
    assert contents == again.artifacts()
    (table,) = run.tables().values()
    assert list(table["method"]) == ["original", "retrain", "scrub", "ssd"]
    pd.testing.assert_frame_equal(table, again.tables()["comparison.json"])
    assert run.fingerprint == again.fingerprint


@pytest.mark.parametrize("changed", ["ssd", "reference", "methods", "scenario"])
def test_runs_of_a_comparison_are_others_when_a_record_changes(workspace, changed):
    before = comparison(workspace).fingerprint
    inputs = INPUTS
    if changed == "methods":
        inputs = Inputs(INPUTS.item, INPUTS.deps, {**INPUTS.params, "pipeline.methods": ["ssd"]})
    elif changed == "scenario":
        for stage in ("audit", "reference"):
            workspace.results(stage, *PLACE).rename(workspace.results(stage, "pbmc", "other"))
        inputs = Inputs(Item("audit", ("pbmc", "other")), INPUTS.deps, INPUTS.params)
    else:
        path = workspace.results(*(("reference", *PLACE) if changed == "reference" else ("audit", *PLACE, "ssd")))
        content = artifacts.read_json(path / "result.json")
        if changed == "ssd":
            content["fingerprint"] = "of another ssd"
        else:
            content["original"]["verdict"] = "UNDETERMINED"
        artifacts.write_json(path / "result.json", content)
    assert comparison(workspace, inputs).fingerprint != before


def test_runs_of_a_comparison_do_not_depend_on_timings(workspace):
    before = comparison(workspace)
    path = workspace.results("unlearn", *PLACE, "ssd") / "cost.json"
    artifacts.write_json(path, {"seeds": {"3": {"seconds": 99.0}}, "machine": {}})
    assert comparison(workspace).fingerprint == before.fingerprint


def test_runs_of_an_audit_without_the_reference_are_those_of_its_methods(workspace):
    (workspace.results("reference", *PLACE) / "result.json").unlink()
    assert [run.tags["method"] for run in replay.runs(workspace, INPUTS)] == METHODS


def test_runs_of_methods_carry_their_cells_as_a_table(workspace):
    ssd, *_ = replay.runs(workspace, INPUTS)
    assert list(ssd.tables()["cells.json"]["cell"]) == ["GT-2", "AC-1", "TT-3"]
    reference = replay.runs(workspace, Inputs(Item("reference", PLACE), INPUTS.deps, {"seed": 42}))
    assert [run.tables() for run in reference] == [{}, {}]


# the tables


def test_comparison_table_shows_each_number_of_the_record(workspace):
    table = comparison(workspace).tables()["comparison.json"]
    rows = table.set_index("method").to_dict("index")
    assert rows["ssd"] == {
        "verdict": "NOT_FORGOTTEN", "utility": "kept",
        "membership": 0.3, "membership_ci": "0.295, 0.305",
        "trace": 8.1235, "trace_ci": "7.873, 8.373",
        "passes_ratio": 2.0, "seconds_ratio": 2.0, "elbo": -100.1235, "marker_r": 0.5,
        "worst_attack_auc": 0.9877, "worst_attack": "lira_online",
    }  # fmt: skip
    assert (rows["scrub"]["trace"], rows["scrub"]["trace_ci"]) == (-0.1, "−0.350, 0.150")
    retrain = rows["retrain"]
    words = [retrain[key] for key in ("utility", "membership_ci", "worst_attack")]
    assert words == ["–"] * 3
    assert np.isnan([retrain["membership"], retrain["trace"], retrain["worst_attack_auc"]]).all()
    assert retrain["passes_ratio"] == 1.0


def test_comparison_table_survives_records_of_which_nothing_is_known():
    table = measures.comparison_table({"ssd": {}, "retrain": {}})
    assert list(table["method"]) == ["retrain", "ssd"]
    assert set(table["verdict"]) == {"–"}


def test_forgotten_asks_for_the_utility_too():
    audits = {
        "good": record(0.5, 0.0, "FORGOTTEN", "kept"),
        "spoilt": record(0.5, 0.0, "FORGOTTEN", "lost"),
        "ineffective": record(0.9, 9.0, "NOT_FORGOTTEN", "kept"),
    }
    assert measures.forgotten(audits) == ["good"]


def test_cell_table_ranks_the_cells_and_says_which_are_exposed():
    table = measures.cell_table(cell_rows(), record(0.5, 0.0, "FORGOTTEN", "kept"))
    assert list(table.columns) == ["rank", "cell", "label", "z", "exposed", "low", "high"]  # no cell has a donor
    assert list(table["rank"]) == [1, 2, 3]
    assert list(table["z"]) == [2.5, 1.0, -0.5]
    assert list(table["exposed"]) == [True, False, False]


def test_cell_table_names_donors_and_leaves_out_what_is_not_known():
    rows = cell_rows().assign(donor=["d1", None, "d2"])
    table = measures.cell_table(rows, {})
    assert list(table.columns) == ["rank", "cell", "label", "donor", "z", "low", "high"]
    assert measures.cell_table(rows[:0], {}).empty


# in the store


@pytest.fixture
def clean(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_LOGGING_LEVEL", "DVC_ROOT", "DVC_STAGE"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever Store sets
        monkeypatch.delenv(name)


def logged(root: Path, fingerprint: str) -> tuple[dict[str, str], dict[str, bytes]]:
    """Tags and files of a run."""
    client = MlflowClient(tracking.uri(root))
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    (run,) = client.search_runs([experiment.experiment_id], f"tags.fingerprint = '{fingerprint}'")
    folder = Path(run.info.artifact_uri)
    return run.data.tags, {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_store_keeps_the_tables_as_they_are_and_rebuilds_the_same_bytes(workspace, clean, tmp_path_factory):
    store = Store(workspace.root)
    runs = replay.runs(workspace, INPUTS)
    assert [store.log(run, "live") for run in runs] == [True] * 3
    tags, files = logged(workspace.root, runs[-1].fingerprint)
    assert json.loads(tags["mlflow.loggedArtifacts"]) == [{"path": "comparison.json", "type": "table"}]
    content, table = json.loads(files["comparison.json"]), runs[-1].tables()["comparison.json"]
    assert content["columns"] == list(table.columns)
    for found, row in zip(content["data"], table.itertuples(index=False), strict=True):
        assert found == [None if value != value else value for value in row]
    ssd = logged(workspace.root, "of ssd")[1]
    assert json.loads(ssd["cells.json"])["data"][0] == [1, "GT-2", "B", 2.5, True, None, None]
    again = replay.runs(workspace, INPUTS)
    assert [store.log(run, "restored") for run in again] == [False] * 3
    other = tmp_path_factory.mktemp("other")  # a store that has lost its runs; MLflow keeps a deleted file open
    assert Store(other).log(again[-1], "restored")
    assert logged(other, runs[-1].fingerprint)[1] == files
