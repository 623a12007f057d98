"""A team's store in use: MLflow's server on PostgreSQL, several writers, and a kill in the middle of a stage."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from mlflow import MlflowClient
from mlflow.entities import Run as Found

from scforget import tracking
from scforget.tracking import Run, Store
from servers import MlflowServer, Postgres, mlflow_server
from shell import Shell
from spoiling import put, tiny_project

pytestmark = [
    pytest.mark.postgres,
    pytest.mark.xdist_group("server"),
    pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning"),  # of MLflow's own tables
]

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT", "DVC_STAGE", "DVC_EXP_NAME"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever Store sets
        monkeypatch.delenv(name)


@pytest.fixture(scope="module")
def database(postgres_cluster) -> str:
    """A database of the server's, whose tables cost seconds to make."""
    return postgres_cluster.database()


@pytest.fixture(scope="module")
def server(postgres_cluster, database, tmp_path_factory) -> Iterator[MlflowServer]:
    artifacts = tmp_path_factory.mktemp("team") / "artifacts"
    with mlflow_server(postgres_cluster.address(database), artifacts) as running:
        yield running


@pytest.fixture
def experiment(request, monkeypatch) -> str:
    """An experiment of this test's own that nobody has made yet."""
    name = re.sub(r"\W", "_", request.node.name)
    monkeypatch.setattr(tracking, "EXPERIMENT", name)
    return name


def found(uri: str, experiment: str) -> list[Found]:
    client = MlflowClient(uri)
    return list(client.search_runs([client.get_experiment_by_name(experiment).experiment_id]))


# several writers

WRITER = """
import sys
from pathlib import Path
from scforget import tracking
from scforget.tracking import Run, Store, warm_up
warm_up()
tracking.EXPERIMENT, own = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
store = Store(Path.cwd())
for number in range(10):
    for name in [f"shared {number}"] * (number < 5) + [f"{own} {number}"]:
        children = (Run("child", f"{name} child", metrics={"y": 2.0}),)
        run = Run(name, name, metrics={"x": number}, artifacts=lambda: {"deep/name": name.encode()}, children=children)
        print(name, store.log(run, "live"), sep=":")
"""


@pytest.mark.parametrize("machines", [1, 2])
def test_log_of_two_writers_at_once_loses_nothing_and_keeps_shared_runs_once(
    server, experiment, monkeypatch, tmp_path, machines
):
    """Two projects have a lock each, as two machines have; both writers find no experiment."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    roots = [tmp_path / "a", tmp_path / ("b" if machines == 2 else "a")]
    writers = []
    for name, root in zip("ab", roots, strict=True):
        root.mkdir(exist_ok=True)
        command = [sys.executable, "-c", WRITER, experiment, name]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        writers.append(subprocess.Popen(command, cwd=root, **pipes))
    assert [writer.stdout.readline() for writer in writers] == ["ready\n"] * 2
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    said = [writer.communicate() for writer in writers]
    assert [writer.returncode for writer in writers] == [0, 0], said
    made = Counter(line.split(":")[0] for out, _ in said for line in out.splitlines() if line.endswith(":True"))
    names = [f"{own} {number}" for own in "ab" for number in range(10)] + [f"shared {number}" for number in range(5)]
    assert set(made) == set(names)
    if machines == 1:
        assert set(made.values()) == {1}
    runs = found(server.uri, experiment)
    assert {run.info.status for run in runs} == {"FINISHED"}
    once = Counter(run.data.tags["fingerprint"] for run in runs)
    assert once == Counter([*names, *(f"{name} child" for name in names)])
    for run in runs:
        if (parent := run.data.tags.get("mlflow.parentRunId")) is None:
            assert run.info.artifact_uri.startswith("mlflow-artifacts:/")
        else:
            assert parent in {run.info.run_id for run in runs}
    client, run = MlflowClient(server.uri), next(run for run in runs if run.info.run_name == "shared 4")
    folder = client.download_artifacts(run.info.run_id, "deep", str(tmp_path))
    assert (Path(folder) / "name").read_bytes() == b"shared 4"


def begun(uri: str, experiment: str, fingerprint: str, tags: dict[str, str], started: float) -> str:
    """Create an unfinished run with an unfinished child, as someone who is being killed, or is elsewhere, leaves it."""
    client = MlflowClient(uri)
    place, moment = client.get_experiment_by_name(experiment).experiment_id, int(started * 1000)
    parent = client.create_run(place, moment, {"fingerprint": fingerprint, **tags}).info.run_id
    client.create_run(place, moment, {"fingerprint": f"{fingerprint} child", "mlflow.parentRunId": parent})
    return parent


def test_log_removes_what_was_cut_off_but_not_what_another_machine_may_be_writing(
    server, experiment, monkeypatch, tmp_path
):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
    store = Store(tmp_path)
    now = time.time()
    begun(server.uri, experiment, "own", {"writer": store._common["writer"]}, now)
    begun(server.uri, experiment, "old", {"writer": "elsewhere"}, now - 2 * 3600)
    elsewhere = begun(server.uri, experiment, "live", {"writer": "elsewhere"}, now)
    for name in ("own", "old", "live"):
        assert store.log(Run(name, name), "live") is True
    status = Counter((run.data.tags["fingerprint"], run.info.status) for run in found(server.uri, experiment))
    assert status == {
        ("own", "FINISHED"): 1, ("old", "FINISHED"): 1, ("live", "FINISHED"): 1,
        ("live", "RUNNING"): 1, ("live child", "RUNNING"): 1,
    }  # fmt: skip
    # it was alive: of twins the first is kept by whoever meets them
    MlflowClient(server.uri).set_terminated(elsewhere, "FINISHED")
    assert store.log(Run("live", "live"), "restored") is False
    (kept,) = [run for run in found(server.uri, experiment) if run.data.tags["fingerprint"] == "live"]
    assert kept.info.run_id == elsewhere


# a kill


class Tracked(NamedTuple):
    """What must be the same of a run on a server and in the project's own store."""

    name: str
    status: str
    tags: dict[str, str]
    params: dict[str, str]
    metrics: dict[str, float]
    files: list[str]


