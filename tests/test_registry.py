"""Only what the recorded audit let pass is registered, once, under its alias; and only that is loaded again.

A tiny project is run up to its audit. The verdicts of its methods are written by hand, for two models of 240 cells
are never proved forgotten.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion
from numpy.testing import assert_allclose
from ruamel.yaml import YAML

import spoiling
from scforget import artifacts, auditing, loading, registry, stages, tracking
from scforget.artifacts import Workspace
from scforget.errors import ArtifactError, ConfigError, DataError, ScforgetError, TrackingError
from scforget.models.vae import VAESettings
from scforget.pipeline import Item, Pipeline, dvc_md5
from servers import mlflow_server

pytestmark = pytest.mark.filterwarnings("ignore::sqlalchemy.exc.SADeprecationWarning")  # of MLflow's own tables

NAME = "scforget-tiny"
PLACE = ("tiny", "half")
AUDITS = "results/audit/tiny/half"
MODELS = "work/unlearn/tiny/half"
VERDICTS = {
    "partial_reset": ("FORGOTTEN", "kept"), "sisa": ("FORGOTTEN", "kept"), "ssd": ("FORGOTTEN", "undetermined"),
    "retain_finetune": ("NOT_FORGOTTEN", "kept"),
}  # fmt: skip


def lock(root: Path) -> None:
    """Write what DVC records of the two stages that judge."""
    found = Pipeline(root)
    outs = {"reference": ["results/reference/tiny/half/result.json"], "audit": [AUDITS]}
    entries = {}
    for stage, paths in outs.items():
        inputs = found.inputs(Item(stage, PLACE))
        entries[inputs.item.name] = {
            "deps": [{"path": path, "md5": digest} for path, digest in inputs.deps.items()],
            "params": {"params.yaml": inputs.params},
            "outs": [{"path": path, "md5": dvc_md5(root / path)} for path in paths],
        }
    YAML(typ="safe", pure=True).dump({"schema": "2.0", "stages": entries}, root / "dvc.lock")


def judge(root: Path, method: str, verdict: str, utility: str) -> None:
    path = root / AUDITS / method / "result.json"
    record = artifacts.read_json(path)
    record["verdict"], record["utility"]["verdict"] = verdict, utility
    artifacts.write_json(path, record)


@pytest.fixture(scope="module")
def audited(tmp_path_factory) -> Path:
    """A project after its audit."""
    root = tmp_path_factory.mktemp("audited")
    spoiling.tiny_project(root)
    spoiling.put("pipeline", "methods", value=list(VERDICTS))(root)
    with spoiling.stages_in(root):
        stages.prepare("tiny")
        stages.split("tiny")
        stages.train("tiny")
        stages.retrain(*PLACE)
        stages.shadows("tiny", "0")
        stages.unlearn(*PLACE)
        auditing.reference(*PLACE)
        auditing.audit(*PLACE)
    for method, verdicts in VERDICTS.items():
        judge(root, method, *verdicts)
    lock(root)
    return root


@pytest.fixture
def project(audited, tmp_path) -> Path:
    """A copy of it to spoil, without a store."""
    return Path(shutil.copytree(audited, tmp_path / "project", symlinks=True, ignore=shutil.ignore_patterns("mlruns")))


@pytest.fixture(autouse=True)
def clean(monkeypatch) -> Iterator[None]:
    for name in [name for name in os.environ if name.startswith(("MLFLOW_", "DVC_"))]:
        monkeypatch.delenv(name)
    before = set(os.environ)
    yield
    for name in set(os.environ) - before:  # what the store sets for its own process
        del os.environ[name]


@pytest.fixture
def promoted(audited) -> MlflowClient:
    """The project's store once the first model is promoted; whatever a test promotes after it, this comes last."""
    registry.promote(audited, *PLACE, "partial_reset", 0)
    return MlflowClient(tracking.uri(audited))


def versions(client: MlflowClient) -> dict[str, ModelVersion]:
    return {one.version: one for one in client.search_model_versions(f"name = '{NAME}'")}


def of(client: MlflowClient, alias: str) -> ModelVersion:
    return client.get_model_version_by_alias(NAME, alias)


def files(client: MlflowClient, alias: str) -> Path:
    return Path(client.get_model_version_download_uri(NAME, of(client, alias).version))


def cells(root: Path) -> pd.DataFrame:
    return artifacts.read_cells(root / spoiling.CELLS).to_df()


# what is registered


