from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import ValidationError

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks import mlp as module
from scforget.attacks.mlp import MlpSettings, attack_features, mlp, shuffled_label_null
from scforget.errors import DataError, EmptyGroupError
from scforget.tasks import Signals, VaeTask

SETTINGS: dict[str, Any] = {
    "hidden": [8, 8], "dropout": 0.3, "learning_rate": 1e-2, "batch_size": 128, "epochs": 3, "folds": 5,
    "attackers": 2, "shuffled_draws": 5,
}  # fmt: skip
Cells = tuple[FloatArray, BoolArray, BoolArray]


def settings(**changes: Any) -> MlpSettings:
    return MlpSettings(**{**SETTINGS, **changes})


@pytest.fixture
def cells() -> Cells:
    """9 forget cells, 14 controls and 7 others, mixed, of 4 features."""
    rng = np.random.default_rng(0)
    group = rng.permutation(np.repeat([0, 1, 2], [9, 14, 7]))
    return rng.normal(size=(30, 4)), group == 0, group == 1


def test_attack_features_are_the_published_columns_in_order() -> None:
    rng = np.random.default_rng(0)
    mu, log_var = rng.normal(size=(3, 32)), rng.normal(size=(3, 32))
    signals = Signals(np.arange(3), np.array([-300.0, -200, -100]), np.array([1.0, 2, 3]), mu, log_var)
    found = attack_features(signals)
    assert found.shape == (3, 69)
    np.testing.assert_array_equal(found[:, :3], [[-300, 1, -301], [-200, 2, -202], [-100, 3, -103]])
    np.testing.assert_array_equal(found[:, 3:35], mu)
    np.testing.assert_array_equal(found[:, 35:67], log_var)
    np.testing.assert_allclose(found[:, 67], [np.sqrt((row**2).sum()) for row in mu])
    np.testing.assert_allclose(found[:, 68], [np.sqrt((row**2).sum()) for row in log_var])


def test_attack_features_equal_the_tasks_own(task: VaeTask) -> None:
    model, chosen = task.new_model(0).eval(), np.arange(20)
    with torch.no_grad():
        wanted = task.features(model, task.batch(chosen)).double().numpy()
    np.testing.assert_allclose(attack_features(task.signals(model, chosen)), wanted, rtol=1e-5, atol=1e-5)


def test_mlp_gives_equal_bytes_for_equal_seeds_and_other_scores_for_others(cells: Cells) -> None:
    found, again, other = (mlp(*cells, settings(), seed) for seed in (1, 1, 2))
    assert found.scores.shape == (30,)
    assert found.per_attacker.shape == (2, 30)
    assert found.scores.tobytes() == again.scores.tobytes()
    assert not np.allclose(found.scores, other.scores)
    np.testing.assert_allclose(found.scores, found.per_attacker.mean(axis=0))


def test_mlp_of_more_attackers_begins_with_the_same(cells: Cells) -> None:
    two, three = (mlp(*cells, settings(attackers=number), 1).per_attacker for number in (2, 3))
    assert three[:2].tobytes() == two.tobytes()
    assert not np.allclose(three[2], three[1])


