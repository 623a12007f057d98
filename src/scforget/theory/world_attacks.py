"""Attacks in a world whose law is known: against exact likelihoods, exact controls and the best possible attack."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy

from scforget import seeding
from scforget.arrays import FloatArray
from scforget.attacks.lira import LiraSettings, lira
from scforget.attacks.references import References
from scforget.audit import intervals, roc
from scforget.theory.gaussian_vae import GaussianVAE, QuadratureSettings, likelihood

Record = dict[str, Any]


def weighted_auc(members: FloatArray, controls: FloatArray, weights: FloatArray) -> float:
    """Chance that a random member scores above a control that is drawn by weight, ties as halves.

    Parameters
    ----------
    members, controls, weights : ``[F]``, ``[U]``, ``[U]`` >= 0

    Notes
    -----
    With weights p(k | x) on draws of a mixture this is, in expectation, the AUC against draws of component k alone:
    p(k | x) p(x) = π_k p(x | k). No control matched by nearness can be better than that.
    """
    order = np.argsort(controls, kind="stable")
    running = np.concatenate([[0.0], np.cumsum(weights[order])])
    below, up_to = (np.searchsorted(controls[order], members, side=side) for side in ("left", "right"))
    return float((running[below] + running[up_to]).mean() / (2 * running[-1]))


def by_weights(
    forgotten: FloatArray, unseen: FloatArray, weights: dict[str, FloatArray], level: float
) -> dict[str, Record]:
    """Mean membership AUC of M models against controls that are drawn by weight from the same unseen points.

    Parameters
    ----------
    forgotten, unseen : ``[M, F]``, ``[M, U]``
        Scores.
    weights
        Kind of controls -> ``[U]``: ``weighted`` by p(k | x) is the best that matching can do, ``nearest`` marks the
        single-cell paper's, nearest to forgotten points in an original's latent means.

    Returns
    -------
    dict
        Kind -> ``auc`` and ``interval``, over models.
    """
    found = {}
    for kind, one in weights.items():
        aucs = [weighted_auc(f, u, one) for f, u in zip(forgotten, unseen, strict=True)]
        found[kind] = {"auc": float(np.mean(aucs)), "interval": list(intervals.mean_interval(aucs, level))}
    return found


def exact_scores(
    models: Sequence[GaussianVAE], points: FloatArray, quadrature: QuadratureSettings
) -> dict[str, FloatArray]:
    """Exact log-likelihood and bound of points under some models, each ``[M, N]`` nats, see :class:`Likelihood`.

    Returns
    -------
    dict
        ``log_likelihood``, ``error``, ``elbo`` (of the whole posterior, not at z = μ) and ``gap``.
    """
    rows = [likelihood(model, points, quadrature)._asdict() for model in models]
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def reference_mean(scores: FloatArray, retrains: FloatArray) -> FloatArray:
    """Mean score of the retrained models at each point, ``[N]``; for the retrained ones themselves of the others."""
    if scores is not retrains:
        return np.asarray(retrains.mean(0))
    return np.asarray((retrains.sum(0) - retrains) / (len(retrains) - 1))


def on_points(
    forgotten: dict[str, FloatArray], controls: dict[str, FloatArray], *, level: float, seed: int, draws: int
) -> dict[str, Record]:
    """Membership AUC of several scores, forgotten points against fresh ones, of one population of models.

    Parameters
    ----------
    forgotten, controls
        Score -> ``[M, F]`` and ``[M, U]``, higher = more member-like.

    Returns
    -------
    dict
        Score -> ``auc``, ``interval`` (models and points resampled).
    """
    found = {}
    for name, scores in forgotten.items():
        auc, interval = intervals.population_auc(scores, controls[name], level, seed, draws)
        found[name] = {"auc": auc, "interval": list(interval)}
    return found


def lira_scores(originals: FloatArray, retrains: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Online LiRA of every model, IN the (other) originals and OUT the (other) retrained models.

    Parameters
    ----------
    originals, retrains : ``[M, F]``, ``[K, F]``, nats; M, K >= 3
        Scores of the forgotten points.

    Returns
    -------
    tuple
        Log-likelihood ratios of the originals and of the retrained models, of the same shapes, with the global
        variance; the audited model is never among its own references.
    """
    shadows, settings = np.concatenate([originals, retrains]), LiraSettings(variance="global", min_models=2)
    inside = np.arange(len(shadows)) < len(originals)
    found = np.empty_like(shadows)
    for index in range(len(shadows)):
        others = np.arange(len(shadows)) != index
        members = np.repeat(inside[others, None], shadows.shape[1], axis=1)
        references = References(retrains, shadows[others], members, np.zeros(shadows.shape[1], dtype=bool))
        found[index] = lira(shadows[[index]], references, settings, own=False)["lira_online"][0]
    return found[inside], found[~inside]


