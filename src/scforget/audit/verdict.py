"""The verdict: forgotten, not forgotten, over-forgotten or undetermined; said in words, with utility beside it."""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from typing import Literal

import numpy as np
import numpy.typing as npt
import scipy

from scforget.audit.equivalence import Equivalence, welch
from scforget.audit.intervals import Interval, check_group
from scforget.errors import DataError

Utility = Literal["kept", "lost", "undetermined"]

# Posterior KL under this share of the retrained models' is a collapse. P0's two collapsed models have 15 % and 0.05 %
# of their retrain's KL, its DP-SGD model, whose latent space still works, has 83 %.
COLLAPSE_SHARE = 0.25
# "Ineffective": the unlearned model lies this many times nearer to the original than to the retrained models, that is,
# it has gone less than a fifth of the way.
INEFFECTIVE_RATIO = 0.25


class Verdict(StrEnum):
    """What the audit says of a method's privacy."""

    FORGOTTEN = "FORGOTTEN"
    NOT_FORGOTTEN = "NOT_FORGOTTEN"
    OVER_FORGOTTEN = "OVER_FORGOTTEN"
    UNDETERMINED = "UNDETERMINED"


def decide(membership: Equivalence, trace: Equivalence) -> Verdict:
    """Combine the two primary statistics: one that is beyond its margin decides before any that is inside.

    Parameters
    ----------
    membership, trace
        The unlearned models' AUC and trace compared with the retrained ones'.

    Returns
    -------
    Verdict
        Any beyond on the original's side: not forgotten; else any beyond on the other: over-forgotten; else both
        inside: forgotten; else undetermined.
    """
    sides = {membership.side, trace.side}
    if "beyond" in sides:
        return Verdict.NOT_FORGOTTEN
    if "opposite" in sides:
        return Verdict.OVER_FORGOTTEN
    return Verdict.FORGOTTEN if sides == {"inside"} else Verdict.UNDETERMINED


def nothing_to_forget(original: Equivalence) -> bool:
    """Say whether the original itself is not shown to be outside the margin on membership."""
    return original.side not in ("beyond", "opposite")


def _remembered(membership: Equivalence, trace: Equivalence, what: str) -> str:
    how = "better" if trace.difference > 0 else "worse"
    kind = (
        f"the models know them {abs(trace.difference):.1f} standard deviations {how} than models that never saw them "
        f"(up to {trace.margin:g} would not matter)"
    )
    if membership.side == "beyond":
        return (
            f"Not forgotten: these very {what} can still be told from unseen {what} of their kind "
            f"(AUC {membership.mean:.3f}; {membership.target_mean:.3f} for models trained without them)."
        )
    if membership.side == "inside":
        return f"Not forgotten: these {what} are not remembered, their kind is; {kind}."
    return f"Not forgotten: {kind}."


def _undecided(undecided: list[tuple[str, Equivalence]], n_members: int, n_controls: int, what: str) -> str:
    names = " and ".join(name for name, _ in undecided)
    first = f"Undetermined: the evidence does not decide on {names}."
    if min(min(e.n_unlearned, e.n_retrained) for _, e in undecided) < 2:
        return f"{first} At least 2 unlearned and 3 retrained models, trained independently, are needed."
    times = [e.models_needed for _, e in undecided]
    if None in times:
        return f"{first} No practical number of models would: the difference lies too near to the margin."
    most = max(t for t in times if t is not None)
    example = undecided[0][1]
    return (
        f"{first} If the differences seen so far are the true ones, about {most * example.n_unlearned} unlearned and "
        f"{most * example.n_retrained} retrained models would decide; or, at best, {most} times as many {what} "
        f"({most * n_members} to forget, {most * n_controls} controls)."
    )


