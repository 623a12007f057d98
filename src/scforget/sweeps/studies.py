"""Optuna studies: two things to make small (distance to the retrained models, cost), utility as a constraint.

Any number of workers may share a study and be killed at any time: a finished trial is on disk, an unfinished one is
run again with the same settings, and a worker by itself that is resumed draws what it would have drawn uninterrupted.
"""

from __future__ import annotations

import math
import platform
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any

import optuna
import psutil
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning, UpdateFinishedTrialError
from optuna.samplers import BaseSampler, TPESampler
from optuna.storages import BaseStorage
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from scforget import seeding
from scforget.search import Choice, Range
from scforget.sweeps.storages import GRACE, RETRY_OF, WORKER, answering, retry

#: What a trial is judged by, both to be made small.
OBJECTIVES = ("distance", "cost")
_FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)
_SURPLUS, _READY = "surplus", "ready"
_PATIENCE = 10.0  # seconds to wait for whoever is making a study
_CONSTRAINED = ("elbo_loss", "marker_r_loss")


class _SurplusError(Exception):
    """Another worker was quicker with the last trial."""


def distributions(space: Mapping[str, Range | Choice]) -> dict[str, BaseDistribution]:
    """Return ranges as Optuna has them."""
    found: dict[str, BaseDistribution] = {}
    for key, one in space.items():
        if isinstance(one, Choice):
            found[key] = CategoricalDistribution(one.values)
        elif one.whole:
            found[key] = IntDistribution(int(one.low), int(one.high), log=one.log)
        else:
            found[key] = FloatDistribution(one.low, one.high, log=one.log)
    return found


def ordinal(study: Study, number: int) -> int:
    """Place of a trial among those that count: the failed were run again, or were never needed."""
    earlier = study.get_trials(deepcopy=False)[:number]
    return sum(trial.state is not TrialState.FAIL for trial in earlier)


