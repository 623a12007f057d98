"""What MLflow runs when it loads a registered model: it checks the files, then scores cells with them.

MLflow logs this file as it is (a model from code) beside the weights and what describes them, so nothing is pickled;
what it imports comes from the installed package.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
from mlflow.models import Model as LoggedModel
from mlflow.pyfunc import PythonModel, PythonModelContext
from scipy import sparse

from scforget import artifacts, loading
from scforget.arrays import FloatArray
from scforget.errors import ArtifactError, DataError
from scforget.models.vae import VAESettings
from scforget.tasks import VaeTask

_TOTAL = "total_counts"


def _check(path: Path, wanted: object, said_by: str) -> None:
    found = hashlib.sha256(artifacts.read_bytes(path)).hexdigest()
    if found != wanted:
        why = f"sha256 is {found}, and {said_by} says {wanted}: not the model that was registered; do not use it"
        raise ArtifactError(path, why)


def _numbers(frame: pd.DataFrame, whole: bool = True) -> FloatArray:
    """Return the values ``[n, columns]`` if all are counts: finite, >= 0 and, if asked for, whole."""
    try:
        values = frame.to_numpy(dtype=np.float64, na_value=np.nan)
    except (TypeError, ValueError) as error:
        raise DataError("counts", f"a column that is not numeric ({error})", "whole numbers >= 0") from error
    bad = ~np.isfinite(values) | (values < 0)
    if whole:
        bad |= values != np.floor(values)
    if bad.any():
        row, column = np.argwhere(bad)[0]
        found = f"{values[row, column]} of {frame.columns[column]} in cell {frame.index[row]}"
        raise DataError("counts", found, "whole numbers >= 0, not normalised" if whole else "numbers >= 0")
    return np.asarray(values)


class Served(PythonModel):
    """A trained VAE, or a mixture of such, as MLflow serves it."""

    def load_context(self, context: PythonModelContext) -> None:
        """Read the files that MLflow brought.

        Raises
        ------
        ArtifactError
            If ``model.json`` is not the one that ``MLmodel`` names, or the weights are not those it names.
        """
        weights, described = Path(context.artifacts["weights"]), Path(context.artifacts["model"])
        logged = LoggedModel.load(str(described.parents[1]))
        _check(described, (logged.metadata or {}).get("model_sha256"), "MLmodel")
        about = artifacts.read_json(described)
        _check(weights, about["weights_sha256"], "model.json")
        self._genes: list[str] = about["genes"]
        self._outputs: list[str] = about["outputs"]
        self._settings = VAESettings(**about["model"])
        self._model = loading.load_model(self._task(pd.DataFrame(columns=self._genes, dtype=np.float64)), weights)

    def _task(self, frame: pd.DataFrame) -> VaeTask:
        counts = _numbers(frame[self._genes])
        return VaeTask(sparse.csr_matrix(counts), self._totals(frame, counts), self._settings)

    def _totals(self, frame: pd.DataFrame, counts: FloatArray) -> FloatArray:
        """Counts of each cell over all genes, ``[n]``; only ``log_mse`` asks for them."""
        inside = counts.sum(axis=1)
        if self._settings.likelihood != "log_mse":
            return inside
        totals = _numbers(frame[[_TOTAL]], whole=False)[:, 0] if _TOTAL in frame else _numbers(frame).sum(axis=1)
        short = (totals < inside) | (totals == 0)
        if short.any():
            cell = int(np.argmax(short))
            wanted = f"above 0, and no less than its {inside[cell]:g} counts of the model's genes"
            raise DataError(f"{_TOTAL} of cell {frame.index[cell]}", f"{totals[cell]:g}", wanted)
        return totals

    def _check_columns(self, frame: object) -> pd.DataFrame:
        wanted = f"a DataFrame of counts with a column for each of the model's {len(self._genes)} genes"
        if not isinstance(frame, pd.DataFrame):
            raise DataError("input", type(frame).__name__, wanted)
        known = set(frame.columns)
        if missing := [gene for gene in self._genes if gene not in known]:
            more = ", ..." if len(missing) > 5 else ""
            raise DataError("input", f"{len(missing)} without a column ({', '.join(missing[:5])}{more})", wanted)
        if twice := {*self._genes, _TOTAL}.intersection(frame.columns[frame.columns.duplicated()]):
            raise DataError("input", f"two columns {min(twice)}", wanted)
        return frame

    def predict(self, model_input: pd.DataFrame) -> pd.DataFrame:
        """Score cells at fixed decoding (eval mode, z = μ).

        Parameters
        ----------
        model_input : ``[n, >= G]``, n >= 0
            Raw counts; columns are genes in any order. Other columns are ignored, but under ``log_mse``: that model
            was given the counts of each cell over all genes, so it takes the column ``total_counts`` or, without it,
            the sum over all columns.

        Returns
        -------
        DataFrame ``[n, Z + 1]``
            With the index of the input: posterior means ``z0`` ..., of a mixture those of all members, and ``elbo``
            in nats (see :meth:`scforget.tasks.VaeTask.signals`).

        Raises
        ------
        DataError
            If a gene lacks or comes twice, or a value is no count.
        """
        frame = self._check_columns(model_input)
        if frame.empty:
            return pd.DataFrame(columns=self._outputs, index=frame.index, dtype=np.float64)
        found = self._task(frame).signals(self._model, np.arange(len(frame)))
        return pd.DataFrame(np.column_stack([found.mu, found.elbo]), columns=self._outputs, index=frame.index)


mlflow.models.set_model(Served())
