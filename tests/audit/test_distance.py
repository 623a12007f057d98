"""Distance to the retrained population: two parts in units of their margins, 0 for a retrain, the same up and down."""

from __future__ import annotations

import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scforget.arrays import FloatArray
from scforget.audit import Margins
from scforget.audit.distance import Distance, between_retrains, to_retrains
from scforget.errors import DataError, EmptyGroupError

MARGINS = Margins(membership=0.02, trace=1.0, elbo=5.0, marker_r=0.02)


def population(models: int, cells: int = 200, seed: int = 0, shift: float = 0.0) -> tuple[FloatArray, FloatArray]:
    """Per-cell scores of models that differ by 2 nats at a cell, and AUCs that differ by 0.002."""
    rng = np.random.default_rng(seed)
    typical = np.random.default_rng(99).normal(-300, 50, cells)
    return typical + 2.0 * (rng.normal(size=(models, cells)) + shift), 0.52 + 0.002 * rng.normal(size=models)


def measured(models: Any, retrains: Any, margins: Margins = MARGINS, shrinkage: float = 0.5) -> Distance:
    return to_retrains(*models, *retrains, margins=margins, shrinkage=shrinkage)


def mean_abs_z(row: list[float], reference: list[list[float]], shrinkage: float) -> float:
    """Slow and obvious: one cell after the other."""
    spreads = [statistics.stdev([other[x] for other in reference]) for x in range(len(row))]
    typical = statistics.median(spreads)
    found = []
    for x, value in enumerate(row):
        spread = math.sqrt((1 - shrinkage) * spreads[x] ** 2 + shrinkage * typical**2)
        found.append(abs(value - statistics.fmean(other[x] for other in reference)) / spread)
    return statistics.fmean(found)


@given(
    models=st.integers(1, 4), retrains=st.integers(3, 6), cells=st.integers(1, 5), seed=st.integers(0, 999),
    shrinkage=st.sampled_from([0.0, 0.3, 1.0]), trace=st.floats(0.1, 5), membership=st.floats(0.001, 0.5),
)  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_to_retrains_equals_a_loop_over_models_and_cells(models, retrains, cells, seed, shrinkage, trace, membership):
    rng = np.random.default_rng(seed)
    (own, aucs), (base, base_aucs) = ((rng.normal(size=(m, cells)), rng.random(m)) for m in (models, retrains))
    margins = Margins(membership=membership, trace=trace, elbo=5.0, marker_r=0.02)
    found = measured((own, aucs), (base, base_aucs), margins, shrinkage)
    rows = base.tolist()
    null = statistics.fmean(mean_abs_z(row, [other for other in rows if other is not row], shrinkage) for row in rows)
    for m in range(models):
        scores = max(0.0, mean_abs_z(own[m].tolist(), rows, shrinkage) - null)
        away = abs(aucs[m] - statistics.fmean(base_aucs))
        assert found.scores[m] == pytest.approx(scores, abs=1e-9)
        assert found.membership[m] == pytest.approx(away, abs=1e-12)
        assert found.total[m] == pytest.approx(scores / trace + away / membership, abs=1e-9)


def test_to_retrains_is_small_for_models_of_the_same_distribution():
    found = measured(population(40, seed=1), population(16))
    assert found.scores.mean() < 0.05
    assert found.total.mean() < 0.25  # of which 0.08 is the AUCs' own noise over the margin
    far = measured(population(40, seed=1, shift=1.0), population(16))
    assert far.total.mean() > 3 * found.total.mean()


@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_to_retrains_counts_too_much_forgetting_as_far_as_too_little(shift):
    typical, (base, base_aucs) = population(0)[0], population(16)
    del typical
    centre, spread = base.mean(axis=0), base.std(axis=0, ddof=1)
    own = np.stack([centre + sign * shift * spread for sign in (1, -1)])
    aucs = base_aucs.mean() + np.array([1, -1]) * 0.03
    found = measured((own, aucs), (base, base_aucs))
    assert found.total[0] == pytest.approx(found.total[1])
    assert found.membership == pytest.approx(0.03)
    less = measured((centre + 0.9 * (own - centre), aucs), (base, base_aucs))
    assert (less.total <= found.total).all()


def test_to_retrains_rises_with_the_shift():
    totals = [measured(population(8, seed=2, shift=shift), population(16)).total.mean() for shift in (0, 0.5, 1, 2, 4)]
    assert totals == sorted(totals)
    assert totals[-1] == pytest.approx(4 / MARGINS.trace - 0.8, rel=0.15)  # 0.8: E|z| of a retrain


def test_to_retrains_never_rewards_models_that_differ_less_than_retrains_do():
    base, aucs = population(16)
    found = measured((base.mean(axis=0, keepdims=True), aucs.mean(keepdims=True)), (base, aucs))
    assert found.scores == 0.0
    assert found.total == pytest.approx(0.0, abs=1e-9)


def test_to_retrains_is_in_units_of_the_margins():
    """A part at its margin adds 1, and half the margin doubles it."""
    (base, base_aucs), (own, _) = population(16), population(3, seed=3, shift=2.0)
    aucs = np.full(3, base_aucs.mean() + MARGINS.membership)
    found = measured((own, aucs), (base, base_aucs))
    assert found.total - found.scores == pytest.approx(1.0)
    finer = Margins(membership=0.01, trace=0.25, elbo=5.0, marker_r=0.02)
    assert measured((own, aucs), (base, base_aucs), finer).total == pytest.approx(4 * found.scores + 2.0)


def test_between_retrains_is_what_each_is_to_the_others():
    base, aucs = population(5, cells=20)
    found = between_retrains(base, aucs, margins=MARGINS, shrinkage=0.5)
    for k in range(5):
        others = [other for other in range(5) if other != k]
        one = measured((base[[k]], aucs[[k]]), (base[others], aucs[others]))
        assert (found.total[k], found.scores[k], found.membership[k]) == (one.total, one.scores, one.membership)
    assert found.total.mean() < measured(population(5, 20, seed=4, shift=1.5), (base, aucs)).total.mean()


@pytest.mark.parametrize("retrains", [1, 2])
def test_to_retrains_needs_three_retrained_models(retrains):
    with pytest.raises(EmptyGroupError, match="at least 3"):
        measured(population(2), population(retrains))


def test_between_retrains_needs_four():
    with pytest.raises(EmptyGroupError, match="at least 3"):
        between_retrains(*population(3), margins=MARGINS, shrinkage=0.5)


def test_to_retrains_needs_a_cell():
    with pytest.raises(EmptyGroupError):
        measured(population(2, cells=0), population(4, cells=0))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", ["models", "retrains"])
def test_to_retrains_refuses_scores_that_are_not_finite(value, where):
    groups = {"models": population(2), "retrains": population(4)}
    groups[where][0][1, 5] = value
    with pytest.raises(DataError):
        measured(groups["models"], groups["retrains"])
