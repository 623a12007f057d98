from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import sparse
from torch import Tensor, nn

from killing import KilledError, MemoryCheckpoint
from scforget.artifacts import FileCheckpoint
from scforget.critics import Critics, CriticSettings, trained_critics
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.methods.extragradient import (
    Cells,
    ExtragradientSettings,
    Player,
    extragradient,
    extragradient_step,
    game,
)
from scforget.models.vae import VAE, Batch
from scforget.tasks import VaeTask
from scforget.training import Effort, Trained, TrainingSettings, fit

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
CRITICS: dict[str, Any] = {
    "number": 3, "hidden": [16, 16], "dropout": 0.3, "learning_rate": 1e-2, "weight_decay": 1e-4, "steps": 20,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "critics": CRITICS, "lam": 10.0, "learning_rate": 1e-3, "ttur": 5.0, "ema_decay": 0.9, "batch_size": 32,
    "epochs": 3,
}  # fmt: skip
RATE = 0.1


def settings(**changes: Any) -> ExtragradientSettings:
    return ExtragradientSettings(**{**SETTINGS, **changes})


@pytest.fixture
def unlearn(task: VaeTask, forget_sets: ForgetSets, original: Original) -> Callable[..., Trained]:
    def run(*, seed: int = 0, checkpoint: Any = None, **changes: Any) -> Trained:
        return extragradient(original(), task, forget_sets, settings(**changes), seed=seed, checkpoint=checkpoint)

    return run


