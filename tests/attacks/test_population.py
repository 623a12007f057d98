from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from scforget.arrays import FloatArray
from scforget.attacks import population
from scforget.attacks.population import hockey_stick, klom, klom_summary, u_lira
from scforget.errors import DataError, EmptyGroupError

SEEDS = st.integers(0, 2**32 - 1)


def populations(
    rng: np.random.Generator, M: int, K: int, F: int, shared: float, shift: float = 0.0
) -> tuple[FloatArray, FloatArray]:
    """Outputs of unit variance; ``shared`` of it moves all cells of a model together."""
    one, two = (
        np.sqrt(shared) * rng.normal(size=(n, 1)) + np.sqrt(1 - shared) * rng.normal(size=(n, F)) for n in (M, K)
    )
    return one + shift, two


def slow_klom(u: FloatArray, r: FloatArray, bins: int, floor: float) -> float:
    edges = np.histogram_bin_edges(np.concatenate([u, r]), bins)
    p, q = (np.histogram(x, edges)[0] / x.size for x in (u, r))
    return float(sum(a * np.log(a / max(b, floor)) for a, b in zip(p, q, strict=True) if a > 0))


@settings(deadline=None)
@given(SEEDS, st.integers(1, 40), st.integers(1, 40), st.sampled_from([2, 5, 20]))
def test_klom_equals_numpy_histograms(seed: int, M: int, K: int, bins: int) -> None:
    rng = np.random.default_rng(seed)
    u, r = rng.normal([0, 1, 300], 1, (M, 3)), rng.normal(0, [1, 3, 200], (K, 3))
    wanted = [slow_klom(a, b, bins, 1e-5) for a, b in zip(u.T, r.T, strict=True)]
    np.testing.assert_allclose(klom(u, r, bins, 1e-5), wanted, atol=1e-9)


def test_klom_of_equal_outputs_is_0_and_of_disjoint_ones_the_floor() -> None:
    values = np.random.default_rng(0).normal(size=(30, 4))
    np.testing.assert_array_equal(klom(values, values, 20, 1e-5), 0)
    np.testing.assert_array_equal(klom(np.ones((3, 2)), np.ones((4, 2)), 20, 1e-5), 0)
    np.testing.assert_allclose(klom(values + 100, values, 20, 1e-5), np.log(1e5))


def test_klom_of_many_models_joins_the_kl_of_two_gaussians() -> None:
    rng = np.random.default_rng(0)
    found = klom(rng.normal(0.5, 1, (100_000, 1)), rng.normal(0, 1, (100_000, 1)), 100, 1e-5)
    assert found[0] == pytest.approx(0.5**2 / 2, abs=0.01)


@pytest.mark.parametrize(("n", "bias"), [(8, 6.5), (64, 0.62), (512, 0.05)])
def test_klom_of_like_populations_grows_as_models_get_fewer(n: int, bias: float) -> None:
    u, r = np.random.default_rng(0).normal(size=(2, n, 400))
    assert klom(u, r, 20, 1e-5).mean() == pytest.approx(bias, rel=0.1)


@pytest.mark.parametrize(("bins", "floor"), [(1, 0.1), (20, 0.0), (20, 1.0)])
def test_klom_refuses_impossible_bins_and_floors(bins: int, floor: float) -> None:
    with pytest.raises(DataError, match="bins and floor"):
        klom(np.ones((2, 2)), np.ones((2, 2)), bins, floor)


def test_klom_summary_of_a_perfect_method_has_no_excess_at_unequal_numbers() -> None:
    rng, found, naive = np.random.default_rng(0), [], []
    for _ in range(200):
        u, r = populations(rng, 8, 30, 20, 0.3)
        found.append(klom_summary(u, r, bins=20, floor=1e-5, seed=0, draws=4))
        naive.append(np.quantile(klom(u, r, 20, 1e-5), 0.95) - np.quantile(klom(r[:15], r[15:], 20, 1e-5), 0.95))
    excess = np.array([one["excess"] for one in found])
    error = excess.std() / np.sqrt(200)
    assert abs(excess.mean()) < 3 * error
    assert abs(np.mean(naive)) > 5 * error  # unequal numbers of models would have been a bias
    assert all(one["models"] == 8 and one["low"] <= one["excess"] <= one["high"] for one in found)


