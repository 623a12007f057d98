"""Proposition 1: when the diagonal Fisher of a linear layer is an outer product.

Exactly and in samples, for squared error, and in the form that a negative binomial has instead.
"""

from __future__ import annotations

from itertools import product
from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from pydantic import Field
from torch import Tensor, nn

from scforget import fisher, seeding
from scforget.arrays import FloatArray
from scforget.models.likelihoods import nb_log_prob
from scforget.settings import Settings
from scforget.theory.corollary import BoundSettings, PointSettings, bounds, cosine, simulate_bounds

Positive = Annotated[float, Field(gt=0)]
Several = Annotated[int, Field(ge=2)]


class PropositionSettings(Settings):
    """Sizes of what Proposition 1 and Corollary 2 are tried on.

    Attributes
    ----------
    outputs, inputs
        D and H of the linear decoder.
    residuals, latents
        Vectors of each that a full product pairs.
    draws
        Sizes n of the samples of independent pairs.
    repeats
        Samples of each size.
    level
        Of the interval of the fitted slope.
    strengths
        Shares of dependent pairs of the two small examples, in tenths.
    means, inverse_dispersions
        Typical mean count, and r, of the negative binomial.
    point
        Of the published numbers.
    bounds
        See :class:`~scforget.theory.corollary.BoundSettings`.
    """

    outputs: Several
    inputs: Several
    residuals: Several
    latents: Several
    draws: Annotated[list[Several], Field(min_length=2)]
    repeats: Several
    level: Annotated[float, Field(gt=0, lt=1)]
    strengths: list[Annotated[int, Field(ge=0, le=10)]]
    means: list[Positive]
    inverse_dispersions: list[Positive]
    point: PointSettings
    bounds: BoundSettings


class Pairs(NamedTuple):
    """Residuals ``[N, D]`` and latents ``[N, H]`` of some cells, in float64."""

    residuals: FloatArray
    latents: FloatArray

    def fisher(self) -> FloatArray:
        """F/4 of squared error, ``[D, H]``: the mean of e_d² z_h²."""
        return np.asarray((self.residuals**2).T @ self.latents**2 / len(self.latents))

    def factors(self) -> tuple[FloatArray, FloatArray]:
        """σ ``[D]`` and ν ``[H]``: the means of e² and of z²."""
        return (self.residuals**2).mean(0), (self.latents**2).mean(0)

    def covariance(self) -> FloatArray:
        """Cov(e_d², z_h²) over the cells, ``[D, H]``."""
        centred = self.residuals**2 - self.factors()[0]
        return np.asarray(centred.T @ (self.latents**2 - self.factors()[1]) / len(self.latents))


def every_pair(residuals: FloatArray, latents: FloatArray) -> Pairs:
    """Pair each residual with each latent vector: independent in the sample, not only in the limit."""
    return Pairs(np.repeat(residuals, len(latents), axis=0), np.tile(latents, (len(residuals), 1)))


def _linear(weight: FloatArray, bias: FloatArray) -> nn.Linear:
    """Return a layer of these parameters, in float64."""
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0], dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    return layer


def squared_error_fisher(pairs: Pairs, weight: FloatArray) -> FloatArray:
    """Diagonal Fisher ``[D, H]`` of the weight of f(z) = Wz + b under squared error, by autograd cell by cell.

    Parameters
    ----------
    pairs
        Each cell's residual and latent vector; what it is fitted to is f(z) + e.
    weight : ``[D, H]``
        W.
    """
    decoder = _linear(weight, np.zeros(len(weight)))
    with torch.no_grad():
        latents = torch.from_numpy(pairs.latents)
        targets = decoder(latents) + torch.from_numpy(pairs.residuals)

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        return (batch[1] - decoder(batch[0])).square().sum(1)

    return np.asarray(fisher.mean_squares(decoder, losses, [(latents, targets)])["weight"].numpy())


def _factorised(forget: tuple[FloatArray, FloatArray], retain: tuple[FloatArray, FloatArray]) -> float:
    """cos(σ^F, σ^R)·cos(ν^F, ν^R)."""
    return cosine(forget[0], retain[0]) * cosine(forget[1], retain[1])