@pytest.mark.parametrize(
    ("alias", "method", "path", "verdict"),
    [("original", "original", "work/train/tiny", None), ("retrain", "retrain", "work/retrain/tiny/half", "TARGET"),
     ("forgotten", "partial_reset", f"{MODELS}/partial_reset", "FORGOTTEN")],
)  # fmt: skip
def test_promote_registers_the_bytes_of_dvc_with_what_vouches_for_them(
    audited, promoted, alias, method, path, verdict
):  # fmt: skip
    version, weights = of(promoted, alias), audited / path / "0.safetensors"
    content = weights.read_bytes()
    assert (files(promoted, alias) / "artifacts/weights.safetensors").read_bytes() == content
    wanted = {
        "dataset": "tiny", "scenario": "half", "method": method, "seed": "0",
        "sha256": hashlib.sha256(content).hexdigest(), "dvc.md5": hashlib.md5(content).hexdigest(),
    }  # fmt: skip
    assert wanted.items() <= version.tags.items()
    assert verdict is None or version.tags["verdict"] == verdict
    run = promoted.get_run(version.run_id)
    assert run.data.tags["fingerprint"] == version.tags["fingerprint"]
    assert (run.data.tags["method"], run.data.tags["kind"]) == (method, "comparison")
    about = json.loads((files(promoted, alias) / "artifacts/model.json").read_text())
    assert about["genes"] == artifacts.read_json(audited / "work/split/tiny/genes.json")["genes"]
    assert (about["seed"], about["outputs"]) == (0, ["z0", "z1", "z2", "z3", "elbo"])


