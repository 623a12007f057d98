"""Attacks on one classifier, against slow arithmetic with many digits, and at logits where probabilities round."""

from __future__ import annotations

from decimal import Decimal, getcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import expit

from scforget.arrays import FloatArray
from scforget.attacks import (
    ATTACKS,
    CLASS_ATTACKS,
    CLASS_MODEL_ATTACKS,
    CLASS_REFERENCE_ATTACKS,
    LEARNED,
    REFERENCE_ATTACKS,
    confidence,
)
from scforget.attacks.confidence import ConfidenceSettings, attack_features, log_probability, rmia_of_probabilities
from scforget.attacks.knn import KnnSettings, knn
from scforget.attacks.references import References
from scforget.attacks.rmia import RmiaSettings
from scforget.class_tasks import ClassSignals

getcontext().prec = 400
LOGITS = np.array([[2.0, -1.0, 0.5], [0.0, 0.0, 0.0], [300.0, -300.0, 0.0], [300.0, -300.0, 0.0], [-1e4, 1e4, 9e3]])
LABELS = np.array([0, 2, 0, 1, 0])


def signals(logits: FloatArray = LOGITS, labels: np.ndarray = LABELS) -> ClassSignals:
    return ClassSignals(np.arange(len(labels)), labels.astype(np.int64), logits, np.zeros((len(labels), 2)))


def scores_of(found: ClassSignals) -> dict[str, FloatArray]:
    return confidence.confidence(found, found, ConfidenceSettings())


def exact(row: FloatArray, label: int) -> tuple[float, float, float, float]:
    """Log-odds of the true class, its log-probability, minus the entropy, log-odds of the likeliest: 400 digits."""
    weights = [Decimal(float(logit)).exp() for logit in row]
    p = [weight / sum(weights) for weight in weights]

    def odds(k: int) -> float:
        return float((weights[k] / sum(w for j, w in enumerate(weights) if j != k)).ln())

    return odds(label), float(p[label].ln()), float(sum(one * one.ln() for one in p)), odds(int(np.argmax(row)))


def test_confidence_scores_equal_arithmetic_with_400_digits() -> None:
    found = scores_of(signals())
    assert tuple(found) == confidence.SCORES
    for item, (row, label) in enumerate(zip(LOGITS, LABELS, strict=True)):
        np.testing.assert_allclose(
            [values[item] for values in found.values()], exact(row, label), rtol=1e-9, atol=1e-12
        )


def test_confidence_keeps_apart_what_probabilities_round_to_one() -> None:
    logits = np.array([[60.0, 0.0], [70.0, 0.0], [-60.0, 0.0], [-70.0, 0.0]])
    found = scores_of(signals(logits, np.zeros(4, dtype=np.int64)))
    np.testing.assert_allclose(found["confidence"], [60, 70, -60, -70])
    np.testing.assert_allclose(found["loss"], [-np.exp(-60.0), -np.exp(-70.0), -60, -70])
    np.testing.assert_allclose(found["max_prob"], [60, 70, 60, 70])


@given(st.integers(0, 2**32 - 1), st.floats(0.1, 1e6))
def test_confidence_scores_are_finite_and_in_their_ranges_for_any_finite_logits(seed: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    found = scores_of(signals(scale * rng.normal(size=(7, 4)), rng.integers(0, 4, 7)))
    assert all(np.isfinite(values).all() for values in found.values())
    assert (found["loss"] <= 0).all()
    assert (found["entropy"] <= 0).all()
    assert (found["entropy"] >= -np.log(4) - 1e-12).all()
    assert (found["max_prob"] >= found["confidence"]).all()
    assert (found["max_prob"] >= -np.log(3) - 1e-9).all()  # the likeliest of 4 has at least 1/4


def test_log_probability_is_the_logarithm_of_the_logistic_function() -> None:
    sure = np.array([-30.0, -1.0, 0.0, 2.0, 12.0])
    np.testing.assert_allclose(log_probability(sure), np.log(expit(sure)), rtol=1e-9)
    np.testing.assert_allclose(log_probability(np.array([-1e5, 1e5])), [-1e5, 0.0])


def test_attack_features_are_all_classes_the_true_one_and_three_numbers() -> None:
    found = attack_features(signals())
    assert found.shape == (5, 9)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found[:, :3]).sum(axis=1), 1)
    np.testing.assert_array_equal(found[:, 3:6], np.eye(3)[LABELS])
    scores = scores_of(signals())
    np.testing.assert_allclose(
        found[:, 6:], np.column_stack([-scores["loss"], scores["confidence"], -scores["entropy"]])
    )
    np.testing.assert_allclose(found[1], [*[-np.log(3)] * 3, 0, 0, 1, np.log(3), -np.log(2), np.log(3)])


def test_knn_of_classifiers_looks_at_features() -> None:
    points = np.array([[0.0, 0.0], [3.0, 4.0]])
    query = ClassSignals(np.array([7]), np.array([0]), np.zeros((1, 2)), points[:1])
    reference = ClassSignals(np.array([8, 9]), np.array([0, 1]), np.zeros((2, 2)), np.array([[0.0, 2.0], [3.0, 4.0]]))
    np.testing.assert_allclose(knn(query, reference, KnnSettings(neighbours=2))["knn"], [-(2 + 5) / 2])


def test_rmia_of_probabilities_counts_ratios_of_probabilities() -> None:
    rng = np.random.default_rng(3)
    n, models, aside = 12, 6, np.arange(12) >= 8
    members = (np.arange(models)[:, None] % 2 == np.arange(n) % 2) & ~aside
    phi, own = rng.normal(size=(models, n)), rng.normal(size=(2, n))
    references = References(rng.normal(size=(3, n)), phi, members, aside)
    found = rmia_of_probabilities(own, references, RmiaSettings(gamma=1.5), own=False)
    p = expit(phi)
    for model in range(2):
        ratios = np.empty(n)
        for x in range(n):
            outside = p[~members[:, x], x].mean()
            mean = outside if aside[x] else (p[members[:, x], x].mean() + outside) / 2
            ratios[x] = expit(own[model, x]) / mean
        for x in range(8):
            wanted = np.mean([ratios[x] / ratios[z] > 1.5 for z in range(8, n)])
            assert found["rmia_online"][model, x] == pytest.approx(wanted)


def test_rmia_of_probabilities_knows_the_retrained_models_again() -> None:
    rng = np.random.default_rng(4)
    members = np.arange(4)[:, None] % 2 == np.arange(6) % 2
    aside = np.arange(6) >= 4
    references = References(rng.normal(size=(3, 6)), rng.normal(size=(4, 6)), members & ~aside, aside)
    found = rmia_of_probabilities(references.retrains, references, RmiaSettings(gamma=1.0), own=True)
    assert found["rmia_online"].shape == (3, 6)


def test_class_attacks_name_each_attack_once_and_share_what_is_the_same() -> None:
    assert set(CLASS_ATTACKS) == {*CLASS_MODEL_ATTACKS, *CLASS_REFERENCE_ATTACKS, "mlp", "population"}
    assert set(CLASS_REFERENCE_ATTACKS) == set(REFERENCE_ATTACKS)
    for name in ("knn", "mlp", "likelihood_ratio", "lira", "population"):
        assert CLASS_ATTACKS[name] is ATTACKS[name]
    assert not set(confidence.SCORES) & {*LEARNED, "knn"}
