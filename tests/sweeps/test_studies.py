"""Studies in one process: interrupted and resumed, numbered, seeded by place, and the choice among their trials."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import psutil
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import BaseStorage, InMemoryStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState, create_trial

from scforget.errors import StudyError
from scforget.search import Choice, Range
from scforget.sweeps import storages, studies, sweep
from studying import FIRST, SEED, SPACE, STARTUP, identity, judge, toy

N = 9
DISTRIBUTIONS = studies.distributions(SPACE)


def table(study: Study) -> str:
    return str(sweep.table(study, studies.best(studies.finished(study))).to_csv(index=False))


@pytest.fixture(scope="module")
def uninterrupted() -> str:
    study = toy(InMemoryStorage())
    studies.run(study, studies.Objective(SPACE, judge, N), N)
    return table(study)


@pytest.fixture
def journal(tmp_path: Path) -> Callable[[], BaseStorage]:
    """Opens the same journal anew each time, as another process would."""
    return lambda: storages.open_storage(str(tmp_path / "deep" / "studies.journal"))


def drawn(study: Study) -> dict[str, Any]:
    """What the next trial would draw."""
    trial = study.ask()
    return {key: studies._suggest(trial, key, one) for key, one in DISTRIBUTIONS.items()}


def test_distributions_keep_ends_scales_and_whole_numbers():
    wanted = {
        "rate": FloatDistribution(1e-4, 1e-1, log=True), "inner.steps": IntDistribution(1, 50),
        "mode": CategoricalDistribution(("a", "b", "c")),
    }  # fmt: skip
    assert wanted == DISTRIBUTIONS
    assert studies.distributions({"x": Range(1, 9, log=True)}) == {"x": IntDistribution(1, 9, log=True)}
    assert studies.distributions({"x": Choice(3)}) == {"x": CategoricalDistribution((3,))}


# finished, in order, each once


def test_run_makes_exactly_so_many_trials_of_which_the_default_is_the_first(uninterrupted):
    rows = uninterrupted.splitlines()
    assert len(rows) == 1 + N
    columns = rows[0].split(",")
    found = [dict(zip(columns, row.split(","), strict=True)) for row in rows[1:]]
    assert [row["trial"] for row in found] == [str(place) for place in range(N)]
    assert [row["default"] for row in found] == ["True"] + ["False"] * (N - 1)
    assert {key: found[0][key] for key in FIRST} == {key: str(value) for key, value in FIRST.items()}
    assert len({tuple(row[key] for key in FIRST) for row in found}) == N
    assert {row["state"] for row in found} == {"complete", "diverged"}  # or other tests would show less than they say


def test_run_gives_the_same_trials_whatever_the_storage(journal, uninterrupted):
    study = toy(journal())
    studies.run(study, studies.Objective(SPACE, judge, N), N)
    assert table(study) == uninterrupted


@pytest.mark.parametrize("kind", [KeyboardInterrupt, RuntimeError, ValueError, OSError])
def test_run_resumed_after_interruptions_leaves_what_an_uninterrupted_one_does(journal, uninterrupted, kind):
    """In the first trial, in a retried one again and again, at random, under TPE."""
    attempts: list[tuple[int, dict[str, Any]]] = []
    stops = iter([0, 1, 2, 3, 4, 5, 7, 8, 12, 13, 16])
    state = {"next": next(stops)}

    def broken(values: dict[str, Any], place: int) -> Any:
        attempts.append((place, values))
        if len(attempts) - 1 == state["next"]:
            state["next"] = next(stops, -1)
            raise kind("now")
        return judge(values, place)

    sittings = 0
    while True:
        study = toy(journal())
        sittings += 1
        try:
            studies.run(study, studies.Objective(SPACE, broken, N), N)
            break
        except (kind, StudyError):
            assert sittings < 20
    assert sittings == 12
    assert table(study) == uninterrupted
    of_place = {place: [values for other, values in attempts if other == place] for place in range(N)}
    assert all(values == tries[0] for tries in of_place.values() for values in tries)  # run again with the same
    assert len(of_place[0]) == 7  # a person who presses Ctrl-C often loses nothing


def test_run_resumed_after_an_interruption_between_two_draws_goes_on_with_the_same(journal, uninterrupted, monkeypatch):
    count, plain = 0, studies._suggest

    def interrupted(*arguments: Any) -> Any:
        nonlocal count
        count += 1
        if count in (2, 5, 15, 22):
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(studies, "_suggest", interrupted)
    for _ in range(4):
        with pytest.raises(KeyboardInterrupt):
            studies.run(toy(journal()), studies.Objective(SPACE, judge, N), N)
    study = toy(journal())
    studies.run(study, studies.Objective(SPACE, judge, N), N)
    assert table(study) == uninterrupted


def test_run_of_a_longer_study_keeps_the_trials_there_are(journal, uninterrupted):
    places: list[int] = []

    def counted(values: dict[str, Any], place: int) -> Any:
        places.append(place)
        return judge(values, place)

    for trials in (4, 4, N, 2):
        studies.run(toy(journal()), studies.Objective(SPACE, counted, trials), trials)
        assert len(places) == (4 if trials == 4 else N)  # nothing is made twice, nor more than is wanted
    assert places == list(range(N))
    study = toy(journal())
    assert table(study) == uninterrupted


def test_run_begins_no_trial_after_its_time(journal):
    study = toy(journal())
    studies.run(study, studies.Objective(SPACE, judge, N), N, timeout=0.0)
    assert studies.finished(study) == []


def test_objective_beyond_the_last_place_is_surplus_and_never_run_again(journal):
    study = toy(journal())
    studies.run(study, studies.Objective(SPACE, judge, 3), 3)
    studies._one(study, studies.Objective(SPACE, judge, 3))  # as a worker that had looked before the last one began
    assert [trial.state.name for trial in study.trials] == ["COMPLETE"] * 3 + ["FAIL"]
    studies.run(study, studies.Objective(SPACE, judge, 4), 4)
    assert [studies.ordinal(study, trial.number) for trial in studies.finished(study)] == [0, 1, 2, 3]


# trials of workers that are gone


def running(study: Study, worker: list[Any] | None) -> FrozenTrial:
    trial = study.ask()
    for key, one in DISTRIBUTIONS.items():
        studies._suggest(trial, key, one)
    if worker is not None:
        trial.set_user_attr("worker", worker)
    return study.trials[trial.number]


def gone() -> list[Any]:
    process = subprocess.Popen(["sleep", "60"])
    found = identity(psutil.Process(process.pid))
    process.kill()
    process.wait()
    return found


def test_recover_gives_a_dead_worker_s_trial_to_the_next_once_with_its_settings(journal, uninterrupted):
    study = toy(journal())
    left = running(study, gone())
    assert studies.recover(study) == 1
    assert studies.recover(study) == 0
    states = [trial.state for trial in study.trials]
    assert states == [TrialState.FAIL, TrialState.WAITING]
    assert study.trials[1].params == left.params
    seen: list[dict[str, Any]] = []
    studies.run(study, studies.Objective(SPACE, lambda v, p: (seen.append(v), judge(v, p))[1], N), N)
    assert seen.count(left.params) == 1
    assert table(study) == uninterrupted


def test_recover_sees_through_a_process_that_has_a_dead_one_s_number(journal):
    study = toy(journal())
    node, pid, created = identity(psutil.Process())
    running(study, [node, pid, created - 1000.0])
    assert studies.recover(study) == 1


def test_recover_takes_a_zombie_for_dead(journal):
    study = toy(journal())
    process = subprocess.Popen(["sleep", "60"])
    running(study, identity(psutil.Process(process.pid)))
    assert studies.recover(study) == 0
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked for its exit code
    assert studies.recover(study) == 1
    process.wait()


@pytest.mark.parametrize("where", ["here", "elsewhere", "unsigned"])
def test_run_waits_for_a_living_worker_and_leaves_its_trial_alone(journal, capsys, where):
    study = toy(journal())
    node, pid, created = identity(psutil.Process())
    running(study, {"here": [node, pid, created], "elsewhere": ["elsewhere", 1, 0.0], "unsigned": None}[where])
    studies.run(study, studies.Objective(SPACE, judge, 2), 2, timeout=1.0, pause=0.01)
    assert [trial.state.name for trial in study.trials] == ["RUNNING", "COMPLETE"]
    assert capsys.readouterr().err == "the last trials are with other workers; waiting for them\n"


def test_recover_gives_up_settings_that_kill_worker_after_worker(journal):
    """They would be drawn anew at the same place for ever: the place is theirs, and they count as diverged."""
    study = toy(journal())
    left = running(study, gone())
    for death in (1, 2, 3):
        assert studies.recover(study) == 1
        if death < 3:
            again = running(study, gone())
            assert again.params == left.params
    assert studies.recover(study) == 0
    (given_up,) = studies.finished(study)
    assert (given_up.state, given_up.params) == (TrialState.PRUNED, left.params)
    assert given_up.user_attrs["diverged"] == "3 workers died in it"
    studies.run(study, studies.Objective(SPACE, judge, N), N)
    assert len(studies.finished(study)) == N
    assert sweep.table(study, None)["state"].tolist()[0] == "diverged"


def test_run_goes_on_when_another_worker_was_given_a_trial_of_ours(journal, uninterrupted):
    """As after a machine's sleep: heartbeats had stopped, and the trial was run again elsewhere."""
    study = toy(journal())

    def held_up(values: dict[str, Any], place: int) -> Any:
        if not held:
            held.append(values)
            other = toy(journal())
            (mine,) = other.get_trials(states=(TrialState.RUNNING,))
            other.tell(mine.number, state=TrialState.FAIL)
            storages.retry(other, mine)
        return judge(values, place)

    held: list[dict[str, Any]] = []
    studies.run(study, studies.Objective(SPACE, held_up, N), N)
    assert table(study) == uninterrupted
    assert sum(trial.params == held[0] for trial in studies.finished(study)) == 1