class SeededSampler(BaseSampler):
    """TPE whose stream is a trial's own, derived from its place in the study: nothing is lost when a worker ends.

    Parameters
    ----------
    seed
        Of the study.
    startup_trials
        Trials drawn at random before TPE takes over.
    """

    def __init__(self, seed: int, startup_trials: int) -> None:
        self._seed, self._startup = seed, startup_trials

    def _own(self, study: Study, trial: FrozenTrial) -> TPESampler:
        seed = seeding.derive(self._seed, "sampler", ordinal(study, trial.number)) % 2**32
        return TPESampler(seed=seed, n_startup_trials=self._startup)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Parameters that are drawn together."""
        return self._own(study, trial).infer_relative_search_space(study, trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:  # fmt: skip
        """Draw them."""
        return self._own(study, trial).sample_relative(study, trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Draw one by itself, as the first trials do."""
        seed = seeding.derive(self._seed, "sampler", ordinal(study, trial.number), param_name) % 2**32
        sampler = TPESampler(seed=seed, n_startup_trials=self._startup)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def open_study(storage: BaseStorage, name: str, first: Mapping[str, Any] | None) -> Study:
    """Open a study, or make it; ``first`` are the settings of its first trial, which whoever makes it enqueues.

    Raises
    ------
    StudyError
        If the storage fails.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings(), answering("of the study"):
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            study = optuna.create_study(storage=storage, study_name=name, directions=["minimize"] * len(OBJECTIVES))
        except DuplicatedStudyError:
            study = optuna.load_study(study_name=name, storage=storage)
            if _is_ready(study):
                return study
        study.set_metric_names(list(OBJECTIVES))  # ours to make, or its maker was killed half-way
        if first is not None and not any("default" in one.user_attrs for one in study.get_trials(deepcopy=False)):
            study.enqueue_trial(dict(first), user_attrs={"default": True})
        study.set_user_attr(_READY, True)
        return study


def _is_ready(study: Study) -> bool:
    """Whether a study is made, its first trial enqueued; waits for whoever is at it."""
    end = time.monotonic() + _PATIENCE
    while not study.user_attrs.get(_READY):
        if time.monotonic() > end:
            return False
        time.sleep(0.1)
    return True


def _me() -> list[Any]:
    own = psutil.Process()
    return [platform.node(), own.pid, own.create_time()]


def _is_dead(trial: FrozenTrial) -> bool:
    """Whether the worker of a running trial is a process of this machine that is no more."""
    worker = trial.user_attrs.get(WORKER)
    if worker is None:  # killed before it could sign
        started = trial.datetime_start
        return started is not None and (datetime.now() - started).total_seconds() > GRACE
    node, pid, created = worker
    if node != platform.node():
        return False
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(pid)
        return bool(process.create_time() != created or process.status() == psutil.STATUS_ZOMBIE)
    return True


def recover(study: Study) -> int:
    """Give trials whose worker died to whoever asks next; returns how many.

    A database knows by heartbeats that have stopped; of a journal, which has none, the processes of this machine are
    looked up.
    """
    found = 0
    for trial in study.get_trials(states=(TrialState.RUNNING,)):
        if _is_dead(trial):
            with suppress(ValueError, RuntimeError):  # another worker was quicker
                study.tell(trial.number, state=TrialState.FAIL)
                retry(study, trial)
                found += 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        optuna.storages.fail_stale_trials(study)
    return found


class Objective:
    """A trial: draws settings, has them judged, and reports.

    Parameters
    ----------
    space
        By dotted key of the method's settings.
    judge
        From drawn values and the place of the trial to numbers: ``distance``, ``cost``, ``elbo_loss``,
        ``marker_r_loss`` (margins; above 1 is lost) and whatever else is to be kept; or why there are none, in words.
    trials
        How many the study shall have.
    """

    def __init__(
        self, space: Mapping[str, Range | Choice], judge: Callable[[dict[str, Any], int], dict[str, Any] | str],
        trials: int,
    ) -> None:  # fmt: skip
        self._space, self._judge, self._trials = distributions(space), judge, trials

    def __call__(self, trial: Trial) -> tuple[float, ...]:
        """Run one trial."""
        trial.set_user_attr(WORKER, _me())
        place = ordinal(trial.study, trial.number)
        if place >= self._trials:
            trial.set_user_attr(_SURPLUS, True)
            raise _SurplusError
        values = {key: _suggest(trial, key, one) for key, one in self._space.items()}
        found = self._judge(values, place)
        if not isinstance(found, str):
            odd = [name for name in (*OBJECTIVES, *_CONSTRAINED) if not math.isfinite(found[name])]
            found = f"{' and '.join(odd)} not finite" if odd else found
        if isinstance(found, str):
            trial.set_user_attr("diverged", found)
            trial.set_constraint("diverged", 1.0)
            raise optuna.TrialPruned(found)
        for key, value in found.items():
            trial.set_user_attr(key, value)
        for name in _CONSTRAINED:
            trial.set_constraint(name, found[name] - 1.0)
        return tuple(float(found[name]) for name in OBJECTIVES)


def _suggest(trial: Trial, key: str, one: BaseDistribution) -> Any:
    if isinstance(one, CategoricalDistribution):
        return trial.suggest_categorical(key, one.choices)
    if isinstance(one, IntDistribution):
        return trial.suggest_int(key, one.low, one.high, log=one.log)
    assert isinstance(one, FloatDistribution)
    return trial.suggest_float(key, one.low, one.high, log=one.log)


def finished(study: Study, trials: int | None = None) -> list[FrozenTrial]:
    """Trials that have an answer (also that they diverged), in their order; of so many first places, if not of all."""
    found = study.get_trials(states=_FINISHED)
    return [one for one in found if trials is None or ordinal(study, one.number) < trials]


def run(
    study: Study, objective: Objective, trials: int, *, timeout: float | None = None,
    done: Callable[[], None] = lambda: None, pause: float = 5.0,
) -> None:  # fmt: skip
    """Work on a study until it has ``trials`` finished ones, or seconds are up; several workers may do so at once.

    Raises
    ------
    StudyError
        If the storage fails.
    """
    started, waiting = time.monotonic(), False
    while timeout is None or time.monotonic() - started < timeout:
        with answering("of the study"):
            recover(study)
            known = study.get_trials(deepcopy=False)
        if sum(trial.state in _FINISHED for trial in known) >= trials:
            return
        if sum(trial.state in (*_FINISHED, TrialState.RUNNING) for trial in known) >= trials:
            if not waiting:
                print("the last trials are with other workers; waiting for them", file=sys.stderr)
            waiting = True
            time.sleep(pause)
            continue
        with answering("of the study"):
            _one(study, objective)
        done()


def _one(study: Study, objective: Objective) -> None:
    failed = {trial.number for trial in study.get_trials(deepcopy=False, states=(TrialState.FAIL,))}
    try:
        study.optimize(objective, n_trials=1, catch=(_SurplusError,))
    except BaseException as error:
        # Ctrl-C, a full disk, a mistake in the settings: whatever it was, the trial is owed.
        trials = study.get_trials()
        retried = {trial.user_attrs.get(RETRY_OF) for trial in trials}
        mine = [
            trial for trial in trials
            if trial.state is TrialState.FAIL and trial.number not in failed and trial.user_attrs.get(WORKER) == _me()
        ]  # fmt: skip
        if isinstance(error, ValueError | UpdateFinishedTrialError) and any(one.number in retried for one in mine):
            return  # we were held up for so long that another worker took it over
        for trial in mine:
            if _SURPLUS not in trial.user_attrs and trial.number not in retried:
                retry(study, trial, died=False)
        raise


def best(trials: Sequence[FrozenTrial]) -> FrozenTrial | None:
    """Choose: the cheapest feasible trial within one standard error of the least distance (Breiman et al. 1984).

    None if no trial keeps utility inside its margins.
    """
    feasible = [t for t in trials if t.state is TrialState.COMPLETE and all(v <= 0 for v in t.constraints.values())]
    if not feasible:
        return None
    nearest = min(feasible, key=lambda trial: (trial.values[0], trial.number))
    limit = nearest.values[0] + float(nearest.user_attrs.get("standard_error") or 0.0)
    return min((t for t in feasible if t.values[0] <= limit), key=lambda t: (t.values[1], t.values[0], t.number))
