"""Selective synaptic dampening: shrink the parameters that matter more to the forgotten cells than to the others."""

from __future__ import annotations

from collections import Counter
from typing import Annotated, Literal

import torch
from pydantic import Field

from scforget import fisher
from scforget.data.splits import ForgetSets
from scforget.models.vae import VAE
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Effort, Trained


class SSDSettings(Settings):
    """Settings of SSD.

    Attributes
    ----------
    alpha
        Selection: a parameter is dampened where I_F > α·I_ref; ``.inf`` selects none and returns the original.
    lam
        λ, the dampening constant.
    reference
        I_ref on all training cells (``D``, Foster et al. 2024) or on the retained ones (``R``).
    draws
        Latent draws per cell of the Fisher information.
    """

    alpha: Annotated[float, Field(gt=0)]
    lam: Annotated[float, Field(ge=0)]
    reference: Literal["D", "R"]
    draws: Annotated[int, Field(gt=0)]


@torch.no_grad()
def dampen(model: VAE, forget: fisher.Diagonal, reference: fisher.Diagonal, alpha: float, lam: float) -> None:
    """Apply θ ← θ·min(λ·I_ref/I_F, 1) in place wherever I_F > α·I_ref; nothing else moves."""
    for name, parameter in model.named_parameters():
        selected = forget[name] > alpha * reference[name]
        # selected implies I_F > 0, so the quotient is finite where it is used
        factor = (lam * reference[name] / forget[name]).clamp(max=1)
        parameter.copy_(torch.where(selected, parameter * factor, parameter))


def ssd(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: SSDSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,  # noqa: ARG001  (seconds of work: nothing to resume)
) -> Trained:  # fmt: skip
    """Dampen by the exact per-cell diagonal Fisher information; no fine-tuning.

    Notes
    -----
    Foster et al. 2024 (AAAI), eq. 3–4: select where I_F > α·I_D, multiply by β = min(λ·I_D/I_F, 1).
    I_D is assembled from I_F and I_R, weighted by their sizes, so each cell is passed once.
    """
    forget_part = fisher.diagonal(model, task, sets.forget, draws=settings.draws, seed=seed)
    reference = fisher.diagonal(model, task, sets.retain, draws=settings.draws, seed=seed)
    if settings.reference == "D":
        share = len(sets.forget) / (len(sets.forget) + len(sets.retain))
        reference = {name: share * forget_part[name] + (1 - share) * value for name, value in reference.items()}
    dampen(model, forget_part, reference, settings.alpha, settings.lam)
    model.eval()
    passes = {"forget": settings.draws * len(sets.forget), "retain": settings.draws * len(sets.retain)}
    return Trained(model, effort=Effort(forward=Counter(passes), backward=Counter(passes)))