def spied_training(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What ``train`` is called with from now on."""
    calls: list[dict[str, Any]] = []
    original = module.train

    def spy(nets: Any, features: Any, labels: Any, weights: Any, **others: Any) -> None:
        calls.append({"features": features.numpy(), "labels": labels.numpy(), "weights": weights.numpy(), **others})
        original(nets, features, labels, weights, **others)

    monkeypatch.setattr(module, "train", spy)
    return calls


def test_mlp_scores_a_cell_by_the_one_network_that_never_saw_it(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    features, forget, controls = cells
    logits: list[FloatArray] = []
    original: Callable[..., FloatArray] = module.logits_of
    monkeypatch.setattr(module, "logits_of", lambda *given: logits.append(original(*given)) or logits[-1])
    calls = spied_training(monkeypatch)
    scores = mlp(features, forget, controls, settings(attackers=1), 0).scores
    (call,), (found,) = calls, logits
    for cell in range(30):
        unseen = [k for k, own in enumerate(call["trained_on"]) if cell not in own]
        assert len(unseen) == (1 if forget[cell] or controls[cell] else 5)
        assert scores[cell] == pytest.approx(np.mean([found[k, cell] for k in unseen]))


def test_mlp_standardises_and_balances_by_the_training_cells_alone(
    cells: Cells, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, forget, controls = cells
    features = np.column_stack([1000 + 50 * features, np.full(30, 0.1)])
    calls = spied_training(monkeypatch)
    mlp(features, forget, controls, settings(attackers=1), 0)
    (call,) = calls
    np.testing.assert_array_equal(call["labels"], forget)
    for own, seen, weights in zip(call["trained_on"], call["features"], call["weights"], strict=True):
        mean, sd = features[own, :4].mean(axis=0), features[own, :4].std(axis=0)
        np.testing.assert_allclose(seen[:, :4], (features[:, :4] - mean) / sd, atol=1e-5)
        np.testing.assert_array_equal(seen[:, 4], 0)
        assert weights[own][forget[own]].sum() == pytest.approx(len(own) / 2)
        assert weights[own][controls[own]].sum() == pytest.approx(len(own) / 2)


def test_mlp_ignores_a_feature_that_is_constant_in_the_training_fold_alone(cells: Cells) -> None:
    features, forget, controls = cells
    rare = np.zeros(30)
    rare[np.flatnonzero(forget)[0]] = 1e6
    found = mlp(np.column_stack([features, rare]), forget, controls, settings(), 0).scores
    assert np.isfinite(found).all()
    assert np.abs(found).max() < 100


@hypothesis_settings(deadline=None)
@given(st.integers(2, 30), st.integers(2, 30), st.integers(2, 6), st.integers(0, 2**32 - 1))
def test_folds_are_even_in_both_groups_and_in_all(members: int, controls: int, folds: int, seed: int) -> None:
    folds = min(folds, members, controls)
    labels = np.random.default_rng(seed).permutation(np.repeat([1.0, 0.0], [members, controls]))
    found = module._folds(labels, folds, np.random.default_rng(seed))
    for group in (labels == 1, labels == 0, labels >= 0):
        sizes = np.bincount(found[group], minlength=folds)
        assert sizes.max() - sizes.min() <= 1
        assert sizes.sum() == group.sum()
        assert sizes.min() >= 1


@pytest.mark.parametrize(("members", "folds"), [(3, 3), (2, 2), (20, 5)])
def test_mlp_takes_fewer_folds_where_a_group_is_smaller(
    members: int, folds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    features, forget = np.random.default_rng(0).normal(size=(40, 3)), np.arange(40) < members
    calls = spied_training(monkeypatch)
    mlp(features, forget, ~forget, settings(attackers=1), 0)
    assert len(calls[0]["trained_on"]) == folds


def test_mlp_takes_batches_as_even_as_can_be(cells: Cells, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = spied_training(monkeypatch)
    for batch_size in (18, 19, 1, 100):
        mlp(*cells, settings(attackers=1, batch_size=batch_size, epochs=1), 0)
    # 23 cells in 5 folds leave 18 or 19 to train on
    assert [call["cuts"] for call in calls] == [2, 1, 19, 1]


def test_mlp_does_not_ask_for_a_features_unit(cells: Cells) -> None:
    features, forget, controls = cells
    scaled = features * [1e3, -1.0, 1e-2, 1.0] + [300.0, 0.0, 5.0, 0.0]
    once, twice = (mlp(x, forget, controls, settings(), 0).scores for x in (features * [1.0, -1.0, 1.0, 1.0], scaled))
    np.testing.assert_allclose(once, twice, atol=1e-4)


@pytest.mark.parametrize(("forget", "controls"), [([0], range(1, 9)), ([], range(1, 9)), (range(8), [9])])
def test_mlp_refuses_a_group_of_fewer_than_two(forget: Any, controls: Any) -> None:
    index = np.arange(10)
    with pytest.raises(EmptyGroupError, match="at least 2"):
        mlp(np.eye(10), np.isin(index, list(forget)), np.isin(index, list(controls)), settings(), 0)


def test_mlp_refuses_what_is_not_its_shape(cells: Cells) -> None:
    features, forget, controls = cells
    for wrong in ((features[:-1], forget, controls), (features[0], forget, controls), (features, forget[1:], controls),
                  (features[:, :0], forget, controls)):  # fmt: skip
        with pytest.raises(DataError, match=r"cells of the mlp attack"):
            mlp(*wrong, settings(), 0)


def test_mlp_refuses_nan_constants_and_a_cell_of_both_groups(cells: Cells) -> None:
    features, forget, controls = cells
    with pytest.raises(DataError, match="1 not finite"):
        mlp(np.where(np.arange(120).reshape(30, 4) == 7, np.nan, features), forget, controls, settings(), 0)
    with pytest.raises(DataError, match="same for every cell"):
        mlp(np.ones((30, 4)), forget, controls, settings(), 0)
    with pytest.raises(DataError, match="both groups"):
        mlp(features, forget, controls | forget, settings(), 0)


def test_shuffled_label_null_refuses_a_single_draw(cells: Cells) -> None:
    with pytest.raises(DataError, match="at least 2"):
        shuffled_label_null(*cells, settings(), 0, 1)


@pytest.mark.parametrize("change", [{"folds": 1}, {"attackers": 0}, {"shuffled_draws": 1}, {"unknown": 1}])
def test_mlp_settings_refuse_what_means_nothing(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        settings(**change)
