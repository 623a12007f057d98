from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from scforget import critics as module
from scforget.critics import (
    Critic,
    Critics,
    CriticSettings,
    PublishedCriticSettings,
    auc,
    balanced_bce,
    draw,
    features_of,
    follow,
    kept_loss,
    mean_logit_auc,
    new_critics,
    plain_bce,
    published_critics,
    refusal,
    standardisation,
    train,
    trained_critics,
    worst_refusal,
)
from scforget.data.splits import ForgetSets
from scforget.errors import DataError, EmptyGroupError, NonFiniteError
from scforget.tasks import VaeTask
from scforget.training import Effort, mean_elbo

WIDTH = 13  # 5 + 2 Z, Z = 4
SETTINGS: dict[str, Any] = {
    "number": 3, "hidden": [8, 8], "dropout": 0.3, "learning_rate": 1e-2, "weight_decay": 1e-4, "steps": 30,
}  # fmt: skip


def settings(**changes: Any) -> CriticSettings:
    return CriticSettings(**{**SETTINGS, **changes})


def plain(**changes: Any) -> Critics:
    return new_critics(settings(**changes), torch.zeros(WIDTH), torch.ones(WIDTH), seed=0).eval()


def normal(*shape: int, seed: int = 0, shift: float = 0.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + shift


@pytest.mark.parametrize(("row", "seen"), [(0, range(13)), (1, range(11)), (2, range(3))])
def test_critics_see_the_columns_of_their_view_alone(row: int, seen: range) -> None:
    features = normal(6, WIDTH)
    before = plain()(features)
    for column in range(WIDTH):
        changed = features.clone()
        changed[:, column] += 5
        assert torch.equal(plain()(changed)[row], before[row]) == (column not in seen)


def test_critics_see_standardised_features() -> None:
    features, mean, sd = normal(6, WIDTH), normal(WIDTH, seed=1), normal(WIDTH, seed=2).square() + 0.1
    scaled = new_critics(settings(), mean, sd, seed=0).eval()
    torch.testing.assert_close(scaled(features * sd + mean), plain()(features), rtol=1e-4, atol=1e-5)


def test_critic_has_layers_of_norm_one_after_training_and_so_is_1_lipschitz() -> None:
    critics = plain(number=1, hidden=[16, 16], dropout=0.0)
    train(critics, normal(20, WIDTH, shift=1.0), normal(30, WIDTH, seed=1), Effort(),
          learning_rate=1e-3, weight_decay=0.0, steps=200)  # fmt: skip
    (critic,) = critics.members
    assert isinstance(critic, Critic)
    linear = [layer for layer in critic.layers if isinstance(layer, nn.Linear)]
    assert [layer.weight.shape for layer in linear] == [(16, 13), (16, 16), (1, 16)]
    for layer in linear:
        assert float(torch.linalg.svdvals(layer.weight.detach())[0]) == pytest.approx(1, abs=0.02)
    one, other = normal(500, WIDTH), normal(500, WIDTH, seed=3)
    ratio = (critic(one) - critic(other)).abs() / (one - other).norm(dim=1)
    assert 0.05 < float(ratio.detach().max()) < 1.02


def test_critic_without_spectral_norm_is_as_pytorch_initialises_it() -> None:
    critic = Critic("all", torch.zeros(WIDTH), torch.ones(WIDTH), [8], 0.0, spectral=False)
    assert list(critic.state_dict()) == [
        "mean", "sd", "layers.0.weight", "layers.0.bias", "layers.3.weight", "layers.3.bias"
    ]  # fmt: skip


def test_new_critics_differ_in_initialisation_and_follow_their_seed() -> None:
    one, again = plain(), plain()
    torch.manual_seed(5)
    other = new_critics(settings(), torch.zeros(WIDTH), torch.ones(WIDTH), seed=1)
    states = [critics.state_dict() for critics in (one, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    weights = [f"members.{i}.layers.3.parametrizations.weight.original" for i in range(3)]
    assert not any(torch.equal(states[0][name], states[2][name]) for name in weights)
    assert not torch.equal(states[0][weights[0]], states[0][weights[1]])
    assert len(plain(number=1).members) == 1


def test_new_critics_share_no_memory_so_that_a_checkpoint_can_hold_them() -> None:
    places = [value.untyped_storage().data_ptr() for value in plain().state_dict().values()]
    assert len(set(places)) == len(places)


def test_losses_equal_cross_entropies_by_the_book() -> None:
    members, others = 3 * normal(3, 5), 3 * normal(3, 11, seed=1)
    for j in range(3):
        one = binary_cross_entropy_with_logits(members[j], torch.ones(5))
        zero = binary_cross_entropy_with_logits(others[j], torch.zeros(11))
        all_cells = binary_cross_entropy_with_logits(
            torch.cat([members[j], others[j]]), torch.cat([torch.ones(5), torch.zeros(11)])
        )
        torch.testing.assert_close(refusal(others)[j], zero)
        torch.testing.assert_close(balanced_bce(members, others)[j], (one + zero) / 2)
        torch.testing.assert_close(plain_bce(members, others)[j], all_cells)
    zeros = torch.zeros(1, 4)
    assert float(balanced_bce(zeros, zeros)) == pytest.approx(np.log(2))


def test_auc_counts_pairs_with_ties_as_halves() -> None:
    members, others = torch.tensor([0.0, 1.0, 2.0, 2.0]), torch.tensor([-1.0, 1.0, 2.0])
    pairs = [(m > o) + 0.5 * (m == o) for m in members.tolist() for o in others.tolist()]
    assert auc(members, others) == pytest.approx(np.mean(pairs))


def test_draw_takes_all_of_a_few_and_some_of_many() -> None:
    cells, noise = np.arange(10, 20), torch.Generator().manual_seed(0)
    before = noise.get_state()
    assert draw(cells, 10, noise) is cells
    assert torch.equal(noise.get_state(), before)
    one, other = draw(cells, 6, noise), draw(cells, 6, noise)
    assert all(len(set(some)) == 6 and set(some) <= set(cells) for some in (one, other))
    assert one.tolist() != other.tolist()


def test_features_of_many_cells_are_those_of_each(
    task: VaeTask, forget_sets: ForgetSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = task.new_model(0).train()
    monkeypatch.setattr(module, "_BATCH", 7)
    found = features_of(task, model, forget_sets.forget)
    assert found.shape == (20, WIDTH)
    assert not found.requires_grad
    for cell, row in zip(forget_sets.forget, found, strict=True):
        wanted = task.features(model.eval(), task.batch(np.array([cell])))[0]
        torch.testing.assert_close(row, wanted.detach(), rtol=1e-4, atol=1e-4)
    signals = task.signals(model, forget_sets.forget)
    np.testing.assert_allclose(found[:, 2], signals.elbo, rtol=1e-5)


def test_features_of_no_cell_are_refused(task: VaeTask) -> None:
    with pytest.raises(EmptyGroupError):
        features_of(task, task.new_model(0), np.array([], dtype=np.int64))


def test_standardisation_gives_mean_and_sd_and_leaves_a_constant_column() -> None:
    features = normal(50, 3) * 1e4 + 1e6
    features[:, 1] = 7.0
    mean, sd = standardisation(features)
    np.testing.assert_allclose(mean, features.double().mean(0), rtol=1e-6)
    np.testing.assert_allclose(sd[[0, 2]], features.double().numpy().std(0)[[0, 2]], rtol=1e-6)
    assert float(sd[1]) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_standardisation_refuses_what_is_not_finite(bad: float) -> None:
    features = normal(5, 3)
    features[2, 1] = bad
    with pytest.raises(NonFiniteError, match="feature"):
        standardisation(features)


def test_train_makes_of_three_critics_what_each_would_be_alone() -> None:
    forget, others = normal(9, WIDTH, shift=0.5), normal(14, WIDTH, seed=1)
    together = plain(dropout=0.0)
    alone = [Critics([copy.deepcopy(member)]) for member in together.members if isinstance(member, Critic)]
    effort = Effort()
    for critics in (together, *alone):
        train(critics, forget, others, effort, learning_rate=1e-2, weight_decay=1e-2, steps=5)
    assert effort.steps == 4 * 5
    for member, single in zip(together.members, alone, strict=True):
        for name, value in single.members[0].state_dict().items():
            torch.testing.assert_close(member.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_train_separates_what_can_be_separated_and_nothing_in_no_step() -> None:
    forget, others = normal(9, WIDTH, shift=2.0), normal(14, WIDTH, seed=1)
    critics = plain(dropout=0.0)
    before = copy.deepcopy(critics.state_dict())
    options = {"learning_rate": 1e-2, "weight_decay": 0.0}
    train(critics, forget, others, Effort(), steps=0, **options)
    assert all(torch.equal(value, before[name]) for name, value in critics.state_dict().items())
    train(critics, forget, others, Effort(), steps=200, **options)
    assert not critics.training
    assert mean_logit_auc(critics, forget, others) > 0.99
    assert (balanced_bce(critics(forget), critics(others)) < 0.5).all()
    assert (critics(forget).mean(1) > critics(others).mean(1)).all()


def test_mean_logit_auc_refuses_a_nan() -> None:
    features = normal(4, WIDTH)
    with pytest.raises(NonFiniteError) as caught:
        mean_logit_auc(plain(), features, features * torch.nan, step=7)
    assert caught.value.step == 7


def test_trained_critics_compare_forgotten_cells_with_those_aside(task: VaeTask, forget_sets: ForgetSets) -> None:
    model, efforts, stream = task.new_model(0), [Effort(), Effort(), Effort()], torch.get_rng_state()
    (one, first), (again, second), (other, _) = (
        trained_critics(model, task, forget_sets, settings(), effort, seed=seed)
        for effort, seed in zip(efforts, (0, 0, 1), strict=True)
    )
    assert torch.equal(torch.get_rng_state(), stream)
    states = [critics.state_dict() for critics in (one, again, other)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert first == second
    assert not torch.equal(states[0]["members.0.layers.0.bias"], states[2]["members.0.layers.0.bias"])
    assert efforts[0].to_dict() == {"steps": 30, "forward": {"aside": 20, "forget": 20}, "backward": {}, "passes": 40}
    forget, aside = (features_of(task, model, cells) for cells in (forget_sets.forget, forget_sets.aside))
    pooled = torch.cat([forget, aside]).double().mean(0).float()
    assert torch.equal(states[0]["members.0.mean"], pooled)
    assert first == mean_logit_auc(one, forget, aside) > 0.6


def test_published_critics_compare_raw_features_with_those_of_retained_cells(
    task: VaeTask, forget_sets: ForgetSets
) -> None:
    own = PublishedCriticSettings(**SETTINGS, retain_cells=64)
    model, effort = task.new_model(0), Effort()
    one, again = (published_critics(model, task, forget_sets, own, effort, seed=0) for _ in range(2))
    assert effort.to_dict() == {"steps": 60, "forward": {"forget": 40, "retain": 128}, "backward": {}, "passes": 168}
    for name, value in one.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
        if name.endswith("mean"):
            assert not value.any()
        if name.endswith("sd"):
            assert (value == 1).all()


def test_worst_refusal_is_that_of_the_critic_hardest_to_convince(task: VaeTask, forget_sets: ForgetSets) -> None:
    model, effort, critics = task.new_model(0), Effort(), plain()
    found = worst_refusal(task, model, critics, forget_sets.forget, effort)
    logits = critics(features_of(task, model, forget_sets.forget)).detach()
    assert found == pytest.approx(max(float(torch.log1p(row.double().exp()).mean()) for row in logits), rel=1e-5)
    assert effort.forward == {"forget": 20}
    assert not effort.backward


def test_worst_refusal_of_a_broken_model_is_refused(task: VaeTask, forget_sets: ForgetSets) -> None:
    model = task.new_model(0)
    with torch.no_grad():
        model.mu.bias[0] = torch.nan
    with pytest.raises(NonFiniteError):
        worst_refusal(task, model, plain(), forget_sets.forget, Effort())


def test_follow_is_a_geometric_mean_of_what_was() -> None:
    average, value = nn.Linear(2, 1), nn.Linear(2, 1)
    start, goal = average.weight.detach().clone(), value.weight.detach()
    for _ in range(10):
        follow(average, value, 0.9)
    torch.testing.assert_close(average.weight.detach(), 0.9**10 * start + (1 - 0.9**10) * goal)
    norm, other = nn.BatchNorm1d(2), nn.BatchNorm1d(2)
    other.running_mean = torch.ones(2)
    follow(norm, other, 0.9)
    assert torch.equal(norm.state_dict()["running_mean"], torch.ones(2))


def test_kept_loss_is_the_size_of_the_mean_loss(task: VaeTask, forget_sets: ForgetSets) -> None:
    model, effort = task.new_model(0), Effort()
    found = kept_loss(task, model, forget_sets.retain, effort)
    wanted = task.loss(model.eval(), task.batch(forget_sets.retain), None).total.mean()
    assert found == pytest.approx(float(wanted.detach()), rel=1e-5)
    assert (effort.forward, effort.passes) == ({"retain": 100}, 100)


@pytest.mark.parametrize(
    ("elbo", "found"), [(3.0, 3.0), (0.0, DataError), (float("nan"), NonFiniteError), (float("inf"), NonFiniteError)]
)
def test_kept_loss_must_be_a_measure(
    task: VaeTask, monkeypatch: pytest.MonkeyPatch, elbo: float, found: float | type[Exception]
) -> None:
    answer: Callable[..., float] = lambda *_: elbo  # noqa: E731
    assert module.mean_elbo is mean_elbo
    monkeypatch.setattr(module, "mean_elbo", answer)
    ask = (task, task.new_model(0), np.arange(3), Effort())
    if isinstance(found, float):
        assert kept_loss(*ask) == found
    else:
        with pytest.raises(found):
            kept_loss(*ask)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("number", 4),
        ("number", True),
        ("hidden", []),
        ("hidden", [0]),
        ("dropout", 1.0),
        ("learning_rate", 0.0),
        ("steps", -1),
    ],
)
def test_critic_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})
