"""SISA: an ensemble trained in shards and slices, of which a deletion retrains only the tails it reaches."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field

from scforget import seeding
from scforget.arrays import IntArray
from scforget.data.splits import ForgetSets
from scforget.errors import EmptyGroupError
from scforget.models.mixture import Mixture, members_of
from scforget.models.vae import VAE
from scforget.search import Range
from scforget.settings import Settings
from scforget.tasks import VaeTask
from scforget.training import Checkpoint, Effort, Epoch, Loop, Trained, TrainingSettings, adam, train_epoch

#: Cells of each shard, slice by slice.
Assignment = list[list[IntArray]]


class SISASettings(Settings):
    """Settings of SISA.

    Attributes
    ----------
    shards
        Members of the ensemble, each trained on cells of its own.
    slices
        Stages of a member's training: stage s is on its slices 1 to s, with a fresh optimiser.
    epochs
        Of each stage. There is no early stopping: cells that decide would tie the result to the request.
    kl_warmup_epochs
        Counted over a member's stages.

    Ranges: from the fewest shards to members of some fifty cells on the smallest data set; the epochs to half as many
    again as ``params.yaml`` has.
    """

    shards: Annotated[int, Field(ge=4), Range(4, 6)]
    slices: Annotated[int, Field(gt=0)]
    epochs: Annotated[int, Field(gt=0), Range(5, 60)]
    learning_rate: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)]
    kl_warmup_epochs: Annotated[int, Field(ge=0)]
    free_bits: Annotated[float, Field(ge=0)]


class _Stage(NamedTuple):
    """Stage ``number`` (from 1) of a member's training, and whether the deletion has to repeat it."""

    shard: int
    number: int
    cells: IntArray
    repeated: bool


def _deal(
    cells: IntArray, donors: npt.NDArray[np.str_] | None, parts: int, generator: np.random.Generator
) -> list[IntArray]:
    """Deal cells into parts of about one size, a donor's all into one where there are as many donors as parts."""
    if donors is not None:
        names, sizes = np.unique(donors[cells], return_counts=True)
        if len(names) >= parts:
            # the largest donor first, each to the part that is smallest so far; the seed decides among equals
            order = generator.permutation(len(names))
            order = order[np.argsort(-sizes[order], kind="stable")]
            filled, part_of = np.zeros(parts, dtype=np.int64), np.zeros(len(names), dtype=np.int64)
            for donor in order:
                part_of[donor] = np.argmin(filled)
                filled[part_of[donor]] += sizes[donor]
            part = part_of[np.searchsorted(names, donors[cells])]
            return [cells[part == index] for index in range(parts)]
    return [np.sort(part) for part in np.array_split(generator.permutation(cells), parts)]


def assign(
    train: IntArray, donors: npt.NDArray[np.str_] | None, shards: int, slices: int, seed: int
) -> Assignment:  # fmt: skip
    """Assign every training cell to a shard and a slice, whatever will be forgotten.

    Parameters
    ----------
    train : ``[N]``
        Sorted; forgotten and retained cells alike.
    donors : ``[all cells]``, optional
        Whose each prepared cell is; a donor's cells share a shard, and a slice if the shard has enough donors.

    Raises
    ------
    EmptyGroupError
        If there are too few cells for a slice to have one.
    """
    dealt = _deal(train, donors, shards, seeding.numpy_generator(seed, "sisa", "shards"))
    found = [
        _deal(cells, donors, slices, seeding.numpy_generator(seed, "sisa", "slices", shard))
        for shard, cells in enumerate(dealt)
    ]
    smallest = min(len(part) for parts in found for part in parts)
    if not smallest:
        raise EmptyGroupError(
            f"SISA of {len(train)} training cells", "a slice without a cell", "fewer shards or slices"
        )
    return found


def _stages(assignment: Assignment, forget: IntArray) -> list[_Stage]:
    """Every stage on the cells that remain, those before and beside the deletion first, as they are left standing."""
    found = []
    for shard, slices in enumerate(assignment):
        for number in range(1, len(slices) + 1):
            cells = np.sort(np.concatenate(slices[:number]))
            found.append(_Stage(shard, number, np.setdiff1d(cells, forget), bool(np.isin(cells, forget).any())))
    return sorted(found, key=lambda stage: stage.repeated)


