"""Selective synaptic dampening: shrink the parameters that matter more to the forgotten cells than to the others."""

from __future__ import annotations

import math
from collections import Counter
from typing import Annotated, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from scforget import fisher
from scforget.curvature import require_finite
from scforget.data.splits import ForgetSets
from scforget.search import Choice, Range
from scforget.settings import Settings
from scforget.tasks import Task
from scforget.training import Checkpoint, Effort, Trained


class SSDSettings(Settings):
    """Settings of SSD.

    Attributes
    ----------
    variant
        ``selective`` (Foster et al. 2024), or ``max_normalised``: every parameter, by its share of the largest
        I_F/I_ref of its tensor.
    action
        What ``selective`` does to the selected: ``dampen`` them, or set them to ``zero``. The other variant dampens.
    alpha
        Selection: where I_F > α·I_ref; ``.inf`` selects none and returns the original. 0 only with ``zero``, where
        it selects whatever matters to the forgotten cells at all. In ``max_normalised`` the strength: finite, and
        0 returns the original.
    lam
        λ, the dampening constant of ``selective``.
    reference
        I_ref on all training cells (``D``, Foster et al. 2024) or on the retained ones (``R``). As I_D contains I_F
        weighted by its share of the cells, I_F/I_D never exceeds |D|/|F|: with ``D`` an α beyond selects none.
    draws
        Latent draws per cell of the Fisher information.

    Ranges: α and λ as scales, the source's 10 and 1 inside; α to far beyond the 5 where the single-cell paper stopped.
    """

    variant: Literal["selective", "max_normalised"]
    action: Literal["dampen", "zero"]
    alpha: Annotated[float, Field(ge=0), Range(0.1, 100.0, log=True)]
    lam: Annotated[float, Field(ge=0, allow_inf_nan=False), Range(0.01, 10.0, log=True)]
    reference: Annotated[Literal["D", "R"], Choice("D", "R")]
    draws: Annotated[int, Field(gt=0)]

    @model_validator(mode="after")
    def _fits_together(self) -> SSDSettings:
        if self.variant == "max_normalised":
            if self.action == "zero":
                raise ValueError("action: zero sets selected parameters to 0, but max_normalised selects none")
            if math.isinf(self.alpha):
                raise ValueError("alpha must be finite in max_normalised, where it is the strength")
        elif self.action == "dampen" and self.alpha == 0:
            raise ValueError("alpha must be > 0 to dampen: 0 selects every parameter with a gradient")
        return self


@torch.no_grad()
def dampen(model: nn.Module, forget: fisher.Diagonal, reference: fisher.Diagonal, alpha: float, lam: float) -> None:
    """Apply θ ← θ·min(λ·I_ref/I_F, 1) in place wherever I_F > α·I_ref; nothing else moves.

    Notes
    -----
    Foster et al. 2024 (AAAI), eq. 3–4.
    """
    for name, parameter in model.named_parameters():
        selected = forget[name] > alpha * reference[name]
        # selected implies I_F > 0, so the quotient is finite where it is used
        factor = (lam * reference[name] / forget[name]).clamp(max=1)
        parameter.copy_(torch.where(selected, parameter * factor, parameter))


@torch.no_grad()
def prune(model: nn.Module, forget: fisher.Diagonal, reference: fisher.Diagonal, alpha: float) -> None:
    """Set θ to 0 in place wherever I_F > α·I_ref; nothing else moves. With α = 0: wherever I_F > 0."""
    for name, parameter in model.named_parameters():
        parameter.masked_fill_(forget[name] > alpha * reference[name], 0)


def shares(forget: Tensor, reference: Tensor) -> Tensor:
    """I/max I of one tensor with I = I_F/I_ref, in [0, 1].

    Notes
    -----
    0/0 is 0, and a tensor without information has no share. Where only the forgotten cells have any, I is infinite:
    there the share is 1, and 0 elsewhere in that tensor (the limit).
    """
    ratio = torch.nan_to_num(forget / reference, nan=0.0, posinf=torch.inf)
    largest = ratio.max()
    if torch.isinf(largest):
        return torch.isinf(ratio).to(ratio.dtype)
    return ratio / largest if largest > 0 else ratio


@torch.no_grad()
def dampen_by_share(model: nn.Module, forget: fisher.Diagonal, reference: fisher.Diagonal, alpha: float) -> None:
    """Apply θ ← θ·(1 − α·I/max I) in place, see :func:`shares`; past α = 1 signs turn round."""
    for name, parameter in model.named_parameters():
        parameter.mul_(1 - alpha * shares(forget[name], reference[name]))


def ssd(
    model: nn.Module, task: Task, sets: ForgetSets, settings: SSDSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,  # noqa: ARG001  (seconds of work: nothing to resume)
) -> Trained:  # fmt: skip
    """Dampen by the exact per-cell diagonal Fisher information; no fine-tuning.

    Raises
    ------
    NonFiniteError
        If an information or a parameter is NaN or infinite.

    Notes
    -----
    ``selective`` is Foster et al. 2024 (AAAI), eq. 3–4: select where I_F > α·I_D, multiply by
    β = min(λ·I_D/I_F, 1); ``action: zero`` the blunter rule that sets the selected to 0. ``max_normalised`` is the
    published single-cell rule θ·(1 − α·I/max I), per tensor, with an information that is one.
    I_D is assembled from I_F and I_R, weighted by their sizes, so each cell is passed once.
    """
    forget_part = fisher.diagonal(model, task, sets.forget, draws=settings.draws, seed=seed)
    reference = fisher.diagonal(model, task, sets.retain, draws=settings.draws, seed=seed)
    require_finite([*forget_part.values(), *reference.values()], 0, "the Fisher information")
    if settings.reference == "D":
        share = len(sets.forget) / (len(sets.forget) + len(sets.retain))
        reference = {name: share * forget_part[name] + (1 - share) * value for name, value in reference.items()}
    if settings.variant == "max_normalised":
        dampen_by_share(model, forget_part, reference, settings.alpha)
    elif settings.action == "zero":
        prune(model, forget_part, reference, settings.alpha)
    else:
        dampen(model, forget_part, reference, settings.alpha, settings.lam)
    require_finite(model.parameters(), 0, "a parameter")
    model.eval()
    passes = {"forget": settings.draws * len(sets.forget), "retain": settings.draws * len(sets.retain)}
    return Trained(model, effort=Effort(forward=Counter(passes), backward=Counter(passes)))
