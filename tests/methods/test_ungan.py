from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, one_hot

from killing import KilledError, MemoryCheckpoint
from methods import class_cases as cases
from scforget import seeding
from scforget.class_tasks import ClassifierTask
from scforget.cramer import new_embedding, slope
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.ungan import UnganSettings, departure, ungan
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
CRITIC: dict[str, Any] = {
    "surrogate": "cramer", "widths": [12, 12, 6], "penalty": "squared", "penalised": "critic", "lam": 10.0,
    "learning_rate": 1e-2, "weight_decay": 1e-3,
}  # fmt: skip
SETTINGS: dict[str, Any] = {
    "learning_rate": 1e-3, "weight_decay": 1e-4, "alpha": 0.0625, "gamma": 0.03125, "epochs": 2, "critic_steps": 2,
    "generator_steps": 2, "finetune_steps": None, "batch_size": 16,
}  # fmt: skip


def settings(critic: dict[str, Any] | None = None, **changes: Any) -> UnganSettings:
    return UnganSettings(critic={**CRITIC, **(critic or {})}, **{**SETTINGS, **changes})


class Case(NamedTuple):
    """A task, its sets, and a copy of its original at each call; ``sizes`` are forget, retain and aside."""

    task: Any
    sets: ForgetSets
    original: Callable[[], Any]

    @property
    def sizes(self) -> tuple[int, int, int]:
        return len(self.sets.forget), len(self.sets.retain), len(self.sets.aside)

    def run(self, seed: int = 0, checkpoint: MemoryCheckpoint | None = None, **changes: Any) -> Trained:
        chosen = settings(**changes)
        return ungan(self.original(), self.task, self.sets, chosen, seed=seed, checkpoint=checkpoint)


@pytest.fixture(params=["vae", "vectors", "images"])
def case(request: pytest.FixtureRequest, task: VaeTask, forget_sets: ForgetSets, original: Callable[[], VAE]) -> Case:
    if request.param == "vae":
        return Case(task, forget_sets, original)
    return Case(cases.task(request.param), cases.sets(), lambda: cases.original(request.param))


@pytest.fixture
def images() -> Case:
    return Case(cases.task("images"), cases.sets(), lambda: cases.original("images"))


