"""What a method or an attack may ask of a model: loss per cell, divergence between two models, membership signals.

A method written in these terms alone serves any model that answers them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
from scipy import sparse
from scipy.special import logsumexp
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from scforget import engine, seeding
from scforget.arrays import FloatArray, IntArray
from scforget.models.likelihoods import LOG_INVERSE_DISPERSION_LIMIT
from scforget.models.mixture import Model, members_of
from scforget.models.vae import VAE, Batch, Decoded, VAESettings, gaussian_kl

_SCORING_BATCH = 1024
# Counts that take no more than this are kept dense: slicing a sparse matrix costs a twentieth of a small model's step,
# and more than the whole step where the device has to wait for it.
_DENSE_BYTES = {"cpu": 2**26, "cuda": 2**33}


@dataclass(frozen=True)
class Signals:
    """What one model says of some cells, at fixed decoding (eval mode, z = μ, true library).

    Attributes
    ----------
    cells : ``[N]``
        Which prepared cells these are.
    reconstruction : ``[N]``, nats
        log p(x | z = μ), summed over genes.
    kl : ``[N]``, nats, >= 0
        KL of the posterior to the prior, summed over latent dimensions.
    mu, log_var : ``[N, Z]``
        Posterior mean and log variance.
    """

    cells: IntArray
    reconstruction: FloatArray
    kl: FloatArray
    mu: FloatArray
    log_var: FloatArray

    @property
    def elbo(self) -> FloatArray:
        """``[N]``, nats: reconstruction minus KL; the score s of the audit, higher = more member-like."""
        return self.reconstruction - self.kl

    @property
    def score(self) -> FloatArray:
        """What the audit's primary statistics rest on: :attr:`elbo`."""
        return self.elbo

    @property
    def latent(self) -> FloatArray:
        """Where the model puts each cell, ``[N, Z]``: :attr:`mu`."""
        return self.mu


class Loss(NamedTuple):
    """Per-cell training loss ``total [B]`` = −reconstruction + β·KL, and its parts, nats."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


class Divergence(NamedTuple):
    """How far a student is from its teacher on each cell: of the posteriors and of the decoded cells, ``[B]`` each.

    Nats, >= 0 (for ``log_mse`` the second is half a squared difference).
    """

    posterior: Tensor
    decoder: Tensor

    @property
    def total(self) -> Tensor:
        """Their sum, ``[B]``."""
        return self.posterior + self.decoder


def posterior_kl(mu: Tensor, log_var: Tensor, other_mu: Tensor, other_log_var: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(μ', σ'²)) summed over latent dimensions, ``[B]`` nats."""
    difference = (mu - other_mu).square() + log_var.exp()
    return 0.5 * (other_log_var - log_var + difference / other_log_var.exp() - 1).sum(-1)


def nb_kl(log_mean: Tensor, other_log_mean: Tensor, log_inverse_dispersion: Tensor) -> Tensor:
    """KL(NB(μ, r) ‖ NB(μ', r)) of each gene, ``[B, G]`` nats, at one inverse dispersion.

    Notes
    -----
    μ log(μ/μ') − (μ + r) log((μ + r)/(μ' + r)); the second logarithm is taken of 1 + μ/r and 1 + μ'/r, so that nothing
    cancels as r → ∞.
    """
    log_r = log_inverse_dispersion.clamp(-LOG_INVERSE_DISPERSION_LIMIT, LOG_INVERSE_DISPERSION_LIMIT)
    mean, r = log_mean.exp(), log_r.exp()
    return mean * (log_mean - other_log_mean) - (mean + r) * (
        softplus(log_mean - log_r) - softplus(other_log_mean - log_r)
    )


def _bernoulli_kl(logits: Tensor, other_logits: Tensor) -> Tensor:
    p = logits.sigmoid()
    return p * (logsigmoid(logits) - logsigmoid(other_logits)) + (1 - p) * (
        logsigmoid(-logits) - logsigmoid(-other_logits)
    )


