"""Fisher scrubbing: noise, or ascent, where the retained cells care least."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from scforget import engine, fisher, seeding
from scforget.curvature import require_finite
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, TrainingSettings, fit

_BATCH = 512


class FisherScrubSettings(Settings):
    """Settings of the scrubbing, and of the training that follows.

    Attributes
    ----------
    variant
        ``noise`` adds Gaussian noise once; ``ascent`` climbs the loss of the forgotten cells.
    alpha
        The strength: α = λσ² of the noise, or the rate of the ascent; 0 scrubs nothing.
    damping
        d, added to the Fisher information; alone it decides where the information is 0 (a dispersion head that
        never enters the loss).
    draws
        Fixed latent draws per cell: of the Fisher information, and of the loss that is climbed.
    steps
        Steps of the ascent; 0 scrubs nothing. The noise does not use it.
    clamp
        Largest change of a parameter in one step of the ascent. The noise does not use it.
    finetune
        Recipe of the training on the retained cells that follows; ``max_epochs: 0`` for none. Without scrubbing
        the original then comes back bit for bit.

    Ranges: α as a scale, to past the noise that wrecks the ELBO (1e-5 in ``docs/results/frontier.md``); the upper end
    is the single-cell paper's step of the ascent.
    """

    variant: Literal["noise", "ascent"]
    alpha: Annotated[float, Field(ge=0, allow_inf_nan=False), Range(1e-9, 1e-4, log=True)]
    damping: Annotated[float, Field(gt=0)]
    draws: Annotated[int, Field(gt=0)]
    steps: Annotated[int, Field(ge=0)]
    clamp: Annotated[float, Field(gt=0)]
    finetune: TrainingSettings


@torch.no_grad()
def diffuse(
    model: nn.Module, information: fisher.Diagonal, alpha: float, damping: float, noise: torch.Generator
) -> None:  # fmt: skip
    """Apply θ ← θ + α^¼·(F + d)^(−¼) ∘ ε in place, ε ~ N(0, I), to every parameter."""
    for name, parameter in model.named_parameters():
        spread = alpha**0.25 * (information[name] + damping) ** -0.25
        parameter.add_(spread * engine.normal(parameter.shape, noise))


@torch.no_grad()
def climb(model: nn.Module, information: fisher.Diagonal, alpha: float, damping: float, clamp: float) -> None:
    """Apply θ ← θ + clamp(α·∂L/(F + d), ±clamp) in place, by the gradients that the parameters hold.

    Parameters
    ----------
    information
        F by parameter name; no damping in it.
    """
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            parameter.add_((alpha * parameter.grad / (information[name] + damping)).clamp(-clamp, clamp))


def _forget_gradient(
    model: VAE, task: VaeTask, sets: ForgetSets, draws: int, *, seed: int, effort: Effort
) -> float:  # fmt: skip
    """Leave ∂L_F in the parameters' gradients, with the same latent draws at every call; return L_F, nats."""
    model.zero_grad(set_to_none=True)
    noise, total = seeding.torch_generator(seed, "ascent"), 0.0
    for start in range(0, len(sets.forget), _BATCH):
        batch = task.batch(sets.forget[start : start + _BATCH])
        for _ in range(draws):
            loss = task.loss(model, batch, noise).total.sum() / draws
            if not torch.isfinite(loss):
                raise NonFiniteError(effort.steps, "the loss")
            loss.backward()
            effort.count("forget", len(batch.counts))
            total += float(loss.detach())
    return total


def fisher_scrub(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: FisherScrubSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Scrub by the exact diagonal Fisher information of the retained cells, then train on them.

    Raises
    ------
    NonFiniteError
        If the information, a loss or a parameter becomes NaN or infinite.

    Notes
    -----
    ``noise`` (Golatkar et al. 2020): θ = θ0 + α^¼·(F_R + d)^(−¼) ∘ ε, ε ~ N(0, I), drawn once; the forgotten cells
    are not read. ``ascent`` (the published single-cell rule, with an information that is one):
    θ ← θ + clamp(α·∂L_F/(F_R + d), ±clamp), ``steps`` times, where L_F is the **sum** over F of the loss in eval
    mode, each cell's averaged over ``draws`` latent draws that stay the same in every step. F_R is computed once,
    at θ0. Under ``log_mse`` no gradient reaches the dispersion head, so its F_R is 0: the noise there is that of the
    damping alone, (α/d)^¼ ε, and the ascent leaves it as it is.
    """
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    effort, draws = loop.effort, settings.draws

    def scrub(_number: int, noise: torch.Generator) -> Epoch:
        model.eval()
        information = fisher.diagonal(model, task, sets.retain, draws=draws, seed=seed)
        effort.count("retain", draws * len(sets.retain))
        require_finite(information.values(), effort.steps, "the Fisher information")
        row: Epoch = {}
        if settings.variant == "noise":
            diffuse(model, information, settings.alpha, settings.damping, noise)
        else:
            for _ in range(settings.steps):
                row["forget_loss"] = _forget_gradient(model, task, sets, draws, seed=seed, effort=effort)
                climb(model, information, settings.alpha, settings.damping, settings.clamp)
                effort.steps += 1
            model.zero_grad(set_to_none=True)
        require_finite(model.parameters(), effort.steps, "a parameter")
        return row

    nothing = settings.alpha == 0 or (settings.variant == "ascent" and settings.steps == 0)
    loop.run("scrub", scrub, 0 if nothing else 1, parts={})
    return fit(model, task, sets.retain, sets.stop, settings.finetune, seed=seed, loop=loop)
