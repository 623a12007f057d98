"""A study in MLflow: the study is the parent, trials are nested, the default and the chosen one are tagged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient

from scforget import artifacts, config, replay, tracking
from scforget.artifacts import Workspace
from scforget.pipeline import Inputs, Item
from scforget.study_runs import study_run

TAGS = {"stage": "sweep", "dataset": "tiny", "scenario": "part", "method": "ssd"}
ROWS = [
    {"trial": 0, "state": "complete", "feasible": True, "default": True, "chosen": False, "distance": 1.5, "cost": 0.2,
     "elbo_loss": 0.1, "alpha": 5.0, "reference": "D"},
    {"trial": 1, "state": "diverged", "feasible": False, "default": False, "chosen": False, "alpha": 0.1,
     "reference": "R"},
    {"trial": 2, "state": "complete", "feasible": True, "default": False, "chosen": True, "distance": 0.5, "cost": 0.3,
     "elbo_loss": 0.2, "alpha": 2.0, "reference": "R"},
]  # fmt: skip
FINAL = {"distance": 0.75, "standard_error": 0.1, "cost": 0.3, "verdict": "FORGOTTEN", "utility": "kept"}


def record(**changes: Any) -> dict[str, Any]:
    return {
        "study": {"name": "tiny/part/ssd/abc", "fingerprint": "f" * 32, "dataset": "tiny", "scenario": "part",
                  "method": "ssd", "development": "part_dev", "trials": 3, "diverged": 1},
        "ranges": {"alpha": {"low": 0.1, "high": 100.0, "log": True}, "reference": {"values": ["D", "R"]}},
        "original": {"distance": 3.0, "cost": 0.0}, "retrain": {"distance": 0.2},
        "default": {"settings": {"alpha": 5.0, "reference": "D"}, "final": {"diverged": "the loss became NaN"}},
        "tuned": {"trial": 2, "settings": {"alpha": 2.0, "reference": "R"}, "development": {"distance": 0.5},
                  "final": FINAL, "optimism": 0.25},
        **changes,
    }  # fmt: skip


def left(folder: Path, content: dict[str, Any]) -> Path:
    artifacts.write_bytes(folder / "best.yaml", config.dump_yaml(content).encode())
    artifacts.write_table(folder / "trials.csv", pd.DataFrame(ROWS))
    artifacts.write_bytes(folder / "study.html", b"<!doctype html>")
    artifacts.write_json(folder / "cost.json", {"seconds": 12.5, "machine": {}})
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return left(tmp_path / "results" / "sweep" / "tiny" / "part" / "ssd", record())


def test_study_run_is_a_parent_with_a_nested_run_for_each_trial(folder):
    run = study_run(folder, TAGS, {"seed": 42})
    assert run.name == "ssd part sweep"
    assert run.params == {"seed": 42}
    assert run.tags == {
        **TAGS, "kind": "study", "optuna.study": "tiny/part/ssd/abc", "development": "part_dev", "best.trial": "2",
        "best.verdict": "FORGOTTEN", "best.settings": "alpha 2, reference R",
    }  # fmt: skip
    assert [child.name for child in run.children] == ["trial 0", "trial 1", "trial 2"]
    shared = {**TAGS, "kind": "trial", "optuna.study": "tiny/part/ssd/abc"}
    own = [{key: value for key, value in child.tags.items() if key not in shared} for child in run.children]
    assert all(shared.items() <= child.tags.items() for child in run.children)
    assert own == [
        {"optuna.trial": "0", "state": "complete", "feasible": "true", "default": "true"},
        {"optuna.trial": "1", "state": "diverged", "feasible": "false"},
        {"optuna.trial": "2", "state": "complete", "feasible": "true", "chosen": "true"},
    ]
    wanted = [{key: row[key] for key in ("alpha", "reference")} for row in ROWS]
    assert [child.params for child in run.children] == wanted
    assert run.children[2].metrics == {"distance": 0.5, "cost": 0.3, "elbo_loss": 0.2}


def test_study_run_has_both_settings_on_both_requests_as_metrics(folder):
    metrics = study_run(folder, TAGS, {}).metrics
    assert metrics == {
        "original/distance": 3.0, "original/cost": 0.0, "retrain/distance": 0.2, "tuned/trial": 2.0,
        "tuned/development/distance": 0.5, "tuned/final/distance": 0.75, "tuned/final/standard_error": 0.1,
        "tuned/final/cost": 0.3, "tuned/optimism": 0.25, "study/trials": 3.0, "study/diverged": 1.0,
        "cost/seconds": 12.5,
    }  # fmt: skip


def test_study_run_carries_what_the_sweep_left(folder):
    run = study_run(folder, TAGS, {})
    files = {name: (folder / name).read_bytes() for name in ("best.yaml", "trials.csv", "study.html", "cost.json")}
    assert run.artifacts() == files
    assert list(run.tables()) == ["trials.json"]
    assert run.tables()["trials.json"]["trial"].tolist() == [0, 1, 2]
    assert not any(child.artifacts() or child.tables() for child in run.children)


def test_study_run_of_a_study_that_promotes_nothing_has_no_best(tmp_path):
    content = record()
    del content["tuned"]
    run = study_run(left(tmp_path, content), TAGS, {})
    assert not [tag for tag in run.tags if tag.startswith("best.")]
    assert not [name for name in run.metrics if name.startswith("tuned/")]


def test_study_run_of_a_choice_that_diverges_in_the_end_says_so(tmp_path):
    content = record(tuned={"trial": 2, "settings": {"alpha": 2.0}, "final": {"diverged": "NaN"}})
    assert study_run(left(tmp_path, content), TAGS, {}).tags["best.verdict"] == "diverged"


def test_study_run_of_a_study_that_went_on_is_another(tmp_path, folder):
    first, again = (study_run(folder, TAGS, {}) for _ in range(2))
    for one, other in zip((first, *first.children), (again, *again.children), strict=True):
        assert one.fingerprint == other.fingerprint
    content = record()
    content["study"]["trials"] = 4
    longer = study_run(left(tmp_path / "longer", content), TAGS, {})
    assert not {one.fingerprint for one in (first, *first.children)} & {
        one.fingerprint for one in (longer, *longer.children)
    }
    assert len({one.fingerprint for one in first.children}) == 3


@pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")
def test_a_study_is_found_in_mlflow_once_with_its_trials_below_it(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    item = Item("sweep", ("tiny", "part", "ssd"))
    inputs = Inputs(item, {"src/x": "0" * 32}, {"seed": 42, "unlearn.ssd": {"lam": 1.0}})
    (run,) = replay.runs(Workspace(tmp_path), inputs)
    (elsewhere,) = replay.studies(Workspace(tmp_path), inputs, left(tmp_path / "studies", record()))
    assert run.fingerprint == elsewhere.fingerprint  # the same study, wherever it is written
    assert run.tags["dvc.stage"] == "sweep@tiny-part-ssd"
    store = tracking.Store(tmp_path)
    assert store.log(run, "live")
    assert not store.log(elsewhere, "restored")
    client = MlflowClient(tracking.uri(tmp_path))
    experiment = client.get_experiment_by_name("scforget").experiment_id
    found = client.search_runs([experiment])
    assert {one.info.status for one in found} == {"FINISHED"}
    (parent,) = [one for one in found if one.data.tags["kind"] == "study"]
    trials = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'")
    assert len(found) == 1 + len(trials) == 4
    (chosen,) = client.search_runs([experiment], "tags.chosen = 'true'")
    assert chosen.data.params == {"alpha": "2.0", "reference": "R"}
    assert chosen.data.metrics["distance"] == 0.5
    (default,) = client.search_runs([experiment], "tags.default = 'true'")
    assert default.data.tags["optuna.trial"] == "0"
    files = {path.path for path in client.list_artifacts(parent.info.run_id)}
    assert files == {"best.yaml", "trials.csv", "study.html", "cost.json", "trials.json"}
