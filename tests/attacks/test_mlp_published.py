from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch.nn.functional import linear

from scforget.arrays import BoolArray, FloatArray
from scforget.attacks import mlp as module
from scforget.attacks.mlp import PublishedAttacker, fit_published
from scforget.errors import DataError, EmptyGroupError

Cells = tuple[FloatArray, BoolArray, BoolArray]


def draw(seed: int, members: int, controls: int, columns: int = 69) -> Cells:
    """Cells whose features say nothing of their group."""
    features = np.random.default_rng(seed).normal(size=(members + controls, columns))
    forget = np.arange(members + controls) < members
    return features, forget, ~forget


@pytest.fixture(scope="module")
def attacker() -> PublishedAttacker:
    return fit_published(*draw(0, 30, 194), seed=0)


def test_fit_published_has_the_published_size_and_split(attacker: PublishedAttacker) -> None:
    assert [weight.shape for weight in attacker.weights] == [(256, 69), (256, 256), (1, 256)]
    assert len(set(attacker.trained_on.tolist())) == 179  # of 224
    # not stratified: P0's 80 % of 30 would be 24 every time
    members = [(fit_published(*draw(0, 10, 20, 3), seed=seed).trained_on < 10).sum() for seed in range(5)]
    assert len(set(members)) > 1


def test_fit_published_takes_full_batches_and_neither_weighs_nor_standardises(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = module.train

    def spy(nets: object, features: object, labels: object, weights: object, **others: object) -> None:
        calls.append((features, weights, others["cuts"]))
        original(nets, features, labels, weights, **others)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "train", spy)
    monkeypatch.setattr(module, "_PUBLISHED", module._PUBLISHED.model_copy(update={"epochs": 1}))
    features, forget, controls = draw(0, 30, 194)
    fit_published(300 + features, forget, controls, 0)
    ((seen, weights, cuts),) = calls
    np.testing.assert_allclose(seen[0], 300 + features, rtol=1e-6)
    assert (weights == 1).all()
    assert cuts == [128]


def test_published_score_equals_torchs_layers(attacker: PublishedAttacker) -> None:
    features = np.random.default_rng(3).normal(size=(11, 69))
    values = torch.from_numpy(features).float()
    for layer, (weight, bias) in enumerate(zip(attacker.weights, attacker.biases, strict=True)):
        values = linear(values.relu() if layer else values, torch.from_numpy(weight), torch.from_numpy(bias))
    np.testing.assert_allclose(attacker.score(features), values[:, 0], rtol=1e-4, atol=1e-5)


def test_published_layers_have_norm_one(attacker: PublishedAttacker) -> None:
    for weight in attacker.weights:
        assert 1 - 1e-4 <= np.linalg.norm(weight, 2) < 1.15


def test_published_attacker_survives_being_saved(
    attacker: PublishedAttacker, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("attacker") / "attacker.npz"
    np.savez(path, **attacker.to_arrays())
    with np.load(path) as arrays:
        again = PublishedAttacker.from_arrays(arrays)
    features = np.random.default_rng(3).normal(size=(5, 69))
    np.testing.assert_array_equal(again.score(features), attacker.score(features))
    np.testing.assert_array_equal(again.trained_on, attacker.trained_on)


@pytest.mark.parametrize("missing", ["trained_on", "weight_0", "bias_1"])
def test_published_attacker_refuses_missing_arrays(attacker: PublishedAttacker, missing: str) -> None:
    arrays = attacker.to_arrays()
    del arrays[missing]
    with pytest.raises(DataError, match="published attacker"):
        PublishedAttacker.from_arrays(arrays)


def test_published_attacker_of_no_arrays_is_refused() -> None:
    with pytest.raises(DataError, match="published attacker"):
        PublishedAttacker.from_arrays({})


def test_fit_published_gives_equal_bytes_for_equal_seeds() -> None:
    first, again, other = (fit_published(*draw(0, 10, 20, 3), seed=seed) for seed in (1, 1, 2))
    assert all(a.tobytes() == b.tobytes() for a, b in zip(first.weights, again.weights, strict=True))
    assert not np.array_equal(first.weights[0], other.weights[0])


def test_published_score_refuses_other_columns_and_nan(attacker: PublishedAttacker) -> None:
    with pytest.raises(DataError, match=r"wanted \[n, 69\]"):
        attacker.score(np.zeros((3, 70)))
    with pytest.raises(DataError, match="NaN"):
        attacker.score(np.full((3, 69), np.nan))


def test_fit_published_refuses_an_empty_group_and_wrong_shapes() -> None:
    features, forget, controls = draw(0, 5, 5, 3)
    with pytest.raises(EmptyGroupError, match="forget cells"):
        fit_published(features, forget & False, controls, 0)
    with pytest.raises(EmptyGroupError, match="control cells"):
        fit_published(features, forget, controls & False, 0)
    with pytest.raises(DataError, match="both groups"):
        fit_published(features, forget, forget, 0)
    with pytest.raises(DataError, match=r"\[n, D\]"):
        fit_published(features[:3], forget, controls, 0)


def test_published_auc_finds_a_leak_where_there_is_none() -> None:
    in_sample, held_out = [], []
    for seed in range(6):
        features, forget, controls = draw(seed, 60, 80)
        attacker = fit_published(features, forget, controls, seed)
        scores, left_out = attacker.score(features), ~np.isin(np.arange(140), attacker.trained_on)
        in_sample.append(roc_auc_score(forget, scores))
        held_out.append(roc_auc_score(forget[left_out], scores[left_out]))
    assert np.mean(in_sample) > 0.8
    assert np.mean(held_out) == pytest.approx(0.5, abs=3 * np.std(held_out, ddof=1) / np.sqrt(6))
