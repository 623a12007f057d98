"""LiRA: whether a cell's score is more likely under models trained with it or under models trained without it."""

from __future__ import annotations

from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks.references import References
from scforget.errors import DataError
from scforget.settings import Settings

SCORES = ("lira_online", "lira_offline")

# A spread below this share of the scores' size is rounding, not a difference between models.
ROUNDING = 1e-10


class LiraSettings(Settings):
    """Settings of LiRA.

    Attributes
    ----------
    variance
        ``per_cell``: each cell has its own variances; ``global``: all compared cells share the mean of theirs, IN and
        OUT apart, which is steadier with few shadow models.
    min_models
        Fewest IN and fewest OUT shadow models of a compared cell.
    """

    variance: Literal["global", "per_cell"]
    min_models: Annotated[int, Field(ge=2)]


def _moments(shadows: FloatArray, which: BoolArray) -> tuple[FloatArray, FloatArray]:
    """``[n]`` each: mean and variance of each cell's scores over the shadow models marked in ``which [S, n]``."""
    counts = which.sum(axis=0)
    mean = np.where(which, shadows, 0.0).sum(axis=0) / counts
    variance = np.where(which, (shadows - mean) ** 2, 0.0).sum(axis=0) / (counts - 1)
    return mean, variance


def _check_spread(name: str, variance: FloatArray, shadows: FloatArray) -> None:
    flat = np.sqrt(variance) <= ROUNDING * np.maximum(1, np.abs(shadows).max())
    if flat.any():
        raise DataError(
            f"spread of the {name} shadow models' scores",
            f"none at {int(flat.sum())} of {flat.size} cells",
            "shadow models that differ (another seed each), or the global variance",
        )


def lira(scores: FloatArray, references: References, settings: LiraSettings, *, own: bool) -> dict[str, FloatArray]:
    """Score each cell by Gaussians of its primary score under shadow models trained with it (IN) and without it (OUT).

    Parameters
    ----------
    scores : ``[M, n]``
        Under the audited models: the per-cell ELBO in nats, or a classifier's logit-scaled confidence.
    references
        Of which ``shadows``, ``members`` ``[S, n]`` and ``aside`` ``[n]`` are used.
    settings
        Kind of variance, and the fewest models.
    own
        Whether the audited models are the retrained ones. It only has that checked: no shadow is an audited model.

    Returns
    -------
    dict
        ``lira_online`` and ``lira_offline``, each ``[M, n]``, higher = more member-like. A cell set aside has no IN
        model: its online score is NaN, its offline one is not.

    Raises
    ------
    EmptyGroupError
        If a compared cell has too few IN or OUT models, or a cell set aside too few OUT models.
    DataError
        If the shadow models do not differ at some cell, or the scores do not fit the references.

    Notes
    -----
    Carlini et al. (2022), arXiv 2112.03570, of the score as it is. Online: log N(s; μ_in, σ²_in) − log N(s; μ_out,
    σ²_out), two-sided where the variances differ. Offline: z = (s − μ_out)/σ_out. The one-sided test's log Φ(z) rises
    with z alike at all cells, so z ranks cells as it does; but Φ(z) rounds to 1 from z = 8 on, where remembered cells
    lie, and would tie them. s − μ_out would not do: its unit differs between cells. Variances are over count − 1.
    """
    checked = references.check(scores, own=own)
    references.require_shadows(settings.min_models)
    shadows, compared = references.shadows, ~references.aside
    mean_out, variance_out = _moments(shadows, ~references.members)
    mean_in, variance_in = _moments(shadows[:, compared], references.members[:, compared])
    if settings.variance == "global":
        variance_out = np.full_like(variance_out, variance_out[compared].mean())
        variance_in = np.full_like(variance_in, variance_in.mean())
    _check_spread("OUT", variance_out, shadows)
    _check_spread("IN", variance_in, shadows)
    z_out = (checked - mean_out) / np.sqrt(variance_out)
    z_in = (checked[:, compared] - mean_in) / np.sqrt(variance_in)
    online = np.full_like(checked, np.nan)
    online[:, compared] = 0.5 * (z_out[:, compared] ** 2 - z_in**2 + np.log(variance_out[compared] / variance_in))
    return {"lira_online": online, "lira_offline": z_out}
