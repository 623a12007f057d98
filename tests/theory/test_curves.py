from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from judged import audit_settings, draw, small_case
from scforget.data.splits import ForgetSets
from scforget.methods.retain_finetune import RetainFinetuneSettings
from scforget.methods.sisa import SISASettings
from scforget.methods.ssd import SSDSettings
from scforget.models.mixture import Mixture
from scforget.models.vae import VAE
from scforget.tasks import VaeTask
from scforget.theory.ablations import Job, make, method_jobs, scratch_jobs, train
from scforget.theory.curves import Point, Recorder, curve_rows, model_of, record
from scforget.theory.judging import Case, Judge, Scored
from scforget.training import TrainingSettings

Recipe = Callable[..., dict[str, Any]]


class Clock:
    """Time that passes when it is told to."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(scope="module")
def case(task: VaeTask, forget_sets: ForgetSets) -> Case:
    return small_case(task, forget_sets)


@pytest.fixture(scope="module")
def judge(case: Case) -> Judge:
    return Judge(case, draw(case, 4, 1), audit_settings(), 0)


@pytest.fixture(scope="module")
def originals(task: VaeTask) -> list[VAE]:
    return [task.new_model(seed) for seed in range(2)]


def job(case: Case, originals: list[VAE], method: str, settings: Any) -> Job:
    return method_jobs(case, method, settings, originals, 0)[0]


def test_recorder_does_not_count_the_time_of_looking() -> None:
    clock = Clock()

    def watch(_tensors: dict[str, Tensor]) -> str:
        clock.now += 50
        return "seen"

    recorder = Recorder(watch, 1.0, clock)
    for passes in (10, 20, 30):
        clock.now += 2
        recorder.save({}, {"effort": {"passes": passes}})
    clock.now += 1
    recorder.finish({}, 35)
    assert recorder.points == [
        Point(1, 10, 2.0, "seen"), Point(2, 20, 4.0, "seen"), Point(3, 30, 6.0, "seen"), Point(3, 35, 7.0, "seen"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("growth", "wanted"), [(1.0, [*range(1, 21)]), (2.0, [1, 2, 4, 8, 16]), (1.5, [1, 2, 3, 5, 8, 12, 18])]
)
def test_recorder_looks_at_growing_numbers_of_epochs(growth: float, wanted: list[int]) -> None:
    recorder = Recorder(lambda _: None, growth, Clock())
    for _ in range(20):
        recorder.save({}, {"effort": {"passes": 0}})
    assert [point.epoch for point in recorder.points] == wanted


def test_recorder_begins_anew_where_preparation_ends() -> None:
    clock = Clock()
    recorder = Recorder(lambda _: None, 4.0, clock)
    for _ in range(3):
        clock.now += 9
        recorder.save({}, {"effort": {"passes": 1}})
    recorder.restart_clock()
    clock.now += 3
    recorder.save({}, {"effort": {"passes": 5}})
    assert recorder.points == [Point(1, 5, 3.0, None)]


def test_recorder_shows_the_model_alone_under_its_own_names() -> None:
    seen: list[dict[str, Tensor]] = []
    recorder = Recorder(seen.append, 1.0, Clock())
    recorder.save(
        {"model/a.weight": torch.ones(1), "part/adam/0/step": torch.ones(1), "best/a.weight": torch.zeros(1)},
        {"effort": {"passes": 1}},
    )
    assert seen == [{"a.weight": torch.ones(1)}]
    assert recorder.load() is None


def test_recorder_changes_nothing_of_the_run(case: Case, recipe: Recipe) -> None:
    [one] = scratch_jobs(case, "retrain", TrainingSettings(**recipe()), [3])
    recorder = Recorder(lambda tensors: case.score(model_of(case.task, tensors)), 1.0)
    plain, watched = train(one).model, train(one, recorder).model
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), watched.parameters(), strict=True))
    assert len(recorder.points) == 4


def test_model_of_rebuilds_models_and_mixtures(case: Case, task: VaeTask) -> None:
    for model in (task.new_model(5), Mixture([task.new_model(6), task.new_model(7)])):
        found = model_of(task, model.state_dict())
        assert type(found) is type(model)
        np.testing.assert_array_equal(case.score(found).features, case.score(model).features)


def test_record_follows_training_and_ends_with_the_finished_model(case: Case, recipe: Recipe) -> None:
    [one] = scratch_jobs(case, "retrain", TrainingSettings(**recipe()), [3])
    points, finished = record(one, 1.0), make(one)
    assert not isinstance(points, str)
    assert not isinstance(finished, str)
    assert [point.epoch for point in points] == [1, 2, 3, 4, 4]
    assert all(a.passes < b.passes and a.seconds < b.seconds for a, b in pairwise(points[:-1]))
    np.testing.assert_array_equal(points[-1].seen.elbo, finished.elbo)
    assert points[-1].passes == finished.passes
    scores = [point.seen.elbo.mean() for point in points]
    assert scores[3] > scores[0] + 1  # every look is at another model


def test_record_of_a_single_step_is_a_single_point(case: Case, originals: list[VAE]) -> None:
    settings = SSDSettings(variant="selective", action="dampen", alpha=5.0, lam=1.0, reference="D", draws=1)
    points = record(job(case, originals, "ssd", settings), 1.5)
    assert len(points) == 1


def test_record_of_sisa_is_of_the_deletion_alone(case: Case, originals: list[VAE]) -> None:
    settings = SISASettings(
        shards=4, slices=2, epochs=2, learning_rate=1e-2, batch_size=32, kl_warmup_epochs=0, free_bits=0.0
    )
    one = job(case, originals, "sisa", settings)
    points, trained = record(one, 1.0), train(one)
    assert not isinstance(points, str)
    assert len(points) == len(trained.history) + 1
    assert points[0].passes > 0
    np.testing.assert_array_equal(points[-1].seen.elbo, case.score(trained.model).elbo)


@pytest.mark.filterwarnings("ignore:overflow|invalid value:RuntimeWarning")
def test_record_says_in_words_that_a_model_diverged(case: Case, originals: list[VAE], recipe: Recipe) -> None:
    broken = [VAE(case.task.counts.shape[1], case.task.settings) for _ in originals]
    torch.nn.init.constant_(next(broken[0].parameters()), float("nan"))
    found = record(job(case, broken, "retain_finetune", RetainFinetuneSettings(**recipe())), 1.0)
    assert "NaN" in str(found)


def drawn(case: Case, lengths: list[int]) -> Iterator[list[Point[Scored]]]:
    """Runs whose memory fades epoch by epoch; the last point is the finished model."""
    for run, length in enumerate(lengths):
        scored = [draw(case, 1, 100 * run + epoch, shift=20.0 - 5 * epoch)[0] for epoch in range(length)]
        yield [Point(epoch + 1, 10 * (epoch + 1), 0.5 * (epoch + 1) + run, one) for epoch, one in enumerate(scored)]


def test_curve_rows_average_runs_where_all_of_them_are(case: Case, judge: Judge, originals: list[VAE]) -> None:
    jobs = [*method_jobs(case, "ssd", audit_settings(), originals, 0), *scratch_jobs(case, "retrain", None, [1])]  # type: ignore[arg-type]
    one, two = drawn(case, [3, 4])
    rows, seconds = curve_rows(judge, jobs, [one, two, "diverged"])
    assert [(row["method"], row["epoch"], row["end"], row["runs"]) for row in rows] == [
        ("ssd", 1, False, 2), ("ssd", 2, False, 2), ("ssd", 3.5, True, 2),
    ]  # fmt: skip
    assert [row["passes"]["mean"] for row in rows] == [10, 20, 35]
    assert [row["seconds"]["mean"] for row in seconds] == [1.0, 1.5, 2.25]
    both = [one[-1].seen, two[-1].seen]
    wanted = judge.statistics(both)
    for name in ("membership", "trace", "distance", "elbo"):
        assert rows[-1][name]["per_model"] == pytest.approx(wanted[name])
    assert rows[0]["trace"]["mean"] > rows[1]["trace"]["mean"] > rows[2]["trace"]["mean"]
    assert "seconds" not in json.dumps(rows)
