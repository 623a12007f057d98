"""RMIA: whether a model raises the probability of a cell more than that of most cells nobody was trained on."""

from __future__ import annotations

from typing import Annotated

import numpy as np
from pydantic import Field
from scipy.special import logsumexp

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks.references import References
from scforget.errors import EmptyGroupError
from scforget.settings import Settings

SCORES = ("rmia_online", "rmia_offline")


class RmiaSettings(Settings):
    """Settings of RMIA.

    Attributes
    ----------
    gamma
        γ >= 1: how many times the ratio of a population cell a cell's ratio must exceed.
    """

    gamma: Annotated[float, Field(ge=1, allow_inf_nan=False)]


def _log_mean_exp(values: FloatArray, which: BoolArray) -> FloatArray:
    """``[n]``: log of the mean of exp(values) over the models marked in ``which [S, n]``, at least one a cell."""
    marked = np.where(which, values, -np.inf)
    return np.asarray(logsumexp(marked, axis=0) - np.log(which.sum(axis=0)))


def _shares(log_ratios: FloatArray, aside: BoolArray, log_gamma: float) -> FloatArray:
    """``[M, n]``: share of the cells set aside whose log ratio a cell's own exceeds by more than log γ."""
    counts = [np.searchsorted(np.sort(row[aside]), row - log_gamma, side="left") for row in log_ratios]
    return np.array(counts) / int(aside.sum())


def rmia(scores: FloatArray, references: References, settings: RmiaSettings, *, own: bool) -> dict[str, FloatArray]:
    """Score each cell by the share of population cells z that it dominates in likelihood ratio.

    Parameters
    ----------
    scores : ``[M, n]``, nats
        Per-cell ELBO under the audited models, taken for log p(x | θ).
    references
        Of which ``shadows``, ``members`` ``[S, n]`` and ``aside`` ``[n]`` are used; the population is ``aside``.
    settings
        γ.
    own
        Whether the audited models are the retrained ones. It only has that checked: no shadow is an audited model.

    Returns
    -------
    dict
        ``rmia_online`` and ``rmia_offline``, each ``[M, n]`` in [0, 1], higher = more member-like. Log-densities differ
        by tens of nats, so many cells tie at 0 and 1. A cell set aside is in its own population.

    Raises
    ------
    EmptyGroupError
        If no cell was set aside, or a compared cell has no IN or no OUT model.
    DataError
        If the scores do not fit the references.

    Notes
    -----
    Zarifzadeh et al. (2024), arXiv 2312.03262: the share of z with [p(x|θ)/p(x)] / [p(z|θ)/p(z)] > γ. p(x) is the mean
    of p(x|θ') over shadow models θ', by log-mean-exp. Online: the average of the IN mean and the OUT mean, however many
    there are of each. Offline: the OUT mean alone, taken for p(x) as it stands: the paper's line through confidences
    in [0, 1] has no meaning for densities. All shadow models are OUT for z.
    """
    checked, aside = references.check(scores, own=own), references.aside
    if not aside.any():
        raise EmptyGroupError("population of the rmia attack (cells set aside)", 0, "at least 1")
    references.require_shadows(1)
    offline = _log_mean_exp(references.shadows, ~references.members)
    online = offline.copy()
    inside = _log_mean_exp(references.shadows[:, ~aside], references.members[:, ~aside])
    online[~aside] = np.logaddexp(inside, offline[~aside]) - np.log(2)
    log_gamma = float(np.log(settings.gamma))
    return {
        "rmia_online": _shares(checked - online, aside, log_gamma),
        "rmia_offline": _shares(checked - offline, aside, log_gamma),
    }
