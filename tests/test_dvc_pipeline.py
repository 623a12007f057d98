"""The whole loop in a repository of its own: what runs, what is restored, what a kill costs, what MLflow can lose.

Each stage is a process that imports for seconds before it does anything, so the `scforget` that DVC finds on its PATH
here is a stand-in that has a process with everything imported fork itself. What it runs is the command line all the
same. The kill is dealt to the real command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from mlflow import MlflowClient
from ruamel.yaml import YAML
from safetensors.numpy import load_file

from scforget import artifacts, config
from scforget.data.synthetic import PRESETS, simulate
from scforget.engine import Numerics
from scforget.pipeline import Item, Pipeline
from shell import Shell

NUMERICS = {"numerics": str(Numerics("mkl", "none", "cpu", 1))}  # of so small a model

# One repository serves all tests of this file (pytest-xdist: --dist loadgroup keeps them in one process).
pytestmark = [
    pytest.mark.xdist_group("dvc"),
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # of MLflow's own tables
]

ROOT = Path(__file__).parents[1]
METHODS = ["ssd", "partial_reset"]


@pytest.fixture(scope="session")
def shell(tmp_path_factory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("sh"))
    yield made
    made.close()


def edit(root: Path, *keys: str, value: Any) -> None:
    yaml = YAML(typ="safe", pure=True)
    params = place = yaml.load(root / "params.yaml")
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    yaml.dump(params, root / "params.yaml")


def shrink(root: Path) -> None:
    """Write params for a tiny simulated set: 2 originals, 3 retrains, 3 epochs, one request, two methods."""
    params = config.read_yaml(ROOT / "params.yaml")
    dataset = params["datasets"]["pbmc68k"]
    dataset["prepare"].update(min_genes=5, mito_column=None, label_column="cluster")
    dataset["split"].update(n_genes=60, markers_per_label=3)
    dataset["model"].update(hidden=[16], latent=4)
    dataset["training"]["max_epochs"] = params["unlearn"]["partial_reset"]["max_epochs"] = 3
    YAML(typ="safe", pure=True).dump(params, root / "params.yaml")
    edit(root, "datasets", value={"tiny": dataset})
    edit(root, "datasets", "tiny", "scenarios", value={"half": {"kind": "subset", "cluster": "0", "fraction": 0.5}})
    classifiers = {**params["pipeline"]["classifiers"], "datasets": []}  # no classifiers: no items of theirs
    plan = {"datasets": ["tiny"], "scenarios": ["half"], "shadow_blocks": [0], "methods": METHODS}
    edit(root, "classifiers", value={})
    edit(root, "pipeline", value={**plan, "classifiers": classifiers})
    edit(root, "train", "seeds", value=[0, 1])
    edit(root, "retrain", "seeds", value=[0, 1, 2])
    edit(root, "audit", "bootstrap_draws", value=50)
    edit(root, "audit", "null_draws", value=200)
    edit(root, "sweep", "methods", value=[])


ITEMS = [
    "prepare@tiny", "split@tiny", "train@tiny", "retrain@tiny-half", "shadows@tiny-0", "unlearn@tiny-half",
    "reference@tiny-half", "audit@tiny-half", "report", "track",
]  # fmt: skip


def ran(log: str) -> list[str]:
    return re.findall(r"Running stage '([^']+)'", log)


def skipped(log: str) -> list[str]:
    return re.findall(r"Stage '([^']+)' is cached - skipping run", log)


def contents(*folders: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder.parent)): path.read_bytes()
        for folder in folders
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".resume" not in path.parts
    }


class Tracked(NamedTuple):
    """What must be the same of a run, whether it was logged live or rebuilt."""

    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    curve: list[tuple[int, float]]
    files: dict[str, bytes]
    parent: str | None
    dataset: list[tuple[str, str]]


OWN = ("stage", "dataset", "scenario", "method", "seed", "kind", "verdict", "utility_verdict", "failed")


def tracked(root: Path) -> dict[str, Tracked]:
    """Every run of the store by its fingerprint; read from a copy, for MLflow would go on reading a deleted file."""
    copy = Path(tempfile.mkdtemp(dir=root.parent)) / "mlflow.db"
    shutil.copy(root / "mlruns" / "mlflow.db", copy)
    client = MlflowClient(f"sqlite:///{copy}")
    experiment = client.get_experiment_by_name("scforget")
    runs = {run.info.run_id: run for run in client.search_runs([experiment.experiment_id], max_results=1000)}
    found = {}
    for run in runs.values():
        tags, folder = run.data.tags, Path(run.info.artifact_uri)
        parent = runs.get(tags.get("mlflow.parentRunId"))
        points = client.get_metric_history(run.info.run_id, "train/stop_elbo")
        assert tags["fingerprint"] not in found
        found[tags["fingerprint"]] = Tracked(
            run.info.run_name, run.info.status, {key: tags[key] for key in OWN if key in tags}, run.data.params,
            run.data.metrics, sorted((point.step, point.value) for point in points),
            {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()},
            parent and parent.data.tags["fingerprint"],
            [(data.dataset.name, data.dataset.digest) for data in run.inputs.dataset_inputs],
        )  # fmt: skip
    return found


class Project(NamedTuple):
    """A repository after its first ``dvc repro``, and what that said and left."""

    root: Path
    log: str
    status: str
    files: dict[str, bytes]
    runs: dict[str, Tracked]


@pytest.fixture(scope="session")
def project(tmp_path_factory, shell) -> Project:
    root = tmp_path_factory.mktemp("project")
    for name in ("dvc.yaml", ".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("*.egg-info"))
    shrink(root)
    (root / "data/tiny").mkdir(parents=True)
    simulate(PRESETS["tiny"], seed=0).write_h5ad(root / "data/tiny/tiny.h5ad")
    shell.run(root, "git", "init", "-q")
    shell.dvc(root, "init", "-q")
    shutil.copy(ROOT / ".dvcignore", root)
    shell.dvc(root, "config", "core.autostage", "true")
    shell.dvc(root, "add", "-q", "data")
    log = shell.dvc(root, "repro")
    files = contents(root / "work", root / "results", root / "report")
    return Project(root, log, shell.dvc(root, "status"), files, tracked(root))


# the first run


def test_repro_runs_every_stage_once_and_in_order(project):
    assert ran(project.log) == ITEMS
    lock = config.read_yaml(project.root / "dvc.lock")["stages"]
    assert list(lock) == ITEMS == [item.name for item in Pipeline(project.root).items()]


def test_status_after_repro_names_track_alone(project):
    assert project.status.split() == ["track:", "always", "changed"]


def test_repro_records_the_hashes_that_the_stages_used(project):
    """So a stage, and `track` after a restore, find the same run."""
    found = Pipeline(project.root)
    recorded = found.recorded()
    assert [item.name for item in recorded] == ITEMS
    for item, inputs in recorded.items():
        if item.stage != "track":  # it depends on the report, which changes while DVC runs
            assert inputs == found.inputs(item), item.name
    live = {recorded[item].fingerprint for item in recorded if item.stage in ("prepare", "split", "train", "retrain")}
    assert live <= set(project.runs)


def test_repro_writes_a_report_that_names_every_method(project):
    summary = json.loads(project.files["report/summary.json"])
    html = project.files["report/report.html"].decode()
    for method in ("original", "retrain", *METHODS):
        assert method in json.dumps(summary)
        assert method in html
        assert any(path.startswith("report/figures/") and path.endswith(f"_{method}.png") for path in project.files)
    assert "tiny" in html
    assert {"report/tables/tiny-half.csv", "report/tables/tiny-half.md"} <= set(project.files)


def test_repro_puts_results_where_git_ignores_them_and_the_summary_where_it_does_not(project, shell):
    shown = shell.run(project.root, "git", "status", "--porcelain", "--untracked-files=all").splitlines()
    paths = {line[3:] for line in shown}
    assert {"report/summary.json", "dvc.lock", "data.dvc"} <= paths
    assert not [path for path in paths if path.startswith(("work/", "mlruns/", "data/", "report/figures"))]
    assert not [path for path in paths if path.startswith("results/") and not path.endswith(".gitignore")]


def test_repro_tracks_every_item_with_its_models_nested(project):
    runs = project.runs.values()
    assert {run.status for run in runs} == {"FINISHED"}
    parents = [run for run in runs if run.parent is None]
    # reference gives two rows of the comparison, audit one for each method and one of all; track is no run.
    stages = sorted(run.tags["stage"] for run in parents)
    once = ["prepare", "split", "train", "retrain", "shadows", "report"]
    assert stages == sorted([*once, *["unlearn"] * 2, *["audit"] * 5])
    rows = {run.tags["method"]: run for run in parents if run.tags.get("kind") == "comparison"}
    assert set(rows) == {"original", "retrain", *METHODS}
    for method, models in (("original", 2), ("retrain", 3), ("ssd", 2), ("partial_reset", 2)):
        (fingerprint,) = [key for key, run in project.runs.items() if run is rows[method]]
        children = [run for run in runs if run.parent == fingerprint]
        assert sorted(child.tags["seed"] for child in children) == [str(seed) for seed in range(models)]
        assert all("audit/elbo/auc" in child.metrics for child in children)
        assert {"audit/elbo/auc", "utility/elbo", "cost/seconds", "cost/passes"} <= set(rows[method].metrics)
        own = {"cells.csv", "cells.json", "cell_scores.png"} if method in METHODS else set()
        assert {"result.json", "roc.png", "score_histograms.png", *own} == set(rows[method].files)
        assert rows[method].dataset[0][0] == "tiny"
    (compared,) = [run for run in parents if run.tags.get("kind") == "comparison_table"]
    table = json.loads(compared.files["comparison.json"])
    assert [row[0] for row in table["data"]][:2] == ["original", "retrain"]
    verdict = table["columns"].index("verdict")
    assert {row[0]: row[verdict] for row in table["data"]} == {name: run.tags["verdict"] for name, run in rows.items()}
    (trained,) = [run for run in parents if run.tags["stage"] == "train"]
    curves = [run.curve for run in runs if run.tags["stage"] == "train" and run.parent]
    assert [[step for step, _ in curve] for curve in curves] == [[1, 2, 3]] * 2
    assert trained.params["training.max_epochs"] == "3"
    assert {"result.json", "history.csv", "cost.json", "training_curves.png"} == set(trained.files)
    (report,) = [run for run in parents if run.tags["stage"] == "report"]
    assert {"summary.json", "report.html", "tables/tiny-half.csv"} <= set(report.files)


def test_models_are_plain_tensors_one_a_seed(project):
    names = {path for path in project.files if path.endswith(".safetensors")}
    folders = [("train/tiny", 2), ("retrain/tiny/half", 3), ("shadows/tiny/0", 8), ("unlearn/tiny/half/ssd", 2),
               ("unlearn/tiny/half/partial_reset", 2)]  # fmt: skip
    assert names == {f"work/{folder}/{seed}.safetensors" for folder, seeds in folders for seed in range(seeds)}
    one, other = (load_file(project.root / "work/train/tiny" / f"{seed}.safetensors") for seed in (0, 1))
    assert one.keys() == other.keys()
    assert any((one[name] != other[name]).any() for name in one)


# and then


def test_repro_again_runs_track_alone(project, shell):
    log = shell.dvc(project.root, "repro")
    assert ran(log) == ["track"]
    assert "track: 0 runs created" in log
    assert contents(project.root / "work", project.root / "results", project.root / "report") == project.files


def test_track_rebuilds_every_run_that_mlflow_lost(project, shell):
    before = tracked(project.root)
    shutil.rmtree(project.root / "mlruns")
    said = shell.run(project.root, "scforget", "track")
    assert "track: 13 runs created, 0 known already" in said
    assert tracked(project.root) == before
    assert "track: 0 runs created, 13 known already" in shell.run(project.root, "scforget", "track")


def test_stage_forced_to_run_again_takes_its_finished_models(project, shell):
    """Also after a change of mind about the results: what cost time is not made twice."""
    before = (project.root / "dvc.lock").read_bytes()
    log = shell.dvc(project.root, "repro", "-f", "-s", "train@tiny")
    assert ran(log) == ["train@tiny"]
    assert (project.root / "dvc.lock").read_bytes() == before  # timings included: they are those of the first run
    assert contents(project.root / "work", project.root / "results", project.root / "report") == project.files
    assert set(tracked(project.root)) == set(project.runs)


def test_one_setting_of_one_method_makes_that_method_alone_and_going_back_restores(project, shell):
    root = project.root
    params = (root / "params.yaml").read_bytes()
    edit(root, "unlearn", "ssd", "alpha", value=1.0)
    log = shell.dvc(root, "repro", "audit")  # all audits and what they rest on
    assert ran(log) == ["unlearn@tiny-half", "audit@tiny-half"]
    assert re.findall(r"^(\S+):$", shell.dvc(root, "status"), re.M) == ["report", "track"]
    moved = {path for path, content in contents(root / "work", root / "results").items()
             if project.files.get(path) != content}  # fmt: skip
    assert moved
    assert all("/tiny/half/ssd/" in path for path in moved)
    after = tracked(root)
    new = {after[fingerprint].tags.get("method", "all") for fingerprint in set(after) - set(project.runs)}
    assert new == {"ssd", "all"}
    assert len(after) == len(project.runs) + 2 * (1 + 2) + 1  # unlearn and audit, each with two models; comparison

    (root / "params.yaml").write_bytes(params)
    log = shell.dvc(root, "repro")
    assert ran(log) == ["track"]
    assert skipped(log) == ["unlearn@tiny-half", "audit@tiny-half"]
    assert "track: 0 runs created, 13 known already" in log
    assert contents(root / "work", root / "results", root / "report") == project.files
    assert tracked(root) == after


def test_show_prints_a_row_for_every_method(project, shell):
    said = shell.run(project.root, "scforget", "show")
    assert "tiny / half" in said
    for method in METHODS:
        assert method in said
    assert "report/report.html" in said


# a kill


def waited(condition: Any, process: subprocess.Popen[bytes] | None = None) -> bool:
    """Ask often, for a minute at most."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if condition():
            return True
        if process is not None and process.poll() is not None:
            return False
        time.sleep(0.02)
    return False


def alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


# The real command, but for a checkpoint after each epoch: these epochs are too short to wait for one a second.
EAGER = """
from scforget import artifacts, cli
artifacts.FileCheckpoint.__init__.__defaults__ = (0.0,)
cli.main()
"""


def test_train_killed_and_run_again_ends_with_the_bytes_of_an_uninterrupted_run(project, shell, tmp_path):
    offline = {"DVC_STAGE": "train@tiny", "MLFLOW_TRACKING_URI": "http://127.0.0.1:1"}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for root in (killed, whole):
        for name in ("work/prepare", "work/split"):
            shutil.copytree(project.root / name, root / name)
        for name in ("src", "data"):
            (root / name).symlink_to(project.root / name)
        for name in ("params.yaml", "dvc.yaml"):
            shutil.copy(project.root / name, root)
        edit(root, "datasets", "tiny", "training", "max_epochs", value=150)
        edit(root, "datasets", "tiny", "training", "patience", value=150)
    said = tmp_path / "said"
    with said.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, "-c", EAGER, "train", "tiny"], cwd=killed, env={**shell.environment, **offline},
            start_new_session=True, stdout=stream, stderr=stream,
        )  # fmt: skip
    resume = killed / "work/.resume"
    assert waited(lambda: len(list(resume.glob("*/checkpoint.safetensors"))) == 2, process), said.read_text()
    process.kill()  # -9, and only the parent: its workers must notice
    process.wait()
    assert waited(lambda: not alive(process.pid))
    assert not list(resume.glob("*/record.json"))
    states = [json.loads(artifacts.read_tensors(path)[1]["state"]) for path in resume.glob("*/checkpoint.safetensors")]
    assert all(0 < len(state["history"]) < 150 for state in states)
    assert not (killed / "work/train").exists()

    for root in (killed, whole):
        assert "train@tiny: 2 of 2 models" in shell.run(root, "scforget", "train", "tiny", **offline)
    kept = contents(killed / "work/train")
    assert set(kept) == {"train/tiny/0.safetensors", "train/tiny/1.safetensors"}
    assert kept == contents(whole / "work/train")
    for name in ("result.json", "history.csv"):
        own = (killed / "results/train/tiny" / name).read_bytes()
        assert own == (whole / "results/train/tiny" / name).read_bytes()
    assert not list(resume.glob("*/checkpoint.safetensors"))


def test_model_fingerprint_finds_the_models_that_a_longer_list_of_seeds_shares(project):
    item = Item("train", ("tiny",))
    inputs = Pipeline(project.root).inputs(item)
    for seed in (0, 1):
        folder = project.root / "work/.resume" / inputs.model_fingerprint(seed, NUMERICS)
        assert (folder / "model.safetensors").read_bytes() == project.files[f"work/train/tiny/{seed}.safetensors"]
        assert not (folder / "checkpoint.safetensors").exists()
