from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from scforget.arrays import FloatArray
from scforget.audit.preprocessing import preprocessing_leak
from scforget.errors import DataError, EmptyGroupError


def paired_aucs(rng: np.random.Generator, splits: int, models: int, leak: float) -> tuple[FloatArray, FloatArray]:
    """AUCs of two candidates, ``[splits, models]`` each: the draw of the cells moves both of a split together."""
    draw = rng.normal(0.5, 0.03, (splits, 1))
    own = rng.normal(0, 0.01, (2, splits, 1)) + rng.normal(0, 0.006, (2, splits, models))
    return np.clip(draw + leak + own[0], 0, 1), np.clip(draw + own[1], 0, 1)


@pytest.mark.parametrize("level", [0.9, 0.95])
def test_preprocessing_leak_equals_scipy_t_interval_of_paired_means(level: float) -> None:
    retrain, pipeline = paired_aucs(np.random.default_rng(0), 7, 3, -0.1)
    found = preprocessing_leak(retrain, pipeline, level=level)
    differences = retrain.mean(axis=1) - pipeline.mean(axis=1)
    expected = stats.ttest_1samp(differences, 0).confidence_interval(level)
    assert found.interval == pytest.approx((expected.low, expected.high))
    assert found.difference == pytest.approx(differences.mean())
    assert found.difference == pytest.approx(found.retrain - found.retrain_pipeline)
    assert (found.level, found.n_splits) == (level, 7)


def test_preprocessing_leak_of_a_known_example() -> None:
    # Means of the splits 0.40, 0.30, 0.35 and 0.50, 0.50, 0.50: differences −0.10, −0.20, −0.15, sd 0.05, t 4.3027.
    found = preprocessing_leak([[0.35, 0.45], [0.3, 0.3], [0.4, 0.3]], [[0.5], [0.5], [0.5]], level=0.95)
    width = 4.302653 * 0.05 / np.sqrt(3)
    assert (found.retrain, found.retrain_pipeline, found.difference) == pytest.approx((0.35, 0.5, -0.15))
    assert found.interval == pytest.approx((-0.15 - width, -0.15 + width))


def test_preprocessing_leak_of_a_pipeline_against_itself_is_nothing() -> None:
    aucs, _ = paired_aucs(np.random.default_rng(1), 5, 2, 0.0)
    found = preprocessing_leak(aucs, aucs, level=0.95)
    assert (found.difference, *found.interval) == (0, 0, 0)


def test_preprocessing_leak_pairs_the_splits() -> None:
    """A difference of equal size in every split has no spread, however much the draw of the cells moves both."""
    pipeline = np.array([[0.4], [0.6], [0.5], [0.7]])
    paired = preprocessing_leak(pipeline + 0.05, pipeline, level=0.95)
    assert paired.interval == pytest.approx((0.05, 0.05))
    shuffled = preprocessing_leak(pipeline[[1, 0, 3, 2]] + 0.05, pipeline, level=0.95)
    assert shuffled.difference == pytest.approx(0.05)
    assert shuffled.interval[0] < -0.1


def test_preprocessing_leak_interval_covers_at_its_level() -> None:
    rng, leak, runs = np.random.default_rng(2), -0.12, 4000
    covered = 0
    for _ in range(runs):
        low, high = preprocessing_leak(*paired_aucs(rng, 10, 2, leak), level=0.95).interval
        covered += low <= leak <= high
    error = np.sqrt(0.95 * 0.05 / runs)
    assert covered / runs == pytest.approx(0.95, abs=3 * error)


@pytest.mark.parametrize("models", [1, 4])
def test_preprocessing_leak_refuses_one_split(models: int) -> None:
    one = np.full((1, models), 0.5)
    with pytest.raises(EmptyGroupError, match="at least 2"):
        preprocessing_leak(one, one, level=0.95)


@pytest.mark.parametrize(
    ("retrain", "pipeline", "level", "why"),
    [
        ([0.5, 0.5], [[0.5], [0.5]], 0.95, "splits x models"),
        (np.empty((3, 0)), [[0.5], [0.5], [0.5]], 0.95, "at least one model"),
        ([[0.5], [0.5], [0.5]], [[0.5], [0.5]], 0.95, "the same splits"),
        ([[0.5], [np.nan]], [[0.5], [0.5]], 0.95, r"numbers in \[0, 1\]"),
        ([[0.5], [0.5]], [[0.5], [1.2]], 0.95, "found 1.2"),
        ([[0.5], [0.5]], [[0.5], [0.5]], 1.0, "between 0 and 1"),
    ],
)
def test_preprocessing_leak_names_bad_input(retrain: object, pipeline: object, level: float, why: str) -> None:
    with pytest.raises(DataError, match=why):
        preprocessing_leak(retrain, pipeline, level=level)  # type: ignore[arg-type]


def test_preprocessing_leak_record_is_json() -> None:
    found = preprocessing_leak(*paired_aucs(np.random.default_rng(3), 4, 2, 0.1), level=0.95)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["interval"] == pytest.approx(list(found.interval))
    assert record["n_splits"] == 4