def test_klom_summary_takes_as_many_unlearned_models_as_it_has_pairs_of_retrained_ones() -> None:
    u, r = populations(np.random.default_rng(0), 3, 2, 4, 0.0)
    found = klom_summary(u, r, bins=20, floor=1e-5, seed=0, draws=200)
    wanted = np.mean([np.quantile(klom(u[[m]], r[[k]], 20, 1e-5), 0.95) for m in range(3) for k in range(2)])
    assert found["models"] == 1
    assert found["value"] == pytest.approx(wanted, rel=0.02)
    assert found["null"] == pytest.approx(np.log(1e5))


def test_klom_summary_finds_a_shift_and_is_reproducible() -> None:
    u, r = populations(np.random.default_rng(0), 32, 64, 20, 0.3, shift=2)
    found = klom_summary(u, r, bins=20, floor=1e-5, seed=0, draws=10)
    assert found == klom_summary(u, r, bins=20, floor=1e-5, seed=0, draws=10)
    assert found["low"] > 0
    assert found["excess"] == pytest.approx(found["value"] - found["null"])
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_klom_summary_refuses_a_single_retrained_model() -> None:
    with pytest.raises(EmptyGroupError, match="KLOM"):
        klom_summary(np.ones((3, 2)), np.ones((1, 2)), bins=20, floor=1e-5, seed=0, draws=3)


def test_u_lira_scores_equal_gaussians_without_the_scored_model() -> None:
    u, r = populations(np.random.default_rng(0), 8, 9, 3, 0.2, shift=1)
    found = u_lira(u, r, 8)
    for scores, own, other, sign in ((found.unlearned_scores, u, r, 1), (found.retrained_scores, r, u, -1)):
        for m in range(len(own)):
            rest = np.delete(own, m, axis=0)
            mine = stats.norm.logpdf(own[m], rest.mean(axis=0), rest.std(axis=0, ddof=1))
            theirs = stats.norm.logpdf(own[m], other.mean(axis=0), other.std(axis=0, ddof=1))
            np.testing.assert_allclose(scores[m], sign * (mine - theirs), atol=1e-9)


def slow_pair_auc(u: FloatArray, r: FloatArray) -> float:
    def ratio(x: FloatArray, one: FloatArray, two: FloatArray) -> FloatArray:
        return np.asarray(
            stats.norm.logpdf(x, one.mean(axis=0), one.std(axis=0, ddof=1))
            - stats.norm.logpdf(x, two.mean(axis=0), two.std(axis=0, ddof=1))
        )

    wins = []
    for m in range(len(u)):
        for k in range(len(r)):
            fits = np.delete(u, m, axis=0), np.delete(r, k, axis=0)
            wins.append(ratio(u[m], *fits) > ratio(r[k], *fits))
    return float(np.mean(wins))


def test_u_lira_auc_and_interval_equal_refitting_without_each_pair_and_model() -> None:
    u, r = populations(np.random.default_rng(1), 4, 5, 6, 0.2, shift=1)
    found = u_lira(u, r, 4)
    assert found.auc == pytest.approx(slow_pair_auc(u, r))
    without_u = np.array([slow_pair_auc(np.delete(u, m, axis=0), r) for m in range(4)])
    without_r = np.array([slow_pair_auc(u, np.delete(r, k, axis=0)) for k in range(5)])
    variance = 3 / 4 * ((without_u - without_u.mean()) ** 2).sum() + 4 / 5 * ((without_r - without_r.mean()) ** 2).sum()
    logit = np.log(found.auc / (1 - found.auc))
    width = stats.t.ppf(0.975, 3) * np.sqrt(variance) / (found.auc * (1 - found.auc))
    np.testing.assert_allclose(found.interval, 1 / (1 + np.exp(-np.array([logit - width, logit + width]))))


