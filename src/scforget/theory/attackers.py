"""What a learned attacker learns from: the membership attack on parts of its features, retrained for every model.

The single-cell paper says that the shared encoder leaks most, since 64 of an attacker's 69 features come from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from scforget import seeding
from scforget.arrays import BoolArray, FloatArray, IntArray
from scforget.attacks.mlp import MlpSettings, mlp
from scforget.theory.judging import Judge, Record, Scored, contrast

#: Columns before those of the latent space, and after them.
_SUMS, _NORMS = 3, 2


def subsets(columns: int) -> dict[str, IntArray]:
    """Places of features by where they come from, among ``5 + 2 Z`` columns in the published order.

    Returns
    -------
    dict
        ``encoder``: μ and log σ², 2 Z columns. ``encoder_and_sums``: those, their norms and the KL, all of which the
        encoder alone gives. ``decoder``: the reconstruction. ``scalars``: reconstruction, KL, ELBO and norms.
        ``all``.
    """
    every = np.arange(columns)
    latent, norms = every[_SUMS:-_NORMS], every[-_NORMS:]
    return {
        "encoder": latent,
        "encoder_and_sums": np.concatenate([[1], latent, norms]),
        "decoder": every[:1],
        "scalars": np.concatenate([every[:_SUMS], norms]),
        "all": every,
    }


@dataclass(frozen=True)
class Attack:
    """One model to be attacked by some of its features.

    Attributes
    ----------
    row
        What the model belongs to: models of one row are averaged.
    features : ``[n, D]``
        Of the case's cells.
    forget, controls : ``[n]`` bool
        Members and non-members.
    """

    row: int
    features: FloatArray
    forget: BoolArray
    controls: BoolArray
    settings: MlpSettings
    seed: int


def attack(job: Attack) -> FloatArray:
    """Scores ``[n]`` by cross-fitted attackers, trained on this model alone; higher = more member-like."""
    return mlp(job.features, job.forget, job.controls, job.settings, job.seed).scores


def attacks(
    judge: Judge, models: Sequence[Scored], columns: IntArray, control: str, settings: MlpSettings, *, seed: int,
    row: int = 0,
) -> list[Attack]:  # fmt: skip
    """One attack on each of some models.

    Parameters
    ----------
    columns : ``[D]``
        Which of the features; see :func:`subsets`.
    control
        ``same_group`` or ``matched_knn``.
    """
    groups = judge.case.groups
    return [
        Attack(row, one.features[:, columns], groups.forget, groups.controls[control], settings,
               seeding.derive(seed, "attack", i))
        for i, one in enumerate(models)
    ]  # fmt: skip


def feature_attacks(judge: Judge, models: Sequence[Scored], settings: MlpSettings, seed: int) -> list[Attack]:
    """Attacks on the models and on the judge's retrained ones, by every subset of features, on ``same_group`` controls.

    The same folds, weights and batches serve all subsets of a model.
    """
    parts = subsets(models[0].features.shape[1])
    groups = (models, judge.retrains)
    return [
        found
        for row, columns in enumerate(parts.values())
        for which, group in enumerate(groups)
        for found in attacks(judge, group, columns, "same_group", settings, seed=seeding.derive(seed, which), row=row)
    ]


def feature_rows(judge: Judge, models: Sequence[Scored], results: Sequence[FloatArray]) -> list[Record]:
    """Judge the scores of :func:`feature_attacks`.

    Returns
    -------
    list of dict
        For each subset: ``features``, ``columns``, :meth:`Judge.compare_aucs`'s record, and ``beyond_encoder``:
        ``difference`` and ``interval`` of its leak (models − retrained) minus that of ``encoder``, model by model.

    Notes
    -----
    ``interval`` takes cells as independent, which cross-fitted scores are not: it is somewhat too narrow. The
    difference's interval is of models alone and has no such flaw.
    """
    parts = subsets(models[0].features.shape[1])
    M, K = len(models), len(judge.retrains)
    scores = np.stack(list(results)).reshape(len(parts), M + K, -1)
    aucs = np.array([judge.case.groups.aucs(part, "same_group") for part in scores])
    rows: list[Record] = []
    for part, own, (name, columns) in zip(scores, aucs, parts.items(), strict=True):
        away = own - aucs[0]
        difference, interval = contrast([(1, away[:M]), (-1, away[M:])], judge.settings.level)
        rows.append(
            {"features": name, "columns": len(columns), **judge.compare_aucs(part[:M], part[M:], "same_group"),
             "beyond_encoder": {"difference": difference, "interval": interval}}
        )  # fmt: skip
    return rows
