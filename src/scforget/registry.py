"""Audited models into MLflow's registry, and out of it again.

Only ``scforget promote`` registers, and only what the audit that DVC recorded found FORGOTTEN with its utility kept.
What is registered are the bytes that DVC versions, with hashes that say so; :func:`load` checks them.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version as installed
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from filelock import FileLock
from scipy import sparse

from scforget import artifacts, loading, replay, tracking
from scforget.artifacts import Workspace, read_bytes, read_json
from scforget.errors import ArtifactError, ConfigError, DataError, ScforgetError, TrackingError
from scforget.models.mixture import members_of
from scforget.models.vae import VAESettings
from scforget.pipeline import Inputs, Item, Pipeline, dvc_md5
from scforget.results import REFERENCES, Record, models_stage
from scforget.tasks import VaeTask

if TYPE_CHECKING:
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.pyfunc import PyFuncModel

_CODE = Path(__file__).with_name("served.py")
_LIBRARY = {
    True: "total_counts, or else the sum over all columns: as the model was given the counts over all genes",
    False: "the sum over the model's genes, at least 1; total_counts is not used",
}


@dataclass(frozen=True)
class Candidate:
    """A model that may be registered.

    Attributes
    ----------
    alias
        What it is to the registered model: ``original``, ``retrain`` or ``forgotten``.
    method, seed
        Of its population.
    weights
        The file that DVC versions.
    record
        The audit's record of its population.
    part
        The stage item that wrote the record.
    """

    alias: str
    method: str
    seed: int
    weights: Path
    record: Record
    part: Inputs


@dataclass(frozen=True)
class Promoted:
    """A version that carries an alias now, and whether it was made for it."""

    alias: str
    method: str
    seed: int
    version: str
    created: bool


def name_of(dataset: str) -> str:
    """Name of the registered model of a data set."""
    return f"scforget-{dataset}"


# what may be promoted


def _recorded(pipeline: Pipeline, root: Path, dataset: str, scenario: str) -> tuple[Inputs, Inputs]:
    """What the reference and the audit of a scenario were made from, if both still are as DVC recorded them."""
    items = Item("reference", (dataset, scenario)), Item("audit", (dataset, scenario))
    if items[1] not in (known := pipeline.items("audit")):
        names = ", ".join(" ".join(item.keys) for item in known)
        raise ConfigError(
            root / "params.yaml", "pipeline", f"audit {dataset} {scenario} is not part of it; it has {names}"
        )
    recorded, astray, what = pipeline.recorded(), pipeline.astray(), f"promote {dataset} {scenario}"
    for item in items:
        if item not in recorded:
            raise DataError(what, f"no {item.name} in dvc.lock", "a finished audit; run `dvc repro`")
        if item in astray:
            wanted = "what dvc.lock records; run `dvc repro`, or `dvc checkout` to get that back"
            raise DataError(what, f"another {astray[item]}", wanted)
        for path, digest in recorded[item].deps.items():
            if path.startswith(("work/", "results/")) and dvc_md5(root / path) != digest:
                wanted = "the one that was audited; run `dvc repro`, or `dvc checkout` to get that back"
                raise DataError(what, f"another {path} than {item.name} read", wanted)
    return recorded[items[0]], recorded[items[1]]


def candidates(root: Path, dataset: str, scenario: str, method: str, seed: int | None) -> list[Candidate]:
    """One original, one retrain and the model to be promoted, if the audit lets it pass.

    Raises
    ------
    ConfigError
        If the pipeline has no such data set and scenario.
    DataError
        If there is no audit of the method, or it is not what DVC recorded, or its verdict is another than FORGOTTEN
        with utility kept, or there is no model of that seed.
    """
    workspace, pipeline = Workspace(root), Pipeline(root)
    reference, audit = _recorded(pipeline, root, dataset, scenario)
    methods = audit.params["pipeline.methods"]
    what = f"promote {dataset} {scenario} {method}"
    if method not in methods:
        raise DataError(what, "no audit of it", f"one of {', '.join(methods)}")
    records = read_json(workspace.results("reference", dataset, scenario) / "result.json")
    records[method] = read_json(workspace.results("audit", dataset, scenario, method) / "result.json")
    verdict, utility = records[method].get("verdict"), records[method]["utility"].get("verdict")
    if (verdict, utility) != ("FORGOTTEN", "kept"):
        wanted = "verdict FORGOTTEN and utility kept; only such a model is registered"
        raise DataError(what, f"verdict {verdict} and utility {utility}", wanted)
    seeds = records[method]["seeds"]
    chosen = seeds[0] if seed is None else seed
    if chosen not in seeds:
        raise DataError(what, f"no audited model of seed {chosen}", f"one of {', '.join(map(str, seeds))}")
    found = []
    for alias, population in [*zip(REFERENCES, REFERENCES, strict=True), ("forgotten", method)]:
        own = records[population]["seeds"]
        nearest = chosen if chosen in own else own[0]
        weights = workspace.work(*models_stage(dataset, scenario, population)) / f"{nearest}.safetensors"
        part = audit if alias == "forgotten" else reference
        found.append(Candidate(alias, population, nearest, weights, records[population], part))
    return found


def describe(workspace: Workspace, candidate: Candidate) -> Record:
    """What ``model.json`` says: all that is needed to use the weights, and their hash."""
    dataset, scenario = candidate.part.item.keys
    settings = VAESettings(**candidate.part.params[f"datasets.{dataset}.model"])
    genes = read_json(workspace.work("split", dataset) / "genes.json")["genes"]
    task = VaeTask(sparse.csr_matrix((0, len(genes))), np.zeros(0), settings)
    width = settings.latent * len(members_of(loading.load_model(task, candidate.weights)))
    made = {
        "original": "trained on all training cells, those to be forgotten included",
        "retrain": f"trained without the cells of {scenario}",
        "forgotten": f"the original of the same seed after {candidate.method} forgot the cells of {scenario}",
    }
    return {
        "dataset": dataset,
        "scenario": None if candidate.alias == "original" else scenario,
        "method": candidate.method,
        "seed": candidate.seed,
        "what": made[candidate.alias],
        "model": settings.model_dump(),
        "genes": genes,
        "library": _LIBRARY[settings.likelihood == "log_mse"],
        "outputs": [*(f"z{number}" for number in range(width)), "elbo"],
        "weights_sha256": hashlib.sha256(read_bytes(candidate.weights)).hexdigest(),
        "package": f"scforget {installed('scforget')}",
    }


# the registry


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Whatever MLflow raises becomes one line."""
    try:
        yield
    except ScforgetError:
        raise
    except Exception as error:
        shown, why = tracking.without_user(address, str(error).strip() or type(error).__name__)
        raise TrackingError(shown, why, "run the same command again when it answers") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what MLflow warns of when its own modules load, and for the lack of an example of an input."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*Any type hint is inferred", UserWarning)
        warnings.filterwarnings("ignore", ".*An input example was not provided", UserWarning)
        yield


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


