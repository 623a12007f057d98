"""Runs into MLflow: everything is there, nothing twice, whatever the place, the names and the interruptions."""

from __future__ import annotations

import getpass
import json
import math
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlflow import MlflowClient
from mlflow.entities import Run as Found

from scforget import tracking
from scforget.errors import ArtifactError, TrackingError
from scforget.tracking import DatasetInput, Run, Store

# MLflow's own tables use what SQLAlchemy is about to drop; it is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")

ENVIRONMENT = (
    "MLFLOW_TRACKING_URI", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT",
    "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_LOGGING_LEVEL", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME",
)  # fmt: skip


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is restored, whatever Store sets
        monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def migrated(tmp_path_factory) -> Path:
    """An empty database of MLflow's: making its tables costs a second or more, so it is done once and copied."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def root(tmp_path, migrated) -> Path:
    (tmp_path / "mlruns").mkdir()
    shutil.copy(migrated, tmp_path / "mlruns" / "mlflow.db")
    return tmp_path


def found(root: Path) -> list[Found]:
    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    return list(client.search_runs([experiment.experiment_id]))


def only(root: Path, fingerprint: str) -> Found:
    (run,) = [run for run in found(root) if run.data.tags["fingerprint"] == fingerprint]
    return run


# where


def test_uri_is_sqlite_under_the_project(tmp_path):
    assert tracking.uri(tmp_path) == f"sqlite:///{tmp_path}/mlruns/mlflow.db"


def test_uri_inside_dvc_is_that_of_the_main_project(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert tracking.uri(tmp_path / "temporary") == f"sqlite:///{tmp_path}/main/mlruns/mlflow.db"


def test_uri_of_the_environment_wins(tmp_path, monkeypatch):
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking.uri(tmp_path) == "http://127.0.0.1:5000"


def test_uri_of_a_relative_database_is_meant_from_the_project(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///runs/mine.db")
    assert tracking.uri(tmp_path) == f"sqlite:///{tmp_path}/runs/mine.db"
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "main"))
    assert tracking.uri(tmp_path) == f"sqlite:///{tmp_path}/main/runs/mine.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////runs/mine.db")
    assert tracking.uri(tmp_path) == "sqlite:////runs/mine.db"


def test_store_of_a_project_that_moved_says_so(root, tmp_path_factory):
    Store(root)
    moved = tmp_path_factory.mktemp("moved")
    shutil.copytree(root / "mlruns", moved / "mlruns")
    with pytest.raises(TrackingError, match=r"the project moved: delete mlruns/mlflow\.db"):
        Store(moved)


def test_uri_is_absolute_for_a_relative_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert tracking.uri(Path()) == f"sqlite:///{tmp_path}/mlruns/mlflow.db"


def test_store_inside_dvc_writes_to_the_main_project(root, monkeypatch):
    copy = root / "temporary"
    copy.mkdir()
    monkeypatch.setenv("DVC_ROOT", str(root))
    monkeypatch.setenv("DVC_EXP_NAME", "tiny-yak")
    Store(copy).log(Run("r", "f", artifacts=lambda: {"a.txt": b"x"}), "live")
    assert not list(copy.iterdir())
    run = only(root, "f")
    assert run.data.tags["dvc.exp"] == "tiny-yak"
    assert run.info.artifact_uri.startswith(str(root / "mlruns" / "artifacts"))


def test_store_opened_twice_at_once_on_no_database_lives_in_both_processes(tmp_path):
    code = (
        "import sys; from pathlib import Path; from scforget.tracking import Run, Store;"
        "print(Store(Path.cwd()).log(Run('r', sys.argv[1]), 'live'))"
    )
    environment = {**os.environ, "DVC_ROOT": "", "MLFLOW_TRACKING_URI": ""}
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, name],
            cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for name in ("one", "two")
    ]  # fmt: skip
    ended = [process.communicate() for process in both]
    assert [process.returncode for process in both] == [0, 0], ended
    assert [out for out, _ in ended] == ["True\n", "True\n"]
    assert sorted(run.data.tags["fingerprint"] for run in found(tmp_path)) == ["one", "two"]


def test_store_that_does_not_answer_is_one_line_within_seconds(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    with pytest.raises(TrackingError, match="results are on disk, run `scforget track` when it answers") as caught:
        Store(tmp_path)
    assert caught.value.exit_code == 5
    assert str(caught.value).startswith("MLflow at http://127.0.0.1:1: ")
    assert "\n" not in str(caught.value)
    assert {path.name for path in tmp_path.rglob("*")} <= {"mlruns", ".lock"}


def test_store_that_is_no_database_is_a_tracking_error(tmp_path):
    (tmp_path / "mlruns").mkdir()
    (tmp_path / "mlruns/mlflow.db").write_bytes(b"garbage" * 1000)
    with pytest.raises(TrackingError) as caught:
        Store(tmp_path)
    assert "\n" not in str(caught.value)


def test_store_where_nothing_can_be_written_is_a_tracking_error(tmp_path):
    (tmp_path / "mlruns").write_text("in the way")
    with pytest.raises(TrackingError):
        Store(tmp_path)


# what


RUN = Run(
    "ssd dendritic audit",
    "parent",
    tags={"stage": "audit", "method": "ssd", "verdict": "FORGOTTEN"},
    params={"seed": 42, "lam": 1.0, "reference": "D", "layer": None, **{f"many.{i:03}": i for i in range(150)}},
    metrics={"audit/threshold/auc": 0.5, "cost/seconds": None, "audit/nan": math.nan, "audit/inf": -math.inf},
    curves={epoch: {"train/elbo": -100.0 + epoch, "train/kl": float(epoch)} for epoch in range(1, 601)},
    artifacts=lambda: {"result.json": b"{}", "figures/deep/roc.png": b"\x89PNG"},
    dataset=DatasetInput("pbmc", "work/prepare/pbmc/cells.h5ad", "0123456789abcdef0123456789abcdef.dir", "audit"),
    children=(
        Run("ssd seed 0", "parent-0", {"seed": "0"}, metrics={"audit/trace": 0.25}),
        Run("ssd seed 1", "parent-1", {"seed": "1", "failed": "diverged"}),
    ),
)


def test_log_keeps_everything_of_a_run_and_its_children(root):
    assert Store(root).log(RUN, "live") is True
    run = only(root, "parent")
    assert run.info.status == "FINISHED"
    assert run.info.run_name == RUN.name
    assert run.data.params == {key: str(value) for key, value in RUN.params.items()}
    assert run.data.metrics == {"audit/threshold/auc": 0.5, "train/elbo": 500.0, "train/kl": 600.0}
    assert RUN.tags.items() | {("source", "live")} <= run.data.tags.items()
    client = MlflowClient(f"sqlite:///{root}/mlruns/mlflow.db")
    curve = client.get_metric_history(run.info.run_id, "train/elbo")
    assert sorted((point.step, point.value) for point in curve) == [(e, -100.0 + e) for e in range(1, 601)]
    files = {path.relative_to(root / "mlruns/artifacts") for path in root.glob("mlruns/artifacts/**/*")}
    folder = Path(run.info.run_id) / "artifacts"
    assert {folder / "result.json", folder / "figures/deep/roc.png"} <= files
    assert (root / "mlruns/artifacts" / folder / "figures/deep/roc.png").read_bytes() == b"\x89PNG"
    (logged,) = run.inputs.dataset_inputs
    assert (logged.dataset.name, logged.dataset.digest) == ("pbmc", "0123456789abcdef0123456789abcdef.dir")
    assert json.loads(logged.dataset.source) == {"uri": "work/prepare/pbmc/cells.h5ad"}
    assert [(tag.key, tag.value) for tag in logged.tags] == [("mlflow.data.context", "audit")]
    first, second = only(root, "parent-0"), only(root, "parent-1")
    assert first.data.tags["mlflow.parentRunId"] == second.data.tags["mlflow.parentRunId"] == run.info.run_id
    assert first.data.metrics == {"audit/trace": 0.25}
    assert second.data.tags["failed"] == "diverged"
    assert "mlflow.parentRunId" not in run.data.tags


def test_log_finds_what_it_made_and_makes_nothing_twice(root):
    Store(root).log(RUN, "live")

    def drawn() -> dict[str, bytes]:
        raise AssertionError("figures are drawn for new runs only")

    again = Run(RUN.name, RUN.fingerprint, artifacts=drawn, children=RUN.children)
    assert Store(root).log(again, "restored") is False
    assert len(found(root)) == 3
    assert only(root, "parent").data.tags["source"] == "live"
    assert Store(root).log(Run(RUN.name, "another"), "restored") is True
    assert only(root, "another").data.tags["source"] == "restored"


class Killed(BaseException):
    """As a kill or Ctrl-C would end it."""


@pytest.mark.parametrize("at", [1, 2, 3])
def test_log_starts_a_run_again_that_was_cut_off(root, monkeypatch, at):
    """Wherever it was cut off: before the first child was begun, in the first, in the second."""
    begun = Counter()
    whole = Store._log_values

    def cut(self: Store, run_id: str, run: Run) -> None:
        begun["runs"] += 1
        if begun["runs"] == at:
            raise Killed
        whole(self, run_id, run)

    monkeypatch.setattr(Store, "_log_values", cut)
    with pytest.raises(Killed):
        Store(root).log(RUN, "live")
    assert {run.info.status for run in found(root)} >= {"RUNNING"}
    monkeypatch.setattr(Store, "_log_values", whole)
    assert Store(root).log(RUN, "live") is True
    assert Counter(run.data.tags["fingerprint"] for run in found(root)) == {"parent": 1, "parent-0": 1, "parent-1": 1}
    assert {run.info.status for run in found(root)} == {"FINISHED"}
    parent = only(root, "parent")
    assert only(root, "parent-0").data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert len(parent.data.params) == len(RUN.params)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("prepare/labels/CD8+ T", "prepare/labels/CD8_ T"),
        ("prepare/labels/γδ T", "prepare/labels/__ T"),
        ("prepare/labels/B (naïve), 50%", "prepare/labels/B _na_ve__ 50_"),
        ("prepare/labels/Mono/", "prepare/labels/Mono/_"),
        ("prepare/labels/a//b", "prepare/labels/a/_/b"),
        ("prepare/labels/..", "prepare/labels/_"),
        ("prepare/labels/T.", "prepare/labels/T"),
        ("/labels", "_/labels"),
        ("x" * 300, "x" * 250),
        ("x" * 249 + "/y", "x" * 249),
        ("a\nb\t'\"`;", "a_b_____"),
        ("", "_"),
    ],
)
def test_key_is_one_that_mlflow_takes(name, kept):
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

    assert tracking._key(name) == kept
    _validate_metric_name(kept)
    assert len(kept) <= MAX_ENTITY_KEY_LENGTH


@given(st.text(max_size=300) | st.text("/.ab ", max_size=300))
@settings(deadline=None, max_examples=200)
def test_key_makes_any_text_one_that_mlflow_takes(name):
    from mlflow.utils.validation import MAX_ENTITY_KEY_LENGTH, _validate_metric_name

    key = tracking._key(name)
    _validate_metric_name(key)
    assert len(key) <= MAX_ENTITY_KEY_LENGTH
    assert tracking._key(key) == key


def test_log_takes_metrics_of_any_name(root):
    names = ["utility/f1/CD8+ T", "utility/f1/Mono.", "utility/f1/a//b", "utility/f1/γδ", ""]
    Store(root).log(Run("r", "f", metrics={name: float(i) for i, name in enumerate(names)}), "live")
    expected = {"utility/f1/CD8_ T": 0, "utility/f1/Mono": 1, "utility/f1/a/_/b": 2, "utility/f1/__": 3, "_": 4}
    assert only(root, "f").data.metrics == expected


def test_log_leaves_an_error_of_ours_what_it_is(root):
    """A missing file is not MLflow's fault, and `scforget track` would not cure it."""

    def missing() -> dict[str, bytes]:
        raise ArtifactError("results/x.json", "no such file")

    with pytest.raises(ArtifactError):
        Store(root).log(Run("r", "f", artifacts=missing), "live")


