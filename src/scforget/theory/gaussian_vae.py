"""A VAE of real-valued points: the project's own model, task and training, with a Gaussian for the counts' law.

With two latent dimensions its likelihood is an integral over a plane and can be had exactly, by quadrature.
"""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import torch
from pydantic import Field
from scipy import sparse
from torch import Tensor

from scforget import engine, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.errors import DataError
from scforget.models.vae import VAE, Batch, Decoded, VAESettings
from scforget.settings import Settings
from scforget.tasks import VaeTask

_LOG_2PI = float(np.log(2 * np.pi))
# Elements of one block of the points × nodes table of the quadrature: 32 MiB of float64.
_BLOCK = 2**22


class QuadratureSettings(Settings):
    """The plane's nodes for the exact likelihood, and the line's for an expectation under the encoder's posterior.

    Attributes
    ----------
    reach
        The grid covers [−reach, reach]² of the latent plane; the prior's mass beyond 6 is 4e-9.
    nodes
        Grid nodes along each axis, an odd number: every second one makes a grid of twice the step, on which the
        error is estimated.
    hermite
        Gauss–Hermite nodes along each axis.
    """

    reach: Annotated[float, Field(gt=0)]
    nodes: Annotated[int, Field(ge=3)]
    hermite: Annotated[int, Field(ge=1)]


class GaussianVAE(VAE):
    """The VAE with a Gaussian observation model: mean from the scale head, variance from the dispersion.

    Notes
    -----
    The inverse dispersion of a Gaussian is its precision, so log σ² is minus what ``decode`` calls
    ``log_inverse_dispersion``: log p(x | z) = −½ Σ_g [log 2π + log σ_g² + (x_g − m_g(z))²/σ_g²].
    """

    def log_prob(self, batch: Batch, decoded: Decoded) -> Tensor:
        """Log-density of each coordinate, ``[B, G]`` nats."""
        log_precision = decoded.log_inverse_dispersion
        return 0.5 * (log_precision - _LOG_2PI - (batch.counts - decoded.logits).square() * log_precision.exp())

    def reconstruction(self, batch: Batch, decoded: Decoded) -> Tensor:
        """:meth:`log_prob` of each point, ``[B]``, summed over coordinates."""
        return self.log_prob(batch, decoded).sum(-1)


class GaussianTask(VaeTask):
    """Real-valued points in the place of counts: what a batch calls counts and inputs are the points themselves.

    What is asked of counts alone (``predicted``, ``decoded_means``) has no meaning here.

    Parameters
    ----------
    points : ``[N, G]``
        Every point, whatever its part.
    hidden, latent, dropout
        Architecture of new models, see :class:`~scforget.models.vae.VAESettings`.
    """

    def __init__(self, points: FloatArray, *, hidden: list[int], latent: int, dropout: float) -> None:
        # the likelihood's name only says that there is no head for zeros; the model's own density is used
        settings = VAESettings(hidden=hidden, latent=latent, likelihood="nb", dispersion="gene", dropout=dropout)
        super().__init__(sparse.csr_matrix(points), np.ones(len(points)), settings)
        self.points = torch.from_numpy(np.asarray(points, dtype=np.float32))

    def new_model(self, seed: int) -> GaussianVAE:
        """Return a freshly initialised model; equal seeds give equal parameters."""
        with seeding.scope(seed, "initialise"):
            return GaussianVAE(self.points.shape[1], self.settings).to(engine.device())

    def batch(self, cells: IntArray) -> Batch:
        """Return the given points, of library 1."""
        points = self.points.index_select(0, torch.from_numpy(cells)).to(engine.device())
        return Batch(points, points, torch.ones(len(points), 1, device=points.device))

    def _decoder_divergence(self, found: Decoded, wanted: Decoded, batch: Batch) -> Tensor:  # noqa: ARG002
        """KL(N(m_t, σ_t²) ‖ N(m_s, σ_s²)) of each coordinate, ``[B, G]`` nats; each with its own variance."""
        log_ratio = found.log_inverse_dispersion - wanted.log_inverse_dispersion
        square = (wanted.logits - found.logits).square() * found.log_inverse_dispersion.exp()
        return 0.5 * (log_ratio.exp() + square - 1 - log_ratio)


class Likelihood(NamedTuple):
    """What a model says of points, exactly, ``[N]`` each, nats.

    Attributes
    ----------
    log_likelihood
        log p_θ(x) = log ∫ N(z; 0, I) p_θ(x | z) dz.
    error
        How far that moves on a grid of twice the step: an estimate, on the safe side, of the quadrature's error.
    elbo
        E_q[log p_θ(x | z)] − KL(q(z | x) ‖ N(0, I)): what the score at z = μ stands for.
    gap
        KL(q(z | x) ‖ p_θ(z | x)), the encoder's error, >= 0 up to the quadrature's.
    """

    log_likelihood: FloatArray
    error: FloatArray
    elbo: FloatArray
    gap: FloatArray