OWN = ("stage", "dataset", "scenario", "method", "seed", "kind", "verdict", "utility_verdict", "failed")


def tracked(uri: str) -> dict[str, Tracked]:
    """Every run by its fingerprint, which must be there once."""
    client = MlflowClient(uri)
    kept: dict[str, Tracked] = {}
    for run in found(uri, "scforget"):
        tags = run.data.tags
        assert tags["fingerprint"] not in kept
        kept[tags["fingerprint"]] = Tracked(
            run.info.run_name, run.info.status, {key: tags[key] for key in OWN if key in tags}, run.data.params,
            run.data.metrics, sorted(file.path for file in client.list_artifacts(run.info.run_id)),
        )  # fmt: skip
    return kept


@pytest.fixture(scope="module")
def shell(tmp_path_factory) -> Iterator[Shell]:
    made = Shell(tmp_path_factory.mktemp("sh"))
    yield made
    made.close()


@pytest.fixture
def project(tmp_path, shell) -> Path:
    root = tmp_path / "project"
    root.mkdir()
    tiny_project(root)
    put("sweep", "methods", value=[])(root)  # other stages are enough here
    (root / "src").unlink()
    shutil.copytree(ROOT / "src", root / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    shell.run(root, "git", "init", "-q")
    shell.dvc(root, "init", "-q")
    for name in (".dvcignore", ".gitignore"):
        shutil.copy(ROOT / name, root)
    shell.dvc(root, "add", "-q", "data")
    return root


def kill_at(server: MlflowServer, cluster: Postgres, database: str, runs: int) -> threading.Thread:
    """Kill the server as soon as the ``unlearn`` stage has begun so many runs: it is then in the middle of one."""
    query = "SELECT count(*) FROM tags WHERE key = 'stage' AND value = 'unlearn'"

    def watch() -> None:
        with cluster.connect(database) as connection:
            while connection.execute(query).fetchone()[0] < runs:
                time.sleep(0.001)
        server.kill()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def said_by(stage: str, log: str) -> list[str]:
    """Return what a stage said of MLflow."""
    _, _, after = log.partition(f"Running stage '{stage}")
    return re.findall(r"^scforget: MLflow at .*$", after.partition("Running stage '")[0], re.M)


def test_repro_survives_a_server_killed_in_the_middle_of_a_stage_and_track_completes_it(
    postgres_cluster, project, shell, tmp_path
):
    database = postgres_cluster.database()
    with mlflow_server(postgres_cluster.address(database), tmp_path / "artifacts") as server:
        online = {"MLFLOW_TRACKING_URI": server.uri}
        watch = kill_at(server, postgres_cluster, database, runs=2)
        log = shell.run(project, sys.executable, "-m", "dvc", "repro", "audit", **online)
        watch.join()
        # before the kill stages say nothing, then each one line
        for stage in ("prepare", "split", "train", "retrain", "shadows"):
            assert said_by(stage, log) == [], log
        for stage in ("unlearn", "reference", "audit"):
            assert len(said_by(stage, log)) == 1, log
            assert "results are on disk, run `scforget track` when it answers" in said_by(stage, log)[0]
        assert "up to date" in shell.dvc(project, "status", "audit")
        # by hand the same is an error
        for command in (("train", "tiny"), ("track",)):
            assert "run `scforget track`" in shell.run(project, "scforget", *command, code=5, **online)

        server.start()
        half = found(server.uri, "scforget")
        assert "RUNNING" in {run.info.status for run in half}
        assert len([run for run in half if run.data.tags["stage"] == "unlearn"]) == 2
        first = shell.run(project, "scforget", "track", **online)
        second = shell.run(project, "scforget", "track", **online)
        created, known = map(int, re.findall(r"track: (\d+) runs created, (\d+) known", first)[0])
        assert created > 0
        assert known == 5  # of the stages before
        assert f"track: 0 runs created, {created + known} known already" in second
        complete = tracked(server.uri)
        assert {run.status for run in complete.values()} == {"FINISHED"}
        assert {run.tags["stage"] for run in complete.values()} >= {"train", "unlearn", "audit"}
        client, path = MlflowClient(server.uri), "results/unlearn/tiny/half/ssd/history.csv"
        run = next(run for run in found(server.uri, "scforget") if run.info.run_name == "ssd half tiny unlearn")
        read = client.download_artifacts(run.info.run_id, "history.csv", str(tmp_path))
        assert Path(read).read_bytes() == (project / path).read_bytes()
        # and it is what the project's own store holds
        shell.run(project, "scforget", "track")
        assert tracked(f"sqlite:///{project}/mlruns/mlflow.db") == complete