def test_log_on_a_database_that_breaks_is_a_tracking_error(root):
    store = Store(root)
    store._client.delete_experiment(store._experiment)
    with pytest.raises(TrackingError) as caught:
        store.log(RUN, "live")
    assert "\n" not in str(caught.value)


def test_store_tags_runs_with_the_commit(root):
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *arguments]
        return subprocess.run(command, cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    assert tracking.git_tags(root / "nowhere") == {}
    git("init", "-q")
    (root / ".gitignore").write_text("mlruns\n")
    assert tracking.git_tags(root) == {}  # no commit yet
    git("add", ".gitignore")
    git("commit", "-qm", "first")
    Store(root).log(Run("clean", "clean"), "live")
    (root / "params.yaml").write_text("seed: 1\n")
    Store(root).log(Run("dirty", "dirty"), "live")
    head = git("rev-parse", "HEAD")
    for name, dirty in (("clean", "false"), ("dirty", "true")):
        tags = only(root, name).data.tags
        assert (tags["git.commit"], tags["git.dirty"]) == (head, dirty)


def test_store_opens_for_a_user_without_a_name(root, monkeypatch):
    def nameless() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr(getpass, "getuser", nameless)
    assert Store(root).log(Run("r", "f"), "live")


# flatten


trees = st.recursive(
    st.integers() | st.lists(st.integers(), max_size=2),
    lambda inner: st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, min_size=1, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text("abc", min_size=1, max_size=2), trees, max_size=3))
@settings(deadline=None, max_examples=50)
def test_flatten_keeps_every_leaf_under_its_dotted_path(tree):
    flat = tracking.flatten(tree)

    def leaves(value: Any) -> int:
        return sum(map(leaves, value.values())) if isinstance(value, dict) else 1

    assert len(flat) == leaves(tree)
    for key, value in flat.items():
        place: Any = tree
        for part in key.split("."):
            place = place[part]
        assert place == value
        assert not isinstance(value, dict)
