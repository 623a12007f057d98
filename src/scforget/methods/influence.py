"""Influence: one Newton step towards what the retained cells alone would have taught."""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

from scforget.curvature import GaussNewton, newton_step
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Loop, Trained, mean_elbo


class InfluenceSettings(Settings):
    """Settings of the Newton step.

    Attributes
    ----------
    damping
        d, added to the diagonal of the curvature: the larger, the shorter the step; ``.inf`` returns the original
        bit for bit.
    draws
        Fixed latent draws per cell, of the gradient and of the curvature alike.
    iterations
        How many steps of conjugate gradients at most; 0 returns the original bit for bit.
    tolerance
        Relative residual at which they stop sooner.

    Ranges: the damping as a scale, two decades to either side of 1: from a long step to next to none.
    """

    damping: Annotated[float, Field(gt=0), Range(0.01, 100.0, log=True)]
    draws: Annotated[int, Field(gt=0)]
    iterations: Annotated[int, Field(ge=0)]
    tolerance: Annotated[float, Field(gt=0, lt=1)]


def influence(
    model: VAE, task: VaeTask, sets: ForgetSets, settings: InfluenceSettings, *,
    seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Take one damped Gauss-Newton step down the loss on the retained cells; the forgotten cells are never touched.

    Raises
    ------
    NonFiniteError
        If the gradient, the curvature, the parameters after the step or their ELBO on ``stop`` is NaN or infinite.

    Notes
    -----
    θ = θ0 − (G_R + d·I)⁻¹ ∇L_R(θ0), by conjugate gradients; G_R is :class:`~scforget.curvature.GaussNewton`.
    Influence functions (Koh and Liang 2017) with G for the Hessian and the gradient on R instead of that on F: at
    a minimum of the loss on all cells they agree up to a factor. Where training stopped early the step also takes
    up what was left to learn of R. There is no trust region: with too small a damping the step leaves the region
    where the quadratic model holds.
    """
    if math.isinf(settings.damping) or not settings.iterations:
        return Trained(model.eval())
    loop = Loop(model, seed=seed, checkpoint=checkpoint)
    effort = loop.effort
    counted = effort.to_dict() if loop.history else None
    curvature = GaussNewton(model, task, sets.retain, draws=settings.draws, seed=seed, effort=effort)
    gradient = curvature.gradient()
    if counted is not None:  # a killed run had counted this pass before
        effort.restore(counted)
    solver = newton_step(
        model, curvature.product, gradient,
        damping=settings.damping, iterations=settings.iterations, tolerance=settings.tolerance, loop=loop,
    )  # fmt: skip
    effort.steps += 1
    effort.count("stop", len(sets.stop), backward=0)
    if not math.isfinite(mean_elbo(task, model, sets.stop)):
        raise NonFiniteError(effort.steps, "the ELBO of the stop cells")
    facts: dict[str, float | str] = {"residual": solver.residual, "iterations": int(solver.taken)}
    facts["step_norm"] = float(solver.x.norm())
    return Trained(model, loop.history, effort, facts)
