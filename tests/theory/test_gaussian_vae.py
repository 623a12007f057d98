import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Normal, kl_divergence

from scforget import fisher, percell
from scforget.errors import DataError
from scforget.theory.gaussian_vae import GaussianTask, GaussianVAE, QuadratureSettings, likelihood, log_likelihood

GENES = 4
QUADRATURE = QuadratureSettings(reach=6.0, nodes=121, hermite=16)


@pytest.fixture
def task():
    points = np.random.default_rng(0).normal(size=(12, GENES)) * 2 - 1
    return GaussianTask(points, hidden=[8], latent=2, dropout=0.0)


@pytest.fixture
def model(task):
    model = task.new_model(3).eval()
    with torch.no_grad():
        model.dispersion.bias.copy_(torch.tensor([0.3, -0.5, 1.0, 0.0]))
    return model


@pytest.fixture
def linear(task):
    """A model whose decoder is z -> W z + b: the hidden layers are replaced, so that everything has a closed form."""
    torch.manual_seed(0)
    model = task.new_model(1).eval()
    model.decoder = torch.nn.Identity()
    model.scale = torch.nn.Linear(2, GENES)
    return model


def points_of(task, n=5):
    return task.points[:n].double().numpy()


def marginal(model):
    """x ~ N(b, W W' + diag σ²) of a linear decoder."""
    weight, offset = model.scale.weight.detach().double().numpy(), model.scale.bias.detach().double().numpy()
    noise = np.diag(np.exp(-model.dispersion.bias.detach().double().numpy()))
    return stats.multivariate_normal(offset, weight @ weight.T + noise), weight, offset, noise


def test_batch_holds_the_points_themselves(task):
    batch = task.batch(np.array([3, 1]))
    assert torch.equal(batch.counts, task.points[[3, 1]])
    assert batch.inputs is batch.counts
    assert (batch.counts < 0).any()
    assert batch.library.tolist() == [[1.0], [1.0]]


def test_log_prob_is_the_normal_density(task, model):
    batch = task.batch(np.arange(6))
    decoded = model.decode(model.encode(batch.inputs)[0])
    wanted = Normal(decoded.logits, (-0.5 * decoded.log_inverse_dispersion).exp()).log_prob(batch.counts)
    torch.testing.assert_close(model.log_prob(batch, decoded), wanted)
    torch.testing.assert_close(model.reconstruction(batch, decoded), wanted.sum(-1))


def test_new_model_depends_on_the_seed_alone(task):
    one, same, other = (task.new_model(seed) for seed in (5, 5, 6))
    assert isinstance(one, GaussianVAE)
    for name, value in one.state_dict().items():
        assert torch.equal(value, same.state_dict()[name])
    assert not torch.equal(one.scale.weight, other.scale.weight)


def test_divergence_is_the_kl_of_the_decoded_normals(task, model):
    other, batch = task.new_model(9).eval(), task.batch(np.arange(6))
    found = task.divergence(other, model, batch).decoder
    laws = []
    for one in (model, other):
        decoded = one.decode(one.encode(batch.inputs)[0])
        laws.append(Normal(decoded.logits, (-0.5 * decoded.log_inverse_dispersion).exp()))
    torch.testing.assert_close(found, kl_divergence(*laws).sum(-1))
    assert (task.divergence(model, model, batch).total.abs() < 1e-6).all()


def test_fisher_diagonal_is_the_mean_of_squared_single_gradients(task, model):
    cells = np.arange(5)
    found = fisher.diagonal(model, task, cells, draws=1, seed=0)
    from scforget import seeding

    noise = seeding.torch_generator(0, "fisher")
    batch = task.batch(cells)
    losses = task.loss(model, batch, noise).total
    total = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    for loss in losses:
        model.zero_grad(set_to_none=True)
        loss.backward(retain_graph=True)
        for name, value in model.named_parameters():
            total[name] += value.grad**2 / len(cells)
    for name, value in total.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)
    assert (found["dispersion.bias"] > 0).all()
    assert type(model.dispersion) in percell.RULES


