"""Phases of a run, learning rates and single steps: what the recipes and the methods are built of."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.data.splits import ForgetSets
from scforget.errors import NonFiniteError
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Effort, Loop, Trained, TrainingSettings, descend, fit, mean_elbo, one_cycle, rates

Recipe = Callable[..., dict[str, Any]]
SEED = 3
#: Scores of the first phase's epochs: the third is best, so that with a patience of 2 the fifth is the last.
SCORES = [1.0, 0.0, 2.0, 1.5, 1.5, 9.0]


def plain(parts: dict[str, Any]) -> bytes:
    """All tensors of some state, as one string of bytes."""
    values = [value for value in parts.values() if isinstance(value, Tensor)]
    inner = [plain(value) for value in parts.values() if isinstance(value, dict)]
    return b"".join([value.numpy().tobytes() for value in values] + inner)


@dataclass
class Toy:
    """A model and a critic that take turns over two phases, the first of them early-stopped."""

    checkpoint: MemoryCheckpoint | None = None
    model: nn.Linear = field(default_factory=lambda: nn.Linear(3, 2))
    critic: nn.Linear = field(default_factory=lambda: nn.Linear(2, 1))
    seen: list[tuple[str, int]] = field(default_factory=list)
    draws: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    after: dict[tuple[str, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        with torch.no_grad():
            for number, parameter in enumerate([*self.model.parameters(), *self.critic.parameters()]):
                parameter.fill_(0.1 * (number + 1))
        self.loop = Loop(self.model, seed=SEED, checkpoint=self.checkpoint)
        self.optimisers: dict[str, torch.optim.Optimizer] = {}

    def phase(self, name: str, epochs: int, **own: Any) -> None:
        critic = copy.deepcopy(self.critic)
        first = torch.optim.Adam(self.model.parameters(), lr=0.05)
        second = torch.optim.SGD(critic.parameters(), lr=0.05, momentum=0.9)

        def epoch(number: int, noise: torch.Generator) -> dict[str, float]:
            self.model.train()
            self.seen.append((name, number))
            one, other = torch.randn(4, 3, generator=noise), torch.rand(4, 3)
            self.draws.append((one, other))
            descend(second, critic(self.model(one).detach()).square().mean(), self.loop.effort)
            descend(first, (critic(self.model(other)) - 1).square().mean(), self.loop.effort)
            self.loop.effort.count("retain", 4, forward=2)
            self.after[name, number] = plain(self.model.state_dict())
            return {"draw": float(one[0, 0])}

        self.loop.run(name, epoch, epochs, parts={"critic": critic, "adam": first, "sgd": second}, **own)
        self.optimisers = {"adam": first, "sgd": second}
        self.last_critic = critic

    def run(self) -> Toy:
        def score() -> float:
            self.loop.effort.count("stop", 5, backward=0)
            return SCORES[self.seen[-1][1] - 1]

        self.phase("first", 6, score=score, patience=2)
        self.phase("second", 3)
        return self

    def everything(self) -> tuple[bytes, ...]:
        """The weights, and what the last phase left in its critic and both optimisers."""
        states = (self.model, self.last_critic, *self.optimisers.values())
        return tuple(plain({str(key): value for key, value in part.state_dict().items()}) for part in states)


def slots(toy: Toy) -> list[dict[str, Any]]:
    return [optimiser.state_dict()["state"] for optimiser in toy.optimisers.values()]


def test_loop_runs_its_phases_one_after_the_other() -> None:
    toy = Toy().run()
    assert toy.seen == [*(("first", n) for n in range(1, 6)), *(("second", n) for n in range(1, 4))]
    assert [row["epoch"] for row in toy.loop.history] == list(range(1, 9))
    assert [row.get("stop_elbo") for row in toy.loop.history] == [*SCORES[:5], None, None, None]
    assert toy.loop.effort == Effort(16, {"retain": 64, "stop": 25}, {"retain": 32})
    assert not toy.model.training


def test_loop_ends_a_scored_phase_with_the_best_epoch_and_another_with_the_last() -> None:
    toy = Toy()
    toy.phase("first", 6, score=lambda: SCORES[toy.seen[-1][1] - 1], patience=2)
    assert plain(toy.model.state_dict()) == toy.after["first", 3] != toy.after["first", 5]
    toy.phase("second", 3)
    assert plain(toy.model.state_dict()) == toy.after["second", 3]


def test_loop_starts_a_phase_from_what_the_one_before_ended_with() -> None:
    toy = Toy().run()
    start, lone = Toy(), Toy()
    start.phase("first", 3)
    lone.model.load_state_dict(start.model.state_dict())
    lone.phase("second", 3)
    assert lone.everything() == toy.everything()


@pytest.mark.parametrize("save", range(1, 8))
def test_loop_resumes_bit_for_bit_after_a_kill_in_any_epoch(save: int) -> None:
    whole = Toy().run()
    dying, survivor = MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        Toy(dying).run()
    survivor.kept = dying.kept
    resumed = Toy(survivor).run()
    assert resumed.everything() == whole.everything()
    assert [len(plain(state)) for state in slots(resumed)] == [
        72,
        12,
    ]  # two moments of 8 weights and two steps; 3 momenta
    assert (resumed.loop.history, resumed.loop.effort) == (whole.loop.history, whole.loop.effort)
    assert resumed.seen == whole.seen[save:]  # and a phase that was left is not entered again


def test_loop_resumes_bit_for_bit_after_a_kill_in_each_phase() -> None:
    whole, kept = Toy().run(), None
    for saves in (2, 4, 1):  # dead after epoch 2, after epoch 1 of the second phase, after its epoch 2
        checkpoint = MemoryCheckpoint(dies_at=saves)
        checkpoint.kept = kept
        with pytest.raises(KilledError):
            Toy(checkpoint).run()
        kept = checkpoint.kept
    last = MemoryCheckpoint()
    last.kept = kept
    resumed = Toy(last).run()
    assert resumed.seen == [("second", 3)]
    assert resumed.everything() == whole.everything()
    assert (resumed.loop.history, resumed.loop.effort) == (whole.loop.history, whole.loop.effort)


def test_loop_takes_up_a_finished_run_without_another_epoch() -> None:
    checkpoint = MemoryCheckpoint()
    whole = Toy(checkpoint).run()
    again = Toy(checkpoint).run()
    assert again.seen == []
    assert again.everything() == whole.everything()
    assert (again.loop.history, again.loop.effort) == (whole.loop.history, whole.loop.effort)
    assert checkpoint.saves == 8


def test_loop_gives_each_epoch_of_each_phase_streams_of_its_own() -> None:
    toy = Toy()  # torch's own initialisation draws from its stream
    before = torch.get_rng_state()
    toy.run()
    assert torch.equal(torch.get_rng_state(), before)
    for (phase, number), (explicit, global_draw) in zip(toy.seen, toy.draws, strict=True):
        noise = seeding.torch_generator(SEED, phase, "epoch", number)
        assert torch.equal(explicit, torch.randn(4, 3, generator=noise))
        with seeding.scope(SEED, phase, "epoch", number):
            assert torch.equal(global_draw, torch.rand(4, 3))
    assert len({draw.numpy().tobytes() for pair in toy.draws for draw in pair}) == 2 * 8


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loop_refuses_a_score_that_is_no_number(value: float) -> None:
    toy = Toy()
    with pytest.raises(NonFiniteError, match="the ELBO of the stop cells") as caught:
        toy.phase("first", 3, score=lambda: value if len(toy.seen) == 2 else 1.0)
    assert caught.value.step == 4


def test_one_cycle_rises_to_its_peak_at_15_percent_and_falls_to_a_thousandth() -> None:
    progress = np.linspace(0, 1, 2001)[1:]
    found = np.array([one_cycle(point) for point in progress])
    top = int(found.argmax())
    assert progress[top] == pytest.approx(0.15)
    assert found[top] == pytest.approx(1)
    assert (np.diff(found[: top + 1]) > 0).all()
    assert (np.diff(found[top:]) < 0).all()
    assert found[-1] == pytest.approx(1e-3)
    assert np.abs(np.diff(found)).max() < 5e-3  # no jump: the ramp climbs 1/300 a point
    assert [one_cycle(point) for point in (0.015, 0.075)] == pytest.approx([0.1, 0.5])
    assert one_cycle(0.575) == pytest.approx(0.5005)  # half-way down


@pytest.mark.parametrize(("cells", "steps"), [(100, 4), (96, 3), (1, 1), (97, 4)])
def test_rates_are_one_for_each_batch(recipe: Recipe, cells: int, steps: int) -> None:
    constant = TrainingSettings(**recipe())
    assert [rates(constant, cells, epoch) for epoch in (1, 4)] == 2 * [[1e-2] * steps]
    cycle = TrainingSettings(**recipe(schedule="one_cycle"))
    assert [len(rates(cycle, cells, epoch)) for epoch in (1, 4)] == 2 * [steps]


def test_rates_of_one_cycle_go_on_from_epoch_to_epoch(recipe: Recipe) -> None:
    cycle = TrainingSettings(**recipe(schedule="one_cycle", max_epochs=30))
    found = [rate for epoch in range(1, 31) for rate in rates(cycle, 100, epoch)]
    assert found == pytest.approx([1e-2 * one_cycle(step / 120) for step in range(1, 121)])
    top = int(np.argmax(found))
    assert top == 17  # step 18 of 120
    assert max(found) == pytest.approx(1e-2, rel=1e-4)
    assert all(later > earlier for earlier, later in pairwise(found[: top + 1]))
    assert all(later < earlier for earlier, later in pairwise(found[top:]))


@pytest.fixture
def train(task: VaeTask, forget_sets: ForgetSets, recipe: Recipe) -> Callable[..., Trained]:
    def run(checkpoint: MemoryCheckpoint | None = None, **changes: Any) -> Trained:
        settings = TrainingSettings(**recipe(**{"schedule": "one_cycle", "kl_warmup_epochs": 0, **changes}))
        sets = forget_sets
        return fit(task.new_model(1), task, sets.retain, sets.stop, settings, seed=SEED, checkpoint=checkpoint)

    return run


def by_hand(task: VaeTask, sets: ForgetSets, epochs: int, peak: float) -> dict[float, dict[str, Tensor]]:
    """Weights after each epoch by the ELBO of the stop cells; the rates are those of 4 steps an epoch."""
    model, step, found = task.new_model(1), 0, {}
    optimiser = torch.optim.Adam(model.parameters(), lr=peak, fused=True)
    for epoch in range(1, epochs + 1):
        model.train()
        with seeding.scope(SEED, "fit", "epoch", epoch) as noise:
            order = sets.retain[torch.randperm(100, generator=noise).numpy()]
            for cells in np.split(order, [32, 64, 96]):
                step += 1
                share = step / (4 * epochs)
                fall = 1e-3 + 0.999 * 0.5 * (1 + math.cos(math.pi * (share - 0.15) / 0.85))
                optimiser.param_groups[0]["lr"] = peak * (share / 0.15 if share < 0.15 else fall)
                optimiser.zero_grad()
                task.loss(model, task.batch(cells), noise).total.mean().backward()
                optimiser.step()
        found[mean_elbo(task, model, sets.stop)] = copy.deepcopy(model.state_dict())
    return found


def test_fit_by_one_cycle_equals_adam_steps_of_those_rates(
    train: Callable[..., Trained], task: VaeTask, forget_sets: ForgetSets
) -> None:
    wanted = by_hand(task, forget_sets, 5, 1e-2)
    trained = train(max_epochs=5)
    assert [row["stop_elbo"] for row in trained.history] == pytest.approx(list(wanted), rel=1e-6)
    best = wanted[max(wanted)]
    for name, value in trained.model.state_dict().items():
        torch.testing.assert_close(value, best[name], rtol=1e-5, atol=1e-6)
    constant = train(max_epochs=5, schedule="constant")
    assert constant.history[0]["stop_elbo"] != trained.history[0]["stop_elbo"]


@pytest.mark.parametrize("epoch", [1, 3, 4])
def test_fit_by_one_cycle_resumes_bit_for_bit(train: Callable[..., Trained], epoch: int) -> None:
    whole = train(max_epochs=5)
    dying, survivor = MemoryCheckpoint(dies_at=epoch), MemoryCheckpoint()
    with pytest.raises(KilledError):
        train(dying, max_epochs=5)
    survivor.kept = dying.kept
    resumed = train(survivor, max_epochs=5)
    assert isinstance(resumed.model, VAE)
    assert plain(resumed.model.state_dict()) == plain(whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)


@pytest.mark.parametrize("clip", [None, 0.5, 5.0, 50.0])
def test_descend_clips_the_whole_gradient_as_torch_does(clip: float | None) -> None:
    """The gradient is (3, 4), of length 5, over two parameters and two groups; the parameters start at 0."""
    one, other, effort = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1)), Effort()
    optimiser = torch.optim.SGD([{"params": [one]}, {"params": [other]}], lr=1.0)
    descend(optimiser, (3 * one + 4 * other).sum(), effort, clip=clip)
    shrink = 1.0 if clip is None else min(1.0, clip / 5)
    assert [one.item(), other.item()] == pytest.approx([-3 * shrink, -4 * shrink], rel=1e-5)
    wanted = [nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    wanted[0].grad, wanted[1].grad = torch.tensor([3.0]), torch.tensor([4.0])
    nn.utils.clip_grad_norm_(wanted, math.inf if clip is None else clip)
    assert [one.item(), other.item()] == [-parameter.grad.item() for parameter in wanted]
    assert effort == Effort(steps=1)


def test_descend_forgets_the_gradient_of_the_step_before() -> None:
    one, effort = nn.Parameter(torch.zeros(1)), Effort()
    optimiser = torch.optim.SGD([one], lr=1.0)
    for wanted in (-3.0, -6.0):
        descend(optimiser, 3 * one.sum(), effort)
        assert one.item() == wanted
    assert effort.steps == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_descend_names_the_step_and_leaves_the_weights(value: float) -> None:
    one, effort = nn.Parameter(torch.ones(1)), Effort(steps=7)
    with pytest.raises(NonFiniteError, match="the loss became NaN or infinite at step 7;") as caught:
        descend(torch.optim.SGD([one], lr=1.0), one.sum() * value, effort)
    assert (caught.value.step, effort.steps, one.item()) == (7, 7, 1.0)
