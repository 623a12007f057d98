"""One forget request, and a judge of it: how far models are from those that were retrained without its cells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy

from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.attacks.mlp import attack_features
from scforget.audit import AuditSettings, distance, equivalence, intervals, roc, verdict
from scforget.audit.scene import Groups
from scforget.data.controls import matched_knn
from scforget.data.splits import ForgetSets, Scenario
from scforget.errors import EmptyGroupError
from scforget.models.mixture import Model
from scforget.tasks import VaeTask

Record = dict[str, Any]
#: Fewest retrained models: each is measured against the others, whose spread needs three.
RETRAINS = 4


@dataclass(frozen=True)
class Scored:
    """What one model says of the n cells of a :class:`Case`, and what making it took.

    Attributes
    ----------
    features : ``[n, 5 + 2 Z]``
        Columns of :func:`scforget.attacks.mlp.attack_features`; at least the first three: reconstruction, KL, ELBO.
    passes
        Cells fed through a model, forwards or backwards.
    """

    features: FloatArray
    passes: int

    @property
    def elbo(self) -> FloatArray:
        """``[n]``, nats, at z = μ; higher = more member-like."""
        return self.features[:, 2]

    @property
    def kl(self) -> FloatArray:
        """``[n]``, nats, of the posterior to the prior."""
        return self.features[:, 1]

    def short(self) -> Scored:
        """What a :class:`Judge` needs of it, without the latent columns."""
        return Scored(self.features[:, :3].copy(), self.passes)


@dataclass(frozen=True)
class Case:
    """A forget request and the cells by which models are judged; picklable.

    Attributes
    ----------
    cells : ``[n]``
        Forgotten cells first, then all unseen ones.
    groups
        Which of the n are forgotten, and which are the ``same_group`` and ``matched_knn`` controls.
    kept : ``[n]`` bool
        Unseen cells outside the forgotten kind: utility is measured on them.
    """

    task: VaeTask
    sets: ForgetSets
    cells: IntArray
    groups: Groups
    kept: BoolArray

    def score(self, model: Model, passes: int = 0) -> Scored:
        """Score one model."""
        return Scored(attack_features(self.task.signals(model, self.cells)), passes)


def make_case(task: VaeTask, scenario: Scenario, unseen: IntArray, original: Model, neighbours: int) -> Case:
    """Gather the cells of a forget request.

    Parameters
    ----------
    scenario
        Its cell sets, its kind, its ``same_group`` controls.
    unseen : ``[U]``
        Cells that no model of the data set was trained on.
    original
        In whose latent means the ``matched_knn`` controls are looked for (the single-cell paper's protocol, at z = μ).
    neighbours
        k of those controls.
    """
    forget = scenario.sets.forget
    cells = np.concatenate([forget, unseen])
    forgotten = np.arange(len(cells)) < len(forget)
    mu = task.signals(original, cells).mu
    matched = ~forgotten
    matched[~forgotten] = matched_knn(mu[forgotten], mu[~forgotten], neighbours)
    groups = {"same_group": ~forgotten & np.isin(cells, scenario.controls), "matched_knn": matched}
    kind = scenario.group[cells]
    kept = ~forgotten if kind[~forgotten].all() else ~forgotten & ~kind  # scattered: no kind is forgotten
    return Case(task, scenario.sets, cells, Groups(forgotten, groups), kept)


def contrast(
    terms: Sequence[tuple[int, FloatArray]], level: float, cells: Sequence[FloatArray] = ()
) -> tuple[float, list[float | None]]:
    """Signed sum of the means of independent populations of models, and its interval.

    Parameters
    ----------
    terms : pairs of +1 or −1 and ``[M_i]``
        One number a model; what shares models must be subtracted model by model before.
    level
        Coverage, in (0, 1).
    cells : each ``[N_j]``
        The share of each cell in the sum, where the interval is to speak of other cells of the same kind as well.

    Returns
    -------
    estimate, interval
        The interval is ``[None, None]`` where a population has a single member.

    Notes
    -----
    Variance Σ s_i²/M_i + Σ s_j²/N_j, Student's quantile at Welch and Satterthwaite's degrees of freedom; with two terms
    it is Welch's interval. Models and cells together are the two-way variance of Owen (2007), which errs towards too
    wide, as each part holds a share of the interaction.
    """
    estimate = float(sum(sign * values.mean() for sign, values in terms))
    groups = [values for _, values in terms] + list(cells)
    if min(values.size for values in groups) < 2:
        return estimate, [None, None]
    parts = np.array([values.var(ddof=1) / values.size for values in groups])
    spread = (parts**2 / np.array([values.size - 1 for values in groups])).sum()
    freedom = parts.sum() ** 2 / spread if spread > 0 else np.inf
    width = float(scipy.stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(parts.sum()))
    return estimate, [estimate - width, estimate + width]


def _advantage(auc: float, interval: Sequence[float]) -> Record:
    """2·|AUC − ½| and the range that it has over the AUC's interval."""
    ends = [roc.advantage(end) for end in interval]
    lowest = 0.0 if interval[0] <= 0.5 <= interval[1] else min(ends)
    return {"advantage": roc.advantage(auc), "advantage_interval": [lowest, max(ends)]}


class Judge:
    """Judges models of one case by the retrained ones.

    Parameters
    ----------
    case
        Whose cells they were scored on.
    retrains
        Retrained models, at least 4.
    settings
        Of the audit: margins, levels, shrinkage, resamples.
    seed
        Of the resamples.

    Attributes
    ----------
    target
        :meth:`statistics` of the retrained models, each against the others.

    Raises
    ------
    EmptyGroupError
        With fewer than 4 retrained models.
    """

    def __init__(self, case: Case, retrains: Sequence[Scored], settings: AuditSettings, seed: int) -> None:
        if len(retrains) < RETRAINS:
            raise EmptyGroupError("retrained models of a judge", len(retrains), f"at least {RETRAINS}")
        self.case, self.settings = case, settings
        self.retrains, self._seed = list(retrains), seed
        self.target = self.statistics(self.retrains, own=True)

    def forgotten(self, models: Sequence[Scored]) -> FloatArray:
        """``[M, F]``: ELBO of the forgotten cells, nats."""
        return np.stack([one.elbo for one in models])[:, self.case.groups.forget]

    @property
    def retrained(self) -> FloatArray:
        """``[K, F]``: the same of the retrained models."""
        return self.forgotten(self.retrains)

    def statistics(self, models: Sequence[Scored], *, own: bool = False) -> dict[str, FloatArray]:
        """``[M]`` each: one number a model; ``own`` says that these are the retrained models themselves.

        ``membership`` and ``matched_knn`` (AUC by the ELBO), ``trace``, ``distance``, ``elbo`` and ``kl`` (held out).
        """
        scores = np.stack([one.elbo for one in models])
        aucs = {name: self.case.groups.aucs(scores, name) for name in ("same_group", "matched_knn")}
        forgotten, margins, w = self.forgotten(models), self.settings.margins, self.settings.trace_shrinkage
        if own:
            trace = equivalence.trace_leave_one_out(forgotten, w)
            away = distance.between_retrains(forgotten, aucs["same_group"], margins=margins, shrinkage=w)
        else:
            trace = equivalence.trace(forgotten, self.retrained, shrinkage=w)
            away = distance.to_retrains(
                forgotten, aucs["same_group"], self.retrained, self.target["membership"], margins=margins, shrinkage=w
            )
        kept = self.case.kept
        return {
            "membership": aucs["same_group"], "matched_knn": aucs["matched_knn"], "trace": trace,
            "distance": away.total, "elbo": scores[:, kept].mean(axis=1),
            "kl": np.array([one.kl[kept].mean() for one in models]),
        }  # fmt: skip

    def compare(self, own: FloatArray, base: FloatArray) -> Record:
        """One statistic of M models beside that of K retrained ones; both ``[M]`` and ``[K]``."""
        found, interval = contrast([(1, own), (-1, base)], self.settings.level)
        between = self.settings.interval_level
        return {
            "mean": float(own.mean()), "interval": contrast([(1, own)], between)[1], "per_model": own.tolist(),
            "retrain_mean": float(base.mean()), "retrain_interval": contrast([(1, base)], between)[1],
            "difference": found, "difference_interval": interval,
        }  # fmt: skip

    def compare_aucs(self, scores: FloatArray, base: FloatArray, control: str) -> Record:
        """AUCs of M models beside those of K retrained ones, by scores ``[M, n]`` and ``[K, n]`` of the case's cells.

        ``interval`` and ``retrain_interval`` are of models **and** cells, ``difference_interval`` is of models.
        """
        groups, settings = self.case.groups, self.settings
        found = self.compare(groups.aucs(scores, control), groups.aucs(base, control))
        for name, rows in (("interval", scores), ("retrain_interval", base)):
            members, controls = rows[:, groups.forget], rows[:, groups.controls[control]]
            drawn = intervals.population_auc(
                members, controls, settings.interval_level, self._seed, settings.bootstrap_draws
            )
            found[name] = list(drawn[1])
        return found | _advantage(found["mean"], found["interval"])

    def judge(self, models: Sequence[Scored], originals: Sequence[Scored]) -> Record:
        """Judge models, knowing what their originals say.

        Returns
        -------
        dict
            ``models``, ``retrains`` and ``cells`` (sizes of the groups); ``membership`` and ``matched_knn``
            (:meth:`compare_aucs`); ``trace``, ``distance``, ``elbo`` and ``kl`` (:meth:`compare`); ``verdict``,
            ``explanation`` and ``utility`` in words; ``passes``, mean.
        """
        own = self.statistics(models)
        scores, base = (np.stack([one.elbo for one in group]) for group in (models, self.retrains))
        return {
            "models": len(models), "retrains": len(self.retrains), "cells": self.case.groups.sizes(),
            "passes": float(np.mean([one.passes for one in models])),
            "membership": self.compare_aucs(scores, base, "same_group"),
            "matched_knn": self.compare_aucs(scores, base, "matched_knn"),
            **{name: self.compare(own[name], self.target[name]) for name in ("trace", "distance", "elbo", "kl")},
            **self._words(own, self.statistics(originals)),
        }  # fmt: skip

    def _words(self, own: dict[str, FloatArray], start: dict[str, FloatArray]) -> Record:
        """The verdict by both primary statistics; the originals say which side is memory."""
        settings, target = self.settings, self.target

        def test(values: FloatArray, name: str) -> equivalence.Equivalence:
            return equivalence.welch_equivalence(
                values, target[name], margin=getattr(settings.margins, name), level=settings.level,
                original_side=1 if start[name].mean() >= target[name].mean() else -1,
            )  # fmt: skip

        membership, trace = test(own["membership"], "membership"), test(own["trace"], "trace")
        sizes = self.case.groups.sizes()
        return {
            "verdict": str(verdict.decide(membership, trace)),
            "explanation": verdict.explain(
                membership, trace, test(start["membership"], "membership"),
                n_members=sizes["forget"], n_controls=sizes["same_group"],
            ),
            "utility": verdict.utility_verdict(
                own["elbo"], target["elbo"], settings.margins.elbo, settings.level
            ),
        }  # fmt: skip
