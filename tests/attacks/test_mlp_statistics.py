"""Errors and power of the learned attacks by simulation; 69 features, few cells, small networks."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from scforget import seeding
from scforget.arrays import BoolArray, FloatArray
from scforget.attacks import mlp as module
from scforget.attacks.mlp import MlpSettings, fit_published, mlp, shuffled_label_null

SETTINGS = MlpSettings(
    hidden=[32, 32], dropout=0.3, learning_rate=1e-3, batch_size=128, epochs=50, folds=5, attackers=1, shuffled_draws=5
)
Cells = tuple[FloatArray, BoolArray, BoolArray]


def draw(seed: int, *, members: int = 50, controls: int = 70, leak: float = 0.0) -> Cells:
    """Normal features; a leak shifts the members by so many standard deviations in three of the 69."""
    forget = np.arange(members + controls) < members
    features = np.random.default_rng(seed).normal(size=(members + controls, 69))
    features[:members, :3] += leak
    return features, forget, ~forget


def aucs(runs: int, **cells: float) -> FloatArray:
    found = []
    for seed in range(runs):
        features, forget, controls = draw(seed, **cells)  # type: ignore[arg-type]
        found.append(roc_auc_score(forget, mlp(features, forget, controls, SETTINGS, seed).scores))
    return np.array(found)


def test_mlp_auc_of_noise_is_one_half() -> None:
    found = aucs(20)
    assert found.mean() == pytest.approx(0.5, abs=3 * found.std(ddof=1) / np.sqrt(20))
    # wider than the rank sum of a fixed score, by a quarter in 400 runs
    assert 0.8 < found.std(ddof=1) / np.sqrt(121 / (12 * 50 * 70)) < 1.8


def test_mlp_finds_a_planted_leak_in_cells_it_never_saw() -> None:
    assert (aucs(4, leak=3.0) > 0.9).all()


def test_mlp_finds_a_leak_of_the_smaller_group_by_far() -> None:
    assert aucs(4, members=16, controls=96, leak=3.0).mean() > 0.9


def test_mlp_ranks_members_higher_in_whichever_direction_they_differ() -> None:
    assert (aucs(2, leak=-3.0) > 0.9).all()


def test_in_sample_scores_of_the_same_networks_find_a_leak_in_noise() -> None:
    features, forget, controls = draw(0)
    problem, folds = module._prepare(features, forget, controls, SETTINGS)
    logits, fold = module._fold_logits(problem, folds, SETTINGS, seeding.numpy_generator(0, "mlp", 0))
    own = logits[fold, np.arange(120)]
    np.testing.assert_array_equal(own, mlp(features, forget, controls, SETTINGS, 0).scores)
    in_sample = (logits.sum(axis=0) - own) / (folds - 1)
    assert roc_auc_score(forget, in_sample) > 0.8
    assert roc_auc_score(forget, own) < 0.65


def test_published_protocol_is_optimistic_where_mlp_is_not() -> None:
    published, honest = [], aucs(5)
    for seed in range(5):
        features, forget, controls = draw(seed)
        published.append(roc_auc_score(forget, fit_published(features, forget, controls, seed).score(features)))
    assert min(published) > 0.8
    assert max(honest) < 0.7


def test_shuffled_label_null_is_about_one_half_even_where_there_is_a_leak() -> None:
    cells = draw(0, leak=2.0)
    found = shuffled_label_null(*cells, SETTINGS, 0, 6)
    assert found["low"] < found["mean"] < found["high"]
    assert found["mean"] == pytest.approx(0.5, abs=3 * found["sd"] / np.sqrt(6))
    assert found == shuffled_label_null(*cells, SETTINGS, 0, 6)
    features, forget, controls = cells
    assert roc_auc_score(forget, mlp(features, forget, controls, SETTINGS, 0).scores) > found["high"]


def test_shuffled_label_null_looks_at_the_two_groups_alone() -> None:
    features, forget, controls = draw(0)
    others = np.concatenate([features, np.full((5, 69), 1e6)])
    wider = [np.concatenate([mask, np.zeros(5, dtype=bool)]) for mask in (forget, controls)]
    assert shuffled_label_null(others, wider[0], wider[1], SETTINGS, 0, 2) == shuffled_label_null(
        features, forget, controls, SETTINGS, 0, 2
    )


def test_mlp_scores_other_cells_like_the_group_they_resemble() -> None:
    features, forget, controls = draw(0, leak=2.0)
    others = draw(1, leak=2.0)[0]
    nobody = np.zeros(len(others), dtype=bool)
    scores = mlp(
        np.concatenate([features, others]), np.concatenate([forget, nobody]), np.concatenate([controls, nobody]),
        SETTINGS, 0,
    ).scores[len(features) :]  # fmt: skip
    assert roc_auc_score(forget, scores) > 0.9
    assert stats.mannwhitneyu(scores[forget], scores[controls]).pvalue < 1e-6
