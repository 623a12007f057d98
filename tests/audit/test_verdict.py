from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from scforget.arrays import FloatArray
from scforget.attacks import ATTACKS
from scforget.audit import AuditSettings
from scforget.audit.equivalence import Equivalence, Side, welch_equivalence
from scforget.audit.verdict import (
    Utility,
    Verdict,
    combined_utility,
    decide,
    explain,
    failure_modes,
    nothing_to_forget,
    published_criterion,
    utility_verdict,
)
from scforget.errors import DataError, EmptyGroupError

SIDES: tuple[Side, ...] = get_args(Side)
BASE = welch_equivalence([0.50, 0.51, 0.49], [0.50, 0.505, 0.495], margin=0.02)
BEYOND = replace(BASE, side="beyond", mean=0.702, target_mean=0.526, difference=0.176)


def with_side(side: Side, **changes: Any) -> Equivalence:
    return replace(BASE, side=side, **changes)


def say(membership: Equivalence, trace: Equivalence, original: Equivalence = BEYOND) -> str:
    return explain(membership, trace, original, n_members=30, n_controls=50)


@pytest.mark.parametrize(("membership", "trace"), list(product(SIDES, SIDES)))
def test_decide_follows_the_precedence(membership: Side, trace: Side) -> None:
    both = (membership, trace)
    if "beyond" in both:
        wanted = "NOT_FORGOTTEN"
    elif "opposite" in both:
        wanted = "OVER_FORGOTTEN"
    elif both == ("inside", "inside"):
        wanted = "FORGOTTEN"
    else:
        wanted = "UNDETERMINED"
    assert decide(with_side(membership), with_side(trace)) == Verdict(wanted)


def test_decide_calls_retrains_forgotten_and_the_pilots_original_not() -> None:
    rng = np.random.default_rng(0)
    retrains, others = rng.normal(0.526, 0.004, 8), rng.normal(0.526, 0.004, 5)
    trace_null, trace_others = rng.normal(0, 0.4, 8), rng.normal(0, 0.4, 5)
    trace = welch_equivalence(trace_others, trace_null, margin=1.0)
    assert decide(welch_equivalence(others, retrains, margin=0.02), trace) is Verdict.FORGOTTEN
    original = welch_equivalence(rng.normal(0.702, 0.002, 5), retrains, margin=0.02)
    assert decide(original, trace) is Verdict.NOT_FORGOTTEN


@settings(deadline=None)
@given(st.sampled_from(SIDES), st.sampled_from(SIDES), st.sampled_from(SIDES))
def test_explain_names_the_verdict_it_explains(membership: Side, trace: Side, original: Side) -> None:
    text = say(with_side(membership), with_side(trace), with_side(original))
    words = {
        Verdict.FORGOTTEN: "Forgotten:",
        Verdict.NOT_FORGOTTEN: "Not forgotten:",
        Verdict.OVER_FORGOTTEN: "Over-forgotten:",
        Verdict.UNDETERMINED: "Undetermined:",
    }
    verdict = decide(with_side(membership), with_side(trace))
    assert [v for v, word in words.items() if word in text] == [verdict]
    assert text.count(". ") <= 2
    assert text.endswith(".")
    assert ("nothing to forget here" in text) == (original in ("inside", "undecided"))


def test_explain_says_that_the_kind_is_remembered_only_when_the_cells_are_not() -> None:
    words = "these cells are not remembered, their kind is"
    known = with_side("beyond", difference=3.7, margin=1.0)
    assert words in say(with_side("inside"), known)
    assert "3.7 standard deviations better" in say(with_side("inside"), known)
    assert "3.7 standard deviations worse" in say(with_side("inside"), replace(known, difference=-3.7))
    assert words not in say(with_side("undecided"), known)
    assert words not in say(BEYOND, known)
    assert "AUC 0.702; 0.526" in say(BEYOND, known)


def test_explain_names_the_models_and_cells_that_would_decide() -> None:
    open_membership = with_side("undecided", models_needed=3, n_unlearned=5, n_retrained=8)
    text = say(open_membership, with_side("inside"))
    assert "does not decide on membership." in text
    assert "15 unlearned and 24 retrained" in text
    assert "90 to forget, 150 controls" in text
    worse = with_side("undecided", models_needed=4, n_unlearned=5, n_retrained=8)
    assert "membership and trace" in say(open_membership, worse)
    assert "20 unlearned and 32 retrained" in say(open_membership, worse)


def test_explain_admits_when_no_number_of_models_would_decide() -> None:
    text = say(with_side("undecided", models_needed=None), with_side("inside"))
    assert "No practical number of models" in text
    single = say(with_side("undecided", models_needed=None, n_unlearned=1), with_side("inside"))
    assert "At least 2 unlearned and 3 retrained models" in single


@pytest.mark.parametrize(("side", "nothing"), [("inside", True), ("undecided", True), ("beyond", False)])
def test_nothing_to_forget_unless_the_original_is_shown_to_be_outside(side: Side, nothing: bool) -> None:
    assert nothing_to_forget(with_side(side)) is nothing


def test_published_criterion_is_inside_the_interval() -> None:
    published = (0.004, 0.266)  # of the paper's retrain; its verdicts on its own methods follow
    assert published_criterion(0.072, published)
    assert not published_criterion(0.300, published)
    assert not published_criterion(0.001, published)


def test_utility_verdict_equals_a_one_sided_welch_test() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for _ in range(200):
        one, two = rng.normal(rng.uniform(-3, 1), 0.5, 5), rng.normal(0, 1, 8)
        above = stats.ttest_ind(one + 1, two, equal_var=False, alternative="greater").pvalue < 0.05
        below = stats.ttest_ind(one + 1, two, equal_var=False, alternative="less").pvalue < 0.05
        wanted = "kept" if above else "lost" if below else "undetermined"
        assert utility_verdict(one, two, 1.0, 0.9) == wanted
        seen.add(wanted)
    assert len(seen) == 3


