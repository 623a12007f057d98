"""A model that MLflow loads answers as the task does, says what is wrong with an input, and refuses changed files."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose

from scforget import artifacts, registry
from scforget.errors import ArtifactError, DataError
from scforget.models.mixture import Mixture, Model
from scforget.tasks import VaeTask

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", ".*Any type hint is inferred", UserWarning)  # of MLflow's own
    from mlflow.pyfunc import load_model

GENES = [f"gene_{number}" for number in range(60)]
CELLS = np.arange(7, 207, 4)


def save(folder: Path, task: VaeTask, model: Model) -> Path:
    """Write what is logged of a model: an MLflow model in a folder."""
    weights = folder / "weights.of.dvc"
    artifacts.write_tensors(weights, model.state_dict())
    width = task.settings.latent * (len(model) if isinstance(model, Mixture) else 1)
    about = {
        "model": task.settings.model_dump(), "genes": GENES, "outputs": [*(f"z{i}" for i in range(width)), "elbo"],
        "weights_sha256": hashlib.sha256(weights.read_bytes()).hexdigest(),
    }  # fmt: skip
    with registry._quiet():
        logged = SimpleNamespace(artifact_location="somewhere", source_run_id="r", model_id="m-1")
        registry._save(folder / "logged", folder, weights, about, logged)
    return folder / "logged"


@pytest.fixture(autouse=True)
def no_pickles(monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_PICKLE_DESERIALIZATION", "false")
    monkeypatch.setenv("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")


def frame(task: VaeTask, **more: Any) -> pd.DataFrame:
    """Some cells with named genes in another order, between other columns."""
    counts = pd.DataFrame(task.counts[CELLS].toarray(), columns=GENES, index=[f"cell {cell}" for cell in CELLS])
    shuffled = list(np.random.default_rng(0).permutation(GENES))
    return counts[shuffled[:20]].assign(**more).join(counts[shuffled[20:]])


@pytest.fixture(scope="module")
def served(task, tmp_path_factory) -> Any:
    """One of the default task, kept for the tests that only ask it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_SKIP_PIP_REQUIREMENTS_CHECK", "true")
        return load_model(str(save(tmp_path_factory.mktemp("served"), task, task.new_model(1))))


# what it answers


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "log_mse"])
@pytest.mark.parametrize("members", [1, 3])
def test_predict_equals_the_signals_of_the_task(make_task, tmp_path, likelihood, members):
    task = make_task(likelihood=likelihood)
    models = [task.new_model(seed) for seed in range(members)]
    model = models[0] if members == 1 else Mixture(models)
    totals = 1.5 * task.counts[CELLS].sum(axis=1).A1  # as the fixture's task has them
    cells = frame(task, total_counts=totals, batch="a", MALAT1=7)
    found = load_model(str(save(tmp_path, task, model))).predict(cells)
    expected = task.signals(model, CELLS)
    assert list(found.columns) == [*(f"z{number}" for number in range(4 * members)), "elbo"]
    assert list(found.index) == list(cells.index)
    assert_allclose(found.drop(columns="elbo"), expected.mu, rtol=1e-6, atol=1e-6)
    assert_allclose(found["elbo"], expected.elbo, rtol=1e-6)


def test_predict_of_log_mse_sums_all_columns_where_there_are_no_totals(make_task, tmp_path):
    task = make_task(likelihood="log_mse")
    model = task.new_model(0)
    served = load_model(str(save(tmp_path, task, model)))
    totals = np.asarray(task.counts.sum(axis=1), dtype=np.float64).ravel() + 500
    expected = VaeTask(task.counts, totals, task.settings).signals(model, CELLS)
    found = served.predict(frame(task, MALAT1=500))
    assert_allclose(found["elbo"], expected.elbo, rtol=1e-6)
    assert not np.allclose(served.predict(frame(task))["elbo"], expected.elbo, rtol=1e-3)


def test_predict_of_counts_knows_nothing_of_totals(served, task):
    cells = frame(task)
    assert served.predict(cells.assign(total_counts="not even a number")).equals(served.predict(cells))


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8, np.float32, pd.SparseDtype(np.float64, 0.0), "Int64"])
def test_predict_takes_counts_of_any_type(served, task, dtype):
    cells = frame(task)
    assert served.predict(cells.astype(dtype)).equals(served.predict(cells))