class Task(Protocol):
    """What a method that serves VAEs and classifiers alike may ask; ``Any`` is the task's own kind of model and batch.

    :class:`VaeTask` answers for cells, :class:`~scforget.class_tasks.ClassifierTask` for labelled items.
    """

    def batch(self, cells: IntArray, /) -> Any:
        """Return the given items as tensors on the device."""

    def loss(self, model: Any, batch: Any, noise: torch.Generator | None, /) -> Any:
        """Return the training loss ℓ(θ; x) of each item, ``total [B]``."""

    def divergence(self, student: Any, teacher: Any, batch: Any, /) -> Any:
        """How far a student's answers are from its teacher's, ``total [B]``; differentiable in the student."""

    def outputs(self, model: Any, batch: Any, /) -> Tensor:
        """What an adversary sees of each item, ``[B, K]``; differentiable in the model."""

    def signals(self, model: Any, cells: IntArray, /) -> Any:
        """Score items in eval mode: ``score [N]``, higher = more member-like, and ``latent [N, Z]``."""

    def error(self, model: Any, cells: IntArray, /) -> float:
        """Mean loss of items in eval mode, without any noise."""


class VaeTask:
    """Counts of the modelled genes, and how a :class:`VAE` is asked about them.

    Parameters
    ----------
    counts : CSR ``[N, G]``
        Integer counts of every prepared cell over the modelled genes.
    total_counts : ``[N]``
        Counts of each cell over **all** genes; the library of ``log_mse`` as published.
    settings
        Architecture of new models.
    donors : ``[N]``, optional
        Whose each cell is, where that is known.
    conditions : ``[N]``, optional
        The group of each cell, 0 to C − 1, that the output layer of new models is told.
    """

    def __init__(
        self, counts: sparse.csr_matrix, total_counts: FloatArray, settings: VAESettings,
        donors: npt.NDArray[np.str_] | None = None, conditions: IntArray | None = None,
    ) -> None:  # fmt: skip
        self.counts = counts
        self.settings = settings
        self.donors = donors
        groups = 0 if conditions is None else int(conditions.max()) + 1
        codes = np.zeros(counts.shape[0], dtype=np.int64) if conditions is None else conditions
        self.one_hot = np.eye(groups, dtype=np.float32)[codes] if groups else np.zeros((len(codes), 0), np.float32)
        # A cell may have no count among the modelled genes; a library of 1 keeps its logarithm finite.
        self.library = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
        self.normaliser = total_counts if settings.likelihood == "log_mse" else self.library

    @cached_property
    def _dense(self) -> Tensor | None:
        """All counts dense on the device, ``[N, G]``, where they are small."""
        limit = _DENSE_BYTES[engine.device().type]
        small = 4 * self.counts.shape[0] * self.counts.shape[1] <= limit
        return torch.from_numpy(self.counts.toarray().astype(np.float32)).to(engine.device()) if small else None

    @cached_property
    def _sizes(self) -> tuple[Tensor, Tensor]:
        """Library and normaliser of every cell on the device, ``[N]`` each."""
        columns = (torch.from_numpy(one.astype(np.float32)) for one in (self.library, self.normaliser))
        library, normaliser = (column.to(engine.device()) for column in columns)
        return library, normaliser

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process gets: not what it makes for itself on its own device."""
        return {name: value for name, value in vars(self).items() if name not in ("_dense", "_sizes")}

    def new_model(self, seed: int) -> VAE:
        """Return a freshly initialised model; equal seeds give equal parameters."""
        with seeding.scope(seed, "initialise"):
            return VAE(self.counts.shape[1], self.settings, self.one_hot.shape[1]).to(engine.device())

    def batch(self, cells: IntArray) -> Batch:
        """Return the given cells as dense float32 tensors on the device."""
        which = torch.from_numpy(cells)
        if self._dense is None:
            counts = torch.from_numpy(self.counts[cells].toarray().astype(np.float32)).to(engine.device())
        else:
            counts = self._dense.index_select(0, which.to(engine.device()))
        library, normaliser = (column.index_select(0, which.to(engine.device()))[:, None] for column in self._sizes)
        condition = torch.from_numpy(self.one_hot[cells]).to(engine.device())
        return Batch(counts, torch.log1p(counts * (1e4 / normaliser)), library, condition)

    def loss(
        self, model: VAE, batch: Batch, noise: torch.Generator | None, *, beta: float = 1.0, free_bits: float = 0.0
    ) -> Loss:
        """Return the negative ELBO of each cell, ℓ(θ; x), summed over genes and latent dimensions.

        Parameters
        ----------
        noise
            Stream of the one latent draw per cell; ``None`` takes z = μ.
        beta : in [0, 1]
            Weight of the KL term (warm-up).
        free_bits : nats per latent dimension, >= 0
            The KL of each dimension counts as at least this (Kingma et al. 2016).
        """
        mu, log_var = model.encode(batch.inputs)
        z = mu
        if noise is not None:
            z = mu + (0.5 * log_var).exp() * engine.normal(mu.shape, noise)
        reconstruction = model.reconstruction(batch, model.decode(z, batch.condition))
        kl = gaussian_kl(mu, log_var)
        penalty = kl.clamp(min=free_bits).sum(-1) if free_bits else kl.sum(-1)
        return Loss(beta * penalty - reconstruction, reconstruction, kl.sum(-1))

    def divergence(self, student: VAE, teacher: VAE, batch: Batch, noise: torch.Generator | None = None) -> Divergence:
        """How far a student's answers are from its teacher's; differentiable in the student.

        Parameters
        ----------
        noise
            ``None``: each decodes its own z = μ. Otherwise both decode one draw of the teacher's posterior, so that
            a student's decoder learns before its encoder does.

        Notes
        -----
        KL(q_t ‖ q_s) of the posteriors, plus the decoder's divergence. ``nb``: :func:`nb_kl` at the teacher's
        dispersion, summed over genes. ``zinb``: the Bernoulli KL of the inflation plus (1 − π_t) times that, the
        chain rule's bound. ``log_mse``: half the squared difference of the decoded means.
        """
        with torch.no_grad():
            teacher_mu, teacher_log_var = teacher.encode(batch.inputs)
            z = teacher_mu
            if noise is not None:
                z = teacher_mu + (0.5 * teacher_log_var).exp() * engine.normal(z.shape, noise)
            wanted = teacher.decode(z, batch.condition)
        mu, log_var = student.encode(batch.inputs)
        found = student.decode(mu if noise is None else z, batch.condition)
        posterior = posterior_kl(teacher_mu, teacher_log_var, mu, log_var)
        return Divergence(posterior, self._decoder_divergence(found, wanted, batch).sum(-1))

    def _decoder_divergence(self, found: Decoded, wanted: Decoded, batch: Batch) -> Tensor:
        if self.settings.likelihood == "log_mse":
            difference = wanted.logits.softmax(-1) - found.logits.softmax(-1)
            return 0.5 * (batch.inputs.sum(-1, keepdim=True) * difference).square()
        log_library = batch.library.log()
        means = wanted.logits.log_softmax(-1) + log_library, found.logits.log_softmax(-1) + log_library
        divergence = nb_kl(*means, wanted.log_inverse_dispersion)
        if wanted.zero_logits is None or found.zero_logits is None:
            return divergence
        return _bernoulli_kl(wanted.zero_logits, found.zero_logits) + wanted.zero_logits.neg().sigmoid() * divergence

    def features(self, model: VAE, batch: Batch, noise: torch.Generator | None = None) -> Tensor:
        """What a membership attacker sees of each cell, ``[B, 5 + 2 Z]``; differentiable in the model.

        Columns in the published order: reconstruction, KL, ELBO, μ (Z), log σ² (Z), ‖μ‖, ‖log σ²‖.

        Parameters
        ----------
        noise
            ``None`` decodes z = μ; otherwise one draw of the posterior (as published).
        """
        mu, log_var = model.encode(batch.inputs)
        z = mu if noise is None else mu + (0.5 * log_var).exp() * engine.normal(mu.shape, noise)
        reconstruction = model.reconstruction(batch, model.decode(z, batch.condition))
        kl = gaussian_kl(mu, log_var).sum(-1)
        sums = torch.stack([reconstruction, kl, reconstruction - kl], 1)
        # the gradient of a norm is undefined at 0, where a collapsed posterior has it
        norms = torch.stack([(part.square().sum(-1) + 1e-12).sqrt() for part in (mu, log_var)], 1)
        return torch.cat([sums, mu, log_var, norms], 1)

    def outputs(self, model: VAE, batch: Batch) -> Tensor:
        """What an adversary of :mod:`~scforget.methods.ungan` sees of each cell, ``[B, Z + G]``, at z = μ.

        μ, and the expected expression on the scale of the encoder input, log1p(CP10k).
        """
        mu, _ = model.encode(batch.inputs)
        return torch.cat([mu, torch.log1p(1e4 * model.decode(mu, batch.condition).logits.softmax(-1))], 1)

    def error(self, model: Model, cells: IntArray) -> float:
        """Mean −ELBO of cells at z = μ, nats per cell."""
        return -float(self.signals(model, cells).elbo.mean())

    @torch.no_grad()
    def signals(self, model: Model, cells: IntArray) -> Signals:
        """Score cells at fixed decoding; see :class:`Signals`.

        Notes
        -----
        Of a mixture: the ELBO is log-mean-exp over members of their ELBOs, the KL their mean, the reconstruction
        what is left; μ and log σ² are concatenated.
        """
        model.eval()
        found = [self._signals(member, cells) for member in members_of(model)]
        if len(found) == 1:
            return found[0]
        elbo = logsumexp([one.elbo for one in found], axis=0) - np.log(len(found))
        kl = np.mean([one.kl for one in found], axis=0)
        mu, log_var = np.hstack([one.mu for one in found]), np.hstack([one.log_var for one in found])
        return Signals(cells, elbo + kl, kl, mu, log_var)

    def _signals(self, model: VAE, cells: IntArray) -> Signals:
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, len(cells), _SCORING_BATCH):
            batch = self.batch(cells[start : start + _SCORING_BATCH])
            mu, log_var = model.encode(batch.inputs)
            kl = gaussian_kl(mu, log_var).sum(-1)
            parts.append((model.reconstruction(batch, model.decode(mu, batch.condition)), kl, mu, log_var))
        columns = [torch.cat(column).double().cpu().numpy() for column in zip(*parts, strict=True)]
        return Signals(cells, *columns)

    @torch.no_grad()
    def predicted(self, model: Model, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """Expected counts and expected fraction of zeros of each gene over some cells, ``[G]`` each, at z = μ.

        Under ``log_mse`` there is no count distribution: the zeros are NaN. A mixture's answer is its members' mean.
        """
        model.eval()
        means, zeros = zip(*(self._predicted(member, cells) for member in members_of(model)), strict=True)
        return np.mean(means, axis=0), np.mean(zeros, axis=0)

    def _predicted(self, model: VAE, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        means, zeros = np.zeros(self.counts.shape[1]), np.zeros(self.counts.shape[1])
        for start in range(0, len(cells), _SCORING_BATCH):
            batch = self.batch(cells[start : start + _SCORING_BATCH])
            decoded = model.decode(model.encode(batch.inputs)[0], batch.condition)
            expressed = 1.0 if decoded.zero_logits is None else torch.sigmoid(-decoded.zero_logits)
            means += (batch.library * decoded.logits.softmax(-1) * expressed).sum(0).double().cpu().numpy()
            if self.settings.likelihood == "log_mse":
                zeros += np.nan
            else:
                empty = batch._replace(counts=torch.zeros_like(batch.counts))
                zeros += model.log_prob(empty, decoded).exp().sum(0).double().cpu().numpy()
        return means / len(cells), zeros / len(cells)

    @torch.no_grad()
    def decoded_means(self, model: Model, cells: IntArray, genes: IntArray) -> FloatArray:
        """Expected expression ``[N, len(genes)]`` at z = μ on the scale of the encoder input, log1p(CP10k).

        A mixture's answer is its members' mean.
        """
        model.eval()
        found = [self._decoded_means(member, cells, genes) for member in members_of(model)]
        return np.asarray(np.mean(found, axis=0), dtype=np.float64)

    def _decoded_means(self, model: VAE, cells: IntArray, genes: IntArray) -> FloatArray:
        parts = []
        for start in range(0, len(cells), _SCORING_BATCH):
            batch = self.batch(cells[start : start + _SCORING_BATCH])
            shares = model.decode(model.encode(batch.inputs)[0], batch.condition).logits.softmax(-1)
            if self.settings.likelihood == "log_mse":
                means = shares * batch.inputs.sum(-1, keepdim=True)
            else:
                means = torch.log1p(1e4 * shares)
            parts.append(means[:, torch.from_numpy(genes)].double().cpu().numpy())
        return np.concatenate(parts)