def test_utility_verdict_at_the_margin_keeps_at_most_at_its_level() -> None:
    rng, runs = np.random.default_rng(0), 1000
    kept = sum(utility_verdict(rng.normal(-1, 1, 5), rng.normal(0, 0.5, 8), 1.0, 0.9) == "kept" for _ in range(runs))
    assert 0.02 < kept / runs < 0.05 + 3 * np.sqrt(0.05 * 0.95 / runs)


def test_utility_verdict_never_counts_a_gain_as_a_loss() -> None:
    assert utility_verdict([5.0, 5.1], [1.0, 1.1], 0.1, 0.9) == "kept"


def test_utility_verdict_of_one_model_is_undetermined() -> None:
    assert utility_verdict([5.0], [1.0, 1.1], 0.1, 0.9) == "undetermined"


@pytest.mark.parametrize(
    ("values", "margin", "error"),
    [([], 1.0, EmptyGroupError), ([np.nan], 1.0, DataError), ([np.inf], 1.0, DataError), ([1.0], 0.0, DataError)],
)
def test_utility_verdict_refuses_impossible_input(values: list[float], margin: float, error: type[Exception]) -> None:
    with pytest.raises(error):
        utility_verdict(values, [1.0, 2.0], margin, 0.9)


@pytest.mark.parametrize(
    ("verdicts", "wanted"),
    [
        (["kept", "kept"], "kept"),
        (["kept", "undetermined"], "undetermined"),
        (["kept", "lost", "undetermined"], "lost"),
    ],
)
def test_combined_utility_is_as_good_as_the_worst(verdicts: list[Utility], wanted: str) -> None:
    assert combined_utility(verdicts) == wanted


def test_combined_utility_refuses_no_metric() -> None:
    with pytest.raises(DataError, match="utility metrics"):
        combined_utility([])


def modes(verdict: Verdict, kl: float, to_original: float, to_retrain: float) -> list[str]:
    return failure_modes(
        verdict, kl=kl, retrain_kl=13.59, distance_to_original=to_original, distance_to_retrain=to_retrain
    )


def test_failure_modes_label_the_papers_and_the_pilots_cases() -> None:
    # KL of the paper's extra-gradient and Fisher models, and of its DP-SGD one (8.08 against 9.69).
    assert modes(Verdict.OVER_FORGOTTEN, 2.0, 9, 1) == ["collapse", "streisand"]
    assert modes(Verdict.NOT_FORGOTTEN, 0.0064, 9, 8) == ["collapse"]
    assert modes(Verdict.FORGOTTEN, 0.83 * 13.59, 9, 1) == []
    # Traces of the pilot: original 11.0, gentle fine-tuning 11.1, rough fine-tuning 7.6.
    assert modes(Verdict.NOT_FORGOTTEN, 13, 0.1, 11.1) == ["ineffective"]
    assert modes(Verdict.NOT_FORGOTTEN, 13, 3.4, 7.6) == []


def test_failure_modes_never_call_a_forgotten_model_ineffective() -> None:
    assert modes(Verdict.FORGOTTEN, 13, 0.0, 0.5) == []


def valid() -> dict[str, Any]:
    return {
        "margins": {"membership": 0.02, "trace": 1.0, "elbo": 2.0, "marker_r": 0.02},
        "level": 0.9,
        "interval_level": 0.95,
        "bootstrap_draws": 1000,
        "null_draws": 1000,
        "trace_shrinkage": 0.5,
        "min_controls": 10,
        "matched_neighbours": 10,
        "fpr_targets": [0.01],
        "permutation_draws": 100,
        "delta": 1e-5,
        "attacks": {
            "threshold": {},
            "knn": {"neighbours": 10},
            "mlp": {
                "hidden": [8], "dropout": 0.0, "learning_rate": 1e-3, "batch_size": 128, "epochs": 1, "folds": 2,
                "attackers": 2, "shuffled_draws": 2,
            },
            "likelihood_ratio": {},
            "lira": {"variance": "global", "min_models": 4},
            "rmia": {"gamma": 1.0},
            "population": {
                "scorer": "exact", "ceiling_draws": 2, "klom_bins": 20, "klom_floor": 1e-5, "min_models": 8,
            },
        },
    }  # fmt: skip


def test_audit_settings_have_a_section_for_every_attack() -> None:
    settings = AuditSettings.model_validate(valid())
    assert set(type(settings.attacks).model_fields) == set(ATTACKS)
    for name, attack in ATTACKS.items():
        assert type(settings.of(name)) is attack.settings


def test_audit_settings_have_no_defaults() -> None:
    for key in valid():
        with pytest.raises(ValidationError, match=key):
            AuditSettings.model_validate({k: v for k, v in valid().items() if k != key})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("level", 1.0),
        ("trace_shrinkage", -0.1),
        ("bootstrap_draws", 1),
        ("fpr_targets", [0.0]),
        ("unknown", 1),
        ("permutation_draws", 0),
        ("delta", 0.0),
        ("delta", 1.0),
    ],
)
def test_audit_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        AuditSettings.model_validate({**valid(), key: value})


def test_audit_settings_refuse_a_margin_of_zero() -> None:
    margins: dict[str, FloatArray | float] = {**valid()["margins"], "trace": 0.0}
    with pytest.raises(ValidationError, match="trace"):
        AuditSettings.model_validate({**valid(), "margins": margins})
