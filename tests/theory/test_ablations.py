from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pydantic
import pytest
import torch

from judged import audit_settings, draw, small_case
from scforget.data.splits import ForgetSets
from scforget.methods.retain_finetune import RetainFinetuneSettings
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.theory.ablations import (
    GridSettings,
    combinations,
    grid_jobs,
    grid_rows,
    make,
    method_jobs,
    rows_of,
    scratch_jobs,
    train,
)
from scforget.theory.judging import Case, Judge
from scforget.training import TrainingSettings, fit

Recipe = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def case(task: VaeTask, forget_sets: ForgetSets) -> Case:
    return small_case(task, forget_sets)


@pytest.fixture(scope="module")
def originals(task: VaeTask) -> list[VAE]:
    return [task.new_model(seed) for seed in range(2)]


@pytest.fixture(scope="module")
def finetune(recipe: Recipe) -> RetainFinetuneSettings:
    return RetainFinetuneSettings(**recipe(max_epochs=1))


def grid(**values: list[Any]) -> GridSettings:
    return GridSettings(method="retain_finetune", fixed={"kl_warmup_epochs": 0}, grid=values)


def test_train_makes_a_retrain_on_the_retained_cells(case: Case, recipe: Recipe) -> None:
    settings = TrainingSettings(**recipe())
    [job] = scratch_jobs(case, "retrain", settings, [5])
    wanted = fit(case.task.new_model(5), case.task, case.sets.retain, case.sets.stop, settings, seed=5)
    for one, two in zip(train(job).model.parameters(), wanted.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_train_makes_an_original_on_all_training_cells(case: Case, recipe: Recipe) -> None:
    settings = TrainingSettings(**recipe(max_epochs=1))
    [job] = scratch_jobs(case, "original", settings, [5])
    cells = len(case.sets.forget) + len(case.sets.retain)
    assert train(job).effort.backward.total() == cells


def test_train_leaves_the_original_as_it_was(
    case: Case, originals: list[VAE], finetune: RetainFinetuneSettings
) -> None:
    before = [p.clone() for p in originals[0].parameters()]
    found = train(method_jobs(case, "retain_finetune", finetune, originals, 0)[0]).model
    assert all(torch.equal(one, two) for one, two in zip(before, originals[0].parameters(), strict=True))
    assert not all(torch.equal(one, two) for one, two in zip(before, found.parameters(), strict=True))


def test_make_scores_the_model_and_counts_its_passes(
    case: Case, originals: list[VAE], finetune: RetainFinetuneSettings
) -> None:
    [job, _] = method_jobs(case, "retain_finetune", finetune, originals, 0)
    trained, scored = train(job), make(job)
    assert not isinstance(scored, str)
    np.testing.assert_array_equal(scored.features, case.score(trained.model).features)
    assert scored.passes == trained.effort.passes > 0


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
def test_make_says_in_words_that_a_model_diverged(
    case: Case, originals: list[VAE], finetune: RetainFinetuneSettings
) -> None:
    broken = [VAE(case.task.counts.shape[1], case.task.settings) for _ in originals]
    for model in broken:
        torch.nn.init.constant_(next(model.parameters()), float("nan"))
    [job, _] = method_jobs(case, "retain_finetune", finetune, broken, 0)
    assert "NaN" in str(make(job))
    still = replace(job, settings=finetune.model_copy(update={"max_epochs": 0}))
    assert make(still) == "retain_finetune: what it says of cells is not finite"


def test_rows_of_counts_the_diverged(case: Case, originals: list[VAE], finetune: RetainFinetuneSettings) -> None:
    jobs = [job for row in (0, 1) for job in method_jobs(case, "retain_finetune", finetune, originals, 0, row=row)]
    one, two = draw(case, 2, 1)
    models, failed = rows_of(jobs, [one, "diverged", "diverged", two])
    assert failed == {0: 1, 1: 1}
    assert models[0][0] is one
    assert models[1][0] is two


def test_combinations_run_the_last_key_fastest() -> None:
    found = combinations(grid(batch_size=[16, 32], learning_rate=[1e-4, 1e-3, 1e-2]))
    assert [tuple(one.values()) for one in found] == [(b, r) for b in (16, 32) for r in (1e-4, 1e-3, 1e-2)]


def test_grid_jobs_differ_in_nothing_but_the_values(
    case: Case, originals: list[VAE], finetune: RetainFinetuneSettings
) -> None:
    jobs = grid_jobs(case, originals, finetune, grid(learning_rate=[1e-4, 1e-2]), 0)
    assert [job.row for job in jobs] == [0, 0, 1, 1]
    assert [job.seed for job in jobs[:2]] == [job.seed for job in jobs[2:]]
    assert jobs[0].seed != jobs[1].seed
    fixed = {**finetune.model_dump(), "kl_warmup_epochs": 0}
    assert [job.settings.model_dump() for job in jobs[::2]] == [
        {**fixed, "learning_rate": 1e-4}, {**fixed, "learning_rate": 1e-2},
    ]  # fmt: skip


@pytest.mark.parametrize("values", [{"learning_rat": [1.0]}, {"learning_rate": [-1.0]}])
def test_grid_jobs_refuse_what_the_method_does_not_know(
    case: Case, originals: list[VAE], finetune: RetainFinetuneSettings, values: dict[str, list[Any]]
) -> None:
    with pytest.raises(pydantic.ValidationError):
        grid_jobs(case, originals, finetune, grid(**values), 0)


def test_grid_rows_judge_each_combination(case: Case, originals: list[VAE], finetune: RetainFinetuneSettings) -> None:
    settings = grid(learning_rate=[1e-4, 1e-3, 1e-2])
    jobs = grid_jobs(case, originals, finetune, settings, 0)
    judge, starts = Judge(case, draw(case, 4, 1), audit_settings(), 0), draw(case, 2, 2)
    one, two = draw(case, 2, 3), draw(case, 1, 4, shift=30.0)
    rows = grid_rows(judge, starts, jobs, [*one, "diverged", *two, "diverged", "diverged"], settings)
    assert [row["values"]["learning_rate"] for row in rows] == [1e-4, 1e-3, 1e-2]
    assert [(row["models"], row["failed"]) for row in rows] == [(2, 0), (1, 1), (0, 2)]
    assert rows[0] == {"method": "retain_finetune", "values": {"learning_rate": 1e-4}, "failed": 0} | judge.judge(
        one, starts
    )
    assert rows[1]["trace"]["mean"] > rows[0]["trace"]["mean"] + 10
    assert "trace" not in rows[2]