def test_log_likelihood_is_the_marginal_normal_of_a_linear_decoder(task, linear):
    found, error = log_likelihood(linear, points_of(task), QUADRATURE)
    np.testing.assert_allclose(found, marginal(linear)[0].logpdf(points_of(task)), atol=1e-6)
    assert (error < 1e-6).all()


def test_log_likelihood_is_an_adaptive_integral_of_a_deep_decoder(task, model):
    point = points_of(task, 1)
    found, error = log_likelihood(model, point, QUADRATURE)
    precision = np.exp(model.dispersion.bias.detach().double().numpy())

    def density(b, a):
        with torch.no_grad():
            mean = model.decode(torch.tensor([[a, b]], dtype=torch.float32)).logits.double().numpy()[0]
        log_p = 0.5 * (np.log(precision) - math.log(2 * math.pi) - (point[0] - mean) ** 2 * precision).sum()
        return math.exp(log_p - 0.5 * (a**2 + b**2)) / (2 * math.pi)

    wanted, _ = integrate.dblquad(density, -5, 5, -5, 5, epsabs=1e-9, epsrel=1e-3)
    assert found[0] == pytest.approx(math.log(wanted), abs=2e-3)
    assert error[0] < 0.01


def test_log_likelihood_error_shows_a_grid_that_is_too_coarse(task, linear):
    with torch.no_grad():
        linear.dispersion.bias.fill_(8.0)  # a posterior of sd 0.02 between nodes 0.5 apart
    wanted = marginal(linear)[0].logpdf(points_of(task))
    found, error = log_likelihood(linear, points_of(task), QUADRATURE.model_copy(update={"nodes": 25}))
    off = np.abs(found - wanted)
    assert off.max() > 1
    assert (error > 1)[off > 1].all()


def test_likelihood_gap_is_the_kl_of_the_encoder_to_the_exact_posterior(task, linear):
    points = points_of(task)
    found = likelihood(linear, points, QUADRATURE)
    _, weight, offset, noise = marginal(linear)
    covariance = np.linalg.inv(np.eye(2) + weight.T @ np.linalg.inv(noise) @ weight)
    means = (points - offset) @ np.linalg.inv(noise) @ weight @ covariance
    with torch.no_grad():
        mu, log_var = (part.double().numpy() for part in linear.encode(torch.from_numpy(points).float()))
    for i in range(len(points)):
        own = np.diag(np.exp(log_var[i]))
        inverse = np.linalg.inv(covariance)
        away = means[i] - mu[i]
        kl = 0.5 * (np.trace(inverse @ own) + away @ inverse @ away - 2)
        kl += 0.5 * (np.linalg.slogdet(covariance)[1] - log_var[i].sum())
        assert found.gap[i] == pytest.approx(kl, abs=1e-5)
    np.testing.assert_allclose(found.elbo + found.gap, found.log_likelihood)


def test_likelihood_bound_is_the_mean_over_sampled_posteriors(task, model):
    points = points_of(task, 2)
    found = likelihood(model, points, QUADRATURE)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        batch = task.batch(np.arange(2).repeat(20_000))
        elbo = -task.loss(model, batch, generator).total.double().numpy().reshape(2, -1)
    np.testing.assert_allclose(found.elbo, elbo.mean(1), atol=5 * elbo.std(1).max() / math.sqrt(20_000))
    assert (found.gap > 0).all()


def test_log_likelihood_refuses_what_is_no_plane(task, model):
    line = GaussianTask(points_of(task), hidden=[4], latent=3, dropout=0.0).new_model(0)
    with pytest.raises(DataError, match="2 latent dimensions"):
        log_likelihood(line, points_of(task), QUADRATURE)
    with pytest.raises(DataError, match="odd number"):
        log_likelihood(model, points_of(task), QUADRATURE.model_copy(update={"nodes": 120}))
