"""The audit: statistics of attack scores, utility, and the verdict; functions of arrays and settings.

roc
    ``auc``, ``advantage``, ``advantage_null``, ``roc_curve``, ``tpr_at_fpr``.
intervals
    ``clopper_pearson``, ``delong``, ``population_auc``, ``mean_interval``, ``bca``, ``plain``.
equivalence
    ``Equivalence``, ``welch_equivalence``, ``half_difference``, ``trace``, ``trace_leave_one_out``, ``excess_abs_z``.
verdict
    ``Verdict``, ``decide``, ``explain``, ``published_criterion``, ``utility_verdict``, ``combined_utility``,
    ``failure_modes``.
utility
    ``latent_agreement``, ``cell_type_accuracy``, ``marker_correlation``, ``posterior_predictive``, ``embedding``.

Only the settings are here, so that reading ``params.yaml`` loads no statistics.
"""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, create_model

from scforget.attacks import ATTACKS
from scforget.settings import Settings

__all__ = ["AuditSettings", "Margins", "equivalence", "intervals", "roc", "utility", "verdict"]

Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class Margins(Settings):
    """Largest differences from the retrained models that do not matter; fixed before any model is seen.

    Attributes
    ----------
    membership
        AUC.
    trace
        Standard deviations of the retrained models' per-cell scores.
    elbo
        Nats per cell, utility.
    marker_r
        Pearson r, utility.
    """

    membership: Positive
    trace: Positive
    elbo: Positive
    marker_r: Positive


_attack_fields: dict[str, Any] = {name: (attack.settings, ...) for name, attack in ATTACKS.items()}
AttackSettings = create_model("AttackSettings", __base__=Settings, **_attack_fields)


class AuditSettings(Settings):
    """Settings of the audit.

    Attributes
    ----------
    margins
        Of the equivalence and non-inferiority tests.
    level
        Of the verdict's Welch intervals; 0.9 is TOST at 5 %.
    interval_level
        Coverage of every other interval.
    bootstrap_draws, null_draws
        Resamples of an interval; simulations of the advantage under no leak.
    trace_shrinkage
        w in [0, 1]: how far per-cell variances of the retrained models are shrunk to the typical one.
    min_controls
        Fewer ``same_group`` controls than this, and no verdict is given.
    matched_neighbours
        k of the ``matched_knn`` controls (P0: 10).
    fpr_targets
        At which the TPR is read off.
    permutation_draws
        Permutations of the cells' labels behind the worst attack's p-value.
    delta
        δ of every (ε, δ).
    attacks
        One section for each attack of the registry.
    """

    margins: Margins
    level: Share
    interval_level: Share
    bootstrap_draws: Annotated[int, Field(ge=2)]
    null_draws: Count
    trace_shrinkage: Annotated[float, Field(ge=0, le=1)]
    min_controls: Annotated[int, Field(ge=2)]
    matched_neighbours: Count
    fpr_targets: list[Share]
    permutation_draws: Count
    delta: Share
    attacks: AttackSettings

    def of(self, attack: str) -> Any:
        """Settings of one attack."""
        return getattr(self.attacks, attack)
