"""The task: loss and signals against the ELBO written out by hand, predictions against closed forms."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse, stats

from scforget import tasks
from scforget.arrays import FloatArray, IntArray
from scforget.models.vae import VAE, Decoded
from scforget.tasks import VaeTask

MakeTask = Callable[..., VaeTask]
LIKELIHOODS = ["nb", "zinb", "log_mse"]
KINDS = list(product(LIKELIHOODS, ["gene-cell", "gene"]))
CELLS: IntArray = np.array([3, 200, 17, 17, 90, 0, 239, 41], dtype=np.int64)


def model_of(task: VaeTask) -> VAE:
    """Return a model that is far from its initial symmetry, in eval mode."""
    model = task.new_model(5).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def by_hand(task: VaeTask, model: VAE, cells: IntArray, z_noise: FloatArray | float = 0.0) -> dict[str, Any]:
    """ELBO parts of some cells by numpy and scipy, from raw counts; only the network itself is torch's."""
    counts = task.counts[cells].toarray()
    settings = task.settings
    library = np.maximum(counts.sum(1), 1)[:, None]
    total = 1.5 * counts.sum(1)[:, None] if settings.likelihood == "log_mse" else library
    expression = np.log1p(1e4 * counts / total)
    mu, log_var = (t.double().numpy() for t in model.encode(torch.from_numpy(expression.astype(np.float32))))
    z = mu + np.exp(log_var / 2) * z_noise
    decoded = model.decode(torch.from_numpy(z.astype(np.float32)))
    shares = decoded.logits.double().softmax(1).numpy()
    kl = (mu**2 + np.exp(log_var) - 1 - log_var) / 2
    found = {"mu": mu, "log_var": log_var, "kl": kl, "shares": shares, "library": library, "expression": expression}
    found |= _log_prob(settings.likelihood, counts, decoded, expression, shares * library, shares)
    return found


def _log_prob(
    likelihood: str, counts: FloatArray, decoded: Decoded, expression: FloatArray, mean: FloatArray, shares: FloatArray
) -> dict[str, Any]:
    if likelihood == "log_mse":
        return {"reconstruction": -((expression - shares * expression.sum(1, keepdims=True)) ** 2).sum(1)}
    r = np.exp(decoded.log_inverse_dispersion.double().numpy())
    zero, share = stats.nbinom.pmf(0, r, r / (r + mean)), np.zeros_like(mean)
    log_p = stats.nbinom.logpmf(counts, r, r / (r + mean))
    if decoded.zero_logits is not None:
        share = 1 / (1 + np.exp(-decoded.zero_logits.double().numpy()))
        log_p = np.log(share * (counts == 0) + (1 - share) * np.exp(log_p))
        zero = share + (1 - share) * zero
    return {"reconstruction": log_p.sum(1), "zero": zero, "mean": (1 - share) * mean}


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_loss_is_minus_the_elbo_written_out_by_hand(make_task: MakeTask, likelihood: str, dispersion: str) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    model = model_of(task)
    noise = torch.randn(len(CELLS), 4, generator=torch.Generator().manual_seed(7)).double().numpy()
    wanted = by_hand(task, model, CELLS, noise)
    loss = task.loss(model, task.batch(CELLS), torch.Generator().manual_seed(7))
    np.testing.assert_allclose(loss.reconstruction.detach(), wanted["reconstruction"], rtol=2e-5)
    np.testing.assert_allclose(loss.kl.detach(), wanted["kl"].sum(1), rtol=2e-5)
    elbo = wanted["reconstruction"] - wanted["kl"].sum(1)
    np.testing.assert_allclose(loss.total.detach(), -elbo, rtol=2e-5)
    with torch.no_grad():
        without = task.loss(model, task.batch(CELLS), None).reconstruction
    assert not np.allclose(without, wanted["reconstruction"], rtol=1e-3)


def test_loss_weighs_the_kl_by_beta(task: VaeTask) -> None:
    model = model_of(task)
    with torch.no_grad():
        for beta in (0.0, 0.3, 1.0):
            loss = task.loss(model, task.batch(CELLS), None, beta=beta)
            torch.testing.assert_close(loss.total, beta * loss.kl - loss.reconstruction)
            assert (loss.kl > 1).all()