def sisa(
    model: VAE,  # noqa: ARG001  (an ensemble is deployed in the original's place)
    task: VaeTask, sets: ForgetSets, settings: SISASettings, *, seed: int, checkpoint: Checkpoint | None = None,
) -> Trained:  # fmt: skip
    """Deploy a SISA ensemble on all training cells, then delete the forgotten ones from it.

    Returns
    -------
    Trained
        The members, equally weighted. History and effort are the deletion's; ``preparation_passes`` are those of
        training the ensemble on all cells, which whoever deploys it pays once.

    Notes
    -----
    Bourtoule et al. 2021. A deletion takes each shard that holds forgotten cells back to the state before the first
    slice with one, and trains the tail again without them. What a deployment did after that state the deletion
    throws away, so it is not computed here; all else of it is computed once and kept. Batches and noise are named by
    shard, stage and epoch and drawn over the shard's remaining cells, so the result is bit for bit that of training
    on the retained cells alone with the same assignment: exact, and no forgotten cell is ever read. A shard that
    loses all its cells leaves an untrained member.
    """
    assignment = assign(
        np.union1d(sets.forget, sets.retain), task.donors, settings.shards, settings.slices, seed
    )  # fmt: skip
    mixture = Mixture([task.new_model(seeding.derive(seed, "sisa", shard)) for shard in range(settings.shards)])
    stages = _stages(assignment, sets.forget)
    loop = Loop(mixture, seed=seed, checkpoint=checkpoint)
    prepared = sum(settings.epochs for stage in stages if not stage.repeated and len(stage.cells))
    restarted = False
    for stage in stages:
        # a run resumed amid the deletion has its clock's reading from there
        if stage.repeated and not restarted and len(loop.history) == prepared and checkpoint is not None:
            checkpoint.restart_clock()
            restarted = True
        _train(loop, mixture, task, stage, settings=settings, seed=seed)
    deletion = [{**row, "epoch": number} for number, row in enumerate(loop.history[prepared:], 1)]
    deployed = sum(len(part) * (settings.slices - i) for slices in assignment for i, part in enumerate(slices))
    facts: dict[str, float | str] = {
        "shards": settings.shards, "affected_shards": len({stage.shard for stage in stages if stage.repeated}),
        "preparation_passes": 2 * settings.epochs * deployed,
    }  # fmt: skip
    mixture.eval()
    return Trained(mixture, deletion, loop.effort, facts)


def _train(loop: Loop, mixture: Mixture, task: VaeTask, stage: _Stage, *, settings: SISASettings, seed: int) -> None:
    """Run one stage of one member; only a repeated one counts as effort."""
    recipe = TrainingSettings(
        learning_rate=settings.learning_rate, schedule="constant", batch_size=settings.batch_size,
        max_epochs=settings.epochs, patience=settings.epochs, kl_warmup_epochs=settings.kl_warmup_epochs,
        free_bits=settings.free_bits,
    )  # fmt: skip
    member = members_of(mixture)[stage.shard]
    optimiser = adam(member, settings.learning_rate)
    effort = loop.effort if stage.repeated else Effort()

    def epoch(number: int, _noise: torch.Generator) -> Epoch:
        done = (stage.number - 1) * settings.epochs + number
        beta = min(1.0, done / settings.kl_warmup_epochs) if settings.kl_warmup_epochs else 1.0
        with seeding.scope(seed, "sisa", stage.shard, stage.number, number) as noise:
            row = train_epoch(member, task, stage.cells, recipe, optimiser, noise, effort, beta=beta)
        return {"shard": float(stage.shard), "slice": float(stage.number), "kl_weight": beta, **row}

    epochs = settings.epochs if len(stage.cells) else 0
    loop.run(f"shard {stage.shard} slice {stage.number}", epoch, epochs, parts={"adam": optimiser})