class Registry:
    """The registered model of a data set.

    Parameters
    ----------
    root
        The project's folder.
    dataset
        Whose models.

    Raises
    ------
    TrackingError
        If the store does not answer.
    """

    def __init__(self, root: Path, dataset: str) -> None:
        os.environ.setdefault("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")  # it would ask PyPI
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        self._root, self._name = root, name_of(dataset)
        self._store = tracking.Store(root)
        self.uri = self._store.uri
        from mlflow import MlflowClient

        self._client = MlflowClient(self.uri, self.uri)

    def register(self, candidate: Candidate) -> Promoted:
        """Find the version that has these weights, or create it; give it the alias and the audit's tags."""
        workspace = Workspace(self._root)
        about = describe(workspace, candidate)
        # The run of the audit that judged the candidate; a store that lacks it gets it.
        run = next(run for run in replay.runs(workspace, candidate.part) if run.tags["method"] == candidate.method)
        self._store.log(run, "restored")
        names = ("dataset", "scenario", "method", "verdict", "utility_verdict")
        tags = {name: run.tags[name] for name in names} | {
            "seed": str(candidate.seed), "fingerprint": run.fingerprint, "sha256": about["weights_sha256"],
            "dvc.md5": dvc_md5(candidate.weights), **tracking.git_tags(self._root),
        }  # fmt: skip
        with _explained(self.uri):
            self._ensure_name()
            same = f"name = '{self._name}' and tags.sha256 = '{about['weights_sha256']}'"
            versions = self._client.search_model_versions(same)
            found = next((one for one in versions if one.tags.get("method") == candidate.method), None)
            version = found or self._create(candidate, about, tags)
            for key, value in tags.items():
                if version.tags.get(key) != value:
                    self._client.set_model_version_tag(self._name, version.version, key, value)
            self._client.set_registered_model_alias(self._name, candidate.alias, version.version)
        return Promoted(candidate.alias, candidate.method, candidate.seed, str(version.version), found is None)

    def _ensure_name(self) -> None:
        from mlflow.exceptions import MlflowException

        about = "VAE of single-cell counts: with the cells to be forgotten, never trained on them, and after forgetting"
        try:
            self._client.create_registered_model(self._name, description=about)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _create(self, candidate: Candidate, about: Record, tags: dict[str, str]) -> ModelVersion:
        """Log the weights, what describes them and the code that serves them; the version comes last."""
        experiment = self._client.get_experiment_by_name(tracking.EXPERIMENT).experiment_id
        runs = self._client.search_runs([experiment], f"tags.fingerprint = '{tags['fingerprint']}'")
        run_id = next(run for run in runs if run.info.status == "FINISHED").info.run_id
        logged = self._client.create_logged_model(experiment, self._name, run_id, tags, model_type="VAE")
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "logged"
            with _quiet():
                _save(folder, Path(scratch), candidate.weights, about, logged)
            self._client.log_model_artifacts(logged.model_id, str(folder))
            tags = {**tags, "files": json.dumps(_digests(folder))}
        self._client.finalize_logged_model(logged.model_id, "READY")
        return self._client.create_model_version(
            self._name, logged.artifact_location, run_id, tags, description=about["what"], model_id=logged.model_id
        )

    def load(self, alias: str) -> PyFuncModel:
        """Fetch the files of an aliased version, check them, and load the model."""
        with _quiet():
            import mlflow.pyfunc

        with tempfile.TemporaryDirectory() as scratch:
            with _explained(self.uri):
                self._fetch(alias, Path(scratch))
            return mlflow.pyfunc.load_model(scratch)

    def _fetch(self, alias: str, target: Path) -> None:
        """Copy what was registered, and nothing else, file by file: the code among it runs when the model is loaded."""
        from mlflow.artifacts import download_artifacts

        version = self._client.get_model_version_by_alias(self._name, alias)
        place = f"models:/{self._name}@{alias}"
        if "files" not in version.tags:
            raise ArtifactError(place, "was not registered by `scforget promote`: no hashes to check it by")
        source = self._client.get_model_version_download_uri(self._name, version.version)
        for name, wanted in json.loads(version.tags["files"]).items():
            path = target / name
            path.parent.mkdir(exist_ok=True)
            download_artifacts(f"{source}/{name}", dst_path=path.parent, tracking_uri=self.uri)
            found = hashlib.sha256(path.read_bytes()).hexdigest()
            if found != wanted:
                why = f"{name}: sha256 is {found}, and {wanted} was registered: do not use it; delete version"
                raise ArtifactError(place, f"{why} {version.version} from the store and promote again")


