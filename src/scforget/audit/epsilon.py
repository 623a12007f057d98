"""Lower bounds on ε that hold with a stated confidence: evidence against an (ε, δ) guarantee, never for one.

A bound of 0 means "no evidence", not "private"; ``EpsilonBound.ceiling`` says what could have been shown at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import scipy

from scforget.arrays import FloatArray, IntArray
from scforget.audit.intervals import check_group, plain
from scforget.errors import DataError
from scforget.seeding import numpy_generator

Rule = Literal["bonferroni", "held_out"]
Event = Literal["at_least", "below"]
Population = Literal["positives", "negatives"]

# Halvings of the bracket around the bound of one run: more than a float64 can tell apart.
BISECTIONS = 60

# The four claims of a threshold: the event, and which hypothesis makes it likelier.
_CLAIMS: tuple[tuple[Event, Population], ...] = (
    ("at_least", "positives"),
    ("below", "negatives"),
    ("at_least", "negatives"),
    ("below", "positives"),
)


@dataclass(frozen=True)
class EpsilonBound:
    """A lower confidence bound on ε, and the test that gave it.

    Attributes
    ----------
    epsilon
        >= 0; the true ε at this δ is at least this with a chance of ``level``.
    ceiling
        What two samples of these sizes give when they are perfectly separated, the largest bound possible.
    threshold, event
        The event is a score ``at_least`` the threshold, or ``below`` it.
    likelier
        The hypothesis under which the event was found to be likelier.
    positive_rate, negative_rate
        Observed share of the event under each hypothesis, of the scores that the bound was computed from.
    n_positives, n_negatives
        Numbers of those scores; with ``held_out`` half of what was given.
    level, delta, rule
        As asked for.
    """

    epsilon: float
    ceiling: float
    threshold: float
    event: Event
    likelier: Population
    positive_rate: float
    negative_rate: float
    n_positives: int
    n_negatives: int
    level: float
    delta: float
    rule: Rule

    def to_dict(self) -> dict[str, Any]:
        """Return what JSON can hold; an infinite threshold becomes null."""
        return plain(self)


def _check_privacy(delta: float, level: float) -> None:
    if not 0 <= delta < 1:
        raise DataError("δ of a bound on ε", delta, "a number in [0, 1)")
    if not 0 < level < 1:
        raise DataError("level of a bound on ε", level, "a number between 0 and 1")


def _check_samples(positives: npt.ArrayLike, negatives: npt.ArrayLike, rule: Rule) -> tuple[FloatArray, FloatArray]:
    P, Q = check_group("scores of positives", positives, 2), check_group("scores of negatives", negatives, 2)
    if P.ndim != 1 or Q.ndim != 1:
        raise DataError("scores of a bound on ε", f"shapes {P.shape} and {Q.shape}", "two plain lists")
    if rule not in ("bonferroni", "held_out"):
        raise DataError("rule of a bound on ε", rule, "bonferroni or held_out")
    return P, Q


def _bounds(k: IntArray, n: int, error: float) -> tuple[FloatArray, FloatArray]:
    """Clopper–Pearson bounds ``[T]`` of k in n, below and above; each alone is wrong with chance <= ``error``."""
    lower = np.where(k > 0, scipy.special.betaincinv(np.maximum(k, 1), n - k + 1, error), 0.0)
    upper = np.where(k < n, scipy.special.betainccinv(k + 1, np.maximum(n - k, 1), error), 1.0)
    return lower, upper


def _count(scores: FloatArray, thresholds: FloatArray) -> IntArray:
    """``[T]``: how many scores are at or above each threshold."""
    return (scores.size - np.searchsorted(np.sort(scores), thresholds, side="left")).astype(np.int64)


def _claims(
    positives: FloatArray, negatives: FloatArray, thresholds: FloatArray, delta: float, errors: tuple[float, float]
) -> FloatArray:
    """``[4, T]``: bound on ε by each claim of ``_CLAIMS`` at each threshold; ``errors`` of a bound of each sample.

    P(S) <= e^ε·Q(S) + δ for every event S and both ways round, so ε >= ln((P(S) − δ) / Q(S)); P(S) is replaced by its
    lower bound and Q(S) by its upper one.
    """
    p_low, p_high = _bounds(_count(positives, thresholds), positives.size, errors[0])
    q_low, q_high = _bounds(_count(negatives, thresholds), negatives.size, errors[1])
    excess = np.stack([p_low, 1 - q_high, q_low, 1 - p_high]) - delta
    claims = np.full(excess.shape, -np.inf)
    denominators = np.stack([q_high, 1 - p_low, p_high, 1 - q_low])
    np.log(np.divide(excess, denominators), out=claims, where=excess > 0)
    return claims


def _simultaneous_errors(n_positives: int, n_negatives: int, level: float) -> tuple[float, float]:
    """Error of each bound of either sample that makes all of them hold at once, at every threshold whatever.

    Write a sample of n as quantiles of uniforms U. Where k scores lie at or below t, the distribution function at t
    lies in [U₍ₖ₎, U₍ₖ₊₁₎]: so bounds on all n order statistics of U bound it at every t, chosen on the data or not,
    with ties or without, and those bounds are Clopper–Pearson's. That makes n events on 2 sides of 2 samples.
    """
    return (1 - level) / (4 * n_positives), (1 - level) / (4 * n_negatives)


def _midway(lower: float, upper: float) -> float:
    """Halfway between neighbouring scores: the same event for those, and a fairer one for scores not seen yet."""
    middle = lower / 2 + upper / 2
    return middle if lower < middle <= upper else upper


def _best(positives: FloatArray, negatives: FloatArray, delta: float, errors: tuple[float, float]) -> tuple[int, float]:
    """Index of the claim with the largest bound over all thresholds between observed scores, and its threshold."""
    thresholds = np.unique(np.concatenate([positives, negatives]))
    claims = _claims(positives, negatives, thresholds, delta, errors)
    claim, at = divmod(int(claims.argmax()), thresholds.size)
    return claim, _midway(float(thresholds[max(at - 1, 0)]), float(thresholds[at]))


def _rate(scores: FloatArray, threshold: float, event: Event) -> float:
    share = float((scores >= threshold).mean())
    return share if event == "at_least" else 1 - share


def _halves(scores: FloatArray, generator: np.random.Generator) -> tuple[FloatArray, FloatArray]:
    order = generator.permutation(scores.size)
    return scores[order[: scores.size // 2]], scores[order[scores.size // 2 :]]


def epsilon_lower_bound(
    positives: npt.ArrayLike, negatives: npt.ArrayLike, *, level: float, delta: float, rule: Rule, seed: int
) -> EpsilonBound:
    """Lower confidence bound on the ε of an (ε, δ) guarantee, from independent scores under two hypotheses.

    Parameters
    ----------
    positives, negatives : ``[a]``, ``[b]``, a, b >= 2
        Independent scores under either hypothesis: one cell's under a unlearned and b retrained models, for one.
    level, delta
        Chance in (0, 1) that the bound is right; δ in [0, 1).
    rule
        How it is paid for that the threshold is chosen on the data: ``bonferroni`` bounds all at once; ``held_out``
        chooses on a random half of each sample and bounds on the other.
    seed
        Of the halves; ``bonferroni`` draws nothing.

    Returns
    -------
    EpsilonBound

    Raises
    ------
    EmptyGroupError
        With fewer than 2 scores on a side.
    DataError
        If a score is NaN, or δ, the level, the rule or a shape cannot be.

    Notes
    -----
    ε >= max over thresholds, both directions and both inequalities of ln((1 − δ − FNR⁺) / FPR⁺) and
    ln((1 − δ − FPR⁺) / FNR⁺), FPR⁺ and FNR⁺ upper bounds (Clopper & Pearson 1934).
    """
    P, Q = _check_samples(positives, negatives, rule)
    _check_privacy(delta, level)
    chosen, errors = (P, Q), _simultaneous_errors(P.size, Q.size, level)
    if rule == "held_out":
        generator = numpy_generator(seed, "epsilon_lower_bound")
        (choosing_p, P), (choosing_q, Q) = _halves(P, generator), _halves(Q, generator)
        # Two bounds in all: one rate from above, the other from below.
        chosen, errors = (choosing_p, choosing_q), ((1 - level) / 2, (1 - level) / 2)
    claim, threshold = _best(*chosen, delta, errors)
    (event, likelier), at = _CLAIMS[claim], np.array([threshold])
    positive_rate, negative_rate = (_rate(scores, threshold, event) for scores in (P, Q))
    separated = _claims(np.ones(P.size), np.zeros(Q.size), np.ones(1), delta, errors)
    return EpsilonBound(
        epsilon=max(0.0, float(_claims(P, Q, at, delta, errors)[claim, 0])),
        ceiling=max(0.0, float(separated.max())),
        threshold=threshold,
        event=event,
        likelier=likelier,
        positive_rate=positive_rate,
        negative_rate=negative_rate,
        n_positives=P.size,
        n_negatives=Q.size,
        level=level,
        delta=delta,
        rule=rule,
    )


def _one_run_p(epsilon: float, m: int, r: int, v: int, delta: float) -> float:
    """p-value of v right guesses in r under an (ε, δ) guarantee; may exceed 1."""
    q = scipy.special.expit(epsilon)
    tail = float(scipy.stats.binom.sf(v - 1, r, q))
    if v == 0 or delta == 0:
        return tail
    below = np.cumsum(scipy.stats.binom.pmf(np.arange(v - 1, -1, -1), r, q))
    return tail + 2 * m * delta * float((below / np.arange(1, v + 1)).max())


def epsilon_one_run(m: int, r: int, v: int, *, delta: float, level: float) -> float:
    """Lower confidence bound on ε from a single training run with many canaries.

    Parameters
    ----------
    m
        Canaries, each put into the training data by its own fair coin; >= 1.
    r
        How many of them were guessed "in" or "out"; how the guesses are made is fixed before the coins are seen;
        1 <= r <= m.
    v
        Guesses that were right, 0 <= v <= r.
    delta
        δ in [0, 1).
    level
        Chance in (0, 1) that the bound is right.

    Returns
    -------
    float
        >= 0: the largest ε that is rejected at 1 − level; 0 when none is.

    Raises
    ------
    DataError
        If the counts do not fit each other, or δ or the level cannot be.

    Notes
    -----
    Steinke, Nasr & Jagielski (2023, arXiv 2305.08846): under an (ε, δ) guarantee the chance of v right guesses or more
    is at most Pr[B >= v] + 2mδ·max_{1<=i<=v} Pr[v − i <= B < v]/i, B ~ Bin(r, q), q = e^ε/(1 + e^ε). It rises
    with ε wherever it is below one half, so bisection finds the crossing. The guarantee is for adding or removing one.
    """
    if not (m >= r >= 1 and r >= v >= 0):
        raise DataError("canaries, guesses and right guesses", (m, r, v), "m >= r >= 1 and r >= v >= 0")
    _check_privacy(delta, level)
    error = 1 - level
    if _one_run_p(0.0, m, r, v, delta) > error:
        return 0.0
    lower, upper = 0.0, 1.0
    while _one_run_p(upper, m, r, v, delta) <= error:
        lower, upper = upper, 2 * upper
    for _ in range(BISECTIONS):
        middle = (lower + upper) / 2
        if _one_run_p(middle, m, r, v, delta) <= error:
            lower = middle
        else:
            upper = middle
    return lower