def _scales(settings: PropositionSettings, rng: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    """Standard deviation of each residual and of each latent dimension of one set."""
    return rng.lognormal(0, 0.7, settings.outputs), rng.lognormal(0, 0.7, settings.inputs)


def product_design(settings: PropositionSettings, seed: int) -> dict[str, Any]:
    """Both identities of Proposition 1 where residual and latent are exactly independent.

    Returns
    -------
    dict
        ``cells`` of each set, ``cosine``, ``product``, and the largest relative errors ``entry_error`` and
        ``cosine_error``.

    Notes
    -----
    Loss L = Σ_d e_d², e = x − Wz − b: ∂L/∂W_dh = −2 e_d z_h, so F_dh = 4 E[e_d² z_h²], which is 4 E[e_d²] E[z_h²] where
    e_d² and z_h² are uncorrelated. Then F = 4σνᵀ, and the cosine of two outer products is the product of the cosines.
    """
    rng = seeding.numpy_generator(seed, "product design")
    weight = rng.normal(size=(settings.outputs, settings.inputs))
    errors, found, factors = [], [], []
    for _ in range(2):
        scale_e, scale_z = _scales(settings, rng)
        residuals = scale_e * rng.normal(size=(settings.residuals, settings.outputs))
        latents = scale_z * rng.normal(rng.normal(size=settings.inputs), size=(settings.latents, settings.inputs))
        pairs = every_pair(residuals, latents)
        found.append(squared_error_fisher(pairs, weight))
        factors.append(pairs.factors())
        errors.append(np.abs(found[-1] / (4 * np.outer(*factors[-1])) - 1).max())
    measured, predicted = cosine(*found), _factorised(*factors)
    return {
        "cells": settings.residuals * settings.latents, "cosine": measured, "product": predicted,
        "entry_error": float(max(errors)), "cosine_error": abs(predicted / measured - 1),
    }  # fmt: skip


def convergence(settings: PropositionSettings, seed: int) -> dict[str, Any]:
    """How fast the cosine identity is reached as independent pairs are drawn.

    Returns
    -------
    dict
        ``draws``, ``error`` (root mean square over repeats of measured cosine − product of the sample's factors) and
        ``slope``, ``low``, ``high``: of log |error| on log n, with the interval of least squares.

    Notes
    -----
    F̂ = σ̂ν̂ᵀ + Ĉ with the sample's covariance Ĉ = O(n^(−1/2)), which enters the cosine linearly: slope −1/2.
    """
    rng = seeding.numpy_generator(seed, "convergence")
    scales = _scales(settings, rng), _scales(settings, rng)
    errors = np.empty((len(settings.draws), settings.repeats))
    for row, repeat in product(range(len(errors)), range(settings.repeats)):
        n = settings.draws[row]
        sets = [
            Pairs(e * rng.standard_normal((n, settings.outputs)), z * rng.standard_normal((n, settings.inputs)))
            for e, z in scales
        ]
        errors[row, repeat] = cosine(sets[0].fisher(), sets[1].fisher()) - _factorised(*(one.factors() for one in sets))
    sizes = np.repeat(np.log(settings.draws), settings.repeats)
    fit = scipy.stats.linregress(sizes, np.log(np.abs(errors)).ravel())
    width = fit.stderr * scipy.stats.t.ppf((1 + settings.level) / 2, errors.size - 2)
    return {
        "draws": settings.draws, "error": np.sqrt((errors**2).mean(1)).tolist(),
        "slope": float(fit.slope), "low": float(fit.slope - width), "high": float(fit.slope + width),
    }  # fmt: skip


_FIRST, _SECOND, _NONE = [1.0, 0.0], [0.0, 1.0], [0.0, 0.0]


def _example(residuals: list[list[float]], latents: list[list[float]], tenths: int) -> Pairs:
    """Two states of residual and latent, in so many tenths of the cells paired in order, in the others each with each.

    Both kinds of cells have the same σ and ν, so that the share changes nothing but the dependence.
    """
    given = np.array(residuals), np.array(latents)
    free = every_pair(*given)
    tied = Pairs(*(np.repeat(one, 2, axis=0) for one in given))
    parts = [free] * (10 - tenths) + [tied] * tenths
    return Pairs(*(np.concatenate(column) for column in zip(*parts, strict=True)))


def dependence(settings: PropositionSettings, seed: int) -> dict[str, Any]:
    """What a residual that depends on the latent does: the gap is the covariance, and may have either sign.

    Returns
    -------
    dict
        ``identity_error``: largest |F_dh/4 − σ_d ν_h − Cov(e_d², z_h²)| relative to the largest entry, in a
        heteroscedastic sample. ``examples``: for each share of dependent cells ``strength`` the ``product`` and the
        ``cosine`` of two pairs of sets, ``over`` and ``under``.

    Notes
    -----
    F_dh/4 = E[e_d² z_h²] = σ_d ν_h + Cov(e_d², z_h²), with no assumption. Two outputs, two inputs, two
    states of a cell:

    *over*: (e², z²) is (e₁, e₁) or (e₂, e₂) in F, and (e₁, e₂) or (e₂, e₁) in R. All factors are flat, the product is
    1; the Fishers I/2 and its mirror image have cosine 0.

    *under*: F has states (e₁, e₁) and (e₂, 0), R only (e₁, e₁). Both Fishers are multiples of e₁e₁ᵀ, cosine 1; the
    silent state of F counts in σ alone, product 1/√2.
    """
    rng = seeding.numpy_generator(seed, "dependence")
    weight = rng.normal(size=(settings.outputs, settings.inputs))
    latents = rng.normal(size=(settings.residuals * settings.latents, settings.inputs))
    spread = np.exp(latents @ rng.normal(scale=0.3, size=(settings.inputs, settings.outputs)))
    pairs = Pairs(spread * rng.normal(size=spread.shape), latents)
    wanted = np.outer(*pairs.factors()) + pairs.covariance()
    error = np.abs(squared_error_fisher(pairs, weight) / 4 - wanted).max() / wanted.max()
    both, swapped = [_FIRST, _SECOND], [_SECOND, _FIRST]
    rows = []
    for tenths in settings.strengths:
        row: dict[str, Any] = {"strength": tenths / 10}
        examples = {
            "over": (_example(both, both, tenths), _example(both, swapped, tenths)),
            "under": (_example(both, [_FIRST, _NONE], tenths), _example([_FIRST] * 2, [_FIRST] * 2, tenths)),
        }
        for name, (forget, retain) in examples.items():
            fishers = (squared_error_fisher(one, np.eye(2)) for one in (forget, retain))
            row |= {f"{name}_cosine": cosine(*fishers)}
            row |= {f"{name}_product": _factorised(forget.factors(), retain.factors())}
        rows.append(row)
    return {"identity_error": float(error), "examples": rows}


def nb_gradient(counts: FloatArray, mean: FloatArray, r: FloatArray | float) -> FloatArray:
    """Gradient of the NB log-likelihood in log μ: m = x − (x + r)μ/(μ + r) = r(x − μ)/(μ + r), of any shape."""
    return np.asarray(r * (counts - mean) / (mean + r))


def nb_weight(mean: FloatArray, r: FloatArray | float) -> FloatArray:
    """E[m²] under the model, rμ/(μ + r), below both μ and r: it saturates.

    Notes
    -----
    Var(x) = μ(μ + r)/r, and m is x − μ times r/(μ + r). Squared error in μ has E[(x − μ)²] = μ + μ²/r, unbounded.
    """
    return np.asarray(r * mean / (mean + r))


def coupled_weight(shares: FloatArray, weight: FloatArray) -> FloatArray:
    """E[g_d²] under the model where μ = s·softmax(a), g the gradient in a; ``[..., G]`` each.

    Notes
    -----
    ∂ log p/∂a_d = m_d − p_d Σ_g m_g. Genes are independent given z and E[m] = 0, so with v = E[m²]
    E[g_d²] = (1 − 2p_d) v_d + p_d² Σ_g v_g.
    """
    return np.asarray((1 - 2 * shares) * weight + shares**2 * weight.sum(-1, keepdims=True))


def nb_fisher(counts: FloatArray, latents: FloatArray, decoder: nn.Linear, r: float) -> FloatArray:
    """Diagonal Fisher ``[D, H]`` of the weight of log μ = Wz + b under NB(μ, r), by autograd cell by cell."""
    log_r = torch.tensor(np.log(r), dtype=torch.float64)

    def losses(batch: tuple[Tensor, Tensor]) -> Tensor:
        return -nb_log_prob(batch[1], decoder(batch[0]), log_r).sum(1)

    batch = torch.from_numpy(latents), torch.from_numpy(counts)
    return np.asarray(fisher.mean_squares(decoder, losses, [batch])["weight"].numpy())


def _nb_product(settings: PropositionSettings, mean: float, r: float, rng: np.random.Generator) -> dict[str, float]:
    """Relative errors where every vector of counts meets every latent vector, at means that do not depend on it."""
    found, factors, errors = [], [], []
    for _ in range(2):
        scale_e, scale_z = _scales(settings, rng)
        means = mean * scale_e
        decoder = _linear(np.zeros((settings.outputs, settings.inputs)), np.log(means))
        counts = rng.negative_binomial(r, r / (r + means), (settings.residuals, settings.outputs)).astype(np.float64)
        counts[0] += 1  # no gene without a count
        pairs = every_pair(counts, scale_z * rng.normal(size=(settings.latents, settings.inputs)))
        found.append(nb_fisher(*pairs, decoder, r))
        factors.append(((nb_gradient(counts, means, r) ** 2).mean(0), pairs.factors()[1]))
        errors.append(np.abs(found[-1] / np.outer(*factors[-1]) - 1).max())
    return {
        "entry_error": float(max(errors)),
        "cosine_error": abs(_factorised(*factors) / cosine(*found) - 1),
    }


def _nb_dependent(settings: PropositionSettings, mean: float, r: float, rng: np.random.Generator) -> dict[str, float]:
    """How far the model's own Fisher is from an outer product where log μ = Wz + log(mean)."""
    weight = rng.normal(scale=1 / np.sqrt(settings.inputs), size=(settings.inputs, settings.outputs))
    fishers, factors, shares = [], [], []
    for _ in range(2):
        scale_z = _scales(settings, rng)[1] ** 0.5
        latents = scale_z * rng.normal(size=(settings.residuals * settings.latents, settings.inputs))
        expected = nb_weight(mean * np.exp(latents @ weight), r)  # E[m² | z], [N, D]
        fishers.append(expected.T @ latents**2 / len(latents))
        factors.append((expected.mean(0), (latents**2).mean(0)))
        shares.append(np.linalg.norm(fishers[-1] - np.outer(*factors[-1])) / np.linalg.norm(fishers[-1]))
    measured, predicted = cosine(*fishers), _factorised(*factors)
    return {"covariance_share": float(max(shares)), "cosine": measured, "product": predicted}


def negative_binomial(settings: PropositionSettings, seed: int) -> dict[str, Any]:
    """The negative-binomial form of Proposition 1, checked exactly, and where its condition fails.

    Returns
    -------
    dict
        ``weight_error``: largest relative error of E[m²] = rμ/(μ + r) against the sum over counts; and ``rows``, one
        for each mean and r: ``entry_error`` and ``cosine_error`` of the factorisation in a full product of counts with
        latents at fixed means; ``covariance_share`` (‖Cov‖/‖F‖, the larger of two sets), ``cosine`` and ``product``
        of the model's own Fisher where log μ is linear in z.

    Notes
    -----
    *Proposition.* Let a count decoder have log μ = Wz + b, or μ = s·softmax(Wz + b), and NB loss with inverse
    dispersion r. Then F_dh = E[w_d z_h²] with w_d = m_d², m_d = r(x_d − μ_d)/(μ_d + r), or w_d = (m_d − p_d Σ_g m_g)²
    under the softmax: the weight w takes the place of 4e². F = E[w] E[z²]ᵀ, and the cosine factorises, if and only if
    (for F) every w_d is uncorrelated with every z_h².

    Under the model E[w_d | z] = rμ_d/(μ_d + r) depends on z through μ unless μ_d >> r, where it is r: where counts are
    nearly Poisson (μ << r) the weight is μ itself, and the residual is never independent of the latent. Squared error
    with noise of fixed variance has no such term.
    """
    rng = seeding.numpy_generator(seed, "negative binomial")
    rows, errors = [], []
    for mean, r in product(settings.means, settings.inverse_dispersions):
        distribution = scipy.stats.nbinom(r, r / (r + mean))
        counts = np.arange(distribution.isf(1e-15) + 200 * (1 + mean / r))
        summed = (distribution.pmf(counts) * nb_gradient(counts, np.array(mean), r) ** 2).sum()
        errors.append(abs(summed / float(nb_weight(np.array(mean), r)) - 1))
        same = seeding.numpy_generator(seed, "negative binomial", "latents")  # rows differ in nothing but mean and r
        row = {"mean": mean, "inverse_dispersion": r}
        rows.append(row | _nb_product(settings, mean, r, rng) | _nb_dependent(settings, mean, r, same))
    return {"weight_error": float(max(errors)), "rows": rows}


def run(settings: PropositionSettings, seed: int) -> dict[str, Any]:
    """Everything about Proposition 1 and Corollary 2 that needs no data; see the functions of the same names."""
    point = settings.point
    return {
        "product_design": product_design(settings, seed),
        "convergence": convergence(settings, seed),
        "dependence": dependence(settings, seed),
        "negative_binomial": negative_binomial(settings, seed),
        "bounds": bounds(point.outputs, point.differing, point.largest, point.classes),
        "simulated_bounds": simulate_bounds(settings.bounds, seed),
    }