def test_ungan_of_no_epoch_is_the_original_bit_for_bit(case: Case, same_bytes: Same) -> None:
    unlearned = case.run(epochs=0)
    assert same_bytes(unlearned.model.state_dict(), case.original().state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


def shuffled(cells: Any, size: int, noise: torch.Generator) -> Any:
    return cells[torch.randperm(len(cells), generator=noise).numpy()[:size]]


def distance(one: Tensor, other: Tensor) -> Tensor:
    return torch.linalg.vector_norm(one - other, dim=1)


def test_ungan_epoch_is_that_written_out(case: Case) -> None:
    """Two steps of the critic, two of the model, one of fine-tuning on all retained items, by torch's own parts."""
    model, frozen, task, sets = case.original(), case.original().eval(), case.task, case.sets
    size, retained = min(case.sizes[0], case.sizes[2]), len(sets.retain)
    with torch.no_grad():
        embed = new_embedding(task.outputs(frozen, task.batch(sets.aside)).shape[1], settings().critic, seed=3)
    adam = torch.optim.Adam(model.parameters(), lr=1e-3, weight_decay=1e-4)
    sgd = torch.optim.SGD(embed.parameters(), lr=1e-2, weight_decay=1e-3)
    means: dict[str, list[float]] = {name: [] for name in ("critic_loss", "distance", "slope", "generator_loss")}

    def drawn(noise: torch.Generator) -> list[Tensor]:
        chosen = [shuffled(cells, size, noise) for cells in (sets.aside, sets.forget, sets.forget)]
        models = (frozen, model.eval(), model.eval())
        return [task.outputs(one, task.batch(cells)) for one, cells in zip(models, chosen, strict=True)]

    with seeding.scope(3, "ungan", "epoch", 1) as noise:
        for _ in range(2):
            z_u, z_f, other = (z.detach() for z in drawn(noise))

            def f(z: Tensor, other: Tensor = other) -> Tensor:
                return distance(embed(z), embed(other)) - torch.linalg.vector_norm(embed(z), dim=1)

            share = torch.rand(size, 1, generator=noise)
            steep = slope(f, share * z_u + (1 - share) * z_f)
            apart = (f(z_u) - f(z_f)).mean()
            loss = 10 * ((steep - 1) ** 2).mean() - apart
            sgd.zero_grad()
            loss.backward()
            sgd.step()
            for name, value in zip(means, (loss, apart, steep.mean()), strict=False):
                means[name].append(value.item())
        for _ in range(2):
            u, f_, g = (embed(z) for z in drawn(noise))
            loss = (distance(u, f_) + distance(u, g) - distance(f_, g)).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            means["generator_loss"].append(loss.item())
        batch = task.batch(shuffled(sets.retain, retained, noise))
        model.train()
        kept = task.loss(model, batch, noise).total.mean()
        gone = departure(task, model, frozen, batch).mean()
        adam.zero_grad()
        (kept / 16 + gone / 32).backward()
        adam.step()
    unlearned = case.run(seed=3, epochs=1, batch_size=retained)
    pairs = [(value, model.state_dict()[name]) for name, value in unlearned.model.state_dict().items()]
    off = torch.cat([((a - b).abs() > 2e-5 + 1e-3 * b.abs()).flatten() for a, b in pairs])
    # Adam's first step is as long for a gradient that is but rounding
    assert off.float().mean() < 0.002
    (row,) = unlearned.history
    for name, values in means.items():
        assert row[name] == pytest.approx(np.mean(values), rel=1e-3, abs=1e-5), name
    assert row["train_loss"] == pytest.approx(kept.item(), rel=1e-4)
    assert row["retain_divergence"] == pytest.approx(gone.item(), rel=1e-3)


def test_ungan_draws_the_forgotten_items_twice_independently(images: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """All 8 are in either draw; an item meets itself in one of 8 rows, not in all."""
    same: list[float] = []

    def watched(embed: nn.Module, z: Any, surrogate: str) -> Tensor:
        assert z.unseen.shape == z.forget.shape == (8, 6)
        torch.testing.assert_close(z.forget[:, 0].sort().values, z.other[:, 0].sort().values)
        same.append(float((z.forget == z.other).all(1).float().mean()))
        return embed(z.forget).mean()

    monkeypatch.setattr("scforget.cramer.generator_loss", watched)
    images.run(epochs=1, critic_steps=1, generator_steps=100, finetune_steps=0, learning_rate=1e-9)
    assert np.mean(same) == pytest.approx(1 / 8, abs=4 * np.sqrt(1 / 8 / len(same)))


def test_departure_of_classifiers_is_the_kl_as_printed() -> None:
    """KL(G ‖ Ĝ), by torch, whose first argument is the second distribution; and it pulls on G."""
    task, model, original = cases.task("vectors"), cases.original("vectors"), cases.task("vectors").new_model(9).eval()
    batch = task.batch(cases.sets().retain)
    found = departure(task, model, original, batch)
    mine, theirs = (one(batch.inputs).detach().log_softmax(1) for one in (model, original))
    torch.testing.assert_close(found.detach(), kl_div(theirs, mine, reduction="none", log_target=True).sum(1))
    found.mean().backward()
    assert all(value.grad is not None for value in model.parameters())
    assert all(value.grad is None for value in original.parameters())


def test_departure_of_vaes_is_the_tasks_divergence(task: VaeTask, original: Callable[[], VAE]) -> None:
    model, other, batch = original(), task.new_model(9).eval(), task.batch(np.arange(12))
    wanted = task.divergence(model, other, batch).total
    torch.testing.assert_close(departure(task, model, other, batch), wanted)


def test_outputs_of_classifiers_are_logits_and_one_hot_labels() -> None:
    task, model = cases.task("images"), cases.original("images")
    batch = task.batch(cases.sets().forget)
    found = task.outputs(model, batch).detach()
    torch.testing.assert_close(found[:, :3], model(batch.inputs).detach())
    assert torch.equal(found[:, 3:], one_hot(batch.labels, 3).float())


def energies(case: Case, model: Any) -> float:
    """Energy distance of the model's outputs on forgotten items from the original's on ``aside`` ones, all pairs."""
    task, sets = case.task, case.sets
    with torch.no_grad():
        u = task.outputs(case.original().eval(), task.batch(sets.aside))
        f = task.outputs(model.eval(), task.batch(sets.forget))
    pairs = {name: torch.cdist(*two).mean() for name, two in {"uf": (u, f), "uu": (u, u), "ff": (f, f)}.items()}
    return float(2 * pairs["uf"] - pairs["uu"] - pairs["ff"])


STRONG: dict[str, Any] = {"learning_rate": 5e-4, "epochs": 6, "critic_steps": 24, "generator_steps": 24}


def falls(case: Case, model: Any, name: str) -> float:
    """By how much the score of some items has fallen in the mean."""
    task, items = case.task, getattr(case.sets, name)
    return float((task.signals(case.original(), items).score - task.signals(model, items).score).mean())


def test_ungan_lowers_scores_that_fine_tuning_alone_does_not(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """And outputs come nearer to those never trained on. The VAE has learnt no item by heart that it could forget."""
    model = case.run(**STRONG).model
    monkeypatch.setattr("scforget.methods.ungan._Game.generator_step", lambda *_: {})
    tuned = case.run(**{**STRONG, "critic_steps": 1}).model
    gone, kept = (falls(case, model, name) - falls(case, tuned, name) for name in ("forget", "retain"))
    assert gone > 0
    assert gone > 1.1 * kept or isinstance(model, VAE)
    assert energies(case, model) < 0.7 * energies(case, tuned)


@pytest.mark.parametrize("critic", [{"penalised": "embedding"}, {"penalty": "printed"}])
def test_ungan_brings_forgotten_items_to_those_never_trained_on(critic: dict[str, Any]) -> None:
    case = Case(cases.task("vectors"), cases.sets(), lambda: cases.original("vectors"))
    model = case.run(critic=critic, learning_rate=1e-3, epochs=8, critic_steps=16, generator_steps=16).model
    assert falls(case, model, "forget") > 0.5
    assert falls(case, model, "forget") > 2 * falls(case, model, "retain")
    assert energies(case, model) < 0.7 * energies(case, case.original())


def test_ungan_wasserstein_moves_forgotten_items_up_the_critic(images: Case) -> None:
    """With a critic that stays as it is, a step of the model brings the two means together."""
    changes = {"critic": {"surrogate": "wasserstein", "learning_rate": 1e-9}, "finetune_steps": 0, "batch_size": 8}
    history = images.run(epochs=10, critic_steps=1, generator_steps=4, **changes).history
    assert history[-1]["generator_loss"] < history[0]["generator_loss"] - 0.1


def test_ungan_moves_running_statistics_by_retained_items_only(images: Case) -> None:
    before = images.original().state_dict()
    after = images.run(finetune_steps=0, epochs=1).model.state_dict()
    tuned = images.run(finetune_steps=1, epochs=1).model.state_dict()
    running = [name for name in before if "running" in name]
    assert running
    assert all(torch.equal(before[name], after[name]) for name in running)
    assert not any(torch.equal(before[name], tuned[name]) for name in running)
    assert not torch.equal(before["output.weight"], after["output.weight"])


@pytest.mark.parametrize(("penalty", "flat"), [("squared", False), ("printed", True)])
def test_ungan_printed_penalty_flattens_the_critic(images: Case, penalty: str, flat: bool) -> None:
    """Without the square the least slope is the best one."""
    critic = {"penalty": penalty, "learning_rate": 1e-2}
    history = images.run(critic=critic, critic_steps=40, generator_steps=1, finetune_steps=0, epochs=2).history
    first, last = (row["slope"] for row in history)
    assert (last < first) is flat


def test_ungan_counts_its_effort(case: Case) -> None:
    effort = case.run(epochs=3).effort
    forget, retain, aside = case.sizes
    size = min(16, forget, aside)
    batches = -(-retain // 16)
    assert effort.steps == 3 * (2 + 2 + batches)
    assert effort.forward == {"forget": 3 * 4 * 2 * size, "aside": 3 * 4 * size, "retain": 3 * 3 * retain}
    assert effort.backward == {"forget": 3 * 2 * 2 * size, "retain": 3 * 2 * retain}


@pytest.mark.parametrize("steps", [0, 2, 5])
def test_ungan_fine_tunes_as_many_steps_as_asked(images: Case, steps: int) -> None:
    """40 retained items make 3 batches of 16, the last of 8; a fourth step begins another pass."""
    found = images.run(epochs=1, finetune_steps=steps)
    assert found.effort.steps == 4 + steps
    assert found.effort.backward["retain"] == 2 * {0: 0, 2: 32, 5: 72}[steps]
    assert ("train_loss" in found.history[0]) == (steps > 0)


def test_ungan_gives_the_same_bytes_for_the_same_seed_only(case: Case, same_bytes: Same) -> None:
    first, again, other = (case.run(seed=seed) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


def test_ungan_resumes_bit_for_bit(case: Case, same_bytes: Same) -> None:
    whole, dying, survivor = case.run(epochs=3), MemoryCheckpoint(dies_at=2), MemoryCheckpoint()
    with pytest.raises(KilledError):
        case.run(epochs=3, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = case.run(epochs=3, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)
    assert survivor.saves == 1


@pytest.mark.parametrize("name", ["forget", "retain", "aside"])
def test_ungan_refuses_an_empty_set(images: Case, name: str) -> None:
    empty = images._replace(sets=replace(images.sets, **{name: images.sets.forget[:0]}))
    with pytest.raises(EmptyGroupError, match=f"{name} items"):
        empty.run()


def test_ungan_of_one_forgotten_item_runs(images: Case) -> None:
    one = images._replace(sets=replace(images.sets, forget=images.sets.forget[:1]))
    assert np.isfinite(one.run().history[-1]["generator_loss"])


def test_ungan_stops_when_a_loss_runs_away(case: Case) -> None:
    with pytest.raises(NonFiniteError):
        case.run(learning_rate=1e30)


def test_ungan_fine_tuning_alone_is_the_weighted_loss(images: Case) -> None:
    """α weighs the cross-entropy, found here from the first batch of the first epoch."""
    task: ClassifierTask = images.task
    row = images.run(epochs=1, finetune_steps=1, learning_rate=1e-12, batch_size=40).history[0]
    model = images.original().train()
    batch = task.batch(images.sets.retain)
    assert row["train_loss"] == pytest.approx(
        float(cross_entropy(model(batch.inputs), batch.labels).detach()), rel=1e-4
    )


@pytest.mark.parametrize(
    ("key", "value"),
    [("epochs", -1), ("critic_steps", 0), ("generator_steps", 0), ("finetune_steps", -1), ("alpha", -1.0),
     ("gamma", -1.0), ("batch_size", 0), ("learning_rate", 0.0), ("critic", {"lam": -1.0})],
)  # fmt: skip
def test_ungan_settings_refuse_what_is_out_of_range(key: str, value: Any) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})
