"""Differentially private training: clipped per-cell gradient sums, Gaussian noise, Poisson batches, the accountant.

Opacus supplies the accountant, and in the tests the reference; the gradients are not its own. It keeps one gradient
per cell and parameter, 7.5 GB for a batch of 256 cells at the published size, where a layer's input and output
gradient hold all that clipping needs: the norm of each cell's gradient in closed form, and the clipped sum as one
matrix product (:mod:`scforget.percell`). That costs about as much memory and time as plain training.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scforget import percell
from scforget.arrays import IntArray
from scforget.errors import DataError, NonFiniteError
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Effort, Epoch

if TYPE_CHECKING:  # it brings a compiler, and private is imported where nothing is trained
    from scforget.gaussian import Source

#: Rényi orders: the accountant's own, and some beyond for small ε.
ORDERS: list[float] = [1 + x / 10 for x in range(1, 100)] + [*range(12, 64), 64, 96, 128, 192, 256, 512, 1024]


class Mechanism(NamedTuple):
    """The sampled Gaussian mechanism of one step, and how many steps an epoch has.

    Attributes
    ----------
    clip
        C > 0, the largest L2 norm of a cell's gradient; infinite: no clipping.
    noise_multiplier
        σ >= 0; the noise on the sum has the standard deviation σ·C.
    rate
        q in (0, 1], the chance of each cell to be in a batch.
    expected
        Cells that the noisy sum is divided by, > 0.
    steps
        Steps of one epoch.
    """

    clip: float
    noise_multiplier: float
    rate: float
    expected: float
    steps: int


@contextmanager
def _loose_bounds_allowed() -> Iterator[None]:
    """A best order at the end of :data:`ORDERS` means a looser bound than possible, not a wrong one."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Optimal order is the", UserWarning)
        yield


@cache
def epsilon_spent(noise_multiplier: float, rate: float, steps: int, delta: float) -> float:
    """ε of that many steps of the sampled Gaussian mechanism at a given δ, by Rényi accounting.

    Neighbours differ by one cell that is added or removed. Infinite without noise, 0 without a step.
    """
    from opacus.accountants import RDPAccountant  # type: ignore[import-untyped]  # takes a second to import

    if not steps:
        return 0.0
    if noise_multiplier == 0:
        return math.inf
    accountant = RDPAccountant()
    accountant.history = [(noise_multiplier, rate, steps)]
    with _loose_bounds_allowed():
        return float(accountant.get_epsilon(delta, alphas=ORDERS))


