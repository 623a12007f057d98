from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from judged import CELLS, audit_settings, draw, small_case
from scforget import seeding
from scforget.audit import roc
from scforget.data.splits import CellSets, ForgetSets
from scforget.errors import EmptyGroupError
from scforget.methods.retain_finetune import RetainFinetuneSettings
from scforget.tasks import VaeTask
from scforget.theory.ablations import make
from scforget.theory.judging import Case, Judge, Scored
from scforget.theory.sizes import (
    Sized,
    SizeSettings,
    leak_of_cells,
    size_cases,
    size_jobs,
    size_rows,
    structured_against_scattered,
)
from scforget.training import TrainingSettings

Recipe = Callable[..., dict[str, Any]]
SETTINGS = SizeSettings(sizes=[5, 20, 100], retained_share=0.5, retrains=4, methods=["retain_finetune"])


@pytest.fixture(scope="module")
def obs() -> pd.DataFrame:
    """Half of the cells are B, a third A, the rest C."""
    return pd.DataFrame({"label": np.array(["A", "B", "A", "B", "C", "B"] * (CELLS // 6))})


@pytest.fixture(scope="module")
def sets() -> CellSets:
    parts = np.split(np.random.default_rng(1).permutation(CELLS).astype(np.int64), [120, 150, 170])
    return CellSets(*(np.sort(part) for part in parts))


@pytest.fixture(scope="module")
def cases(task: VaeTask, obs: pd.DataFrame, sets: CellSets) -> list[Sized]:
    return size_cases(task, obs, sets, task.new_model(0), settings=SETTINGS, audit=audit_settings(), seed=0)


@pytest.fixture(scope="module")
def case(task: VaeTask, forget_sets: ForgetSets) -> Case:
    return small_case(task, forget_sets)


def test_size_cases_draw_both_kinds_at_every_size_that_fits(
    cases: list[Sized], obs: pd.DataFrame, sets: CellSets
) -> None:
    assert [(one.kind, one.size) for one in cases] == [
        ("cluster_subset", 5), ("scattered", 5), ("cluster_subset", 20), ("scattered", 20),
    ]  # fmt: skip
    labels = obs["label"].to_numpy()
    for one in cases:
        forget, retain = one.case.sets.forget, one.case.sets.retain
        assert len(forget) == one.size
        assert np.union1d(forget, retain).tolist() == sets.train.tolist()
        controls = one.case.cells[one.case.groups.controls["same_group"]]
        if one.kind == "cluster_subset":
            assert set(labels[forget]) == set(labels[controls]) == {"B"}
        else:
            assert set(labels[forget]) == {"A", "B", "C"} or one.size == 5
            assert len(controls) == len(sets.unseen)


def test_size_cases_refuse_sizes_of_which_none_fits(task: VaeTask, obs: pd.DataFrame, sets: CellSets) -> None:
    few = SETTINGS.model_copy(update={"retained_share": 0.97})
    with pytest.raises(EmptyGroupError, match="none of"):
        size_cases(task, obs, sets, task.new_model(0), settings=few, audit=audit_settings(), seed=0)


def test_size_jobs_retrain_each_set_and_unlearn_each_original(
    cases: list[Sized], task: VaeTask, recipe: Recipe
) -> None:
    originals, how = [task.new_model(0), task.new_model(1)], RetainFinetuneSettings(**recipe())
    jobs = size_jobs(
        cases, originals, TrainingSettings(**recipe()), {"retain_finetune": how}, settings=SETTINGS, seed=0
    )
    assert [(job.row, job.method) for job in jobs[:6]] == [(0, "retrain")] * 4 + [(1, "retain_finetune")] * 2
    assert len(jobs) == 6 * len(cases)
    assert len({job.seed for job in jobs}) == len(jobs)
    assert [job.original for job in jobs[4:6]] == originals


def test_leak_of_cells_has_the_difference_as_its_mean(case: Case) -> None:
    judge, models = Judge(case, draw(case, 5, 1), audit_settings(), 0), draw(case, 3, 2, shift=9.0)
    own = judge.statistics(models)
    members, controls = leak_of_cells(judge, models, "membership")
    wanted = own["membership"].mean() - judge.target["membership"].mean()
    assert members.mean() == pytest.approx(wanted)
    assert controls.mean() == pytest.approx(wanted)
    [cells] = leak_of_cells(judge, models, "trace")
    assert cells.mean() == pytest.approx(own["trace"].mean())


def test_leak_of_cells_is_each_cells_share(case: Case) -> None:
    retrains, models = draw(case, 5, 1), draw(case, 3, 2, shift=9.0)
    audit = audit_settings()
    for one in (*retrains, *models):
        one.features[:, 2] = np.round(one.features[:, 2])  # some ties
    judge = Judge(case, retrains, audit, 0)
    forget, controls = np.flatnonzero(case.groups.forget), case.groups.controls["same_group"]

    def alone(group: list[Scored], cell: int) -> float:
        return float(np.mean([roc.auc(one.elbo[[cell]], one.elbo[controls]) for one in group]))

    wanted = [alone(models, cell) - alone(retrains, cell) for cell in forget]
    assert leak_of_cells(judge, models, "membership")[0] == pytest.approx(wanted)
    base = np.stack([one.elbo[forget] for one in retrains])
    variance, w = base.var(axis=0, ddof=1), audit.trace_shrinkage
    spread = np.sqrt((1 - w) * variance + w * np.median(np.sqrt(variance)) ** 2)
    z = (np.stack([one.elbo[forget] for one in models]).mean(axis=0) - base.mean(axis=0)) / spread
    assert leak_of_cells(judge, models, "trace")[0] == pytest.approx(z)


def test_structured_against_scattered_subtracts_what_retrained_models_show(cases: list[Sized]) -> None:
    by = {one.kind: one.case for one in cases if one.size == 20}
    judges = {kind: Judge(case, draw(case, 8, 1), audit_settings(), 0) for kind, case in by.items()}
    starts = {kind: draw(case, 5, 2, shift=4.0) for kind, case in by.items()}
    starts["cluster_subset"] = draw(by["cluster_subset"], 5, 2, shift=16.0)
    found = structured_against_scattered(judges, starts, 0.9)
    for name in ("membership", "trace"):
        excess = {kind: judges[kind].statistics(starts[kind])[name] - judges[kind].target[name].mean() for kind in by}
        wanted = excess["cluster_subset"].mean() - excess["scattered"].mean()
        assert found[name]["difference"] == pytest.approx(wanted)
        low, high = found[name]["interval"]
        inner = found[name]["models_interval"]
        assert low < inner[0] < wanted < inner[1] < high
    assert found["trace"]["interval"][0] > 0


def test_structured_against_scattered_finds_nothing_where_both_are_remembered_alike(cases: list[Sized]) -> None:
    by, covered, audit = {one.kind: one.case for one in cases if one.size == 20}, 0, audit_settings()
    for seed in range(40):
        judges = {kind: Judge(case, draw(case, 4, 2 * seed), audit, 0) for kind, case in by.items()}
        starts = {kind: draw(case, 3, 2 * seed + 1, shift=8.0) for kind, case in by.items()}
        low, high = structured_against_scattered(judges, starts, 0.9)["trace"]["interval"]
        covered += low <= 0 <= high
    assert covered >= 34


def test_size_rows_judge_originals_and_methods_by_their_own_retrains(
    cases: list[Sized], task: VaeTask, recipe: Recipe
) -> None:
    originals, audit = [task.new_model(0), task.new_model(1)], audit_settings()
    how = {"retain_finetune": RetainFinetuneSettings(**recipe(max_epochs=1))}
    jobs = size_jobs(cases[:2], originals, TrainingSettings(**recipe()), how, settings=SETTINGS, seed=0)
    results = [make(job) for job in jobs]
    found = size_rows(cases[:2], originals, jobs, results, settings=SETTINGS, audit=audit, seed=0)
    assert [(row["kind"], row["method"]) for row in found["rows"]] == [
        (kind, method) for kind in ("cluster_subset", "scattered") for method in ("original", "retain_finetune")
    ]
    case = cases[0].case
    retrains = [one for one in results[:4] if isinstance(one, Scored)]
    judge = Judge(case, retrains, audit, seeding.derive(0, "judge", "cluster_subset", 5))
    starts = [case.score(one) for one in originals]
    wanted = {"kind": "cluster_subset", "size": 5, "method": "original", "failed": 0} | judge.judge(starts, starts)
    assert found["rows"][0] == wanted
    assert found["rows"][1]["failed"] == 0
    [contrast] = found["contrasts"]
    assert contrast["size"] == 5
    lacking: list[Scored | str] = ["diverged", *results[1:]]
    with pytest.raises(EmptyGroupError, match="retrained"):
        size_rows(cases[:2], originals, jobs, lacking, settings=SETTINGS, audit=audit, seed=0)