class Point(nn.Module):
    """A player of the game x·y: one number, in float64."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor(value, dtype=torch.float64))


def bilinear(
    optimiser: Callable[..., torch.optim.Optimizer] = torch.optim.SGD, **own: Any
) -> tuple[list[Player], Callable[[], Sequence[Tensor]], Callable[[], tuple[float, float]]]:  # fmt: skip
    x, y = Point(1.0), Point(1.0)
    players = [Player(point, optimiser(point.parameters(), lr=RATE, **own)) for point in (x, y)]
    return players, lambda: (x.value * y.value, -x.value * y.value), lambda: (x.value.item(), y.value.item())


def test_extragradient_step_reaches_the_saddle_where_plain_steps_spiral_away() -> None:
    players, losses, at = bilinear()
    for _ in range(2000):
        extragradient_step(players, losses, Effort())
    assert math.hypot(*at()) < 1e-3
    players, losses, at = bilinear()
    norms = []
    for _ in range(500):
        first, second = losses()
        first.backward(inputs=list(players[0].module.parameters()))
        second.backward(inputs=list(players[1].module.parameters()))
        for player in players:
            player.optimiser.step()
            player.optimiser.zero_grad()
        norms.append(math.hypot(*at()))
    assert norms == sorted(norms)
    assert norms[-1] == pytest.approx(math.sqrt(2) * (1 + RATE**2) ** 250)


def test_extragradient_step_is_the_closed_form_matrix() -> None:
    players, losses, at = bilinear()
    matrix = np.array([[1 - RATE**2, -RATE], [RATE, 1 - RATE**2]])
    for steps in range(1, 20):
        values = extragradient_step(players, losses, Effort())
        before = np.linalg.matrix_power(matrix, steps - 1) @ [1, 1]
        np.testing.assert_allclose(at(), matrix @ before, rtol=1e-12)
        np.testing.assert_allclose(values, [before[0] * before[1], -before[0] * before[1]], rtol=1e-12)


def test_extragradient_step_with_adam_is_extra_adam() -> None:
    """Algorithm 4 of Gidel et al. (2019), number by number: moments run on through both steps of a round."""
    players, losses, at = bilinear(torch.optim.Adam, betas=(0.5, 0.9))
    w, m, v, count = [1.0, 1.0], [0.0, 0.0], [0.0, 0.0], 0
    for _ in range(25):
        extragradient_step(players, losses, Effort())
        start, point = list(w), list(w)
        for _ in range(2):
            gradient, count = (point[1], -point[0]), count + 1
            m = [0.5 * old + 0.5 * g for old, g in zip(m, gradient, strict=True)]
            v = [0.9 * old + 0.1 * g * g for old, g in zip(v, gradient, strict=True)]
            point = [
                s - RATE * (a / (1 - 0.5**count)) / (math.sqrt(b / (1 - 0.9**count)) + 1e-8)
                for s, a, b in zip(start, m, v, strict=True)
            ]
        w = point
        np.testing.assert_allclose(at(), w, rtol=1e-9)


def test_extragradient_step_shows_both_evaluations_the_same_noise() -> None:
    players, losses, _ = bilinear()
    players[0].module.register_buffer("memory", torch.zeros(1))
    noise, seen = torch.Generator().manual_seed(3), []

    def watched() -> Sequence[Tensor]:
        memory = players[0].module.get_buffer("memory")
        seen.append((float(torch.rand(1)), float(torch.rand(1, generator=noise)), float(memory)))
        memory += 1
        return losses()

    effort = Effort()
    for _ in range(3):
        extragradient_step(players, watched, effort, noise)
    assert seen[0::2] == seen[1::2]
    assert len(set(seen)) == 3  # but the next step draws afresh
    assert [row[2] for row in seen[::2]] == [0, 1, 2]
    assert effort.steps == 3 * 2 * 2


@pytest.mark.parametrize("at", [1, 2])
def test_extragradient_step_stops_at_a_nan_in_either_evaluation(at: int) -> None:
    players, losses, _ = bilinear()
    calls, effort = iter([1, 2]), Effort()

    def spoiled() -> Sequence[Tensor]:
        factor = torch.nan if next(calls) == at else 1.0
        return [loss * factor for loss in losses()]

    with pytest.raises(NonFiniteError) as caught:
        extragradient_step(players, spoiled, effort)
    assert caught.value.step == 2 * (at - 1)


@pytest.fixture
def board(task: VaeTask, forget_sets: ForgetSets, original: Original) -> tuple[VAE, Critics, Cells]:
    model = original()
    critics, _ = trained_critics(model, task, forget_sets, CriticSettings(**CRITICS), Effort(), seed=0)
    return model, critics, Cells(forget_sets.retain[:30], forget_sets.forget[:12], forget_sets.aside)


def test_game_pays_critics_what_the_model_loses_but_for_what_is_kept(
    task: VaeTask, board: tuple[VAE, Critics, Cells]
) -> None:
    model, critics, cells = board
    with torch.no_grad():  # critics in eval mode: no dropout
        torch.manual_seed(0)
        value, paid = game(task, model, critics, cells, noise=torch.Generator().manual_seed(1), weight=0.01)
        torch.manual_seed(0)
        kept = task.loss(model.train(), task.batch(cells.retain), torch.Generator().manual_seed(1)).total.mean()
        losses = []
        for member in critics.members:
            p, q = (member(task.features(model.eval(), task.batch(some))).double().sigmoid()
                    for some in (cells.forget, cells.aside))  # fmt: skip
            losses.append(-0.5 * (p.log().mean() + (1 - q).log().mean()))
    assert float(paid) == pytest.approx(float(torch.stack(losses).mean()), rel=1e-4)
    assert float(value) == pytest.approx(0.01 * float(kept) - float(paid), rel=1e-5)


def test_extragradient_step_of_the_game_is_what_copies_say(
    task: VaeTask, board: tuple[VAE, Critics, Cells], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SGD: copies move first, their gradients are found from scratch, and the players follow those."""
    model, critics, cells = board
    model.double(), critics.double().train()
    batch = task.batch
    monkeypatch.setattr(task, "batch", lambda some: Batch(*(part.double() for part in batch(some))))

    def play(one: VAE, other: Critics) -> tuple[Callable[[], Sequence[Tensor]], torch.Generator]:
        def losses() -> Sequence[Tensor]:
            return game(task, one, other, cells, noise=noise, weight=0.01)

        torch.manual_seed(5)
        noise = torch.Generator().manual_seed(6)
        return losses, noise

    def gradients(one: VAE, other: Critics) -> dict[str, Tensor]:
        found = {}
        for index in (0, 1):
            again = copy.deepcopy((one, other))
            play(*again)[0]()[index].backward()
            found |= {f"{index}.{n}": p.grad for n, p in again[index].named_parameters() if p.grad is not None}
        return found

    def moved(by: dict[str, Tensor]) -> tuple[VAE, Critics]:
        pair = copy.deepcopy(start)
        with torch.no_grad():
            for index, player in enumerate(pair):
                for name, value in player.named_parameters():
                    if f"{index}.{name}" in by:
                        value.sub_(rates[index] * by[f"{index}.{name}"])
        return pair

    start, rates = copy.deepcopy((model, critics)), (0.01, 0.1)
    wanted = moved(gradients(*moved(gradients(*start))))
    pair = (model, critics)
    players = [Player(p, torch.optim.SGD(p.parameters(), lr=r)) for p, r in zip(pair, rates, strict=True)]
    losses, noise = play(*pair)
    extragradient_step(players, losses, Effort(), noise)
    plain = moved(gradients(*start))
    apart = wrong = 0.0
    for got, want, simple in zip(pair, wanted, plain, strict=True):
        for name, value in want.named_parameters():
            wrong = max(wrong, float((value - got.state_dict()[name]).detach().abs().max()))
            apart = max(apart, float((value - simple.state_dict()[name]).detach().abs().max()))
    assert wrong < 1e-12
    assert apart > 1e-3  # an ordinary step would have gone elsewhere


def test_extragradient_of_no_epoch_is_the_original_bit_for_bit(
    unlearn: Callable[..., Trained], original: Original, same_bytes: Same
) -> None:
    unlearned = unlearn(epochs=0)
    assert same_bytes(unlearned.model.state_dict(), original().state_dict())
    assert (unlearned.effort.passes, unlearned.effort.steps, unlearned.history) == (0, 0, [])


