"""The score of the NeurIPS 2023 unlearning challenge: an empirical epsilon of each forget cell, and their quality."""

from __future__ import annotations

import warnings

import numpy as np
import numpy.typing as npt

from scforget.arrays import FloatArray, IntArray
from scforget.attacks.population import Scorer, matrices, matrix, splits, spread
from scforget.errors import DataError, EmptyGroupError

# The delta that belongs to each scorer.
DELTAS: dict[Scorer, float] = {"official": 1e-5, "suprun": 1e-2, "exact": 1e-5}
# Of the official scorer: largest epsilon, thresholds per unit of score, slack around an interval, peakiness rule.
CAP, PER_UNIT, BUFFER, RANGE_RATIO = 50.0, 100, 2.0, 0.01
BIN_WIDTH, SUPRUN_BINS = 0.5, 13
# Share of the models that a test fold of the suprun scorer's logistic regression holds, and their number.
FOLD, FOLDS = 0.1, 3


def _epsilon(fpr: FloatArray, fnr: FloatArray, delta: float, inverted: float) -> FloatArray:
    """Epsilon of each rule in [0, CAP]; 0 for a dropped one, ``inverted`` where both logarithms are undefined."""
    with np.errstate(divide="ignore", invalid="ignore"):
        value = np.fmax(np.log(1 - delta - fpr) - np.log(fnr), np.log(1 - delta - fnr) - np.log(fpr))
    value = np.where(np.isnan(value), inverted, value)
    value = np.where((fpr == 0) != (fnr == 0), 0.0, value)
    return np.clip(np.where((fpr == 0) & (fnr == 0), CAP, value), 0.0, CAP)


def _table(M: int, K: int, delta: float, inverted: float) -> FloatArray:
    """``[M + 1, K + 1]``: epsilon of predicting "unlearned" on a region by how many models of each kind it holds.

    A rule matters only through these two counts. Reversed on both axes it is the table of predicting "retrained" there.
    """
    fpr, fnr = np.arange(K + 1) / K, np.arange(M, -1, -1) / M
    return _epsilon(fpr[None, :], fnr[:, None], delta, inverted)


def _pooled(u: FloatArray, r: FloatArray) -> tuple[FloatArray, IntArray, IntArray]:
    """All outputs of a cell in order, and how many unlearned and retrained ones are among the first 0, 1, … of them."""
    pooled = np.concatenate([u, r])
    order = np.argsort(pooled, kind="stable")
    ours = np.concatenate([[0], np.cumsum(order < u.size)])
    return pooled[order], ours, np.arange(pooled.size + 1) - ours


def _official(u: FloatArray, r: FloatArray, table: FloatArray) -> float:
    widths = float(np.ptp(u)), float(np.ptp(r))
    if max(widths) > 0 and min(widths) / max(widths) < RANGE_RATIO:
        return CAP
    ordered, ours, theirs = _pooled(u, r)
    retrained_higher = bool(np.median(r) > np.median(u))
    single = np.linspace(ordered[0], ordered[-1], int(np.ceil((ordered[-1] - ordered[0]) * PER_UNIT)))
    start = np.searchsorted(ordered, single)
    higher = table[::-1, ::-1] if retrained_higher else table
    best = higher[ours[-1] - ours[start], theirs[-1] - theirs[start]].max(initial=0)

    unlearned_narrower = widths[0] < widths[1] or (widths[0] == widths[1] and retrained_higher)
    narrow, width = (u, widths[0]) if unlearned_narrower else (r, widths[1])
    low, high = narrow.min() + width - BUFFER, narrow.max() + BUFFER
    right = np.linspace(low, high, int(np.ceil((high - low) * PER_UNIT)))
    left = np.linspace(right - width - BUFFER, right - width + BUFFER, int(np.ceil(2 * BUFFER * PER_UNIT)), axis=1)
    stop = np.searchsorted(ordered, right, side="right")[:, None]
    start = np.minimum(np.searchsorted(ordered, left), stop)
    inside = table if unlearned_narrower else table[::-1, ::-1]
    return float(max(best, inside[ours[stop] - ours[start], theirs[stop] - theirs[start]].max()))


def _exact(u: FloatArray, r: FloatArray, table: FloatArray) -> float:
    ordered, ours, theirs = _pooled(u, r)
    cuts = np.concatenate([[0], np.flatnonzero(np.diff(ordered)) + 1, [ordered.size]])
    first, last = np.triu_indices(cuts.size, 1)
    counts = ours[cuts[last]] - ours[cuts[first]], theirs[cuts[last]] - theirs[cuts[first]]
    return float(max(table[counts].max(), table[::-1, ::-1][counts].max()))