# the sampler


def told(study: Study, count: int) -> None:
    for place in range(count):
        trial = create_trial(
            params={"rate": 10.0 ** -(1 + place % 3), "inner.steps": 3 * place + 1, "mode": "abc"[place % 3]},
            distributions=DISTRIBUTIONS, values=[float(place % 4), place / 10],
            constraints={"elbo_loss": place % 2 - 0.5},
        )  # fmt: skip
        study.add_trial(trial)


def failed(study: Study) -> None:
    study.add_trial(create_trial(state=TrialState.FAIL))


@pytest.mark.parametrize("place", [0, STARTUP - 1, STARTUP, 8])
def test_sampler_draws_by_the_place_whatever_has_failed_before(place):
    """And what fails is not known: no settings of it were judged."""
    plain, holey = toy(InMemoryStorage(), first=None), toy(InMemoryStorage(), first=None)
    told(plain, place)
    failed(holey)
    told(holey, place)
    failed(holey)
    failed(holey)
    assert drawn(plain) == drawn(holey)


def test_sampler_draws_anew_at_every_place_and_with_every_seed():
    rows = []
    for seed in (SEED, SEED + 1):
        study = toy(InMemoryStorage(), first=None)
        study.sampler = studies.SeededSampler(seed, STARTUP)
        for _ in range(3):
            rows.append(drawn(study)["rate"])
    assert len(set(rows)) == 6


