"""Runs into MLflow: the only module that imports it.

MLflow's store is a view, not the record: a run is built from files that are already on disk, found again by its
fingerprint, and can be rebuilt at any time. So whatever happens here, no result is lost.

The store is the project's own SQLite, or a team's server. Processes of one project take turns by a file lock. Machines
that share a server have none: both may make the same run. Of such twins all who meet them keep the same one.
"""

from __future__ import annotations

import getpass
import json
import logging
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import unquote

from filelock import FileLock

from scforget.errors import ScforgetError, TrackingError

if TYPE_CHECKING:
    import pandas as pd
    from mlflow import MlflowClient
    from mlflow.entities import Experiment
    from mlflow.entities import Run as Found

EXPERIMENT = "scforget"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # the UI's view for trained models, not for LLM traces
_FORBIDDEN = re.compile(r"[^\w\-. :/]", re.ASCII)  # in a metric's name; cell types may hold any sign
_LONGEST_KEY = 250
_ABANDONED = 3600  # seconds after which an unfinished run of another machine is taken for cut off
# Stores that failed in this process, by address: a stage shall wait for a dead server once, not for each of its runs.
_given_up: dict[str, TrackingError] = {}
_said: set[str] = set()


def _view(title: str, condition: str, order: str, columns: tuple[str, ...]) -> str:
    """A saved view of the runs table, as MLflow 3.17 keeps it; undocumented, so all that may be lost is the view."""
    state = {"searchFilter": condition, "orderByKey": order, "orderByAsc": True, "selectedColumns": columns}
    return json.dumps({"name": title, "createdAt": 1, "state": json.dumps(state)})