def _folds(M: int, K: int) -> list[tuple[IntArray, IntArray]]:
    """Training and test models of each fold, unlearned ones first; the same for every cell."""
    from sklearn.model_selection import StratifiedShuffleSplit

    labels = np.repeat([1, 0], [M, K])
    split = StratifiedShuffleSplit(n_splits=FOLDS, test_size=FOLD, random_state=0)
    tested = int(np.ceil(FOLD * (M + K)))
    folds = list(split.split(labels, labels)) if tested >= 2 else []
    if not folds or any(np.ptp(labels[test]) == 0 for _, test in folds):
        wanted = "both kinds in every test fold of a tenth; 6 of each will do"
        raise EmptyGroupError("models of the suprun scorer", f"{M} and {K}", wanted)
    return folds


def _logistic_rates(u: FloatArray, r: FloatArray, folds: list[tuple[IntArray, IntArray]]) -> tuple[float, float]:
    """Mean FPR and FNR of a logistic regression on one output over held-out folds."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    values, labels = np.concatenate([u, r])[:, None], np.repeat([1, 0], [u.size, r.size])
    rates = []
    for train, test in folds:
        with warnings.catch_warnings():
            # The scorer is defined on raw outputs; of hundreds of nats they may not converge, and count all the same.
            warnings.simplefilter("ignore", ConvergenceWarning)
            said = LogisticRegression().fit(values[train], labels[train]).predict(values[test])
        truth = labels[test]
        rates.append((said[truth == 0].mean(), 1 - said[truth == 1].mean()))
    fpr, fnr = np.mean(rates, axis=0)
    return float(fpr), float(fnr)


def _suprun(
    u: FloatArray, r: FloatArray, table: FloatArray, delta: float, folds: list[tuple[IntArray, IntArray]]
) -> float:
    ordered, ours, theirs = _pooled(u, r)
    start = np.searchsorted(ordered, ordered, side="right")
    best = table[ours[-1] - ours[start], theirs[-1] - theirs[start]].max()
    fpr, fnr = _logistic_rates(u, r, folds)
    return float(max(best, _epsilon(np.array(fpr), np.array(fnr), delta, np.inf)))


def kaggle_epsilon(
    unlearned: npt.ArrayLike, retrained: npt.ArrayLike, *, scorer: Scorer, delta: float
) -> FloatArray:  # fmt: skip
    """Empirical epsilon of each forget cell: how well the best rule tells unlearned from retrained models.

    Parameters
    ----------
    unlearned : ``[M, F]``
        One output per model and forget cell, M >= 2: logit-scaled confidence, or ELBO in nats.
    retrained : ``[K, F]``
        The same of models that never saw the cells, K >= 2.
    scorer
        ``official``: single thresholds on a grid (the population with the higher median above), and intervals on a
        grid for the population with the narrower range; ``suprun``: logistic regression and every output as threshold
        (unlearned above); ``exact``: every single threshold and interval between outputs, predicting either population.
    delta
        In [0, 1); ``DELTAS`` holds the one that belongs to each scorer.

    Returns
    -------
    ``[F]``
        In [0, 50]: 50 when some rule makes no error (or, for ``official``, one range is under 1 % of the other), 0 when
        no rule is left. A maximum over rules chosen on the same models: **not** a lower bound on the true epsilon.

    Raises
    ------
    EmptyGroupError
        With fewer than 2 models of a kind, no cell, or for ``suprun`` too few models for a fold with both kinds.
    DataError
        If outputs are not finite, the cells differ, or delta is not in [0, 1).

    Notes
    -----
    NeurIPS 2023 machine unlearning challenge (Triantafillou et al. 2024, arXiv 2406.09073): ε of a rule is
    max(ln((1 − δ − FPR)/FNR), ln((1 − δ − FNR)/FPR)); both rates 0: infinite; exactly one: dropped, as too few models.
    ``suprun`` is the challenge's community scorer, which also counts a rule that is wrong on every model as infinite.
    ``exact`` sees all that the official grids see, at any range of outputs, so it is never smaller where the rule on
    ranges is silent.
    """
    one, two = matrices(unlearned, retrained, 2)
    M, K = one.shape[0], two.shape[0]
    if not 0 <= delta < 1:
        raise DataError("delta of the Kaggle epsilon", delta, "a number in [0, 1)")
    cells = list(zip(one.T, two.T, strict=True))
    if scorer == "suprun":
        table, folds = _table(M, K, delta, np.inf), _folds(M, K)
        return np.array([_suprun(u, r, table, delta, folds) for u, r in cells])
    score = _official if scorer == "official" else _exact
    table = _table(M, K, delta, 0.0)
    return np.array([score(u, r, table) for u, r in cells])


def forgetting_points(epsilons: npt.ArrayLike, n_models: int, scorer: Scorer) -> FloatArray:
    """2/2ⁿ of each cell, n the 1-based bin of width 0.5 that its epsilon falls into; arguments as of the next function.

    Returns
    -------
    ``[F]``
        In [0, 1].
    """
    values = np.asarray(epsilons, dtype=np.float64)
    if values.size < 1 or n_models < 3:
        raise EmptyGroupError("forgetting quality", f"{values.size} cells, {n_models} models", "1 cell and 3 models")
    if np.isnan(values).any() or values.min() < 0:
        raise DataError("epsilons of a forgetting quality", "NaN or a negative number", "numbers from 0")
    if scorer == "suprun":
        number = np.digitize(values, np.arange(SUPRUN_BINS) * BIN_WIDTH)
        return np.asarray(2.0 / 2.0**number)
    end = np.ceil(np.log(n_models - 1))
    number = np.floor(values / BIN_WIDTH) + 1
    return np.where(number * BIN_WIDTH <= end, 2.0 / 2.0**number, 0.0)


def forgetting_quality(epsilons: npt.ArrayLike, n_models: int, scorer: Scorer) -> float:
    """Mean over cells of :func:`forgetting_points`.

    Parameters
    ----------
    epsilons : ``[F]``
        From ``kaggle_epsilon``, >= 0, F >= 1.
    n_models
        Models in each population, the smaller number if they differ; >= 3, as 2 leave no bin.
    scorer
        ``suprun``: 13 bins, the last one open. ``official`` and ``exact``: bins up to ⌈ln(``n_models`` − 1)⌉, the
        largest epsilon that so many models can show, and no points beyond.

    Returns
    -------
    float
        In [0, 1], higher = better forgotten; read it beside ``forgetting_ceiling``.
    """
    return float(forgetting_points(epsilons, n_models, scorer).mean())


def final_score(quality: float, ra_u: float, ra_r: float, ta_u: float, ta_r: float) -> float:
    """Score of the challenge: F · (RA_U/RA_R) · (TA_U/TA_R).

    Parameters
    ----------
    quality
        F of ``forgetting_quality``.
    ra_u, ra_r, ta_u, ta_r
        Mean accuracies of the unlearned and the retrained models on retained and on test cells, in one unit; those of
        the retrained models > 0. Not for losses: their ratio rewards the worse model.
    """
    found = (quality, ra_u, ra_r, ta_u, ta_r)
    if not np.isfinite(found).all() or min(found) < 0 or min(ra_r, ta_r) == 0:
        raise DataError("quality and accuracies of a final score", found, "numbers from 0, the retrained above 0")
    return quality * (ra_u / ra_r) * (ta_u / ta_r)


def forgetting_ceiling(
    retrained: npt.ArrayLike, n: int, *, scorer: Scorer, delta: float, seed: int, draws: int
) -> dict[str, float]:
    """Forgetting quality of retrain against retrain: what a perfect method would score with so few models.

    Parameters
    ----------
    retrained : ``[K, F]``
        As for ``kaggle_epsilon``; K >= 2n.
    n
        Models on each side, >= 3: that of the unlearned models, or K // 2 if that is smaller.
    scorer, delta, seed, draws
        As for ``kaggle_epsilon``; seed of the stream; random disjoint pairs of n models each, >= 1.

    Returns
    -------
    dict
        ``mean``, and ``low`` and ``high``, the central 95 % of the draws. The draws share the K models, so this is the
        scatter over splits, and narrower than the scatter over new models.
    """
    two = matrix("retrained models", retrained, max(2 * n, 6))
    if n < 3 or draws < 1:
        raise EmptyGroupError("models and draws of a forgetting ceiling", (n, draws), "at least 3 models and 1 draw")
    pairs = splits(two.shape[0], n, draws, seed, "forgetting_ceiling")
    qualities = [
        forgetting_quality(kaggle_epsilon(two[a], two[b], scorer=scorer, delta=delta), n, scorer) for a, b in pairs
    ]
    low, high = spread(np.array(qualities))
    return {"mean": float(np.mean(qualities)), "low": low, "high": high}
