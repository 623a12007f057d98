from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from methods import class_cases as cases
from scforget import seeding
from scforget.class_training import ClassTrainingSettings, fit_classifier
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.similarity_teacher import SimilarityTeacherSettings, serving, similarity_teacher
from scforget.training import Trained

Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {
    "training": ClassTrainingSettings(**cases.recipe(epochs=2)), "neighbours": 2, "optimiser": cases.optimiser(),
    "epochs": 3, "batch_size": 4,
}  # fmt: skip


def run(
    kind: str, seed: int = 0, checkpoint: MemoryCheckpoint | None = None, sets: Any = None, **changes: Any
) -> Trained:
    settings = SimilarityTeacherSettings(**{**SETTINGS, **changes})
    one, sets = cases.original(kind), sets or cases.sets()
    return similarity_teacher(one, cases.task(kind), sets, settings, seed=seed, checkpoint=checkpoint)


@pytest.fixture(params=cases.KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def served(kind: str, neighbours: int = 2) -> Counter[int]:
    """By slow loops: how many forgotten items each retained one is among the nearest of."""
    task, sets = cases.task(kind), cases.sets()
    forget, retain = (task.signals(cases.original(kind), items).features for items in (sets.forget, sets.retain))
    found: Counter[int] = Counter()
    for place in forget:
        distances = [float(((place - other) ** 2).sum()) for other in retain]
        nearest = sorted(range(len(distances)), key=distances.__getitem__)[:neighbours]
        found.update(int(sets.retain[k]) for k in nearest)
    return found


def test_similarity_teacher_of_no_epoch_is_the_original_bit_for_bit(kind: str, same_bytes: Same) -> None:
    unlearned = run(kind, epochs=0)
    assert same_bytes(unlearned.model.state_dict(), cases.original(kind).state_dict())
    assert (unlearned.effort.passes, unlearned.history) == (0, [])
    assert not unlearned.model.training


@pytest.mark.parametrize("neighbours", [1, 3, 40])
def test_serving_counts_the_forgotten_items_that_each_serves(kind: str, neighbours: int) -> None:
    task, sets = cases.task(kind), cases.sets()
    forget, retain = (task.signals(cases.original(kind), items).features for items in (sets.forget, sets.retain))
    found, wanted = serving(forget, retain, neighbours), served(kind, neighbours)
    assert found.tolist() == [wanted[int(item)] for item in sets.retain]
    assert found.sum() == 8 * neighbours


def test_serving_refuses_too_few_retained_items_and_none_to_forget() -> None:
    with pytest.raises(EmptyGroupError, match="2 retained items"):
        serving(np.zeros((3, 2)), np.zeros((2, 2)), 3)
    with pytest.raises(EmptyGroupError, match="none to forget"):
        serving(np.zeros((0, 2)), np.zeros((2, 2)), 1)


def test_similarity_teacher_is_that_written_out() -> None:
    """The teacher is trained as any classifier is; then one step on F towards it, one on its neighbours back."""
    task, sets, model, good = cases.task("images"), cases.sets(), cases.original("images"), cases.original("images")
    bad = task.new_model(seeding.derive(5, "similarity teacher"))
    recipe = ClassTrainingSettings(**cases.recipe(epochs=2))
    taught = fit_classifier(bad, task, sets.retain, recipe, seed=5, phase="teacher").history
    counts = served("images")
    retained = np.array(sorted(counts))
    mean = sum(counts.values()) / len(counts)
    adam = torch.optim.Adam(model.parameters(), lr=3e-3)
    with seeding.scope(5, "unlearn", "epoch", 1) as noise:
        orders = [items[torch.randperm(len(items), generator=noise).numpy()] for items in (sets.forget, retained)]
        apart = task.divergence(model.train(), bad, task.batch(orders[0], noise)).total.mean()
        apart.backward()
        adam.step()
        adam.zero_grad()
        back = task.divergence(model, good, task.batch(orders[1], noise)).total
        held = sum(counts[int(item)] / mean * back[k] for k, item in enumerate(orders[1])) / len(retained)
        assert isinstance(held, Tensor)
        held.backward()
        adam.step()
    unlearned = run("images", seed=5, epochs=1, batch_size=40)
    for name, value in unlearned.model.state_dict().items():
        torch.testing.assert_close(value, model.state_dict()[name], rtol=1e-3, atol=1e-5)
    first, second, row = unlearned.history
    assert [first["train_loss"], second["train_loss"]] == [row["train_loss"] for row in taught]
    assert row["forget_divergence"] == pytest.approx(apart.item(), rel=1e-4)
    assert row["retain_divergence"] == pytest.approx(held.item(), rel=1e-3)
    most = max(counts.values()) / mean
    assert unlearned.facts == {"retained_items": len(retained), "most_served": pytest.approx(most)}


def test_similarity_teacher_takes_turns_between_the_teachers(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 batches of forgotten items; those of the retained ones that are left come after."""
    sizes: list[str] = []
    forget = set(cases.sets().forget.tolist())

    batch = cases.task("vectors").batch

    def watched(_self: Any, cells: Any, noise: Any = None) -> Any:
        sizes.append("F" if set(cells.tolist()) <= forget else "R")
        return batch(cells, noise)

    small = ClassTrainingSettings(**cases.recipe(epochs=0))
    retained = len(served("vectors"))
    monkeypatch.setattr("scforget.class_tasks.ClassifierTask.batch", watched)
    run("vectors", epochs=1, training=small)
    left = -(-retained // 4) - (retained % 4 == 1) - 2
    assert left > 0
    # the first two look features up
    assert "".join(sizes) == "FR" + "FRFR" + "R" * left


def test_similarity_teacher_lowers_the_confidence_of_forgotten_items_more(kind: str) -> None:
    task, sets = cases.task(kind), cases.sets()
    training = ClassTrainingSettings(**cases.recipe(epochs=25))
    model, original = run(kind, epochs=10, training=training).model, cases.original(kind)
    fall = {
        name: float((task.signals(original, items).score - task.signals(model, items).score).mean())
        for name, items in (("forget", sets.forget), ("retain", sets.retain))
    }
    assert fall["forget"] > 0.5 + fall["retain"]


def test_similarity_teacher_counts_its_effort(kind: str) -> None:
    effort = run(kind).effort
    serve = len(served(kind))
    batches = -(-serve // 4) - (serve % 4 == 1)
    assert effort.steps == 2 * 3 + 3 * (2 + batches)
    assert effort.forward == {"forget": 8 + 3 * 2 * 8, "retain": 40 + 2 * 40 + 3 * 2 * serve}
    assert effort.backward == {"forget": 3 * 8, "retain": 2 * 40 + 3 * serve}


def test_similarity_teacher_gives_the_same_bytes_for_the_same_seed_only(kind: str, same_bytes: Same) -> None:
    first, again, other = (run(kind, seed=seed) for seed in (0, 0, 1))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 3, 4])
def test_similarity_teacher_resumes_bit_for_bit_in_either_phase(kind: str, save: int, same_bytes: Same) -> None:
    whole, dying, survivor = run(kind), MemoryCheckpoint(dies_at=save), MemoryCheckpoint()
    with pytest.raises(KilledError):
        run(kind, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = run(kind, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)
    assert survivor.saves == 5 - save


def test_similarity_teacher_refuses_what_it_cannot_serve() -> None:
    with pytest.raises(EmptyGroupError, match="none to forget"):
        run("vectors", sets=replace(cases.sets(), forget=cases.sets().forget[:0]))
    with pytest.raises(EmptyGroupError, match="40 retained items"):
        run("vectors", neighbours=41)


def test_similarity_teacher_stops_when_the_divergence_runs_away() -> None:
    with pytest.raises(NonFiniteError):
        run("vectors", optimiser=cases.optimiser(learning_rate=1e30))


def test_similarity_teacher_refuses_features_that_are_not_finite() -> None:
    one = cases.original("vectors")
    with torch.no_grad():
        one.hidden[0].weight.fill_(float("nan"))  # type: ignore[operator, union-attr]
    with pytest.raises(NonFiniteError, match="feature"):
        similarity_teacher(one, cases.task("vectors"), cases.sets(), SimilarityTeacherSettings(**SETTINGS), seed=0)


@pytest.mark.parametrize(("key", "value"), [("neighbours", 0), ("epochs", -1), ("batch_size", 0)])
def test_similarity_teacher_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        run("vectors", **{key: value})
