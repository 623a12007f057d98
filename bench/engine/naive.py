"""The same model as anyone would write it in eager torch, and Opacus on top of it."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from bench.engine import cells
from bench.engine.measuring import peak_mb, profile
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset


def _blocks(widths: list[int], dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU(), nn.Dropout(dropout)]
    return nn.Sequential(*layers)


def nb_log_likelihood(counts: Tensor, mean: Tensor, r: Tensor) -> Tensor:
    """Log-likelihood of each cell, ``[B]``: the formula, an operator at a time."""
    log_both = torch.log(mean + r)
    each = torch.lgamma(counts + r) - torch.lgamma(r) - torch.lgamma(counts + 1)
    each = each + r * (torch.log(r) - log_both) + counts * (torch.log(mean) - log_both)
    return each.sum(-1)


class Net(nn.Module):
    """The published network with the product's parameter names; called with counts it answers minus the ELBO."""

    def __init__(self, genes: int, dropout: float) -> None:
        super().__init__()
        widths = [genes, *cells.HIDDEN]
        self.encoder = _blocks(widths, dropout)
        self.mu = nn.Linear(widths[-1], cells.LATENT)
        self.log_var = nn.Linear(widths[-1], cells.LATENT)
        self.decoder = _blocks([cells.LATENT, *widths[:0:-1]], dropout)
        self.scale = nn.Linear(widths[1], genes)
        self.dispersion = nn.Linear(widths[1], genes)

    def forward(self, counts: Tensor, noise: Tensor | None = None) -> Tensor:
        """``[B, G]`` counts and ``[B, Z]`` standard normal noise → ``[B]`` nats."""
        library = counts.sum(1, keepdim=True)
        hidden = self.encoder(torch.log1p(counts / library * 1e4))
        mu, log_var = self.mu(hidden), self.log_var(hidden)
        noise = torch.randn_like(mu) if noise is None else noise
        decoded = self.decoder(mu + torch.exp(0.5 * log_var) * noise)
        mean = library * torch.softmax(self.scale(decoded), -1)
        kl = -0.5 * (1 + log_var - mu**2 - torch.exp(log_var)).sum(-1)
        return kl - nb_log_likelihood(counts, mean, torch.exp(self.dispersion(decoded)))


def squares_of_each_cell(net: Net, counts: Tensor, noise: Tensor | None = None) -> dict[str, Tensor]:
    """Mean over cells of squared gradients, a backward pass a cell."""
    total = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for i in range(len(counts)):
        net.zero_grad()
        net(counts[i : i + 1], None if noise is None else noise[i : i + 1]).sum().backward()
        for name, parameter in net.named_parameters():
            total[name] += parameter.grad**2
    return {name: value / len(counts) for name, value in total.items()}


class Naive:
    """Training and a per-cell Fisher loop; ``switched``: with oneDNN's matrix products, which is one line of torch."""

    def __init__(self, path: str, threads: int, switched: bool = False, dropout: float = cells.DROPOUT) -> None:
        torch.set_num_threads(threads)
        torch.manual_seed(cells.SEED)
        warnings.simplefilter("ignore")  # Opacus's hooks warn of what they themselves do
        if switched:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        self.counts = torch.from_numpy(cells.load(path)[: cells.TRAIN].toarray()).float()
        self.net = Net(self.counts.shape[1], dropout)
        self._batches: dict[int, Iterator[list[Tensor]]] = {}
        self._prepare()

    def _prepare(self) -> None:
        self.optimiser = torch.optim.Adam(self.net.parameters(), lr=cells.LEARNING_RATE)

    def _next(self, size: int) -> Tensor:
        def endless() -> Iterator[list[Tensor]]:
            while True:
                yield from DataLoader(TensorDataset(self.counts), size, shuffle=True, num_workers=0)

        return next(self._batches.setdefault(size, endless()))[0]

    def _step(self, batch: int) -> None:
        loss = self.net(self._next(batch)).mean()
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()

    def steps(self, n: int, batch: int = cells.BATCH) -> float:
        """Train; seconds a step."""
        self.net.train()
        start = time.perf_counter()
        for _ in range(n):
            self._step(batch)
        return (time.perf_counter() - start) / n

    def profile(self, n: int) -> dict[str, Any]:
        """What the steps spend their time in."""
        return profile(lambda: self.steps(n), n)

    def fisher(self, n: int) -> float:
        """Take n cells one by one; seconds a cell."""
        self.net.eval()
        start = time.perf_counter()
        squares_of_each_cell(self.net, self.counts[:n])
        return (time.perf_counter() - start) / n

    def facts(self) -> dict[str, Any]:
        """Parameters, peak memory and torch's switch."""
        parameters = sum(parameter.numel() for parameter in self.net.parameters())
        return {"parameters": parameters, "peak_mb": peak_mb(),
                "torch_switch": torch.backends.mkldnn.matmul.fp32_precision}  # fmt: skip


class OpacusSamples(Naive):
    """Per-cell gradients by GradSampleModule; make it without dropout, as its hooks see nothing in eval mode."""

    def _prepare(self) -> None:
        from opacus import GradSampleModule

        self.net = GradSampleModule(self.net, loss_reduction="sum")

    def fisher(self, n: int, batch: int = 16) -> float:
        """Square the per-cell gradients of n cells; seconds a cell."""
        self.net.train()
        total = [torch.zeros_like(parameter) for parameter in self.net.parameters()]
        start = time.perf_counter()
        for first in range(0, n, batch):
            self.net.zero_grad()
            self.net(self.counts[first : first + batch]).sum().backward()
            for squares, parameter in zip(total, self.net.parameters(), strict=True):
                squares.add_((parameter.grad_sample**2).sum(0))
        return (time.perf_counter() - start) / n


class OpacusGhost(Naive):
    """DP-SGD by Opacus's ghost clipping: σ 0.5, clip 1."""

    def _prepare(self) -> None:
        from opacus.grad_sample import GradSampleModuleFastGradientClipping
        from opacus.optimizers import DPOptimizerFastGradientClipping

        self.net = GradSampleModuleFastGradientClipping(self.net, max_grad_norm=1.0, use_ghost_clipping=True)
        adam = torch.optim.Adam(self.net.parameters(), lr=cells.LEARNING_RATE)
        self.optimiser = DPOptimizerFastGradientClipping(
            adam, noise_multiplier=0.5, max_grad_norm=1.0, expected_batch_size=256
        )  # fmt: skip

    def _step(self, batch: int) -> None:
        from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

        each = self.net(self._next(batch))
        self.optimiser.zero_grad()
        DPTensorFastGradientClipping(self.net, self.optimiser, each, "mean").backward()
        self.optimiser.step()
