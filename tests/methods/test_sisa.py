"""A deletion from SISA against SISA trained on the retained cells, written out again without the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from killing import KilledError, MemoryCheckpoint
from scforget import seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError, NonFiniteError
from scforget.methods.sisa import Assignment, SISASettings, assign, sisa
from scforget.models.mixture import Mixture, members_of
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.training import Trained

Original = Callable[[], VAE]
Same = Callable[[dict[str, Tensor], dict[str, Tensor]], bool]
SETTINGS: dict[str, Any] = {
    "shards": 4, "slices": 2, "epochs": 2, "learning_rate": 1e-2, "batch_size": 16, "kl_warmup_epochs": 3,
    "free_bits": 0.0,
}  # fmt: skip


class Clocked(MemoryCheckpoint):
    """Remembers after how many saves the clock was restarted."""

    def __init__(self, dies_at: int | None = None) -> None:
        super().__init__(dies_at)
        self.restarted: list[int] = []

    def restart_clock(self) -> None:
        self.restarted.append(self.saves)


def settings(**changes: Any) -> SISASettings:
    return SISASettings(**{**SETTINGS, **changes})


def train_of(sets: ForgetSets) -> IntArray:
    return np.union1d(sets.forget, sets.retain)


def forgetting(sets: ForgetSets, forget: IntArray) -> ForgetSets:
    """The same training cells, others of which are to be forgotten."""
    return replace(sets, forget=np.sort(forget), retain=np.setdiff1d(train_of(sets), forget))


def delete(task: VaeTask, sets: ForgetSets, seed: int = 5, **own: Any) -> Trained:
    return sisa(task.new_model(0), task, sets, settings(), seed=seed, **own)


def from_scratch(task: VaeTask, assignment: Assignment, kept: IntArray, seed: int) -> Mixture:
    """SISA on some cells: each member by its stages, each stage by Adam on its batches."""
    members = []
    for shard, slices in enumerate(assignment):
        member = task.new_model(seeding.derive(seed, "sisa", shard)).train()
        for stage in (1, 2):
            cells = np.intersect1d(np.concatenate(slices[:stage]), kept)
            optimiser = torch.optim.Adam(member.parameters(), lr=1e-2, fused=True)
            for epoch in (1, 2):
                beta = min(1.0, (2 * (stage - 1) + epoch) / 3)
                with seeding.scope(seed, "sisa", shard, stage, epoch) as noise:
                    order = cells[torch.randperm(len(cells), generator=noise).numpy()]
                    for part in np.split(order, range(16, len(order), 16)):
                        loss = task.loss(member, task.batch(part), noise, beta=beta)
                        optimiser.zero_grad()
                        loss.total.mean().backward()
                        optimiser.step()
        members.append(member)
    return Mixture(members)


@pytest.mark.parametrize("draw", range(3))
def test_sisa_equals_training_on_the_retained_cells_bit_for_bit(
    task: VaeTask, forget_sets: ForgetSets, same_bytes: Same, draw: int
) -> None:
    train = train_of(forget_sets)
    chosen = np.random.default_rng(draw).choice(train, [1, 5, 30][draw], replace=False)
    sets = forgetting(forget_sets, chosen)
    assignment = assign(train, None, 4, 2, 5)
    wanted = from_scratch(task, assignment, sets.retain, 5)
    found = delete(task, sets).model
    assert same_bytes(found.state_dict(), wanted.state_dict())
    deployed = from_scratch(task, assignment, train, 5)
    assert not same_bytes(found.state_dict(), deployed.state_dict())


@pytest.mark.parametrize("position", [0, 1])
def test_sisa_leaves_the_other_shards_and_pays_for_one_tail_only(
    task: VaeTask, forget_sets: ForgetSets, same_bytes: Same, position: int
) -> None:
    train = train_of(forget_sets)
    assignment = assign(train, None, 4, 2, 5)
    sets = forgetting(forget_sets, assignment[2][position][:3])
    deployed = members_of(delete(task, forgetting(forget_sets, train[:0])).model)
    trained = delete(task, sets)
    for shard, (one, other) in enumerate(zip(deployed, members_of(trained.model), strict=True)):
        assert same_bytes(one.state_dict(), other.state_dict()) == (shard != 2)
    # 15 cells a slice; two epochs of each stage from the first that lost a cell
    cells = [15 - 3 + 30 - 3, 30 - 3][position]
    assert trained.effort.forward == trained.effort.backward == {"retain": 2 * cells}
    assert trained.effort.steps == 2 * [1 + 2, 2][position]
    assert [(row["epoch"], row["shard"], row["slice"]) for row in trained.history] == [
        (number, 2.0, stage) for number, stage in enumerate([[1, 1, 2, 2], [2, 2]][position], 1)
    ]
    assert trained.facts == {"shards": 4, "affected_shards": 1, "preparation_passes": 2 * 2 * 4 * (15 + 30)}


def test_sisa_without_a_request_is_the_deployed_ensemble(
    task: VaeTask, forget_sets: ForgetSets, same_bytes: Same
) -> None:
    train = train_of(forget_sets)
    trained = delete(task, forgetting(forget_sets, train[:0]))
    assert same_bytes(
        trained.model.state_dict(), from_scratch(task, assign(train, None, 4, 2, 5), train, 5).state_dict()
    )
    assert (trained.effort.passes, trained.effort.steps, trained.history) == (0, 0, [])
    assert trained.facts["affected_shards"] == 0
    assert not trained.model.training


def test_sisa_survives_the_loss_of_a_slice_and_of_a_shard(
    task: VaeTask, forget_sets: ForgetSets, same_bytes: Same
) -> None:
    assignment = assign(train_of(forget_sets), None, 4, 2, 5)
    gone = np.concatenate([assignment[0][0], *assignment[1]])
    trained = delete(task, forgetting(forget_sets, gone))
    first, second, *_ = members_of(trained.model)
    untrained = [task.new_model(seeding.derive(5, "sisa", shard)).state_dict() for shard in (0, 1)]
    assert not same_bytes(first.state_dict(), untrained[0])
    assert same_bytes(second.state_dict(), untrained[1])
    assert trained.effort.forward == {"retain": 2 * 15}


def test_assign_deals_cells_evenly_whatever_is_forgotten(forget_sets: ForgetSets) -> None:
    train = train_of(forget_sets)
    found = assign(train, None, 5, 3, 0)
    parts = [part for slices in found for part in slices]
    assert np.array_equal(np.sort(np.concatenate(parts)), train)
    assert [len(slices) for slices in found] == 5 * [3]
    assert {len(part) for part in parts} == {8}
    other = assign(train, None, 5, 3, 1)
    assert not np.array_equal(other[0][0], found[0][0])


def donors_of(cells: int, donors: int) -> npt.NDArray[np.str_]:
    """Of very different sizes: the k-th has about k times as many cells as the first."""
    weights = np.arange(1, donors + 1) / np.arange(1, donors + 1).sum()
    return np.random.default_rng(0).choice([f"d{k}" for k in range(donors)], cells, p=weights).astype(np.str_)


def test_assign_keeps_a_donor_together_and_the_shards_of_one_size(forget_sets: ForgetSets) -> None:
    train, donors = train_of(forget_sets), donors_of(240, 20)
    found = assign(train, donors, 4, 2, 0)
    parts = [part for slices in found for part in slices]
    assert np.array_equal(np.sort(np.concatenate(parts)), train)
    owners = [set(donors[part]) for part in parts]
    assert sum(map(len, owners)) == len(set(donors[train]))
    sizes = [sum(map(len, slices)) for slices in found]
    assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize(("n_donors", "together"), [(3, False), (4, True), (5, True)])
def test_assign_splits_donors_only_where_they_are_too_few(
    forget_sets: ForgetSets, n_donors: int, together: bool
) -> None:
    train, donors = train_of(forget_sets), donors_of(240, n_donors)
    found = assign(train, donors, 4, 2, 0)
    owners = [set(donors[np.concatenate(slices)]) for slices in found]
    assert (sum(map(len, owners)) == n_donors) == together
    assert all(len(part) for slices in found for part in slices)


def test_assign_refuses_too_few_cells() -> None:
    with pytest.raises(EmptyGroupError, match="SISA of 7 training cells"):
        assign(np.arange(7), None, 4, 2, 0)


def test_sisa_deletes_a_donor_from_one_shard(
    make_task: Callable[..., VaeTask], forget_sets: ForgetSets, same_bytes: Same
) -> None:
    plain, train = make_task(), train_of(forget_sets)
    task = VaeTask(plain.counts, plain.library, plain.settings, donors_of(240, 12))
    assert task.donors is not None
    sets = forgetting(forget_sets, train[task.donors[train] == "d7"])
    trained = delete(task, sets)
    assert trained.facts["affected_shards"] == 1
    wanted = from_scratch(task, assign(train, task.donors, 4, 2, 5), sets.retain, 5)
    assert same_bytes(trained.model.state_dict(), wanted.state_dict())


def test_sisa_gives_the_same_bytes_for_the_same_seed_only(
    task: VaeTask, forget_sets: ForgetSets, same_bytes: Same
) -> None:
    first, again, other = (delete(task, forget_sets, seed) for seed in (5, 5, 6))
    assert same_bytes(first.model.state_dict(), again.model.state_dict())
    assert first.history == again.history
    assert not same_bytes(first.model.state_dict(), other.model.state_dict())


@pytest.mark.parametrize("save", [1, 2, 7, 11, 12, 13, 14])
def test_sisa_resumes_bit_for_bit(task: VaeTask, forget_sets: ForgetSets, same_bytes: Same, save: int) -> None:
    """Three shards are whole and one keeps its first stage: 14 epochs of preparation, then 2 of deletion."""
    sets = forgetting(forget_sets, assign(train_of(forget_sets), None, 4, 2, 5)[1][1][:4])
    clean = Clocked()
    whole = delete(task, sets, checkpoint=clean)
    assert (clean.saves, clean.restarted) == (16, [14])
    dying, survivor = Clocked(dies_at=save), Clocked()
    with pytest.raises(KilledError):
        delete(task, sets, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = delete(task, sets, checkpoint=survivor)
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort, resumed.facts) == (whole.history, whole.effort, whole.facts)
    assert (survivor.saves, survivor.restarted) == (16 - save, [14 - save])


def test_sisa_killed_while_it_deletes_keeps_its_clock(task: VaeTask, forget_sets: ForgetSets, same_bytes: Same) -> None:
    whole = delete(task, forget_sets)
    prepared = 16 - len(whole.history)
    dying, survivor = Clocked(dies_at=prepared + 1), Clocked()
    with pytest.raises(KilledError):
        delete(task, forget_sets, checkpoint=dying)
    survivor.kept = dying.kept
    resumed = delete(task, forget_sets, checkpoint=survivor)
    assert (dying.restarted, survivor.restarted) == ([prepared], [])
    assert same_bytes(resumed.model.state_dict(), whole.model.state_dict())
    assert (resumed.history, resumed.effort) == (whole.history, whole.effort)


def test_sisa_never_reads_the_forgotten_cells(
    task: VaeTask, poisoned: VaeTask, forget_sets: ForgetSets, same_bytes: Same
) -> None:
    clean, other = (delete(t, forget_sets, seed=3) for t in (task, poisoned))
    assert same_bytes(clean.model.state_dict(), other.model.state_dict())
    assert clean.history == other.history


def test_sisa_stops_where_it_diverges(task: VaeTask, forget_sets: ForgetSets, original: Original) -> None:
    with pytest.raises(NonFiniteError):
        sisa(original(), task, forget_sets, settings(learning_rate=1e30), seed=5)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shards", 3), ("slices", 0), ("epochs", 0), ("learning_rate", 0.0), ("batch_size", 0),
        ("kl_warmup_epochs", -1), ("free_bits", -0.1), ("patience", 3),
    ],
)  # fmt: skip
def test_sisa_settings_refuse_what_is_out_of_range(key: str, value: object) -> None:
    with pytest.raises(ValidationError, match=key):
        settings(**{key: value})
