"""What a method or an attack may ask of a model: loss per cell, divergence between two models, membership signals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from scforget import seeding
from scforget.arrays import FloatArray, IntArray
from scforget.models.vae import VAE, Batch, VAESettings, gaussian_kl

_SCORING_BATCH = 1024


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


class Loss(NamedTuple):
    """Per-cell training loss ``total [B]`` = −reconstruction + β·KL, and its parts, nats."""

    total: Tensor
    reconstruction: Tensor
    kl: Tensor


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
    """

    def __init__(self, counts: sparse.csr_matrix, total_counts: FloatArray, settings: VAESettings) -> None:
        self.counts = counts
        self.settings = settings
        # A cell may have no count among the modelled genes; a library of 1 keeps its logarithm finite.
        self.library = np.maximum(np.asarray(counts.sum(axis=1), dtype=np.float64).ravel(), 1.0)
        self.normaliser = total_counts if settings.likelihood == "log_mse" else self.library

    def new_model(self, seed: int) -> VAE:
        """Return a freshly initialised model; equal seeds give equal parameters."""
        with seeding.scope(seed, "initialise"):
            return VAE(self.counts.shape[1], self.settings)

    def batch(self, cells: IntArray) -> Batch:
        """Return the given cells as dense float32 tensors."""
        counts = torch.from_numpy(self.counts[cells].toarray().astype(np.float32))
        library = torch.from_numpy(self.library[cells].astype(np.float32))[:, None]
        normaliser = torch.from_numpy(self.normaliser[cells].astype(np.float32))[:, None]
        return Batch(counts, torch.log1p(counts * (1e4 / normaliser)), library)

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
            z = mu + (0.5 * log_var).exp() * torch.randn(mu.shape, generator=noise)
        reconstruction = model.reconstruction(batch, model.decode(z))
        kl = gaussian_kl(mu, log_var)
        penalty = kl.clamp(min=free_bits).sum(-1) if free_bits else kl.sum(-1)
        return Loss(beta * penalty - reconstruction, reconstruction, kl.sum(-1))

    @torch.no_grad()
    def signals(self, model: VAE, cells: IntArray) -> Signals:
        """Score cells at fixed decoding; see :class:`Signals`."""
        model.eval()
        parts: list[tuple[Tensor, ...]] = []
        for start in range(0, len(cells), _SCORING_BATCH):
            batch = self.batch(cells[start : start + _SCORING_BATCH])
            mu, log_var = model.encode(batch.inputs)
            kl = gaussian_kl(mu, log_var).sum(-1)
            parts.append((model.reconstruction(batch, model.decode(mu)), kl, mu, log_var))
        columns = [torch.cat(column).double().numpy() for column in zip(*parts, strict=True)]
        return Signals(cells, *columns)

    @torch.no_grad()
    def predicted(self, model: VAE, cells: IntArray) -> tuple[FloatArray, FloatArray]:
        """Expected counts and expected fraction of zeros of each gene over some cells, ``[G]`` each, at z = μ.

        Under ``log_mse`` there is no count distribution: the zeros are NaN.
        """
        model.eval()
        means, zeros = np.zeros(self.counts.shape[1]), np.zeros(self.counts.shape[1])
        for start in range(0, len(cells), _SCORING_BATCH):
            batch = self.batch(cells[start : start + _SCORING_BATCH])
            decoded = model.decode(model.encode(batch.inputs)[0])
            expressed = 1.0 if decoded.zero_logits is None else torch.sigmoid(-decoded.zero_logits)
            means += (batch.library * decoded.logits.softmax(-1) * expressed).sum(0).double().numpy()
            if self.settings.likelihood == "log_mse":
                zeros += np.nan
            else:
                empty = batch._replace(counts=torch.zeros_like(batch.counts))
                zeros += model.log_prob(empty, decoded).exp().sum(0).double().numpy()
        return means / len(cells), zeros / len(cells)

    @torch.no_grad()
    def decoded_means(self, model: VAE, cells: IntArray, genes: IntArray) -> FloatArray:
        """Expected expression ``[N, len(genes)]`` at z = μ on the scale of the encoder input, log1p(CP10k)."""
        model.eval()
        parts = []
        for start in range(0, len(cells), _SCORING_BATCH):
            batch = self.batch(cells[start : start + _SCORING_BATCH])
            shares = model.decode(model.encode(batch.inputs)[0]).logits.softmax(-1)
            if self.settings.likelihood == "log_mse":
                means = shares * batch.inputs.sum(-1, keepdim=True)
            else:
                means = torch.log1p(1e4 * shares)
            parts.append(means[:, torch.from_numpy(genes)].double().numpy())
        return np.concatenate(parts)