def best_auc(originals: FloatArray, retrains: FloatArray, *, corrected: bool) -> float:
    """AUC of the best possible attack on a model by one point's score, if scores are Gaussian with a common variance.

    Parameters
    ----------
    originals, retrains : ``[M, F]``, ``[K, F]``
        Scores of the forgotten points.
    corrected
        Take from each point's squared distance what M and K models alone would give it, 1/M + 1/K.

    Notes
    -----
    With d_x = (μ_in − μ_out)/σ at x the log-likelihood ratio is N(±d_x²/2, d_x²) (Neyman and Pearson 1933), so a random
    (point, original) is above a random (point, retrain) with probability mean_{x,y} Φ(½ √(d_x² + d_y²)). The plain
    estimate is too high, as noise in the means looks like distance; the corrected one is too high only where d² is
    near 0, where it is cut off at 0.
    """
    M, K = len(originals), len(retrains)
    squares = (M - 1) * originals.var(axis=0, ddof=1) + (K - 1) * retrains.var(axis=0, ddof=1)
    distances = (originals.mean(0) - retrains.mean(0)) ** 2 / (squares.mean() / (M + K - 2))
    if corrected:
        distances = np.maximum(distances - 1 / M - 1 / K, 0)
    return float(scipy.stats.norm.cdf(0.5 * np.sqrt(distances[:, None] + distances)).mean())


def _model_scores(originals: FloatArray, retrains: FloatArray, log_density: FloatArray) -> dict[str, Any]:
    """Scores of the game "was this model trained on this point?": attack -> (of originals, of retrains)."""
    return {
        "elbo": (originals, retrains),
        "calibrated": (originals - log_density, retrains - log_density),
        "difference": (originals - reference_mean(originals, retrains), retrains - reference_mean(retrains, retrains)),
        "lira_online": lira_scores(originals, retrains),
    }


def on_models(
    originals: FloatArray, retrains: FloatArray, log_density: FloatArray, *, level: float, seed: int, draws: int
) -> dict[str, Record]:
    """Tell originals from retrained models by the score of one forgotten point; and the best possible.

    Parameters
    ----------
    originals, retrains : ``[M, F]``, ``[K, F]``, nats
        ELBO of the forgotten points.
    log_density : ``[F]``, nats
        log p(x) of the world.
    level, seed, draws
        Of percentile intervals from resampled models and points: originals, retrained models and points each by
        themselves. A handful of models makes them too narrow.

    Returns
    -------
    dict
        ``elbo``, ``calibrated`` (minus log p), ``difference`` (minus the other retrained models' mean),
        ``lira_online``, ``best`` and ``best_corrected`` (:func:`best_auc`), each ``auc`` and ``interval``. The two
        last have no interval: resampled models repeat, which makes spreads too small.

    Notes
    -----
    Without any difference ``lira_online`` falls **below** ½ with few models: leaving a model out moves its own side's
    mean away from it. Compare it with what retrained models drawn apart show, not with ½.
    """
    generator = seeding.numpy_generator(seed, "on_models")
    found = {}
    M, K, F = len(originals), len(retrains), len(log_density)
    picks = [
        (generator.integers(0, M, M), generator.integers(0, K, K), generator.integers(0, F, F)) for _ in range(draws)
    ]
    for name, (one, two) in _model_scores(originals, retrains, log_density).items():
        values = [roc.auc(one[m][:, f].ravel(), two[k][:, f].ravel()) for m, k, f in picks]
        tail = (1 - level) / 2
        interval = np.quantile(values, [tail, 1 - tail]).tolist()
        found[name] = {"auc": roc.auc(one.ravel(), two.ravel()), "interval": interval}
    for name, corrected in (("best", False), ("best_corrected", True)):
        found[name] = {"auc": best_auc(originals, retrains, corrected=corrected), "interval": None}
    return found


def agreement(bound: FloatArray, exact: dict[str, FloatArray], level: float) -> Record:
    """How the score at z = μ compares with the exact likelihood, over models and points.

    Parameters
    ----------
    bound : ``[M, N]``, nats
        ELBO at z = μ.
    exact
        From :func:`exact_scores`, of the same models and points.

    Returns
    -------
    dict
        Means over models of each model's mean over points, with intervals over models: ``log_likelihood``, ``elbo``
        (of the posterior), ``score`` (at z = μ), ``gap`` (KL of the encoder's posterior to the exact one), all in nats;
        ``rank_correlation`` of score and log-likelihood (Spearman); ``error``, the quadrature's largest, nats.
    """
    ranks = [scipy.stats.spearmanr(one, two).statistic for one, two in zip(bound, exact["log_likelihood"], strict=True)]
    columns: dict[str, FloatArray] = {
        "log_likelihood": exact["log_likelihood"].mean(1), "elbo": exact["elbo"].mean(1), "score": bound.mean(1),
        "gap": exact["gap"].mean(1), "rank_correlation": np.array(ranks),
    }  # fmt: skip
    row: Record = {"error": float(exact["error"].max())}
    for name, values in columns.items():
        row[name] = float(np.mean(values))
        row[f"{name}_interval"] = list(intervals.mean_interval(values, level))
    return row
