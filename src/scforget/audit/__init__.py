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

from typing import Annotated, Any, ClassVar

from pydantic import Field, create_model

from scforget.attacks import (
    ATTACKS,
    CLASS_ATTACKS,
    CLASS_MODEL_ATTACKS,
    CLASS_REFERENCE_ATTACKS,
    MODEL_ATTACKS,
    REFERENCE_ATTACKS,
    Attack,
)
from scforget.settings import Settings

__all__ = [
    "AuditSettings", "BaseAuditSettings", "BaseMargins", "ClassAuditSettings", "ClassMargins", "Margins",
    "equivalence", "intervals", "roc", "utility", "verdict",
]  # fmt: skip

Share = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(gt=0)]


class BaseMargins(Settings):
    """Largest differences from the retrained models that do not matter; fixed before any model is seen.

    Attributes
    ----------
    membership
        AUC.
    trace
        Standard deviations of the retrained models' per-cell scores.
    """

    membership: Positive
    trace: Positive

    @property
    def utility(self) -> dict[str, float]:
        """Margins of the utility metrics, by metric: all that are not of a primary statistic."""
        return {name: value for name, value in self if name not in BaseMargins.model_fields}


class Margins(BaseMargins):
    """Margins for VAEs.

    Attributes
    ----------
    elbo
        Nats per cell, utility.
    marker_r
        Pearson r, utility.
    """

    elbo: Positive
    marker_r: Positive


class ClassMargins(BaseMargins):
    """Margins for classifiers.

    Attributes
    ----------
    accuracy
        Share of unseen items that are classified rightly, utility.
    """

    accuracy: Share


def _sections(name: str, attacks: dict[str, Attack]) -> type[Settings]:
    fields: dict[str, Any] = {attack: (found.settings, ...) for attack, found in attacks.items()}
    return create_model(name, __base__=Settings, **fields)


class BaseAuditSettings(Settings):
    """Settings of the audit of any kind of model.

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
    model_attacks, reference_attacks
        Those of the registry that look at one model, and that compare many models' scores.
    """

    model_attacks: ClassVar[dict[str, Attack]]
    reference_attacks: ClassVar[dict[str, Attack]]
    margins: BaseMargins
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
    attacks: Settings

    def of(self, attack: str) -> Any:
        """Settings of one attack."""
        return getattr(self.attacks, attack)


class AuditSettings(BaseAuditSettings):
    """Settings of the audit of VAEs, see :class:`BaseAuditSettings`."""

    model_attacks = MODEL_ATTACKS
    reference_attacks = REFERENCE_ATTACKS
    margins: Margins
    attacks: _sections("AttackSettings", ATTACKS)  # type: ignore[valid-type]


class ClassAuditSettings(BaseAuditSettings):
    """Settings of the audit of classifiers, see :class:`BaseAuditSettings`."""

    model_attacks = CLASS_MODEL_ATTACKS
    reference_attacks = CLASS_REFERENCE_ATTACKS
    margins: ClassMargins
    attacks: _sections("ClassAttackSettings", CLASS_ATTACKS)  # type: ignore[valid-type]