def test_promote_links_the_audit_by_its_fingerprint_and_the_files_by_their_hashes(audited, promoted):
    version, folder = of(promoted, "forgotten"), files(promoted, "forgotten")
    record = artifacts.read_json(audited / AUDITS / "partial_reset/result.json")
    assert (version.tags["fingerprint"], version.tags["utility_verdict"]) == (record["fingerprint"], "kept")
    found = {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert json.loads(version.tags["files"]) == found
    assert not [name for name in found if name.endswith((".pkl", ".pickle", ".pt", ".pth", ".joblib"))]


def test_promote_again_makes_no_version_and_renews_what_the_audit_says(audited, promoted):
    before = versions(promoted)
    promoted.set_model_version_tag(NAME, of(promoted, "forgotten").version, "fingerprint", "of an older audit")
    done = registry.promote(audited, *PLACE, "partial_reset")
    assert [(one.alias, one.created) for one in done] == [("original", False), ("retrain", False), ("forgotten", False)]
    assert {key: one.tags for key, one in versions(promoted).items()} == {key: one.tags for key, one in before.items()}


def test_promote_of_another_moves_the_aliases_there_and_back(audited, promoted, capsys):
    before = {alias: of(promoted, alias).version for alias in ("original", "retrain", "forgotten")}
    capsys.readouterr()
    registry.promote(audited, *PLACE, "partial_reset", 1)
    after = {alias: of(promoted, alias) for alias in before}
    assert all(after[alias].version != before[alias] for alias in before)
    assert {one.tags["seed"] for one in after.values()} == {"1"}
    said = capsys.readouterr().err.splitlines()
    assert said[-1] == f"promote: {NAME} version {after['forgotten'].version} @forgotten: partial_reset, seed 1 (new)"
    registry.promote(audited, *PLACE, "partial_reset", 0)
    assert {alias: of(promoted, alias).version for alias in before} == before
    assert capsys.readouterr().err.count("(was there)") == 3


def test_promote_logs_the_run_of_an_audit_that_the_store_lost(audited, promoted):
    version = of(promoted, "forgotten")
    promoted.delete_run(version.run_id)
    registry.promote(audited, *PLACE, "partial_reset", 1)
    experiment = promoted.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
    (run,) = promoted.search_runs([experiment], f"tags.fingerprint = '{version.tags['fingerprint']}'")
    assert run.info.status == "FINISHED"


# loading


@pytest.mark.parametrize("method", ["partial_reset", "sisa"])
def test_load_answers_as_the_audited_model(audited, promoted, method):
    registry.promote(audited, *PLACE, method, 1)
    found = registry.load(audited, "tiny").predict(cells(audited))
    workspace = Workspace(audited)
    settings = Pipeline(audited).inputs(Item("audit", PLACE)).params["datasets.tiny.model"]
    task = loading.load_task(workspace, VAESettings(**settings), "tiny")
    model = loading.load_model(task, audited / MODELS / method / "1.safetensors")
    expected = task.signals(model, pd.RangeIndex(len(found)).to_numpy())
    assert_allclose(found["elbo"], expected.elbo, rtol=1e-6)
    assert_allclose(found.drop(columns="elbo"), expected.mu, rtol=1e-6, atol=1e-6)


STRANGER = """
import sys, pandas as pd, mlflow
model = mlflow.pyfunc.load_model(f"models:/{sys.argv[1]}")
model.predict(pd.read_csv(sys.argv[2], index_col=0)).to_csv(sys.argv[3])
"""


def test_models_load_with_mlflow_alone_in_another_process(audited, promoted, tmp_path):
    counts = cells(audited)
    counts.to_csv(tmp_path / "counts.csv")
    environment = {
        **os.environ, "MLFLOW_TRACKING_URI": tracking.uri(audited), "MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false",
        "MLFLOW_DISABLE_TELEMETRY": "true",
    }  # fmt: skip
    command = [sys.executable, "-c", STRANGER, f"{NAME}@forgotten", "counts.csv", "found.csv"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    found = pd.read_csv(tmp_path / "found.csv", index_col=0)
    assert_allclose(found, registry.load(audited, "tiny").predict(counts), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["artifacts/weights.safetensors", "artifacts/model.json", "served.py", "MLmodel"])
def test_load_refuses_a_file_with_one_byte_flipped(audited, promoted, name):
    path = files(promoted, "forgotten") / name
    content = path.read_bytes()
    path.write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
    try:
        with pytest.raises(ArtifactError) as raised:
            registry.load(audited, "tiny")
        assert str(raised.value).startswith(f"models:/{NAME}@forgotten: {name}: sha256 is ")
        assert "\n" not in str(raised.value)
    finally:
        path.write_bytes(content)


def test_load_refuses_a_version_that_promote_did_not_make(audited, promoted):
    version = of(promoted, "original")
    other = promoted.create_model_version(NAME, version.source, version.run_id, model_id=version.model_id)
    promoted.set_registered_model_alias(NAME, "theirs", other.version)
    with pytest.raises(ArtifactError, match="not registered by `scforget promote`"):
        registry.load(audited, "tiny", "theirs")


def test_load_of_an_unknown_alias_is_one_line(audited, promoted):
    with pytest.raises(TrackingError, match="alias nobody not found") as raised:
        registry.load(audited, "tiny", "nobody")
    assert "\n" not in str(raised.value)


# what is refused


def other_weights(root: Path) -> None:
    folder = root / MODELS / "partial_reset"
    shutil.copy(folder / "1.safetensors", folder / "0.safetensors")


def other_verdict(root: Path) -> None:
    judge(root, "retain_finetune", "FORGOTTEN", "kept")


Refused = tuple[tuple[Any, ...], Callable[[Path], object] | None, type[ScforgetError], str]
REFUSED: dict[str, Refused] = {
    "not forgotten": ((*PLACE, "retain_finetune"), None, DataError, "found verdict NOT_FORGOTTEN and utility kept"),
    "utility open": ((*PLACE, "ssd"), None, DataError, "found verdict FORGOTTEN and utility undetermined"),
    "verdict by hand": ((*PLACE, "retain_finetune"), other_verdict, DataError, f"found another {AUDITS}; wanted what"),
    "other weights": ((*PLACE, "partial_reset"), other_weights, DataError, f"another {MODELS} than audit@tiny-half"),
    "no weights": ((*PLACE, "partial_reset"), spoiling.remove(MODELS), ArtifactError, "no such file"),
    "no audit": ((*PLACE, "partial_reset"), spoiling.remove("dvc.lock"), DataError, "no reference@tiny-half in dvc"),
    "unknown method": ((*PLACE, "scrub"), None, DataError, "no audit of it; wanted one of partial_reset, sisa, ssd"),
    "target": ((*PLACE, "retrain"), None, DataError, "no audit of it"),
    "unknown seed": ((*PLACE, "partial_reset", 7), None, DataError, "no audited model of seed 7; wanted one of 0, 1"),
    "unknown scenario": (("tiny", "all", "ssd"), None, ConfigError, "audit tiny all is not part of it; it has tiny ha"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_promote_refuses_in_one_line_and_registers_nothing(project, name):
    arguments, spoil, kind, said = REFUSED[name]
    if spoil:
        spoil(project)
    with pytest.raises(kind) as raised:
        registry.promote(project, *arguments)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)
    assert raised.value.exit_code == (2 if kind is ConfigError else 3)
    assert not (project / "mlruns").exists()


def test_promote_refuses_what_was_made_again_after_the_audit(project):
    """DVC's record of the models is right again, but not of those that were audited."""
    other_weights(project)
    entries = YAML(typ="safe").load(project / "dvc.lock")
    entries["stages"]["unlearn@tiny-half"] = {"outs": [{"path": MODELS, "md5": dvc_md5(project / MODELS)}]}
    YAML(typ="safe", pure=True).dump(entries, project / "dvc.lock")
    with pytest.raises(DataError, match="than audit@tiny-half read"):
        registry.promote(project, *PLACE, "partial_reset")


def test_promote_without_an_answer_is_a_tracking_error(project, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(TrackingError) as raised:
        registry.promote(project, *PLACE, "partial_reset")
    assert raised.value.exit_code == 5


# a team's server


@pytest.mark.postgres
def test_promote_and_load_work_through_a_server(project, postgres, tmp_path, monkeypatch):
    (tmp_path / "server").mkdir()
    with mlflow_server(postgres, tmp_path / "server/artifacts") as server:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.uri)
        assert [one.created for one in registry.promote(project, *PLACE, "partial_reset")] == [True] * 3
        assert [one.created for one in registry.promote(project, *PLACE, "partial_reset")] == [False] * 3
        found = registry.load(project, "tiny").predict(cells(project))
        assert len(found) == len(cells(project))
        described = (tmp_path / "server").rglob("model.json")
        path = next(path for path in described if json.loads(path.read_text())["method"] == "partial_reset")
        path.write_text(path.read_text() + " ")
        with pytest.raises(ArtifactError, match=r"artifacts/model.json: sha256 is"):
            registry.load(project, "tiny")
