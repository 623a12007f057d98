"""Proposition 1 against autograd cell by cell, exact sums over counts, and designs whose answer is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from scforget.arrays import FloatArray
from scforget.models.likelihoods import nb_log_prob
from scforget.theory.propositions import (
    Pairs,
    PropositionSettings,
    convergence,
    coupled_weight,
    dependence,
    every_pair,
    nb_fisher,
    nb_gradient,
    nb_weight,
    negative_binomial,
    product_design,
    run,
    squared_error_fisher,
)

VALUES: dict[str, Any] = {
    "outputs": 6, "inputs": 3, "residuals": 7, "latents": 9, "draws": [100, 1000, 10000], "repeats": 12, "level": 0.99,
    "strengths": [0, 5, 10], "means": [0.1, 30.0], "inverse_dispersions": [0.5, 500.0],
    "point": {"outputs": 2000, "differing": 100, "largest": 3.0, "classes": 14},
    "bounds": {
        "outputs": [9], "differing": [2], "largest": [3.0], "classes": [3], "profiles": 20, "starts": 1,
    },
}  # fmt: skip
SETTINGS = PropositionSettings(**VALUES)


def random_pairs(seed: int) -> tuple[Pairs, FloatArray]:
    rng = np.random.default_rng(seed)
    return Pairs(rng.normal(size=(5, 4)), rng.normal(size=(5, 3))), rng.normal(size=(4, 3))


def test_squared_error_fisher_equals_a_loop_over_cells() -> None:
    pairs, weight = random_pairs(0)
    wanted = np.zeros_like(weight)
    for residual, latent in zip(*map(torch.from_numpy, pairs), strict=True):
        free = torch.from_numpy(weight).requires_grad_()
        target = (free @ latent).detach() + residual
        (gradient,) = torch.autograd.grad((target - free @ latent).square().sum(), free)
        wanted += gradient.numpy() ** 2 / len(pairs.latents)
    np.testing.assert_allclose(squared_error_fisher(pairs, weight), wanted, rtol=1e-10)
    np.testing.assert_allclose(4 * pairs.fisher(), wanted, rtol=1e-10)


def test_covariance_is_what_the_product_of_the_factors_leaves() -> None:
    pairs, _ = random_pairs(1)
    for d, h in np.ndindex(4, 3):
        wanted = np.cov(pairs.residuals[:, d] ** 2, pairs.latents[:, h] ** 2, ddof=0)[0, 1]
        assert pairs.covariance()[d, h] == pytest.approx(wanted, rel=1e-10)
    np.testing.assert_allclose(pairs.fisher(), np.outer(*pairs.factors()) + pairs.covariance(), rtol=1e-12)


def test_every_pair_has_no_covariance() -> None:
    rng = np.random.default_rng(2)
    pairs = every_pair(rng.normal(size=(3, 4)), rng.normal(size=(5, 2)))
    assert pairs.residuals.shape == (15, 4)
    assert len(np.unique(np.hstack(pairs), axis=0)) == 15
    assert np.abs(pairs.covariance()).max() < 1e-15


def test_product_design_holds_both_identities() -> None:
    found = product_design(SETTINGS, 3)
    assert found["cells"] == 63
    assert found["entry_error"] <= 1e-10
    assert found["cosine_error"] <= 1e-10
    assert found["cosine"] < 0.9  # profiles that differ: not the cosine of a set with itself


def test_convergence_has_slope_minus_a_half() -> None:
    found = convergence(SETTINGS, 3)
    assert found["low"] < -0.5 < found["high"]
    assert -0.7 < found["slope"] < -0.3
    assert found["error"] == sorted(found["error"], reverse=True)


def test_dependence_is_the_covariance_and_has_either_sign() -> None:
    found = dependence(SETTINGS, 3)
    assert found["identity_error"] <= 1e-12
    none, half, full = found["examples"]
    for row in found["examples"]:  # the factors do not know of the dependence
        assert row["over_product"] == pytest.approx(1, rel=1e-12)
        assert row["under_product"] == pytest.approx(0.5**0.5, rel=1e-12)
    assert none["over_cosine"] == pytest.approx(1, rel=1e-12)
    assert none["under_cosine"] == pytest.approx(0.5**0.5, rel=1e-12)
    assert half["over_cosine"] == pytest.approx(2 * 0.75 * 0.25 / (0.75**2 + 0.25**2), rel=1e-12)
    assert half["under_cosine"] == pytest.approx(0.75 / np.hypot(0.75, 0.25), rel=1e-12)
    assert full["over_cosine"] == pytest.approx(0, abs=1e-12)
    assert full["under_cosine"] == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("r", [0.3, 4.0, 2000.0])
def test_nb_gradient_equals_autograd(r: float) -> None:
    counts = torch.tensor([[0.0, 1.0, 2.0, 40.0]], dtype=torch.float64)
    logits = torch.tensor([[0.1, -2.0, 3.0, 1.0]], dtype=torch.float64, requires_grad=True)
    size, log_r = 25.0, torch.tensor(r, dtype=torch.float64).log()
    shares = logits.detach().softmax(1).numpy()
    m = nb_gradient(counts.numpy(), size * shares, r)
    (coupled,) = torch.autograd.grad(nb_log_prob(counts, logits.log_softmax(1) + np.log(size), log_r).sum(), logits)
    np.testing.assert_allclose(coupled.numpy(), m - shares * m.sum(), rtol=1e-9)
    log_mean = torch.from_numpy(np.log(size * shares)).requires_grad_()
    (free,) = torch.autograd.grad(nb_log_prob(counts, log_mean, log_r).sum(), log_mean)
    np.testing.assert_allclose(free.numpy(), m, rtol=1e-9)


def test_nb_weight_saturates() -> None:
    mean = np.geomspace(1e-3, 1e6, 30)
    for r in (0.2, 3.0, 1e4):
        weight = nb_weight(mean, r)
        assert (weight <= np.minimum(mean, r)).all()
        assert (weight >= np.minimum(mean, r) / 2).all()
    assert nb_weight(np.array(1e9), 3.0) == pytest.approx(3, rel=1e-6)
    assert nb_weight(np.array(3.0), 1e9) == pytest.approx(3, rel=1e-6)


def test_coupled_weight_equals_simulation() -> None:
    rng = np.random.default_rng(4)
    shares, r = np.array([0.6, 0.3, 0.1]), np.array([0.5, 2.0, 50.0])
    mean = 12 * shares
    counts = rng.negative_binomial(r, r / (r + mean), (400_000, 3)).astype(np.float64)
    m = nb_gradient(counts, mean, r)
    squared = (m - shares * m.sum(1, keepdims=True)) ** 2
    error = squared.std(0) / np.sqrt(len(squared))
    assert (np.abs(squared.mean(0) - coupled_weight(shares, nb_weight(mean, r))) < 4 * error).all()
    assert (np.abs((m**2).mean(0) - nb_weight(mean, r)) < 4 * (m**2).std(0) / np.sqrt(len(m))).all()
    assert (np.abs(squared.mean(0) - nb_weight(mean, r)) > 10 * error)[:2].all()  # so that the test can tell them apart


def test_nb_fisher_equals_its_weights() -> None:
    rng = np.random.default_rng(5)
    decoder = nn.Linear(3, 4, dtype=torch.float64)
    counts, latents = rng.poisson(3, (6, 4)).astype(np.float64), rng.normal(size=(6, 3))
    with torch.no_grad():
        means = decoder(torch.from_numpy(latents)).exp().numpy()
    wanted = (nb_gradient(counts, means, 1.7) ** 2).T @ latents**2 / 6
    np.testing.assert_allclose(nb_fisher(counts, latents, decoder, 1.7), wanted, rtol=1e-9)


def test_negative_binomial_factorises_where_the_weight_does_not_depend_on_the_latent() -> None:
    found = negative_binomial(SETTINGS, 3)
    assert found["weight_error"] <= 1e-10
    assert [(row["mean"], row["inverse_dispersion"]) for row in found["rows"]] == [
        (0.1, 0.5), (0.1, 500.0), (30.0, 0.5), (30.0, 500.0),
    ]  # fmt: skip
    for row in found["rows"]:
        assert row["entry_error"] <= 1e-10
        assert row["cosine_error"] <= 1e-10
    shares = [row["covariance_share"] for row in found["rows"]]
    assert shares[2] < shares[0] < shares[1]  # saturated, between, Poisson
    assert shares[2] < shares[3] < shares[1]


def test_run_returns_plain_values_and_the_same_again() -> None:
    found = run(SETTINGS, 3)
    assert list(found) == [
        "product_design", "convergence", "dependence", "negative_binomial", "bounds", "simulated_bounds",
    ]  # fmt: skip
    assert found == run(SETTINGS, 3)
    assert round(found["bounds"]["published"], 3) == 0.679

    def plain(value: Any) -> bool:
        if isinstance(value, dict):
            return all(isinstance(name, str) and plain(one) for name, one in value.items())
        return all(map(plain, value)) if isinstance(value, list) else type(value) in {int, float, bool, str}

    assert plain(found)
