"""The exact diagonal Fisher information: the mean of squared per-cell gradients, without per-cell gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from scforget import seeding
from scforget.arrays import IntArray
from scforget.errors import EmptyGroupError
from scforget.models.vae import VAE, PerGene
from scforget.tasks import VaeTask

#: One tensor of squared gradients per parameter name.
Diagonal = dict[str, Tensor]
_BATCH = 512


def _squares(module: nn.Module, inputs: Tensor, gradient: Tensor) -> dict[str, Tensor]:
    """Sum over the batch of each parameter's squared per-cell gradient, from a layer's input and output gradient."""
    squared = gradient.square()
    if isinstance(module, nn.Linear):
        return {"weight": squared.T @ inputs.square(), "bias": squared.sum(0)}
    if isinstance(module, nn.LayerNorm):
        normalised = layer_norm(inputs, module.normalized_shape, None, None, module.eps)
        return {"weight": (squared * normalised.square()).sum(0), "bias": squared.sum(0)}
    return {"bias": squared.sum(0)}


@contextmanager
def _captured(model: nn.Module, add: Callable[[str, nn.Module, Tensor, Tensor], None]) -> Iterator[None]:
    """Call ``add(name, module, input, output gradient)`` for every layer with parameters as gradients arrive."""

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor], Tensor], None]:
        def hook(module: nn.Module, arguments: tuple[Tensor], output: Tensor) -> None:
            inputs = arguments[0].detach()
            output.register_hook(lambda gradient: add(name, module, inputs, gradient))

        return hook

    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.LayerNorm | PerGene)]
    handles = [module.register_forward_hook(watch(name)) for name, module in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def diagonal(model: VAE, task: VaeTask, cells: IntArray, *, draws: int, seed: int) -> Diagonal:
    """Exact diagonal of the empirical Fisher information of some cells.

    Parameters
    ----------
    cells : ``[N]``, N > 0
        Set S.
    draws : >= 1
        Fixed latent draws per cell; each draw's gradient is squared before averaging.
    seed
        Names the stream of the draws.

    Returns
    -------
    dict
        For every parameter name a tensor of its shape, >= 0; zero where no gradient arrives (the dispersion head
        under ``log_mse``).

    Raises
    ------
    EmptyGroupError
        If ``cells`` is empty.

    Notes
    -----
    I_S[k] = mean over x in S and draws of (∂ℓ(θ; x)/∂θ_k)², eval mode. For a Linear layer with input a and output
    gradient g the sum over cells is (g²)ᵀ(a²): each cell's gradient is the outer product g aᵀ. LayerNorm and bias
    are elementwise. It is not the square of a batch gradient, whose cross terms between cells dominate.
    """
    if not len(cells):
        raise EmptyGroupError("Fisher information", "0 cells", "at least one")
    total = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}

    def add(name: str, module: nn.Module, inputs: Tensor, gradient: Tensor) -> None:
        for parameter, value in _squares(module, inputs, gradient).items():
            total[f"{name}.{parameter}"] += value

    model.eval()
    noise = seeding.torch_generator(seed, "fisher")
    with _captured(model, add):
        for start in range(0, len(cells), _BATCH):
            batch = task.batch(cells[start : start + _BATCH])
            for _ in range(draws):
                loss = task.loss(model, batch, noise).total.sum()
                loss.backward()
    model.zero_grad(set_to_none=True)
    return {name: value / (len(cells) * draws) for name, value in total.items()}
