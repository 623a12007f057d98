"""Several workers on one journal, and workers that are killed."""

from __future__ import annotations

import signal
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from optuna.storages import InMemoryStorage
from optuna.study import Study
from optuna.trial import TrialState

from scforget.sweeps import storages, studies, sweep
from studying import FIRST, SPACE, Worker, judge, judged, toy

N = 8


def reopened(where: Path) -> Study:
    return toy(storages.open_storage(str(where)))


def table(study: Study) -> str:
    return str(sweep.table(study, studies.best(studies.finished(study))).to_csv(index=False))


@pytest.fixture
def worker(tmp_path: Path) -> Worker:
    return Worker(str(tmp_path / "studies.journal"), tmp_path / "log", N)


def test_a_worker_killed_in_mid_trial_and_resumed_leaves_what_an_uninterrupted_one_does(worker):
    """Killed in the first trial, in the same one once more, at random, and under TPE."""
    for dies_at in (1, 2, 2, 3):
        worker.dies_at = dies_at
        assert worker.run() == (-signal.SIGKILL, "")
        assert reopened(Path(worker.where)).trials[-1].state is TrialState.RUNNING
    worker.dies_at = None
    assert worker.run() == (0, "")
    plain = toy(InMemoryStorage())
    studies.run(plain, studies.Objective(SPACE, judge, N), N)
    assert table(reopened(Path(worker.where))) == table(plain)
    begun = Counter((place, str(values)) for _, place, values in judged(worker.log))
    assert sorted(place for place, _ in begun) == list(range(N))  # every place has had one set of values
    assert sorted(begun.values()) == [1] * (N - 4) + [2] * 4


def test_two_workers_at_once_make_exactly_so_many_trials_each_once(worker):
    worker.slow = 0.2
    started = [worker.start(), worker.start()]
    ended = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], ended
    study = reopened(Path(worker.where))
    done = studies.finished(study)
    assert [studies.ordinal(study, trial.number) for trial in done] == list(range(N))
    begun = judged(worker.log)
    assert len(begun) == N
    assert len({pid for pid, _, _ in begun}) == 2
    assert len({str(trial.params) for trial in done}) == N
    assert [trial.number for trial in study.trials if trial.user_attrs.get("default")] == [0]
    assert {key: done[0].params[key] for key in FIRST} == FIRST


def test_a_worker_leaves_alone_what_another_is_at_and_takes_it_over_when_that_is_killed(worker, tmp_path):
    hanging = Worker(worker.where, tmp_path / "other", N, hangs_at=2).start()
    until(lambda: (tmp_path / "other").exists() and len(judged(tmp_path / "other")) == 2)
    process = worker.start()
    until(lambda: len(studies.finished(reopened(Path(worker.where)))) == N - 1)
    assert process.poll() is None  # it waits for the last
    (_, _, values) = judged(tmp_path / "other")[-1]
    assert values not in [one for _, _, one in judged(worker.log)]
    hanging.kill()
    hanging.communicate()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, b"the last trials are with other workers; waiting for them\n")
    assert [one for _, _, one in judged(worker.log)].count(values) == 1
    study = reopened(Path(worker.where))
    assert [studies.ordinal(study, trial.number) for trial in studies.finished(study)] == list(range(N))


def until(ready: Any) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.05)


# whoever makes a study


def test_open_study_enqueues_the_default_once_however_often_it_is_opened(tmp_path):
    for _ in range(3):
        study = reopened(tmp_path / "journal")
    assert [trial.user_attrs for trial in study.trials] == [{"default": True}]
    assert study.trials[0].system_attrs["fixed_params"] == FIRST


def test_open_study_has_no_first_trial_if_the_default_lies_outside_the_ranges(tmp_path):
    assert toy(storages.open_storage(str(tmp_path / "journal")), first=None).trials == []


def test_open_study_waits_for_whoever_makes_it(tmp_path, monkeypatch):
    """Or the default, which is the first trial, would come after what it has drawn itself."""
    made: list[Study] = []
    plain = Study.set_metric_names

    def slow(study: Study, names: list[str]) -> None:
        """Another process opens the study while we are between making it and enqueueing."""
        if not made:
            made.append(study)
            asked.append(later.start())
            time.sleep(4.0)
        plain(study, names)

    asked: list[Any] = []
    later = Worker(str(tmp_path / "journal"), tmp_path / "log", 2)
    monkeypatch.setattr(Study, "set_metric_names", slow)
    reopened(tmp_path / "journal")
    _, said = asked[0].communicate(timeout=60)
    assert (asked[0].returncode, said) == (0, b"")
    trials = reopened(tmp_path / "journal").trials
    assert [trial.user_attrs.get("default", False) for trial in trials] == [True, False]


@pytest.mark.parametrize("enqueued", [False, True])
def test_open_study_finishes_what_its_killed_maker_began(tmp_path, monkeypatch, enqueued):
    monkeypatch.setattr(studies, "_PATIENCE", 0.2)

    def killed(*_: Any, **__: Any) -> None:
        raise SystemExit

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Study, "set_user_attr" if enqueued else "set_metric_names", killed)
        with pytest.raises(SystemExit):
            reopened(tmp_path / "journal")
    for _ in range(2):
        study = reopened(tmp_path / "journal")
    assert [trial.user_attrs for trial in study.trials] == [{"default": True}]
    assert study.metric_names == list(studies.OBJECTIVES)
