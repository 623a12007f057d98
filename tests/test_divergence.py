"""Divergences, attackers' features and mixtures of a task, against sums and loops written out."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from scforget.arrays import FloatArray, IntArray
from scforget.models.mixture import Mixture, members_of
from scforget.models.vae import VAE, Decoded
from scforget.tasks import VaeTask, nb_kl, posterior_kl

MakeTask = Callable[..., VaeTask]
KINDS = list(product(["nb", "zinb", "log_mse"], ["gene-cell", "gene"]))
CELLS: IntArray = np.array([3, 200, 17, 17, 90, 0, 239, 41], dtype=np.int64)
MEANS = (1e-3, 0.2, 1.0, 40.0, 1e3)


def moved(task: VaeTask, seed: int) -> VAE:
    """Return a model far from its initial symmetry, in eval mode."""
    model, generator = task.new_model(seed).eval(), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


def test_posterior_kl_is_that_of_independent_normals() -> None:
    generator = torch.Generator().manual_seed(0)
    mu, log_var, other_mu, other_log_var = 2 * torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    normals = (Normal(m, (0.5 * v).exp()) for m, v in ((mu, log_var), (other_mu, other_log_var)))
    wanted = kl_divergence(*normals).sum(1)
    torch.testing.assert_close(posterior_kl(mu, log_var, other_mu, other_log_var), wanted, rtol=1e-12, atol=0)
    assert not torch.allclose(posterior_kl(other_mu, other_log_var, mu, log_var), wanted)
    assert not posterior_kl(mu, log_var, mu, log_var).any()


def nbinom_kl(mean: float, other: float, r: float) -> float:
    """Sum of p·log(p/q) over counts, up to where what is left weighs less than 1e-18."""
    last = mean + 20 * np.sqrt(mean + mean**2 / r) + 45 / np.log1p(r / mean) + 10
    counts = np.arange(int(last) + 1)
    log_p, log_q = (stats.nbinom.logpmf(counts, r, r / (r + m)) for m in (mean, other))
    return float((np.exp(log_p) * (log_p - log_q)).sum())


@pytest.mark.parametrize("r", [0.05, 1.0, 30.0, 1e4])
def test_nb_kl_is_the_sum_over_counts(r: float) -> None:
    """To 1e-7 relative: the sum itself is no better where p is within 1e-7 of 1."""
    pairs = np.array(list(product(MEANS, MEANS)))
    wanted = [nbinom_kl(mean, other, r) for mean, other in pairs]
    log_means = torch.from_numpy(np.log(pairs))
    found = nb_kl(log_means[:, 0], log_means[:, 1], torch.tensor(r, dtype=torch.float64).log())
    np.testing.assert_allclose(found, wanted, rtol=1e-7, atol=1e-11)
    assert found.min() > -1e-11
    assert (found[pairs[:, 0] != pairs[:, 1]] > 1e-3).all()


@pytest.mark.parametrize(
    "log_r",
    [
        -3.0,
        4.0,
        12.0,
        15.0,
    ],
)
def test_nb_kl_is_accurate_in_single_precision(log_r: float) -> None:
    grid = torch.linspace(-7, 7, 29, dtype=torch.float64)
    arguments = grid[:, None], grid[None], torch.tensor(log_r, dtype=torch.float64)
    found, wanted = nb_kl(*(each.float() for each in arguments)), nb_kl(*arguments)
    # means go up to e^7 = 1,097, of which single precision resolves 1e-4
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=3e-3)


def decoded_by_hand(task: VaeTask, model: VAE, cells: IntArray, z: Tensor) -> dict[str, FloatArray]:
    """Means, inverse dispersions and inflation of decoded cells, from raw counts."""
    counts = task.counts[cells].toarray()
    decoded = Decoded(*(None if part is None else part.double() for part in model.decode(z)))
    library = counts.sum(1, keepdims=True)
    if task.settings.likelihood == "log_mse":
        library = np.log1p(1e4 * counts / (1.5 * library)).sum(1, keepdims=True)
    share = 0.0 if decoded.zero_logits is None else decoded.zero_logits.sigmoid().numpy()
    mean = library * decoded.logits.softmax(1).numpy()
    return {"mean": mean, "r": decoded.log_inverse_dispersion.exp().numpy(), "share": np.zeros_like(mean) + share}


def decoder_divergence_by_hand(likelihood: str, own: dict[str, Any], teacher: dict[str, Any]) -> FloatArray:
    """METHODS: the NB's closed form at the teacher's dispersion; half a squared difference for ``log_mse``."""
    mean, other, r = teacher["mean"], own["mean"], teacher["r"]
    if likelihood == "log_mse":
        return np.asarray((0.5 * (mean - other) ** 2).sum(1))
    nb = mean * np.log(mean / other) - (mean + r) * np.log((mean + r) / (other + r))
    if likelihood == "nb":
        return np.asarray(nb.sum(1))
    p, q = teacher["share"], own["share"]
    bernoulli = p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))
    return np.asarray((bernoulli + (1 - p) * nb).sum(1))


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
@torch.no_grad()
def test_divergence_is_its_formula_written_out(make_task: MakeTask, likelihood: str, dispersion: str) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    student, teacher, batch = moved(task, 1), moved(task, 2), task.batch(CELLS)
    (mu, log_var), (other_mu, other_log_var) = student.encode(batch.inputs), teacher.encode(batch.inputs)
    eps = torch.randn(mu.shape, generator=torch.Generator().manual_seed(3))
    draw = other_mu + (0.5 * other_log_var).exp() * eps
    cases = ((None, mu, other_mu), (torch.Generator().manual_seed(3), draw, draw))
    for noise, z, other_z in cases:
        found = task.divergence(student, teacher, batch, noise)
        own, wanted = decoded_by_hand(task, student, CELLS, z), decoded_by_hand(task, teacher, CELLS, other_z)
        np.testing.assert_allclose(found.decoder, decoder_divergence_by_hand(likelihood, own, wanted), rtol=1e-4)
        posterior = posterior_kl(*(part.double() for part in (other_mu, other_log_var, mu, log_var)))
        np.testing.assert_allclose(found.posterior, posterior, rtol=1e-5)
        torch.testing.assert_close(found.total, found.posterior + found.decoder)
        assert (found.posterior > 0.1).all()
        assert (found.decoder > 0.01).all()


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
@pytest.mark.parametrize("shared", [False, True])
@torch.no_grad()
def test_divergence_of_equal_models_is_0(make_task: MakeTask, likelihood: str, dispersion: str, shared: bool) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    noise = torch.Generator().manual_seed(0) if shared else None
    found = task.divergence(moved(task, 1), moved(task, 1), task.batch(CELLS), noise)
    assert found.total.tolist() == [0.0] * len(CELLS)


@torch.no_grad()
def test_divergence_of_zinb_bounds_that_of_the_inflated_counts(make_task: MakeTask) -> None:
    task = make_task(likelihood="zinb")
    models, batch = [moved(task, seed) for seed in (1, 2)], task.batch(CELLS[:2])
    bound = task.divergence(models[0], models[1], batch).decoder
    student, teacher = (decoded_by_hand(task, m, CELLS[:2], m.encode(batch.inputs)[0]) for m in models)
    counts, r = np.arange(5_000)[:, None, None], teacher["r"]
    p, q = (
        each["share"] * (counts == 0) + (1 - each["share"]) * stats.nbinom.pmf(counts, r, r / (r + each["mean"]))
        for each in (teacher, student)
    )
    matters = p > 1e-30
    assert q[matters].min() > 1e-300
    terms = np.where(matters, p * np.log(np.where(matters, p, 1) / np.where(matters, q, 1)), 0)
    exact = terms.sum((0, 2))
    np.testing.assert_allclose(p.sum(0), 1, atol=1e-9)
    assert (bound.numpy() >= exact).all()
    assert (bound.numpy() < 1.5 * exact).all()


def test_divergence_decodes_one_draw_of_the_teachers_posterior_in_both(
    task: VaeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    student, teacher, batch = moved(task, 1), moved(task, 2), task.batch(CELLS)
    seen: list[Tensor] = []
    decode = VAE.decode

    def watched(model: VAE, z: Tensor, condition: Tensor | None = None) -> Decoded:
        seen.append(z.detach())
        return decode(model, z, condition)

    monkeypatch.setattr(VAE, "decode", watched)
    task.divergence(student, teacher, batch, torch.Generator().manual_seed(3))
    task.divergence(student, teacher, batch)
    mu, log_var = teacher.encode(batch.inputs)
    draw = mu + (0.5 * log_var).exp() * torch.randn(mu.shape, generator=torch.Generator().manual_seed(3))
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], draw)
    assert torch.equal(seen[2], mu)
    assert torch.equal(seen[3], student.encode(batch.inputs)[0])


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_divergence_gives_a_gradient_to_the_student_alone(
    make_task: MakeTask, likelihood: str, dispersion: str
) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    student, teacher = moved(task, 1), moved(task, 2)
    task.divergence(student, teacher, task.batch(CELLS)).total.mean().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    moves = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert moves == {name for name, _ in student.named_parameters() if not name.startswith("dispersion.")}
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in student.parameters() if p.grad is not None)


def test_divergence_of_a_shared_draw_teaches_the_decoder_apart_from_the_encoder(task: VaeTask) -> None:
    student, teacher, batch = moved(task, 1), moved(task, 2), task.batch(CELLS)
    task.divergence(student, teacher, batch, torch.Generator().manual_seed(0)).decoder.mean().backward()
    assert student.mu.weight.grad is None
    assert student.scale.weight.grad is not None


@pytest.mark.parametrize(("likelihood", "dispersion"), KINDS)
def test_features_are_the_signals_in_the_published_order(make_task: MakeTask, likelihood: str, dispersion: str) -> None:
    task = make_task(likelihood=likelihood, dispersion=dispersion)
    model, batch = moved(task, 1), task.batch(CELLS)
    features = task.features(model, batch)
    signals = task.signals(model, CELLS)
    wanted = np.column_stack([
        signals.reconstruction, signals.kl, signals.elbo, signals.mu, signals.log_var,
        np.linalg.norm(signals.mu, axis=1), np.linalg.norm(signals.log_var, axis=1),
    ])  # fmt: skip
    assert features.shape == (len(CELLS), 5 + 2 * 4)
    np.testing.assert_allclose(features.detach(), wanted, rtol=1e-6)
    drawn = task.features(model, batch, torch.Generator().manual_seed(4)).detach()
    loss = task.loss(model, batch, torch.Generator().manual_seed(4))
    assert torch.equal(drawn[:, 0], loss.reconstruction)
    assert not torch.equal(drawn[:, 0], features[:, 0])
    assert torch.equal(drawn[:, 3:], features[:, 3:])


def test_features_have_a_gradient_even_where_the_posterior_has_collapsed(task: VaeTask) -> None:
    model = moved(task, 1)
    with torch.no_grad():
        for head in (model.mu, model.log_var):
            head.weight.zero_(), head.bias.zero_()
    task.features(model, task.batch(CELLS)).sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "log_mse"])
def test_mixture_answers_as_its_members_cell_by_cell(make_task: MakeTask, likelihood: str) -> None:
    task = make_task(likelihood=likelihood)
    members = [moved(task, seed) for seed in (1, 2, 3)]
    mixture = Mixture(members).train()
    found = task.signals(mixture, CELLS)
    each = [task.signals(member, CELLS) for member in members]
    for index in range(len(CELLS)):
        elbos = [np.longdouble(one.elbo[index]) for one in each]
        top = max(elbos)
        bound = float(top + np.log(sum(np.exp(elbo - top) for elbo in elbos) / 3))
        assert found.elbo[index] == pytest.approx(bound, rel=1e-12)
        assert found.kl[index] == pytest.approx(sum(one.kl[index] for one in each) / 3, rel=1e-12)
        assert found.mu[index].tolist() == [value for one in each for value in one.mu[index]]
        assert found.log_var[index].tolist() == [value for one in each for value in one.log_var[index]]
    assert not any(member.training for member in members)
    np.testing.assert_array_equal(found.cells, CELLS)


@pytest.mark.parametrize("likelihood", ["nb", "zinb", "log_mse"])
def test_mixture_predicts_the_mean_of_its_members(make_task: MakeTask, likelihood: str) -> None:
    task, genes = make_task(likelihood=likelihood), np.array([5, 0], dtype=np.int64)
    members = [moved(task, seed) for seed in (1, 2, 3)]
    mixture = Mixture(members)
    for found, wanted in (
        (task.predicted(mixture, CELLS), [task.predicted(member, CELLS) for member in members]),
        ((task.decoded_means(mixture, CELLS, genes),), [(task.decoded_means(m, CELLS, genes),) for m in members]),
    ):
        for value, parts in zip(found, zip(*wanted, strict=True), strict=True):
            np.testing.assert_allclose(value, sum(parts) / 3, rtol=1e-12)


def test_mixture_of_one_or_of_equals_is_that_model(task: VaeTask) -> None:
    model = moved(task, 1)
    alone, one, three = (task.signals(m, CELLS) for m in (model, Mixture([model]), Mixture(3 * [model])))
    np.testing.assert_array_equal(one.elbo, alone.elbo)
    np.testing.assert_array_equal(one.mu, alone.mu)
    np.testing.assert_allclose(three.elbo, alone.elbo, rtol=1e-12)
    assert three.mu.shape == (len(CELLS), 3 * 4)
    assert len(Mixture(3 * [model])) == 3
    assert members_of(model) == members_of(Mixture([model])) == [model]