# MLflow's runs table shows none of our columns by itself.
_VIEWS = {
    "mlflow.sharedViewState.audits": _view(
        "audited methods", "tags.kind = 'comparison'", "metrics.`audit/membership/difference`",
        ("tags.`stage`", "tags.`dataset`", "tags.`scenario`", "tags.`method`", "tags.`verdict`",
         "tags.`utility_verdict`", "metrics.`audit/membership/difference`", "metrics.`audit/trace/difference`",
         "metrics.`audit/worst_attack/auc`", "metrics.`utility/elbo`", "metrics.`utility/marker_r`",
         "metrics.`utility/accuracy`",
         "metrics.`cost/passes_ratio`", "metrics.`cost/seconds`"),
    ),
    "mlflow.sharedViewState.studies": _view(
        "searches for settings", "tags.kind = 'study'", "metrics.`tuned/final/distance`",
        ("tags.`scenario`", "tags.`method`", "tags.`best.settings`", "tags.`best.verdict`",
         "metrics.`default/final/distance`", "metrics.`tuned/development/distance`", "metrics.`tuned/final/distance`",
         "metrics.`retrain/distance`", "metrics.`tuned/final/cost`", "metrics.`study/trials`"),
    ),
}  # fmt: skip


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
    tables
        Makes tables by path (``….json``) within the run, which MLflow's UI shows as such; called only then, too.
        MLflow keeps 10 decimals of a number.
    """

    name: str
    fingerprint: str
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, object] = field(default_factory=dict)
    metrics: Mapping[str, float | None] = field(default_factory=dict)
    curves: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    artifacts: Callable[[], Mapping[str, bytes]] = dict
    tables: Callable[[], Mapping[str, pd.DataFrame]] = dict
    dataset: DatasetInput | None = None
    children: tuple[Run, ...] = ()


def home(root: Path) -> Path:
    """The project whose ``mlruns/`` is meant: inside ``dvc exp run --temp`` the main one, not the temporary copy."""
    return Path(os.environ.get("DVC_ROOT") or root).resolve()


def _apart(address: str) -> tuple[str, str]:
    """Take ``user:password`` out of an address: the address without, and what was taken out."""
    scheme, _, rest = address.partition("://")
    if not rest or scheme == "sqlite":
        return address, ""
    user, _, place = rest.rpartition("@")  # the last one: a password may hold others
    return f"{scheme}://{place}", user


def without_user(address: str, message: str) -> tuple[str, str]:
    """An address and the first line of a message about it, both without the user and password in it, for people."""
    shown, user = _apart(address)
    line = message.splitlines()[0]
    return shown, (line.replace(user, "***") if user else line)[:200]


def uri(root: Path) -> str:
    """Address of the store: ``MLFLOW_TRACKING_URI`` if set, else SQLite under ``mlruns/``.

    A relative SQLite path is meant from the project's folder: from a temporary copy of it the runs would be lost.
    A server's address comes without user and password, as it is shown to people; :func:`warm_up` hands them to MLflow.
    """
    address = os.environ.get("MLFLOW_TRACKING_URI") or "sqlite:///mlruns/mlflow.db"
    if address.startswith("http"):
        return _apart(address)[0]
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
    if address in _given_up:
        raise _given_up[address]
    try:
        yield
    except ScforgetError:
        raise
    except Exception as error:
        said = str(error).strip() or type(error).__name__
        said = said.rpartition("(Caused by ")[2]  # of a server that is away, the last words say why
        _given_up[address] = TrackingError(*without_user(address, said))
        raise _given_up[address] from error


def say(error: TrackingError) -> None:
    """Print why runs are not in MLflow; the same line once in a process, however many runs it concerns."""
    if str(error) not in _said:
        print(f"scforget: {error}", file=sys.stderr)
    _said.add(str(error))


def warm_up() -> None:
    """Import MLflow, which takes a second that a stage has while its models are made; settings come before."""
    address, user = _apart(os.environ.get("MLFLOW_TRACKING_URI", ""))
    if user and address.startswith("http"):  # MLflow prints addresses, but not its variables
        name, _, password = user.partition(":")
        os.environ |= {"MLFLOW_TRACKING_URI": address, "MLFLOW_TRACKING_USERNAME": unquote(name)}
        if password:
            os.environ["MLFLOW_TRACKING_PASSWORD"] = unquote(password)
    # An unreachable server shall cost seconds, not the minutes of MLflow's default retries.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # two lines for each of hundreds of runs
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
        self._local = self.uri.startswith("sqlite")
        # Two processes that create the schema at once destroy each other's migration, and two that find a run missing
        # would both create it.
        self._lock = FileLock(home(root) / "mlruns" / ".lock", timeout=120)
        with _explained(self.uri):
            (home(root) / "mlruns").mkdir(exist_ok=True)
        with _explained(self.uri), self._lock:
            self._client: MlflowClient = MlflowClient(self.uri)
            opened = self._open()
        self._experiment: str = opened.experiment_id
        if self._local and opened.artifact_location.removeprefix("file://") != self._location():
            why = f"was made for artifacts in {opened.artifact_location}; the project moved: delete mlruns/mlflow.db"
            raise TrackingError(self.uri, why)
        writer = sha256(f"{platform.node()} {home(root)}".encode()).hexdigest()[:12]  # those who share the lock
        self._common = {**git_tags(root), "mlflow.source.name": "scforget", "mlflow.user": _user(), "writer": writer}
        if os.environ.get("DVC_EXP_NAME"):
            self._common["dvc.exp"] = os.environ["DVC_EXP_NAME"]

    def _location(self) -> str | None:
        """Where artifacts are put; a server knows by itself."""
        return str(home(self._root) / "mlruns" / "artifacts") if self._local else None

    def _open(self) -> Experiment:
        from mlflow.exceptions import MlflowException

        found = self._client.get_experiment_by_name(EXPERIMENT)
        if found is None:
            try:
                self._client.create_experiment(EXPERIMENT, self._location(), tags=_KIND)
            except MlflowException as error:  # another machine was quicker
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self._client.get_experiment_by_name(EXPERIMENT)
        for key, view in _VIEWS.items():
            if key not in found.tags:
                try:
                    self._client.set_experiment_tag(found.experiment_id, key, view)
                except MlflowException:  # another writer was quicker, and the tag is unique
                    if key not in self._client.get_experiment(found.experiment_id).tags:
                        raise
        return found

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
            if self._settle(run.fingerprint):
                return False
            self._create(run, source, None)
            self._settle(run.fingerprint)  # another machine may have made it meanwhile
            return True

    def _settle(self, fingerprint: str) -> bool:
        """Remove what was cut off half-way, and all finished runs but the first; say whether there is that one."""
        found = self._client.search_runs([self._experiment], f"tags.fingerprint = '{fingerprint}'")
        finished = [run for run in found if run.info.status == "FINISHED"]
        kept = min(finished, key=lambda run: (run.info.start_time, run.info.run_id), default=None)
        for run in found:
            if run is not kept and (run.info.status == "FINISHED" or self._cut_off(run)):
                nested = f"tags.`mlflow.parentRunId` = '{run.info.run_id}'"
                for one in [*self._client.search_runs([self._experiment], nested), run]:
                    self._client.delete_run(one.info.run_id)
        return kept is not None

    def _cut_off(self, run: Found) -> bool:
        """Whether nobody is writing an unfinished run: who shares our lock does not, and another machine may be."""
        ours = self._local or run.data.tags.get("writer") == self._common["writer"]
        return ours or bool(run.info.start_time < (time.time() - _ABANDONED) * 1000)

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
        for name, table in run.tables().items():
            self._client.log_table(run_id, table, name)
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