@pytest.mark.parametrize("count", [0, 1])
def test_predict_takes_few_cells(served, task, count):
    found = served.predict(frame(task).iloc[:count])
    assert found.shape == (count, 5)
    assert_allclose(found.to_numpy(), served.predict(frame(task)).to_numpy()[:count], rtol=1e-6, atol=1e-6)
    assert (found.dtypes == np.float64).all()


def test_predict_takes_a_cell_without_counts(served, task):
    empty = frame(task).iloc[:1] * 0
    assert np.isfinite(served.predict(empty)).all(axis=None)


# what it refuses


def put(value: Any) -> Callable[[pd.DataFrame], object]:
    def change(cells: pd.DataFrame) -> pd.DataFrame:
        cells = cells.astype(type(value))
        cells.loc["cell 11", "gene_3"] = value
        return cells

    return change


BAD: dict[str, tuple[Callable[[pd.DataFrame], object], str]] = {
    "missing": (lambda cells: cells.drop(columns=["gene_5", "gene_3"]), "2 without a column (gene_3, gene_5)"),
    "most missing": (
        lambda cells: cells[GENES[50:]],
        "50 without a column (gene_0, gene_1, gene_2, gene_3, gene_4, ..",
    ),
    "twice": (lambda cells: pd.concat([cells, cells[["gene_9"]]], axis=1), "two columns gene_9"),
    "negative": (put(-1.0), "-1.0 of gene_3 in cell cell 11"),
    "fractional": (put(0.5), "0.5 of gene_3 in cell cell 11"),
    "nan": (put(float("nan")), "nan of gene_3 in cell cell 11"),
    "infinite": (put(float("inf")), "inf of gene_3 in cell cell 11"),
    "text": (put("many"), "not numeric"),
    "matrix": (lambda cells: cells.to_numpy(), "ndarray"),
    "nothing": (lambda _: None, "NoneType"),
}


@pytest.mark.parametrize("name", BAD)
def test_predict_says_in_one_line_what_is_wrong(served, task, name):
    change, found = BAD[name]
    with pytest.raises(DataError) as raised:
        served.predict(change(frame(task)))
    assert found in str(raised.value)
    assert "wanted" in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("total", [0, 3, -1, np.nan, "x"])
def test_predict_of_log_mse_refuses_impossible_totals(make_task, tmp_path, total):
    task = make_task(likelihood="log_mse")
    served = load_model(str(save(tmp_path, task, task.new_model(0))))
    with pytest.raises(DataError, match=r"total_counts|numeric"):
        served.predict(frame(task, total_counts=total))


# the files


def test_saved_files_are_tensors_text_and_code(task, tmp_path):
    folder = save(tmp_path, task, task.new_model(0))
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt", "served.py",
        "artifacts/model.json", "artifacts/weights.safetensors",
    }  # fmt: skip
    assert (folder / "artifacts/weights.safetensors").read_bytes() == (tmp_path / "weights.of.dvc").read_bytes()
    assert str(Path(registry.__file__).parent) not in (folder / "MLmodel").read_text()
    assert {"scforget==0.1.0", "torch==2.13.0"} <= set((folder / "requirements.txt").read_text().split())


@pytest.mark.parametrize("name", ["weights.safetensors", "model.json"])
def test_load_refuses_a_file_with_one_byte_flipped(task, tmp_path, name):
    folder = save(tmp_path, task, task.new_model(0))
    path = folder / "artifacts" / name
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(ArtifactError, match=rf"{name}: sha256 is .* not the model that was registered") as raised:
        load_model(str(folder))
    assert "\n" not in str(raised.value)


def test_load_refuses_the_weights_and_the_description_of_another_model(task, tmp_path):
    """That pair fits together, but not this version."""
    own, other = tmp_path / "own", tmp_path / "other"
    own.mkdir()
    other.mkdir()
    folder, source = save(own, task, task.new_model(0)), save(other, task, task.new_model(1))
    for name in ("weights.safetensors", "model.json"):
        (folder / "artifacts" / name).write_bytes((source / "artifacts" / name).read_bytes())
    load_model(str(source))
    with pytest.raises(ArtifactError, match="MLmodel says"):
        load_model(str(folder))