def test_sampler_learns_after_the_startup_trials():
    """Settings near to the best are drawn more often than at random."""
    rates = {}
    for startup in (1, 100):
        study = toy(InMemoryStorage(), first=None)
        study.sampler = studies.SeededSampler(SEED, startup)
        studies.run(study, studies.Objective(SPACE, judge, 25), 25)
        rates[startup] = [trial.values[0] for trial in studies.finished(study) if trial.values][-10:]
    assert sum(rates[1]) < sum(rates[100]) / 2


# judgement and choice


@pytest.mark.parametrize("name", ["distance", "cost", "elbo_loss", "marker_r_loss"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_objective_takes_what_is_not_finite_for_diverged(name, value):
    study = toy(InMemoryStorage())
    objective = studies.Objective(SPACE, lambda _, p: {**judge(FIRST, p), name: value}, 2)
    studies.run(study, objective, 2, timeout=10.0)
    assert [trial.state for trial in study.trials] == [TrialState.PRUNED] * 2
    assert study.trials[0].user_attrs["diverged"] == f"{name} not finite"
    assert studies.best(studies.finished(study)) is None


def test_diverged_trials_count_are_infeasible_and_stay_out_of_the_choice():
    study = toy(InMemoryStorage())
    studies.run(study, studies.Objective(SPACE, lambda *_: "the loss became NaN", 3), 3)
    assert len(study.trials) == 3
    assert studies.best(studies.finished(study)) is None
    rows = sweep.table(study, None)
    assert rows["state"].tolist() == ["diverged"] * 3
    assert not rows["feasible"].any()
    assert rows["distance"].isna().all()
    assert rows["rate"].notna().all()  # what had been tried


def candidate(number: int, distance: float, cost: float, error: float | None = 0.0, loss: float = 0.0) -> FrozenTrial:
    trial = create_trial(
        values=[distance, cost], user_attrs={} if error is None else {"standard_error": error},
        constraints={"elbo_loss": loss - 1.0, "marker_r_loss": -0.5},
    )  # fmt: skip
    trial.number = number
    return trial


@pytest.mark.parametrize(
    ("trials", "wanted"),
    [
        ([candidate(0, 1.0, 0.5), candidate(1, 0.9, 0.9)], 1),
        ([candidate(0, 1.0, 0.5), candidate(1, 0.9, 0.9, error=0.2)], 0),  # within one standard error, and cheaper
        ([candidate(0, 1.0, 0.5, error=9.0), candidate(1, 0.9, 0.9, error=0.05)], 1),  # of the nearest, not its own
        ([candidate(0, 1.0, 0.5), candidate(1, 0.9, 0.9, error=0.1)], 0),  # at the very limit
        ([candidate(0, 0.1, 0.1, loss=1.01), candidate(1, 0.9, 0.9)], 1),  # utility comes first
        ([candidate(0, 0.1, 0.1, loss=1.0), candidate(1, 0.9, 0.9)], 0),  # a margin is still inside
        ([candidate(0, 0.1, 0.1, loss=1.01, error=5.0), candidate(1, 0.9, 0.9), candidate(2, 1.0, 0.1)], 1),
        ([candidate(0, 1.0, 0.5, error=0.5), candidate(1, 0.9, 0.5, error=0.5)], 1),  # the nearer of two as cheap
        ([candidate(0, 1.0, 0.5, error=0.5), candidate(1, 1.0, 0.5, error=0.5)], 0),  # the first of two alike
        ([candidate(0, 1.0, 0.5), candidate(1, 0.9, 0.9, error=None)], 1),  # one model has no standard error
        ([candidate(0, 1.0, 0.5, loss=2.0)], None),
        ([], None),
    ],
)
def test_best_is_the_cheapest_feasible_within_one_standard_error_of_the_nearest(trials, wanted):
    for rows in (trials, trials[::-1]):
        chosen = studies.best(rows)
        assert (chosen and chosen.number) == wanted


def test_optuna_says_nothing_experimental_or_deprecated_to_people(journal, recwarn):
    study = toy(journal())
    studies.run(study, studies.Objective(SPACE, judge, 3), 3)
    assert [str(one.message) for one in recwarn] == []
    assert optuna.logging.get_verbosity() == optuna.logging.ERROR
