"""Dropout: what it keeps, from which stream, and that its hash leaves no pattern in the masks."""

from __future__ import annotations

import subprocess
import sys
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

from scforget import seeding
from scforget.arrays import FloatArray
from scforget.models import layers
from scforget.models.layers import Dropout, dropout_mask

N = 1_000_000
WITHOUT_NUMBA = """
import sys
sys.modules["numba"] = None
import torch
from scforget.models import likelihoods
from scforget.models.layers import Dropout
from scforget.models.vae import VAE, Batch, VAESettings
assert likelihoods.COMPILED is None
assert 0.6 < float((Dropout(0.3)(torch.ones(50, 70)) > 0).float().mean()) < 0.8
settings = dict(hidden=[4], latent=2, dispersion="gene", dropout=0.1)
for name in ("nb", "zinb"):
    model = VAE(6, VAESettings(likelihood=name, **settings))
    batch = Batch(torch.ones(3, 6), torch.ones(3, 6), torch.full((3, 1), 6.0))
    model.reconstruction(batch, model.decode(model.encode(batch.inputs)[0])).sum().backward()
    assert torch.isfinite(model.scale.weight.grad).all()
print("done")
"""


def mask_of(seed: int, keep: float = 0.7, n: int = N) -> FloatArray:
    """The mask of one seed, standardised to mean 0 and variance 1 by its expectation."""
    mask = dropout_mask((n,), 1 - keep, seed).double().numpy()
    return np.asarray((mask * keep - keep) / np.sqrt(keep * (1 - keep)))


def z_score(one: FloatArray, other: FloatArray) -> float:
    """Of the correlation of two independent rows."""
    return float((one * other).sum() / np.sqrt(len(one)))


@pytest.fixture(params=["compiled", "torch"])
def _either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """With numba's masks, and with torch's where there is none."""
    if request.param == "torch":
        monkeypatch.setattr(layers, "COMPILED", None)


def test_dropout_in_eval_mode_or_of_nothing_returns_its_input() -> None:
    inputs = torch.randn(4, 3)
    assert Dropout(0.5).eval()(inputs) is inputs
    assert Dropout(0.0)(inputs) is inputs


@pytest.mark.usefixtures("_either_way")
@pytest.mark.parametrize("p", [0.01, 0.1, 0.5, 0.9])
def test_dropout_keeps_its_share_and_the_mean(p: float) -> None:
    """Within 4 sd of the binomial share; what is kept is scaled by 1/(1 − p), so the mean is unbiased."""
    with seeding.scope(0, "share", p):
        found = Dropout(p)(torch.ones(1000, 1000)).double()
    sd = np.sqrt(p * (1 - p) / N)
    assert abs(float((found > 0).double().mean()) - (1 - p)) < 4 * sd
    assert abs(float(found.mean()) - 1) < 4 * sd / (1 - p)
    assert set(found.unique().tolist()) == {0.0, float(np.float32(1 / (1 - p)))}


@pytest.mark.usefixtures("_either_way")
def test_dropout_follows_the_scope_that_it_draws_in() -> None:
    layer, inputs = Dropout(0.5), torch.ones(20, 30)

    def draws(*names: object) -> list[torch.Tensor]:
        with seeding.scope(3, *names):
            return [layer(inputs) for _ in range(3)]

    first, again, other = draws("a"), draws("a"), draws("b")
    assert all(torch.equal(one, same) for one, same in zip(first, again, strict=True))
    assert not any(torch.equal(one, different) for one, different in zip(first, other, strict=True))
    assert not any(torch.equal(one, following) for one, following in pairwise(first))


@pytest.mark.parametrize("keep", [0.5, 0.9])
def test_dropout_masks_have_no_correlated_neighbours(keep: float) -> None:
    """Along a mask, at distances of one unit and of one cell; up to 4 standard errors."""
    for seed in (0, 1, 2**40 + 12345):
        mask = mask_of(seed, keep)
        assert abs(mask.sum() / np.sqrt(N)) < 4
        for lag in (1, 2, 3, 8, 16, 60, 128, 1024, 65536):
            assert abs(z_score(mask[:-lag], mask[lag:])) < 4, (seed, lag)