def _grid(settings: QuadratureSettings) -> tuple[FloatArray, FloatArray]:
    """Nodes ``[J, 2]`` and log prior weights ``[J]``: log(h² N(z; 0, I)), row by row of the square."""
    line = np.linspace(-settings.reach, settings.reach, settings.nodes)
    nodes = np.stack(np.meshgrid(line, line, indexing="ij"), -1).reshape(-1, 2)
    return nodes, 2 * np.log(line[1] - line[0]) - _LOG_2PI - 0.5 * (nodes**2).sum(1)


def _decoded(model: GaussianVAE, nodes: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Means ``[J, G]`` and log precisions ``[G]`` of the decoded nodes."""
    decoded = model.decode(torch.from_numpy(nodes).float())
    return decoded.logits.double().numpy(), decoded.log_inverse_dispersion[0].double().numpy()


def _log_density(points: FloatArray, means: FloatArray, log_precision: FloatArray) -> FloatArray:
    """Log p(x | z) of every point at every node, ``[N, J]``, by one matrix product."""
    root = np.exp(0.5 * log_precision)
    x, m = points * root, means * root
    squares = (x**2).sum(1)[:, None] + (m**2).sum(1) - 2 * x @ m.T
    return 0.5 * (float(log_precision.sum()) - points.shape[1] * _LOG_2PI - squares)


@torch.no_grad()
def log_likelihood(
    model: GaussianVAE, points: FloatArray, settings: QuadratureSettings
) -> tuple[FloatArray, FloatArray]:
    """Exact log p_θ(x) of points under a model with two latent dimensions, and the quadrature's error.

    Parameters
    ----------
    points : ``[N, G]``

    Returns
    -------
    tuple
        log p_θ(x) ``[N]``, nats, and how far it is from that of a grid of twice the step, ``[N]``, >= 0.

    Raises
    ------
    DataError
        If the latent space is no plane, or the number of nodes is even.

    Notes
    -----
    The trapezoidal rule on a square; for a smooth integrand that vanishes at the border its error falls faster than
    any power of the step once the step is below the integrand's width. The kinks of the decoder's ReLU make it h².
    """
    if model.settings.latent != 2 or settings.nodes % 2 == 0:
        space = f"{model.settings.latent} latent dimensions and {settings.nodes} nodes"
        raise DataError("exact likelihood", space, "2 latent dimensions and an odd number of nodes along each axis")
    model.eval()
    nodes, weights = _grid(settings)
    means, log_precision = _decoded(model, nodes)
    coarse = np.zeros((settings.nodes, settings.nodes), dtype=bool)
    coarse[::2, ::2] = True
    rare = coarse.ravel()
    found: list[FloatArray] = []
    rough: list[FloatArray] = []
    for start in range(0, len(points), step := max(1, _BLOCK // len(nodes))):
        table = weights + _log_density(points[start : start + step], means, log_precision)
        top = table.max(axis=1)
        parts = np.exp(table - top[:, None])
        found.append(top + np.log(parts.sum(axis=1)))
        with np.errstate(divide="ignore"):  # the coarse grid may miss a narrow posterior altogether
            rough.append(top + np.log(4 * parts[:, rare].sum(axis=1)))
    exact = np.concatenate(found)
    return exact, np.abs(exact - np.concatenate(rough))


@torch.no_grad()
def likelihood(model: GaussianVAE, points: FloatArray, settings: QuadratureSettings) -> Likelihood:
    """Compare the bound with what it bounds: exact log-likelihood, exact ELBO and their gap of some points.

    Parameters
    ----------
    points : ``[N, G]``

    Notes
    -----
    log p_θ(x) − ELBO(x) = KL(q ‖ p_θ(z | x)) (Kingma and Welling 2014, eq. 1). E_q by a Gauss–Hermite product rule
    at z = μ + σ·√2·t.
    """
    exact, error = log_likelihood(model, points, settings)
    mu, log_var = (part.double().numpy() for part in model.encode(torch.from_numpy(points).float()))
    abscissae, line = np.polynomial.hermite.hermgauss(settings.hermite)
    expected = np.zeros(len(points))
    for one, first in zip(abscissae, line, strict=True):
        for two, second in zip(abscissae, line, strict=True):
            z = mu + np.exp(0.5 * log_var) * np.sqrt(2) * np.array([one, two])
            means, log_precision = _decoded(model, z)
            square = ((points - means) ** 2 * np.exp(log_precision)).sum(1)
            density = 0.5 * (log_precision.sum() - points.shape[1] * _LOG_2PI - square)
            expected += first * second / np.pi * density
    elbo = expected - 0.5 * (mu**2 + np.exp(log_var) - 1 - log_var).sum(1)
    return Likelihood(exact, error, elbo, exact - elbo)
