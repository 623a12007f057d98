from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scforget.arrays import FloatArray
from scforget.audit import intervals
from scforget.audit.variance import variance_components
from scforget.errors import DataError, EmptyGroupError

SEEDS = st.integers(0, 2**32 - 1)
SIZES = st.integers(2, 5)


def nested(rng: np.random.Generator, shape: tuple[int, int, int], spreads: tuple[float, float, float]) -> FloatArray:
    a, b, e = spreads
    originals, seeds, _ = shape
    between, within = rng.normal(size=(originals, 1, 1)), rng.normal(size=(originals, seeds, 1))
    return 3 + a * between + b * within + e * rng.normal(size=shape)


@settings(deadline=None, max_examples=40)
@given(SEEDS, SIZES, SIZES, SIZES)
def test_variance_components_equal_a_table_of_mean_squares(seed: int, L: int, J: int, K: int) -> None:
    y = nested(np.random.default_rng(seed), (L, J, K), (1.0, 0.7, 0.5))
    grand = sum(y[i, j, k] for i in range(L) for j in range(J) for k in range(K)) / (L * J * K)
    between = sum(J * K * (y[i].mean() - grand) ** 2 for i in range(L)) / (L - 1)
    within = sum(K * (y[i, j].mean() - y[i].mean()) ** 2 for i in range(L) for j in range(J)) / (L * (J - 1))
    rest = sum((y[i, j, k] - y[i, j].mean()) ** 2 for i in range(L) for j in range(J) for k in range(K))
    rest /= L * J * (K - 1)
    raw = {"originals": (between - within) / (J * K), "unlearning": (within - rest) / K, "audit": rest}
    found = variance_components(y, level=0.95)
    for name, value in raw.items():
        assert getattr(found, name) == pytest.approx(max(0.0, value), abs=1e-12)
    assert found.truncated == tuple(name for name, value in raw.items() if value < 0)
    assert found.mean == pytest.approx(grand)
    assert found.standard_error**2 == pytest.approx(between / (L * J * K))


def test_variance_components_equal_reml_of_statsmodels() -> None:
    """Restricted maximum likelihood agrees with the analysis of variance where no component is truncated."""
    import pandas as pd
    from statsmodels.regression.mixed_linear_model import MixedLM

    y = nested(np.random.default_rng(3), (12, 3, 4), (2.0, 1.0, 0.5))
    i, j, _ = np.indices(y.shape)
    frame = pd.DataFrame({"y": y.ravel(), "i": i.ravel(), "j": j.ravel()})
    model = MixedLM.from_formula("y ~ 1", groups="i", re_formula="1", vc_formula={"b": "0 + C(j)"}, data=frame)
    fit = model.fit(reml=True)
    found = variance_components(y, level=0.95)
    assert found.truncated == ()
    assert found.originals == pytest.approx(fit.cov_re.iloc[0, 0], rel=1e-3)
    assert found.unlearning == pytest.approx(fit.vcomp[0], rel=1e-3)
    assert found.audit == pytest.approx(fit.scale, rel=1e-3)
    assert found.mean == pytest.approx(fit.fe_params["Intercept"])
    assert found.standard_error == pytest.approx(fit.bse_fe["Intercept"], rel=1e-3)


def test_variance_components_are_unbiased_where_none_is_truncated() -> None:
    rng, runs = np.random.default_rng(0), 1500
    results = [variance_components(nested(rng, (8, 4, 4), (2.0, 1.5, 1.0)), level=0.95) for _ in range(runs)]
    for name, truth in (("originals", 4.0), ("unlearning", 2.25), ("audit", 1.0)):
        values = np.array([getattr(one, name) for one in results])
        assert abs(values.mean() - truth) < 3 * values.std() / np.sqrt(runs)
        assert values.std() / np.sqrt(runs) < 0.02 * truth  # the comparison is sharp


@pytest.mark.parametrize(("shape", "spreads"), [((3, 1, 1), (1, 1, 1)), ((5, 2, 3), (1, 1, 1)), ((5, 3, 2), (0, 1, 1))])
def test_variance_components_interval_covers_at_its_level(
    shape: tuple[int, int, int], spreads: tuple[float, float, float]
) -> None:
    rng, runs, covered = np.random.default_rng(1), 1500, 0
    for _ in range(runs):
        low, high = variance_components(nested(rng, shape, spreads), level=0.9).interval
        covered += low <= 3 <= high
    assert covered / runs == pytest.approx(0.9, abs=3 * np.sqrt(0.09 / runs))


def test_variance_components_interval_is_that_of_the_originals_means() -> None:
    y = nested(np.random.default_rng(0), (5, 2, 3), (1, 1, 1))
    found = variance_components(y, level=0.9)
    assert found.interval == pytest.approx(intervals.mean_interval(y.mean(axis=(1, 2)), 0.9))


def test_variance_components_of_single_seeds_are_left_in_the_source_above() -> None:
    y = nested(np.random.default_rng(0), (6, 3, 4), (1, 1, 1))
    one_audit = variance_components(y[:, :, :1], level=0.9)
    assert one_audit.audit is None
    assert one_audit.unlearning == pytest.approx(y[:, :, 0].var(axis=1, ddof=1).mean())
    one_seed = variance_components(y[:, :1], level=0.9)
    assert one_seed.unlearning is None
    within = y[:, 0].var(axis=1, ddof=1).mean()
    assert one_seed.audit == pytest.approx(within)
    assert one_seed.originals == pytest.approx(max(0, y[:, 0].mean(axis=1).var(ddof=1) - within / 4))
    single = variance_components(y[:, :1, :1], level=0.9)
    assert (single.unlearning, single.audit) == (None, None)
    assert single.originals == pytest.approx(y[:, 0, 0].var(ddof=1))


def test_variance_components_below_zero_are_truncated_and_named() -> None:
    # Originals agree exactly while their seeds differ: the estimate between originals is negative.
    y = np.tile(np.array([-1.0, 1.0])[None, :, None], (4, 1, 2))
    found = variance_components(y, level=0.9)
    assert found.truncated == ("originals",)
    assert (found.originals, found.unlearning, found.audit) == (0, 2, 0)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["truncated"] == ["originals"]
    assert record["interval"] == [0, 0]


def test_variance_components_refuse_impossible_input() -> None:
    y = np.ones((3, 2, 2))
    with pytest.raises(EmptyGroupError, match="at least 2 originals"):
        variance_components(y[:1], level=0.9)
    with pytest.raises(EmptyGroupError, match="1 seed"):
        variance_components(y[:, :0], level=0.9)
    with pytest.raises(DataError, match="2 axes"):
        variance_components(y[0], level=0.9)
    with pytest.raises(DataError, match="finite"):
        variance_components(np.where(np.arange(3)[:, None, None] == 1, np.inf, y), level=0.9)
    with pytest.raises(DataError, match="level"):
        variance_components(y, level=1.0)