def test_extragradient_follows_its_seed_alone(unlearn: Callable[..., Trained], same_bytes: Same) -> None:
    first, stream = unlearn(), torch.get_rng_state()
    torch.manual_seed(99)
    again, other = unlearn(), unlearn(seed=1)
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert (first.history, first.facts) == (again.history, again.facts)
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())
    assert not first.model.training
    torch.set_rng_state(stream)
    unlearn()
    assert torch.equal(torch.get_rng_state(), stream)


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_extragradient_resumes_bit_for_bit(unlearn: Callable[..., Trained], same_bytes: Same, epoch: int) -> None:
    whole, last = unlearn(checkpoint=(kept := MemoryCheckpoint())), MemoryCheckpoint()
    dying = MemoryCheckpoint(dies_at=epoch)
    with pytest.raises(KilledError):
        unlearn(checkpoint=dying)
    last.kept = dying.kept
    resumed = unlearn(checkpoint=last)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)
    assert kept.kept is not None
    assert last.kept is not None
    assert same_bytes(last.kept[0], kept.kept[0])  # critics, their power iterations, averages and optimisers too


def test_extragradient_resumes_from_a_file(
    unlearn: Callable[..., Trained], same_bytes: Same, tmp_path: Path
) -> None:  # fmt: skip
    whole = unlearn()
    unlearn(checkpoint=FileCheckpoint(tmp_path, every=0), epochs=2)
    resumed = unlearn(checkpoint=FileCheckpoint(tmp_path, every=0))
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)


def test_extragradient_rows_agree_with_each_other(unlearn: Callable[..., Trained]) -> None:
    for row in unlearn(epochs=2).history:
        assert 0 <= row["ema_auc"] <= 1
        assert -1.5 < row["payoff"] < -0.2
        assert -2000 < row["train_elbo"] < 0
        assert row["train_loss"] > row["payoff"]


def test_extragradient_fools_critics_that_stand_still_the_less_the_more_is_kept(
    task: VaeTask, forget_sets: ForgetSets, recipe: Callable[..., dict[str, Any]]
) -> None:
    """Of an original that has finished learning: one that had not would leave the critics' features by itself.

    Payoffs at every seed; the AUC over 40 cells as a mean over seeds.
    """
    train = np.union1d(forget_sets.forget, forget_sets.retain)
    whole = TrainingSettings(**recipe(max_epochs=10, kl_warmup_epochs=0))
    finished = fit(task.new_model(1), task, train, forget_sets.stop, whole, seed=1).model
    last: dict[float, list[float]] = {0.1: [], 10_000.0: []}
    for seed in range(4):
        histories = {}
        for lam, aucs in last.items():
            own = settings(lam=lam, ttur=1e-9, epochs=20)
            histories[lam] = extragradient(copy.deepcopy(finished), task, forget_sets, own, seed=seed).history
            aucs.append(histories[lam][-1]["ema_auc"])
        eager, careful = histories.values()
        assert eager[-1]["payoff"] < eager[0]["payoff"] - 0.2
        assert careful[-1]["payoff"] > eager[-1]["payoff"] + 0.1
    assert np.mean(last[0.1]) < np.mean(last[10_000.0]) - 0.1


def test_extragradient_critics_learn_while_the_model_stands_still(unlearn: Callable[..., Trained]) -> None:
    history = unlearn(critics={**CRITICS, "steps": 0}, learning_rate=1e-9, ttur=1e7, epochs=20).history
    assert history[-1]["payoff"] > history[0]["payoff"] + 0.02
    assert history[-1]["ema_auc"] > 0.6


def test_extragradient_counts_its_effort(unlearn: Callable[..., Trained]) -> None:
    effort = unlearn().effort
    # once over each set for critics and unit; two evaluations a step, four steps an epoch; once more to look
    assert effort.steps == 20 + 3 * 4 * 2 * 2
    each = 20 + 3 * (2 * 4 * 20 + 20)
    assert effort.forward == {"forget": each, "aside": each, "retain": 100 + 3 * 200}
    assert effort.backward == {"forget": 3 * 160, "aside": 3 * 160, "retain": 3 * 200}
    few = unlearn(batch_size=8, epochs=1).effort
    assert few.backward == {"forget": 2 * 13 * 8, "aside": 2 * 13 * 8, "retain": 200}


@pytest.mark.parametrize("which", ["forget", "retain", "aside"])
def test_extragradient_ends_on_a_nan_in_any_set(
    make_task: Callable[..., VaeTask], tiny_counts: sparse.csr_matrix, forget_sets: ForgetSets, original: Original,
    which: str,
) -> None:  # fmt: skip
    counts = tiny_counts.toarray()
    counts[getattr(forget_sets, which)[3], 0] = np.nan
    with pytest.raises(NonFiniteError):
        extragradient(original(), make_task(counts=sparse.csr_matrix(counts)), forget_sets, settings(), seed=0)


@pytest.mark.parametrize("batch_size", [32, 100])
def test_extragradient_ends_at_a_huge_learning_rate(unlearn: Callable[..., Trained], batch_size: int) -> None:
    with pytest.raises(NonFiniteError):
        unlearn(learning_rate=1e30, batch_size=batch_size, epochs=1)


@pytest.mark.parametrize(
    ("key", "value"), [("lam", 0.0), ("ttur", 0.0), ("ema_decay", 1.0), ("batch_size", 0), ("epochs", -1)]
)
def test_extragradient_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})