@cache  # seconds of search, the same for every seed
def noise_multiplier(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The σ with which that many steps spend at most ε, and hardly less; 0 for an infinite ε.

    Raises
    ------
    DataError
        If no σ is large enough.
    """
    from opacus.accountants.utils import get_noise_multiplier  # type: ignore[import-untyped]

    if math.isinf(epsilon):
        return 0.0
    try:
        with _loose_bounds_allowed():
            found = get_noise_multiplier(
                target_epsilon=epsilon, target_delta=delta, sample_rate=rate, steps=steps, accountant="rdp",
                epsilon_tolerance=1e-3 * epsilon, alphas=ORDERS,
            )  # fmt: skip
    except ValueError as error:
        raise DataError("privacy budget", f"epsilon {epsilon:g} at delta {delta:g}", "a larger epsilon") from error
    return float(found)


def group_guarantee(epsilon: float, delta: float, size: int) -> tuple[float, float]:
    """What (ε, δ) per cell means for a group of k cells: (kε, Σ_{i<k} e^{iε}·δ).

    Returns
    -------
    tuple
        ε and δ of the group; δ is capped at 1, at which nothing is guaranteed any more.

    Notes
    -----
    k steps from neighbour to neighbour, each of which multiplies the δ so far by e^ε and adds δ. The sum is
    geometric, e^{(k−1)ε}·(1 − e^{−kε})/(1 − e^{−ε}), and taken by logarithms.
    """
    if not size or not delta:
        return size * epsilon, 0.0
    if math.isinf(epsilon):
        return epsilon, 1.0
    log_sum = math.log(size)
    if epsilon > 0:
        log_sum = (size - 1) * epsilon + math.log(-math.expm1(-size * epsilon)) - math.log(-math.expm1(-epsilon))
    return size * epsilon, math.exp(min(0.0, math.log(delta) + log_sum))


def poisson(cells: IntArray, rate: float, source: Source) -> IntArray:
    """Draw a batch that each cell joins independently with probability ``rate``; it may be empty."""
    from scforget import gaussian

    return cells[gaussian.uniform(len(cells), source) < rate]


def clipped_sums(
    model: nn.Module, parameters: Mapping[str, nn.Parameter], losses: Callable[[], Tensor], clip: float
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Sum over cells of their gradients, each clipped to a norm of C; one forward and one backward pass.

    Parameters
    ----------
    parameters
        The parameters to differentiate in, by name; the norm is over these alone.
    losses
        Returns every cell's loss, ``[B]``; what it may do, and what is refused, says :func:`scforget.percell.trace`.
    clip
        C > 0; infinite: no clipping.

    Returns
    -------
    tuple
        The sums by name, each of its parameter's shape; the losses ``[B]``; the unclipped norms ``[B]``.

    Notes
    -----
    Σ_i g_i·min(1, C/‖g_i‖), Abadi et al. 2016 (Algorithm 1). What each cell's gradient is scaled by, its output
    gradients in every layer may be scaled by, as it is linear in them.
    """
    traces, total = percell.trace(model, losses, parameters)
    norms = percell.squared_norms(traces, total).sqrt()
    factors = (clip / norms).clamp(max=1)
    sums = {name: value for one in traces for name, value in one.sums(factors).items()}
    # no gradient arrives at the dispersion of log_mse
    dead = {name: torch.zeros_like(parameters[name], requires_grad=False) for name in parameters.keys() - sums.keys()}
    return sums | dead, total, norms


def step(
    model: nn.Module, optimiser: Optimizer, parameters: Mapping[str, nn.Parameter],
    losses: Callable[[], Tensor] | None, *, mechanism: Mechanism, source: Source, effort: Effort,
) -> float:  # fmt: skip
    """Take one optimiser step along the privatised gradient.

    Parameters
    ----------
    optimiser
        Over ``parameters``; it only sees the privatised gradient, so any will do.
    losses
        See :func:`clipped_sums`; ``None`` for an empty batch, a step of pure noise.
    source
        Of the noise. Whoever knows a generator's seed can take the noise away; nobody can with
        :class:`scforget.gaussian.Secure`.

    Returns
    -------
    float
        Sum of the batch's losses, nats.

    Raises
    ------
    NonFiniteError
        If a cell's loss or gradient is NaN or infinite.

    Notes
    -----
    (Σ_i clip_C(g_i) + N(0, (σC)²))/expected batch size, Abadi et al. 2016 (Algorithm 1).
    """
    from scforget.gaussian import privatise

    sums, total = {name: torch.zeros_like(p, requires_grad=False) for name, p in parameters.items()}, 0.0
    if losses is not None:
        sums, each, norms = clipped_sums(model, parameters, losses, mechanism.clip)
        for name, values in (("the loss", each), ("a cell's gradient", norms)):
            if not torch.isfinite(values).all():
                raise NonFiniteError(effort.steps, name)
        total = float(each.double().sum())
    std = mechanism.noise_multiplier * mechanism.clip if mechanism.noise_multiplier else 0.0
    privatise([sums[name] for name in parameters], source, std, mechanism.expected)
    for name, parameter in parameters.items():
        parameter.grad = sums[name]
    optimiser.step()
    effort.steps += 1
    return total


def train_epoch(  # noqa: PLR0917
    model: VAE, task: VaeTask, cells: IntArray, mechanism: Mechanism, optimiser: Optimizer,
    parameters: Mapping[str, nn.Parameter], noise: torch.Generator, source: Source, effort: Effort,
) -> Epoch:  # fmt: skip
    """Take ``mechanism.steps`` private steps on Poisson batches of the retained cells.

    Parameters
    ----------
    noise
        Stream of the latent draws, and of the Poisson batches unless these are to be secure.
    source
        Of the noise on gradients, and of the batches where it is secure.

    Returns
    -------
    dict
        The mean loss of the cells drawn, which no guarantee covers: it is reported, and decides nothing.

    Raises
    ------
    NonFiniteError
        If a loss, a gradient or a weight is NaN or infinite.
    """
    model.train()
    total, drawn = 0.0, 0
    for _ in range(mechanism.steps):
        part = poisson(cells, mechanism.rate, noise if isinstance(source, torch.Generator) else source)

        def losses(part: IntArray = part) -> Tensor:
            return task.loss(model, task.batch(part), noise).total

        total += step(
            model, optimiser, parameters, losses if len(part) else None,
            mechanism=mechanism, source=source, effort=effort,
        )  # fmt: skip
        effort.count("retain", len(part))
        drawn += len(part)
    if not all(torch.isfinite(parameter).all() for parameter in parameters.values()):
        raise NonFiniteError(effort.steps, "the weights")
    return {"train_loss": total / max(drawn, 1), "drawn": float(drawn)}