@pytest.mark.parametrize("difference", [1, 2, 3, 2**16, 2**31, 2**32, 2**32 + 1, 2**40, 2**62])
def test_dropout_masks_of_neighbouring_seeds_are_uncorrelated(difference: int) -> None:
    """At the same entry and at the next ones; seeds that differ in bit 61 alone have a correlation of 0.004."""
    for seed in (0, 977, 3 * 2**33 + 5):
        one, other = mask_of(seed), mask_of(seed + difference)
        for lag in (0, 1, 2, 64):
            assert abs(z_score(one[: N - lag], other[lag:])) < 4, (seed, lag)


def test_dropout_masks_of_one_stream_are_uncorrelated() -> None:
    """All pairs of 50 masks, seeded as a layer is: their correlations are as normal as chance makes them."""
    with seeding.scope(0, "masks"):
        seeds = [int(torch.empty((), dtype=torch.int64).random_()) for _ in range(50)]
    masks = np.stack([mask_of(seed, n=100_000) for seed in seeds])
    scores = (masks @ masks.T / np.sqrt(100_000))[np.triu_indices(50, 1)]
    assert stats.kstest(scores, "norm").pvalue > 1e-3
    assert np.abs(scores).max() < 4.5


def test_dropout_masks_drop_every_unit_equally_often() -> None:
    """χ² over 128 units of 5,000 cells, for several seeds: p-values neither tiny nor all near 1 (a grid)."""
    p_values = []
    for seed in range(20):
        kept = mask_of(seed, 0.9, 128 * 5000).reshape(5000, 128).sum(0) / np.sqrt(5000)
        p_values.append(stats.chi2.sf((kept**2).sum(), 128))
    assert min(p_values) > 1e-4
    assert stats.kstest(p_values, "uniform").pvalue > 1e-3


@pytest.mark.usefixtures("_either_way")
def test_dropout_has_the_gradient_of_its_mask() -> None:
    inputs = torch.randn(30, 40).requires_grad_()
    found = Dropout(0.4)(inputs)
    (gradient,) = torch.autograd.grad(found.sum(), inputs)
    torch.testing.assert_close(gradient * inputs, found, rtol=0, atol=0)
    assert set(gradient.unique().tolist()) == {0.0, float(np.float32(1 / 0.6))}


@pytest.mark.usefixtures("_either_way")
def test_dropout_keeps_type_and_shape() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for shape in ((5, 7), (0, 7), (2, 3, 4)):
            found = Dropout(0.5)(torch.ones(shape, dtype=dtype))
            assert (found.dtype, found.shape) == (dtype, shape)
    wide = torch.ones(40, 60).T
    assert set(Dropout(0.5)(wide).unique().tolist()) == {0.0, 2.0}


def test_dropout_under_autocast_stays_bfloat16() -> None:
    block = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), Dropout(0.5))
    with torch.autocast("cpu", torch.bfloat16):
        assert block(torch.ones(4, 8)).dtype == torch.bfloat16


@pytest.mark.parametrize("compiled", [True, False])
def test_dropout_takes_one_number_of_the_stream(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size, so that what is drawn next does not depend on it."""
    if not compiled:
        monkeypatch.setattr(layers, "COMPILED", None)
    following = set()
    for size in (1, 1000):
        with seeding.scope(1, "size"):
            Dropout(0.5)(torch.ones(size))
            following.add(float(torch.rand(())))
    assert len(following) == 1


def test_models_do_without_numba() -> None:
    command = [sys.executable, "-W", "ignore", "-c", WITHOUT_NUMBA]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.stdout.strip() == "done", found.stderr
