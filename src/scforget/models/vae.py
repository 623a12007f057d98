"""The single-cell VAE: an encoder to a Gaussian posterior, a decoder to a count distribution."""

from __future__ import annotations

from itertools import pairwise
from typing import Annotated, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from scforget.models.layers import Dropout
from scforget.models.likelihoods import (
    nb_log_likelihood,
    nb_log_prob,
    squared_error,
    zinb_log_likelihood,
    zinb_log_prob,
)
from scforget.settings import Settings


class VAESettings(Settings):
    """Architecture of the VAE.

    Attributes
    ----------
    hidden
        Widths of the encoder's hidden layers, input side first; the decoder mirrors them.
    latent
        Dimensions Z of the latent space.
    likelihood
        ``nb``, ``zinb`` or ``log_mse`` (the squared error that the published results were made with).
    dispersion
        Inverse dispersion per gene and cell (a decoder head) or per gene (one value each).
    dropout
        Probability in every hidden block.
    """

    hidden: Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=1)]
    latent: Annotated[int, Field(gt=0)]
    likelihood: Literal["nb", "zinb", "log_mse"]
    dispersion: Literal["gene-cell", "gene"]
    dropout: Annotated[float, Field(ge=0, lt=1)]


class Batch(NamedTuple):
    """Some cells, dense: ``counts [B, G]``, encoder ``inputs [B, G]`` (log1p CP10k), ``library [B, 1]`` (counts).

    ``condition [B, C]`` is a one-hot of each cell's group where the decoder is told it, and has no column otherwise.
    """

    counts: Tensor
    inputs: Tensor
    library: Tensor
    condition: Tensor | None = None


class Decoded(NamedTuple):
    """Decoder output: ``logits [B, G]`` of the expression shares, log r, and zero-inflation logits (``zinb`` only)."""

    logits: Tensor
    log_inverse_dispersion: Tensor
    zero_logits: Tensor | None


class PerGene(nn.Module):
    """One free value per gene, ``[G]``, as a module so that per-cell gradients can be hooked like a layer's."""

    def __init__(self, genes: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(genes))

    def forward(self, hidden: Tensor) -> Tensor:
        """Expand to ``[B, G]``."""
        return self.bias.expand(hidden.shape[0], -1)


def _blocks(widths: list[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU(), Dropout(dropout)]
    return nn.Sequential(*layers)


def _full(output: Tensor) -> Tensor:
    """What comes after the layers is float32 even where autocast runs them in bfloat16."""
    return output.float() if output.dtype == torch.bfloat16 else output


class VAE(nn.Module):
    """VAE with hidden blocks Linear → LayerNorm → ReLU → Dropout.

    Parameters
    ----------
    genes
        G, the number of modelled genes.
    settings
        See :class:`VAESettings`.
    conditions
        C > 0: groups of which the output layer of the expression shares is told one, by C further inputs; a control of
        the Fisher analysis.

    Notes
    -----
    At 2000-1024-512-128-32 with ``nb`` and ``gene-cell`` it has exactly 7,349,984 parameters, as published (7,377,984
    with 14 conditions).
    """

    def __init__(self, genes: int, settings: VAESettings, conditions: int = 0) -> None:
        super().__init__()
        self.settings = settings
        self.conditions = conditions
        widths = [genes, *settings.hidden]
        self.encoder = _blocks(widths, settings.dropout)
        self.mu = nn.Linear(widths[-1], settings.latent)
        self.log_var = nn.Linear(widths[-1], settings.latent)
        self.decoder = _blocks([settings.latent, *settings.hidden[::-1]], settings.dropout)
        self.scale = nn.Linear(widths[1] + conditions, genes)
        self.dispersion = nn.Linear(widths[1], genes) if settings.dispersion == "gene-cell" else PerGene(genes)
        self.zero = nn.Linear(widths[1], genes) if settings.likelihood == "zinb" else None

    def encode(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, G]`` log-normalised expression → posterior μ and log σ², each ``[B, Z]``."""
        hidden = self.encoder(inputs)
        return _full(self.mu(hidden)), _full(self.log_var(hidden))

    def decode(self, z: Tensor, condition: Tensor | None = None) -> Decoded:
        """``[B, Z]`` → parameters of the observation model; ``condition [B, C]`` is needed where C > 0."""
        hidden = self.decoder(z)
        zero_logits = _full(self.zero(hidden)) if self.zero is not None else None
        told = hidden if not self.conditions or condition is None else torch.cat([hidden, condition], 1)
        return Decoded(_full(self.scale(told)), _full(self.dispersion(hidden)), zero_logits)

    def log_prob(self, batch: Batch, decoded: Decoded) -> Tensor:
        """Log-likelihood of each count, ``[B, G]``: nats, or minus a squared error for ``log_mse``."""
        if self.settings.likelihood == "log_mse":
            return -squared_error(batch.inputs, decoded.logits)
        log_mean = decoded.logits.log_softmax(-1) + batch.library.log()
        if decoded.zero_logits is None:
            return nb_log_prob(batch.counts, log_mean, decoded.log_inverse_dispersion)
        return zinb_log_prob(batch.counts, log_mean, decoded.log_inverse_dispersion, decoded.zero_logits)

    def reconstruction(self, batch: Batch, decoded: Decoded) -> Tensor:
        """:meth:`log_prob` of each cell, ``[B]``, summed over genes."""
        if self.settings.likelihood == "log_mse":
            return self.log_prob(batch, decoded).sum(-1)
        parameters = decoded.logits, batch.library.log(), decoded.log_inverse_dispersion
        if decoded.zero_logits is None:
            return nb_log_likelihood(batch.counts, *parameters)
        return zinb_log_likelihood(batch.counts, *parameters, decoded.zero_logits)


#: The parts of the network that a method may name, each with the submodules it holds.
BLOCKS: dict[str, tuple[str, ...]] = {
    "encoder": ("encoder",),
    "bottleneck": ("mu", "log_var"),
    "decoder": ("decoder",),
    "heads": ("scale", "dispersion", "zero"),
}


def block_of(parameter: str) -> str:
    """Name the block of :data:`BLOCKS` that a parameter of a :class:`VAE` belongs to."""
    module = parameter.split(".", 1)[0]
    return next(block for block, modules in BLOCKS.items() if module in modules)


def gaussian_kl(mu: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(μ, σ²) ‖ N(0, 1)) per latent dimension, ``[B, Z]`` nats: (μ² + σ² − 1 − log σ²)/2."""
    return 0.5 * (mu.square() + log_var.exp() - 1 - log_var)