def _save(folder: Path, scratch: Path, weights: Path, about: Record, logged: Any) -> None:
    """Write an MLflow model of safetensors, JSON and code: no pickle."""
    from mlflow.models import Model, ModelSignature
    from mlflow.pyfunc import save_model
    from mlflow.types import ColSpec, Schema

    artifacts.copy(weights, scratch / "weights.safetensors")
    artifacts.write_json(scratch / "model.json", about)
    artifacts.copy(_CODE, scratch / _CODE.name)  # from here, so that MLmodel does not name a folder of this machine
    # No schema of inputs: MLflow would drop columns that are not in it, though they may belong to a cell's total, and
    # refuse integers for "double" and floats for "long". The code says what is wrong with an input.
    outputs = Schema([ColSpec("double", name) for name in about["outputs"]])
    libraries = ("scforget", "mlflow", "numpy", "pandas", "safetensors", "scipy", "torch")
    save_model(
        path=str(folder), python_model=str(scratch / _CODE.name),
        artifacts={"weights": str(scratch / "weights.safetensors"), "model": str(scratch / "model.json")},
        signature=ModelSignature(outputs=outputs),
        pip_requirements=[f"{name}=={installed(name).split('+')[0]}" for name in libraries],
        metadata={"model_sha256": hashlib.sha256(read_bytes(scratch / "model.json")).hexdigest()},
        mlflow_model=Model(logged.artifact_location, logged.source_run_id,
                           model_uuid=logged.model_id, model_id=logged.model_id),
    )  # fmt: skip


def promote(root: Path, dataset: str, scenario: str, method: str, seed: int | None = None) -> list[Promoted]:
    """Register a forgotten model, with an original and a retrain to compare it to; say on stderr what was done.

    Parameters
    ----------
    seed
        Which of the method's models; ``None``: the first. Original and retrain are of the same seed, or the first.

    Raises
    ------
    ConfigError, DataError, ArtifactError
        As :func:`candidates` says.
    TrackingError
        If the store does not answer.
    """
    chosen = candidates(root, dataset, scenario, method, seed)
    registry = Registry(root, dataset)
    done = []
    # Two processes that find a version missing would both make it.
    with FileLock(tracking.home(root) / "mlruns" / ".promote.lock"):
        for candidate in chosen:
            one = registry.register(candidate)
            made = "new" if one.created else "was there"
            where = f"{name_of(dataset)} version {one.version} @{one.alias}"
            print(f"promote: {where}: {one.method}, seed {one.seed} ({made})", file=sys.stderr)
            done.append(one)
    return done


def load(root: Path, dataset: str, alias: str = "forgotten") -> PyFuncModel:
    """Load ``models:/scforget-DATASET@ALIAS`` after checking that every file is the one that was registered.

    Raises
    ------
    ArtifactError
        If a file is another.
    TrackingError
        If the store does not answer, or has no such model.
    """
    return Registry(root, dataset).load(alias)