def explain(
    membership: Equivalence, trace: Equivalence, original: Equivalence, *,
    n_members: int, n_controls: int, what: str = "cells",
) -> str:  # fmt: skip
    """Say the verdict in plain words, for a data protection officer.

    Parameters
    ----------
    membership, trace
        As for ``decide``.
    original
        The **original** models' membership AUC compared with the retrained ones'.
    n_members, n_controls
        Cells to be forgotten, and controls of the same group.
    what
        Was forgotten, a plural.

    Returns
    -------
    str
        Two or three sentences: first, where it is so, that there is nothing to forget; then the verdict and why; then,
        where it is open, how many models or cells should decide it. "Times as many cells" is a best case: it takes the
        between-model variance to fall with 1/cells, as it does when models disagree on each cell by itself.
    """
    sentences = []
    if nothing_to_forget(original):
        sentences.append(
            f"There is nothing to forget here: the original is not shown to tell these {n_members} {what} from unseen "
            f"ones (AUC {original.mean:.3f}; {original.target_mean:.3f} for models trained without them)."
        )
    verdict = decide(membership, trace)
    if verdict is Verdict.NOT_FORGOTTEN:
        sentences.append(_remembered(membership, trace, what))
    elif verdict is Verdict.OVER_FORGOTTEN:
        sentences.append(
            f"Over-forgotten: the models treat these {what} as stranger than models that never saw them do. "
            "That itself gives away that they were removed."
        )
    elif verdict is Verdict.FORGOTTEN:
        sentences.append(
            f"Forgotten: nothing more of these {n_members} {what} was found in {membership.n_unlearned} unlearned "
            f"models than in {membership.n_retrained} models trained without them. "
            "Both differences lie inside margins that were set beforehand."
        )
    else:
        pairs = (("membership", membership), ("trace", trace))
        sentences.append(_undecided([p for p in pairs if p[1].side != "inside"], n_members, n_controls, what))
    return " ".join(sentences)


def published_criterion(advantage: float, retrain_advantage_interval: Interval) -> bool:
    """P0's own rule: the advantage lies inside the retrained model's 95 % interval of it.

    Reported beside the verdict, never used for it: the interval is of one retrain's cells, so a small forget set
    passes by having few cells.
    """
    lower, upper = retrain_advantage_interval
    return bool(lower <= advantage <= upper)


def utility_verdict(values: npt.ArrayLike, retrain: npt.ArrayLike, margin: float, level: float) -> Utility:
    """One-sided non-inferiority test of a utility metric (higher = better) against the retrained models.

    Parameters
    ----------
    values : ``[M1]``
        The metric of each unlearned model.
    retrain : ``[M2]``
        Of each retrained model.
    margin
        Largest loss that does not matter, > 0, in the metric's unit.
    level
        Of the two-sided Welch interval whose ends are used, so each end is at (1 − level)/2.

    Returns
    -------
    "kept" | "lost" | "undetermined"
        Kept: the interval of the difference lies above −margin; lost: wholly below. Undetermined too with a single
        model of a kind.

    Raises
    ------
    EmptyGroupError
        If either population is empty.
    DataError
        If a value is not finite or the margin not positive.
    """
    one, two = check_group("unlearned models", values, 1), check_group("retrained models", retrain, 1)
    if not (np.isfinite(one).all() and np.isfinite(two).all()):
        raise DataError("utility of a model", "an infinite value", "finite numbers")
    if margin <= 0:
        raise DataError("margin of a utility", margin, "a number above 0")
    if min(one.size, two.size) < 2:
        return "undetermined"
    error, freedom = welch(one, two)
    width = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * error
    difference = float(one.mean() - two.mean())
    if difference - width > -margin:
        return "kept"
    return "lost" if difference + width < -margin else "undetermined"


def combined_utility(verdicts: Iterable[Utility]) -> Utility:
    """Combine metrics: lost if any is, kept only if all are (which needs no correction), else undetermined.

    Raises
    ------
    DataError
        Without any metric: nothing is kept by not being looked at.
    """
    found = set(verdicts)
    if not found:
        raise DataError("utility metrics", "none", "at least one")
    if "lost" in found:
        return "lost"
    return "kept" if found == {"kept"} else "undetermined"


def failure_modes(
    verdict: Verdict, *, kl: float, retrain_kl: float, distance_to_original: float, distance_to_retrain: float
) -> list[str]:
    """Label how a method failed, in P0's words.

    Parameters
    ----------
    verdict
        Of ``decide``.
    kl, retrain_kl
        Mean posterior KL of unseen cells under the unlearned and the retrained models, nats per cell, >= 0.
    distance_to_original, distance_to_retrain
        Of the unlearned models, in any one measure (such as |difference of mean trace|), >= 0.

    Returns
    -------
    list of str
        Any of ``collapse`` (the latent space says little of a cell any more), ``streisand`` (the removal shows) and
        ``ineffective`` (the model is still the original; never said of a forgotten one).
    """
    modes = []
    if kl < COLLAPSE_SHARE * retrain_kl:
        modes.append("collapse")
    if verdict is Verdict.OVER_FORGOTTEN:
        modes.append("streisand")
    if verdict is not Verdict.FORGOTTEN and distance_to_original < INEFFECTIVE_RATIO * distance_to_retrain:
        modes.append("ineffective")
    return modes