def test_u_lira_of_a_perfect_method_is_half_and_its_own_scores_would_not_be() -> None:
    rng, aucs, naive = np.random.default_rng(0), [], []
    for M, K in [(8, 8), (8, 24)] * 250:
        u, r = populations(rng, M, K, 5, 0.3)
        aucs.append(population._pair_auc(u, r))
        found = population._density(u, *population._without_each(u)) - population._density(
            u, r.mean(0), r.var(0, ddof=1)
        )
        other = population._density(r, u.mean(0), u.var(0, ddof=1)) - population._density(
            r, *population._without_each(r)
        )
        naive.append((found[:, None] > other[None]).mean())
    assert np.mean(aucs) == pytest.approx(0.5, abs=3 * np.std(aucs) / np.sqrt(500))
    assert np.mean(naive) == pytest.approx(0.40, abs=0.02)


@pytest.mark.parametrize(
    ("M", "K", "F", "shared", "shift"), [(8, 8, 5, 0.0, 0.0), (8, 24, 10, 0.5, 0.0), (8, 24, 10, 0.5, 1.5)]
)
def test_u_lira_interval_covers(M: int, K: int, F: int, shared: float, shift: float) -> None:
    rng, runs = np.random.default_rng(0), 100
    found = [u_lira(*populations(rng, M, K, F, shared, shift), 8) for _ in range(runs)]
    expected = np.mean([one.auc for one in found]) if shift else 0.5
    covered = np.mean([one.interval[0] <= expected <= one.interval[1] for one in found])
    assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)


@pytest.mark.parametrize("d", [0.5, 2.0])
def test_u_lira_of_many_models_joins_the_closed_form(d: float) -> None:
    rng, runs = np.random.default_rng(0), 20
    found = [u_lira(*populations(rng, 40, 40, 5, 0.0, shift=d), 8) for _ in range(runs)]
    wanted = stats.norm.cdf(d / np.sqrt(2))
    assert np.mean([one.auc for one in found]) == pytest.approx(wanted, abs=0.02)
    covered = np.mean([one.interval[0] <= wanted <= one.interval[1] for one in found])
    assert covered > 0.95 - 3 * np.sqrt(0.95 * 0.05 / runs)


def test_u_lira_sees_a_spread_that_a_mean_does_not() -> None:
    rng = np.random.default_rng(0)
    found = u_lira(rng.normal(0, 0.2, (24, 20)), rng.normal(0, 1, (24, 20)), 8)
    assert found.interval[0] > 0.7


def test_u_lira_interval_of_separated_populations_is_no_point() -> None:
    u, r = populations(np.random.default_rng(0), 8, 8, 3, 0.0, shift=100)
    found = u_lira(u, r, 8)
    assert found.auc == 1
    assert found.interval == (pytest.approx(0.025 ** (1 / 8)), 1)


@pytest.mark.parametrize(("M", "K"), [(7, 8), (8, 7), (0, 8)])
def test_u_lira_is_refused_with_one_model_too_few(M: int, K: int) -> None:
    rng = np.random.default_rng(0)
    found = u_lira(rng.normal(size=(M, 3)), rng.normal(size=(K, 3)), 8)
    assert found.status == "undetermined"
    assert "needs 8" in found.reason
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (record["auc"], record["interval"], record["n_unlearned"]) == (None, [None, None], M)


def test_u_lira_to_dict_holds_what_was_measured() -> None:
    u, r = populations(np.random.default_rng(0), 8, 9, 3, 0.0)
    found = u_lira(u, r, 8, level=0.9)
    record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert record["interval"] == list(found.interval)
    assert (record["auc"], record["level"], record["n_retrained"]) == (found.auc, 0.9, 9)