def test_loss_counts_every_dimension_for_at_least_its_free_bits(task: VaeTask) -> None:
    model = model_of(task)
    kl = by_hand(task, model, CELLS)["kl"]
    free = float(np.median(kl))
    with torch.no_grad():
        loss = task.loss(model, task.batch(CELLS), None, beta=0.5, free_bits=free)
    penalty = 0.5 * np.maximum(kl, free).sum(1)
    np.testing.assert_allclose(loss.total + loss.reconstruction, penalty, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(loss.kl, kl.sum(1), rtol=2e-5)


def test_loss_has_no_kl_gradient_inside_the_free_bits(task: VaeTask) -> None:
    model = task.new_model(0).eval()
    loss = task.loss(model, task.batch(CELLS), None, free_bits=1e6)
    (gradient,) = torch.autograd.grad(loss.total.sum(), model.log_var.weight, allow_unused=True)
    assert gradient is None or not gradient.any()


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_signals_equal_the_loss_parts_without_noise(make_task: MakeTask, likelihood: str, dispersion: str) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    model = model_of(task)
    with torch.no_grad():
        loss = task.loss(model, task.batch(CELLS), None)
    signals = task.signals(model.train(), CELLS)  # a model left in training mode is scored without dropout
    np.testing.assert_array_equal(signals.cells, CELLS)
    np.testing.assert_array_equal(signals.reconstruction, loss.reconstruction)
    np.testing.assert_array_equal(signals.kl, loss.kl)
    np.testing.assert_array_equal(signals.elbo, signals.reconstruction - signals.kl)
    wanted = by_hand(task, model, CELLS)
    np.testing.assert_allclose(signals.mu, wanted["mu"], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(signals.log_var, wanted["log_var"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_scoring_does_not_depend_on_its_batches(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, likelihood: str
) -> None:
    task, cells = make_task(likelihood=likelihood), np.arange(50)
    model = model_of(task)

    def scored() -> list[FloatArray]:
        signals = task.signals(model, cells)
        parts = [signals.reconstruction, signals.kl, signals.mu, signals.log_var]
        return [*parts, *task.predicted(model, cells), task.decoded_means(model, cells, np.array([5, 2]))]

    whole = scored()
    monkeypatch.setattr(tasks, "_SCORING_BATCH", 7)
    for one, other in zip(whole, scored(), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_cell_without_counts_in_the_modelled_genes_stays_finite(make_task: MakeTask, likelihood: str) -> None:
    counts = sparse.csr_matrix(np.vstack([np.zeros(60), np.arange(60.0)]))
    task = VaeTask(counts, np.array([900.0, 2000.0]), make_task(likelihood=likelihood).settings)
    model, both = task.new_model(0).eval(), np.array([0, 1])
    loss = task.loss(model, task.batch(both), torch.Generator().manual_seed(0)).total
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())
    signals = task.signals(model, both)
    assert np.isfinite(signals.elbo).all()
    assert np.isfinite(task.decoded_means(model, both, np.arange(60))).all()


def test_batch_is_the_same_from_dense_and_from_sparse_counts(
    make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counts too large to be kept dense are sliced as they are; no cell and repeated cells included."""
    dense = make_task()
    assert dense.batch(CELLS).counts.any()  # decides how it keeps them
    monkeypatch.setitem(tasks._DENSE_BYTES, "cpu", 0)
    sliced = make_task()
    for cells in ([], [3], [5, 2, 2, 0]):
        found = zip(dense.batch(np.array(cells, int)), sliced.batch(np.array(cells, int)), strict=True)
        assert all(torch.equal(*pair) and pair[0].dtype == torch.float32 for pair in found)


def test_batch_normalises_by_the_modelled_genes_except_as_published(make_task: MakeTask) -> None:
    counts = make_task().counts[CELLS].toarray()
    modelled = counts.sum(1, keepdims=True)
    for likelihood, total in (("nb", modelled), ("zinb", modelled), ("log_mse", 1.5 * modelled)):
        batch = make_task(likelihood=likelihood).batch(CELLS)
        np.testing.assert_array_equal(batch.counts, counts)
        np.testing.assert_array_equal(batch.library, modelled)
        np.testing.assert_allclose(batch.inputs, np.log1p(1e4 * counts / total), rtol=1e-6)
        assert {tensor.dtype for tensor in batch} == {torch.float32}


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_predicted_equals_the_mean_of_each_cells_distribution(
    make_task: MakeTask, likelihood: str, dispersion: str
) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    model = model_of(task)
    wanted = by_hand(task, model, CELLS)
    means, zeros = task.predicted(model, CELLS)
    expected = wanted.get("mean", wanted["shares"] * wanted["library"])
    np.testing.assert_allclose(means, expected.mean(0), rtol=2e-5)
    if likelihood == "log_mse":
        assert np.isnan(zeros).all()
    else:
        np.testing.assert_allclose(zeros, wanted["zero"].mean(0), rtol=2e-5)


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
def test_decoded_means_are_on_the_scale_of_the_encoder_input(make_task: MakeTask, likelihood: str) -> None:
    task, genes = make_task(likelihood=likelihood), np.array([59, 0, 7])
    model = model_of(task)
    wanted = by_hand(task, model, CELLS)
    means = np.log1p(1e4 * wanted["shares"])
    if likelihood == "log_mse":
        means = wanted["shares"] * wanted["expression"].sum(1, keepdims=True)
    np.testing.assert_allclose(task.decoded_means(model, CELLS, genes), means[:, genes], rtol=2e-5, atol=1e-6)


def test_new_model_depends_on_its_seed_alone(task: VaeTask) -> None:
    before = torch.get_rng_state()
    first = task.new_model(1).state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(3)
    again, other = task.new_model(1).state_dict(), task.new_model(2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["scale.weight"], other["scale.weight"])


def test_conditions_reach_the_output_layer_alone(task: VaeTask) -> None:
    groups = np.arange(task.counts.shape[0]) % 3
    told = VaeTask(task.counts, task.normaliser, task.settings, conditions=groups)
    model, cells = told.new_model(0), np.arange(6)
    batch = told.batch(cells)
    assert batch.condition is not None
    assert batch.condition.argmax(1).tolist() == [0, 1, 2, 0, 1, 2]
    with torch.no_grad():
        model.eval()
        mu = model.encode(batch.inputs)[0]
        hidden = model.decoder(mu)
        share = model.scale.weight[:, -3:].T[torch.from_numpy(groups[cells])]  # the column of each cell's own group
        by_hand = hidden @ model.scale.weight[:, :-3].T + model.scale.bias + share
        torch.testing.assert_close(model.decode(mu, batch.condition).logits, by_hand)
        plain = model.dispersion(hidden)
        torch.testing.assert_close(model.decode(mu, batch.condition).log_inverse_dispersion, plain)
    other = VaeTask(task.counts, task.normaliser, task.settings, conditions=(groups + 1) % 3)
    assert not np.array_equal(told.signals(model, cells).elbo, other.signals(model, cells).elbo)
    assert task.batch(cells).condition is not None  # of no column
    assert task.batch(cells).condition.shape == (6, 0)
