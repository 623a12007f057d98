"""Runs into MLflow: the only module that imports it.

MLflow's store is a view, not the record: a run is built from files that are already on disk, found again by its
fingerprint, and can be rebuilt at any time. So whatever happens here, no result is lost.
"""

from __future__ import annotations

import getpass
import logging
import math
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock

from scforget.errors import ScforgetError, TrackingError

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXPERIMENT = "scforget"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # the UI's view for trained models, not for LLM traces
_FORBIDDEN = re.compile(r"[^\w\-. :/]", re.ASCII)  # in a metric's name; cell types may hold any sign
_LONGEST_KEY = 250


class DatasetInput(NamedTuple):
    """The data a run used: name, path in the project, DVC's md5, and what it was used for."""

    name: str
    source: str
    digest: str
    context: str


@dataclass(frozen=True)
class Run:
    """One MLflow run and its nested runs.

    Attributes
    ----------
    fingerprint
        Identity: a finished run with it is left alone.
    curves
        Metrics by step (epoch).
    artifacts
        Makes the content by path within the run; called only when the run is created.
    """

    name: str
    fingerprint: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    curves: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    artifacts: Callable[[], Mapping[str, bytes]] = dict
    dataset: DatasetInput | None = None
    children: tuple[Run, ...] = ()


def home(root: Path) -> Path:
    """The project whose ``mlruns/`` is meant: inside ``dvc exp run --temp`` the main one, not the temporary copy."""
    return Path(os.environ.get("DVC_ROOT") or root).resolve()


def uri(root: Path) -> str:
    """Address of the store: ``MLFLOW_TRACKING_URI`` if set, else SQLite under ``mlruns/``.

    A relative SQLite path is meant from the project's folder: from a temporary copy of it the runs would be lost.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlruns/mlflow.db"
    path = address.removeprefix("sqlite:///")
    if path == address or path.startswith("/"):
        return address
    return f"sqlite:///{home(root)}/{path}"


def git_tags(root: Path) -> dict[str, str]:
    """``git.commit`` and ``git.dirty`` of the project; empty outside Git."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return {"git.commit": git("rev-parse", "HEAD"), "git.dirty": str(bool(git("status", "--porcelain"))).lower()}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # a container's user may have no name
        return "unknown"


@contextmanager
def _explained(address: str) -> Iterator[None]:
    """Whatever MLflow or its database raises becomes one line; it has dozens of kinds, none of them our bug."""
    try:
        yield
    except ScforgetError:
        raise
    except Exception as error:
        why = str(error).strip().splitlines()
        raise TrackingError(address, (why[0] if why else type(error).__name__)[:200]) from error


def warm_up() -> None:
    """Import MLflow, which takes a second that a stage has while its models are made; settings come before."""
    # An unreachable server shall cost seconds, not the minutes of MLflow's default retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    logging.getLogger("alembic").setLevel(logging.WARNING)
    import mlflow.tracking  # noqa: F401


class Store:
    """An open MLflow store.

    Parameters
    ----------
    root
        The project's folder.

    Raises
    ------
    TrackingError
        If the store does not answer.
    """

    def __init__(self, root: Path) -> None:
        warm_up()
        from mlflow import MlflowClient

        self._root, self.uri = root, uri(root)
        local = self.uri.startswith("sqlite")
        # Two processes that create the schema at once destroy each other's migration, and two that find a run missing
        # would both create it.
        self._lock = FileLock(home(root) / "mlruns" / ".lock", timeout=120) if local else nullcontext()
        location = str(home(root) / "mlruns" / "artifacts") if local else None
        with _explained(self.uri):
            if local:
                (home(root) / "mlruns").mkdir(exist_ok=True)
        with _explained(self.uri), self._lock:
            self._client: MlflowClient = MlflowClient(self.uri)
            found = self._client.get_experiment_by_name(EXPERIMENT)
            self._experiment: str = (
                found.experiment_id if found else self._client.create_experiment(EXPERIMENT, location, tags=_KIND)
            )
        if found and local and found.artifact_location.removeprefix("file://") != location:
            why = f"was made for artifacts in {found.artifact_location}; the project moved: delete mlruns/mlflow.db"
            raise TrackingError(self.uri, why)
        self._common = {**git_tags(root), "mlflow.source.name": "scforget", "mlflow.user": _user()}
        if os.environ.get("DVC_EXP_NAME"):
            self._common["dvc.exp"] = os.environ["DVC_EXP_NAME"]

    def log(self, run: Run, source: str) -> bool:
        """Find the run by its fingerprint, or create it with everything nested in it.

        Parameters
        ----------
        source
            ``live`` from the stage that made the results, ``restored`` from ``scforget track``.

        Returns
        -------
        bool
            Whether it was created.
        """
        with _explained(self.uri), self._lock:
            condition = f"tags.fingerprint = '{run.fingerprint}'"
            finished = False
            for found in self._client.search_runs([self._experiment], condition):
                if found.info.status == "FINISHED":
                    finished = True
                else:  # cut off half-way: start again
                    nested = f"tags.`mlflow.parentRunId` = '{found.info.run_id}'"
                    for cut_off in [*self._client.search_runs([self._experiment], nested), found]:
                        self._client.delete_run(cut_off.info.run_id)
            if not finished:
                self._create(run, source, None)
            return not finished

    def _create(self, run: Run, source: str, parent: str | None) -> None:
        tags = {**self._common, **run.tags, "fingerprint": run.fingerprint, "source": source}
        if parent:
            tags["mlflow.parentRunId"] = parent
        created = self._client.create_run(self._experiment, tags=tags, run_name=run.name)
        run_id = created.info.run_id
        self._log_values(run_id, run)
        if run.dataset:
            self._log_dataset(run_id, run.dataset)
        if contents := run.artifacts():
            with tempfile.TemporaryDirectory() as folder:
                for name, content in contents.items():
                    path = Path(folder) / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(content)
                self._client.log_artifacts(run_id, folder)
        for child in run.children:
            self._create(child, source, run_id)
        self._client.set_terminated(run_id, "FINISHED")

    def _log_values(self, run_id: str, run: Run) -> None:
        from mlflow.entities import Metric, Param

        now = int(time.time() * 1000)
        rows = [(key, value, 0) for key, value in run.metrics.items()]
        rows += [(key, value, step) for step, row in run.curves.items() for key, value in row.items()]
        known = [(_key(key), value, step) for key, value, step in rows if value is not None]
        metrics = [Metric(key, float(v), now, step) for key, v, step in known if math.isfinite(v)]
        params = [Param(key, str(value)) for key, value in run.params.items()]
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])
        for start in range(0, len(metrics), 1000):
            self._client.log_batch(run_id, metrics=metrics[start : start + 1000])

    def _log_dataset(self, run_id: str, dataset: DatasetInput) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        # Built by hand: MLflow's own dataset classes read and hash the array, and DVC has hashed it already.
        entity = Dataset(dataset.name, dataset.digest[:36], "local", f'{{"uri": "{dataset.source}"}}')
        self._client.log_inputs(run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", dataset.context)])])


def _key(name: str) -> str:
    """Return what MLflow takes as a metric's name: no forbidden sign, no path with empty parts, not too long."""
    parts = (part.strip(".") or "_" for part in _FORBIDDEN.sub("_", name).split("/"))
    return "/".join(parts)[:_LONGEST_KEY].rstrip("/")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings to dotted keys, as MLflow params want them."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat |= flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value}
    return flat