def test_u_lira_refuses_bad_input() -> None:
    u, r = populations(np.random.default_rng(0), 8, 8, 3, 0.0)
    same = u.copy()
    same[:, 1] = 0.1
    for one, two in ((same, r), (r, same)):
        with pytest.raises(DataError, match="equal outputs"):
            u_lira(one, two, 8)
    same[0, 1] = 5.0  # equal once model 0 is left out
    with pytest.raises(DataError, match="equal outputs"):
        u_lira(same, r, 8)
    with pytest.raises(DataError, match="same cells"):
        u_lira(u, r[:, :2], 8)
    with pytest.raises(DataError, match="not finite"):
        u_lira(u * np.inf, r, 8)
    with pytest.raises(DataError, match="fewest models"):
        u_lira(u, r, 3)


def pair(mean: FloatArray, sd: FloatArray) -> FloatArray:
    """Two models whose fitted Gaussian has exactly this mean and spread."""
    return np.array([mean - sd / np.sqrt(2), mean + sd / np.sqrt(2)])


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 1.0, 4.0])
def test_hockey_stick_of_equal_spreads_equals_the_closed_form(epsilon: float) -> None:
    distance, sd = (grid.ravel() for grid in np.meshgrid([0.1, 0.5, 1.0, 3.0, 8.0], [0.2, 1.0, 30.0]))
    forward, backward = hockey_stick(pair(distance, sd), pair(0 * sd, sd), epsilon)
    near, far = distance / (2 * sd), epsilon * sd / distance
    wanted = stats.norm.cdf(near - far) - np.exp(epsilon) * stats.norm.cdf(-near - far)
    np.testing.assert_allclose(forward, wanted, atol=1e-5)
    np.testing.assert_allclose(backward, wanted, atol=1e-5)


@pytest.mark.parametrize("epsilon", [0.0, 1.0])
@pytest.mark.parametrize(("mean", "sd"), [(0.0, 0.5), (1.0, 2.0), (-3.0, 0.1)])
def test_hockey_stick_of_unequal_spreads_equals_adaptive_integration(mean: float, sd: float, epsilon: float) -> None:
    one, two = stats.norm(mean, sd), stats.norm(0, 1)
    found = hockey_stick(pair(np.array([mean]), np.array([sd])), pair(np.zeros(1), np.ones(1)), epsilon)
    for delta, p, q in ((found[0], one, two), (found[1], two, one)):
        wanted = integrate.quad(
            lambda x, p=p, q=q: max(0.0, p.pdf(x) - np.exp(epsilon) * q.pdf(x)), -16, 16, limit=500, points=[mean, 0]
        )[0]
        assert delta[0] == pytest.approx(wanted, abs=1e-4)


@settings(deadline=None, max_examples=30)
@given(SEEDS)
def test_hockey_stick_lies_in_0_1_falls_with_epsilon_and_swaps(seed: int) -> None:
    rng = np.random.default_rng(seed)
    u, r = rng.normal(0, 10.0 ** rng.uniform(-4, 4), (5, 2)), rng.normal(rng.uniform(-3, 3), 1, (4, 2))
    found = np.array([hockey_stick(u, r, epsilon) for epsilon in (0, 0.5, 2, 50)])
    assert ((found >= 0) & (found <= 1)).all()
    assert (np.diff(found, axis=0) <= 1e-12).all()
    np.testing.assert_array_equal(hockey_stick(r, u, 0.5)[::-1], found[1])


def test_hockey_stick_plug_in_is_biased_upwards_by_few_models() -> None:
    rng = np.random.default_rng(0)
    means = [hockey_stick(*rng.normal(size=(2, n, 300)), 1.0)[0].mean() for n in (8, 64, 512)]
    assert means[0] > 0.04 > 0.005 > means[1] > means[2]


def test_hockey_stick_refuses_bad_input() -> None:
    good = np.random.default_rng(0).normal(size=(4, 2))
    with pytest.raises(DataError, match="equal outputs"):
        hockey_stick(np.ones((4, 2)), good, 1.0)
    for epsilon in (-0.1, np.nan, np.inf):
        with pytest.raises(DataError, match="epsilon"):
            hockey_stick(good, good, epsilon)
    with pytest.raises(EmptyGroupError):
        hockey_stick(good[:1], good, 1.0)
