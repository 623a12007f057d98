"""The command behind ``scforget sweep``: choose a method's settings on one request, judge them on another."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from pydantic import ValidationError

from scforget import artifacts, config, engine, parallel, populations, search
from scforget.context import Context, open_sweep
from scforget.errors import ConfigError, DataError
from scforget.methods import METHODS
from scforget.progress import Progress
from scforget.results import Record
from scforget.search import Choice, Range
from scforget.settings import Settings
from scforget.sweeps import plots, storages, studies
from scforget.sweeps.requests import Arena, Request, Scored, disjoint, evaluate

#: Digits of a drawn number that count; more would be noise in params.yaml.
DIGITS = 4
_SHOWN = ("distance", "standard_error", "scores", "membership", "cost", "elbo_loss", "marker_r_loss")


def rounded(value: Any) -> Any:
    """Return a drawn value as it is used and written."""
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) else value


def _lookup(settings: Settings, key: str) -> Any:
    value: Any = settings
    for part in key.split("."):
        value = getattr(value, part)
    return value


def space_of(params_path: Path, method: str, base: Settings, overrides: Mapping[str, Any]) -> dict[str, Range | Choice]:
    """What a sweep may change of a method; every end of every range is tried against the method's own checks.

    Raises
    ------
    ConfigError
        If the method has no range, an override names no setting of it, or a range goes beyond what the setting allows.
    """
    space = search.overridden(search.space(METHODS[method].settings), overrides)
    if not space:
        why = "no setting of it has a search range; give one, e.g. {learning_rate: {low: 1e-5, high: 1e-3, log: true}}"
        raise ConfigError(params_path, f"sweep.ranges.{method}", why)
    for key, one in space.items():
        for value in one.values if isinstance(one, Choice) else (one.low, one.high):
            try:
                search.fill(base, {key: value})
            except ValidationError as error:
                first = error.errors()[0]
                why = f"{value!r} does not do: {first['msg'].removeprefix('Value error, ')}"
                raise ConfigError(params_path, f"sweep.ranges.{method}.{key}", why) from error
    return space


@dataclass(frozen=True)
class Judge:
    """Judges settings by the models they make; one job is one model."""

    request: Request
    context: Context
    base: Settings
    originals: list[int]

    def models(self, values: Mapping[str, Any], *stream: object) -> list[Scored] | str:
        """Unlearn from each original; diverged is why, in words."""
        key = f"unlearn.{self.context.item.keys[2]}"
        try:
            settings = search.fill(self.base, values)
        except ValidationError as error:  # each end of each range does, but not all ends together
            raise ConfigError("params.yaml", key, str(error.errors()[0]["msg"])) from error

        def make(original: int) -> Scored | str:
            return self.request.unlearned(settings, original, self.context.seed(*stream, original))

        found = parallel.each(make, self.originals, lambda: None)
        scored = [one for one in found if isinstance(one, Scored)]
        return scored if len(scored) == len(found) else next(one for one in found if isinstance(one, str))

    def __call__(self, drawn: dict[str, Any], place: int) -> Record | str:
        """Judge one trial."""
        values = {key: rounded(value) for key, value in drawn.items()}
        models = self.models(values, "trial", place)
        return models if isinstance(models, str) else {**evaluate(self.request, models), "settings": values}


def table(study: Study, chosen: FrozenTrial | None, trials: int | None = None) -> pd.DataFrame:
    """One row for each finished trial, numbered by its place; what is in it depends on nothing but the seeds."""
    rows = []
    for trial in studies.finished(study, trials):
        found = trial.user_attrs
        settings = found.get("settings") or {key: rounded(value) for key, value in trial.params.items()}
        rows.append({
            "trial": studies.ordinal(study, trial.number),
            "state": "complete" if trial.state is TrialState.COMPLETE else "diverged",
            "feasible": trial.state is TrialState.COMPLETE and all(v <= 0 for v in trial.constraints.values()),
            "default": bool(found.get("default", False)),
            "chosen": chosen is not None and trial.number == chosen.number,
            **{key: found.get(key, np.nan) for key in _SHOWN},
            **settings,
        })  # fmt: skip
    return pd.DataFrame(rows).sort_values("trial")


def _shown(found: Mapping[str, Any]) -> Record:
    return {key: float(f"{found[key]:.6g}") if found.get(key) is not None else None for key in _SHOWN}


class Sweep:
    """One method's study on a development request, and its judgement on the final one.

    Parameters
    ----------
    context
        Of the item: data set, scenario, method.
    """

    def __init__(self, context: Context) -> None:
        self.context = context
        dataset, scenario, method = context.item.keys
        params, path = context.params, context.workspace.params
        self.arena = Arena(context, method)
        self.space = space_of(path, method, self.arena.base, params.sweep.ranges.get(method, {}))
        self.development = params.sweep.development.get(scenario)
        if self.development is None:
            why = f"names no request to choose settings on for {scenario}; add one of kind sibling, or another kind's"
            raise ConfigError(path, "sweep.development", why)
        known = params.datasets[dataset].scenarios
        for name in (scenario, self.development):
            if name not in known:
                raise ConfigError(path, f"datasets.{dataset}.scenarios", f"lacks {name}; it has {', '.join(known)}")
        originals = self.arena.originals
        self.chosen_on, self.judged_on = originals[: params.sweep.seeds], originals[params.sweep.seeds :]
        if len(self.judged_on) < 2:
            found = f"{len(originals)} originals, of which sweep.seeds takes {len(self.chosen_on)}"
            raise DataError(f"originals of {dataset}", found, "2 or more left for the final audit (train.seeds)")

    @property
    def name(self) -> str:
        """Of the study: other code, data or settings make another."""
        return "/".join([*self.context.item.keys, self.context.inputs.study_fingerprint(str(engine.current()))[:12]])

    @property
    def default(self) -> dict[str, Any]:
        """What params.yaml has of the searched settings."""
        return {key: _lookup(self.arena.base, key) for key in self.space}

    def search(self, study: Study, trials: int, timeout: float | None) -> None:
        """Make trials until there are enough."""
        judge = Judge(Request(self.arena, str(self.development), "development"), self.context, self.arena.base,
                      self.chosen_on)  # fmt: skip
        disjoint(judge.request, self.final)
        objective = studies.Objective(self.space, judge, trials)
        left = trials - len(studies.finished(study))
        with Progress(f"{self.context.item.name} ({self.name})", max(left, 0), "trials") as progress:
            studies.run(study, objective, trials, timeout=timeout, done=progress.advance)

    @cached_property
    def final(self) -> Request:
        """The request that settings are judged on."""
        return Request(self.arena, self.context.item.keys[1], "final")

    def _judged(self, values: Mapping[str, Any], originals: list[Scored]) -> Record:
        judge = Judge(self.final, self.context, self.arena.base, self.judged_on)
        models = judge.models(values, "final")
        if isinstance(models, str):
            return {"diverged": models}
        return {**_shown(evaluate(self.final, models)), **self.final.verdict(models, originals)}

    def record(self, study: Study, chosen: FrozenTrial | None, trials: int) -> Record:
        """What the study came to: default and tuned settings, on the development and on the final request."""
        originals = self.final.originals(self.judged_on)
        doing_nothing = evaluate(self.final, originals)
        finished = studies.finished(study, trials)
        default = next((trial for trial in finished if trial.user_attrs.get("default", False)), None)
        found: Record = {
            "study": {
                "name": self.name, "fingerprint": self.context.inputs.study_fingerprint(str(engine.current())),
                **dict(zip(("dataset", "scenario", "method"), self.context.item.keys, strict=True)),
                "development": self.development, "trials": len(finished),
                "diverged": sum(trial.state is TrialState.PRUNED for trial in finished),
                "chosen_on": self.chosen_on, "judged_on": self.judged_on,
            },
            "ranges": {key: _range(one) for key, one in self.space.items()},
            "original": _shown(doing_nothing) | {"cost": 0.0},
            "retrain": {"distance": float(f"{self.final.floor().total.mean():.6g}")},
            "default": {"settings": self.default, "final": self._judged(self.default, originals)},
        }  # fmt: skip
        if default is not None and default.state is TrialState.COMPLETE:
            found["default"]["development"] = _shown(default.user_attrs)
        if chosen is not None:
            settings = chosen.user_attrs["settings"]
            same = settings == {key: rounded(value) for key, value in self.default.items()}
            found["tuned"] = {
                "trial": studies.ordinal(study, chosen.number), "settings": settings,
                "development": _shown(chosen.user_attrs),
                "final": found["default"]["final"] if same else self._judged(settings, originals),
            }  # fmt: skip
        for row in (found["default"], found.get("tuned", {})):
            if "development" in row and "distance" in row["final"]:
                row["optimism"] = float(f"{row['final']['distance'] - row['development']['distance']:.6g}")
        return found

    def write(self, study: Study, folder: Path, trials: int) -> None:
        """Write trials, the choice, the pictures and the seconds; of a longer study, its first trials alone."""
        finished = studies.finished(study, trials)
        chosen = studies.best(finished)
        artifacts.write_table(folder / "trials.csv", table(study, chosen, trials))
        artifacts.write_bytes(folder / "study.html", plots.page(study, self.name, trials).encode())
        seconds = sum(
            (trial.datetime_complete - trial.datetime_start).total_seconds()
            for trial in finished if trial.datetime_complete and trial.datetime_start
        )  # fmt: skip
        artifacts.write_json(folder / "cost.json", {"seconds": seconds, "machine": populations.machine()})
        artifacts.write_bytes(folder / "best.yaml", config.dump_yaml(self.record(study, chosen, trials)).encode())


def _range(one: Range | Choice) -> Record:
    if isinstance(one, Choice):
        return {"values": list(one.values)}
    return {"low": one.low, "high": one.high, "log": one.log}


def sweep(
    method: str, dataset: str | None, scenario: str, *, trials: int | None, timeout: float | None, storage: str | None
) -> Path:
    """Search a method's settings, and write what was found.

    Parameters
    ----------
    method, dataset, scenario
        Of params.yaml; no data set means its only one.
    trials
        Of the whole study, over all its sittings and workers. With a number of one's own the results go to
        ``studies/DATASET/SCENARIO/METHOD``, beside the pipeline's; None is the pipeline's own.
    timeout : seconds
        No trial is begun after that.
    storage
        A journal file or a database; None is ``studies/studies.journal``.

    Returns
    -------
    Path
        The folder with ``trials.csv``, ``best.yaml``, ``study.html`` and ``cost.json``.
    """
    context = open_sweep(method, dataset, scenario)
    mine = Sweep(context)
    wanted = context.params.sweep.trials if trials is None else trials
    folder = context.results if trials is None else context.workspace.studies(*context.item.keys)
    where = storages.address(context.workspace.root, storage)
    first = mine.default if all(value in mine.space[key] for key, value in mine.default.items()) else None
    study = studies.open_study(storages.open_storage(where), mine.name, first)
    study.sampler = studies.SeededSampler(context.seed("study"), context.params.sweep.startup_trials)
    try:
        mine.search(study, wanted, timeout)
    except KeyboardInterrupt:
        done = len(studies.finished(study))
        print(f"\n{done} of {wanted} trials are kept; the same command goes on", file=sys.stderr)
        raise
    if done := len(studies.finished(study, wanted)):
        mine.write(study, folder, wanted)
        context.track(study=folder)
        _say(folder, done, wanted)
    return folder


def _say(folder: Path, done: int, wanted: int) -> None:
    record = config.read_yaml(folder / "best.yaml")
    more = "" if done >= wanted else f" ({done} of {wanted}: the same command goes on)"
    if "tuned" not in record:
        why = "no trial kept utility inside its margins (docs/sweeps.md)"
        print(f"sweep: {done} trials{more}; nothing to promote: {why}; {os.path.relpath(folder)}", file=sys.stderr)
        return
    rows = {name: record[name]["final"] for name in ("default", "tuned")}
    text = ", ".join(f"{name} {row.get('distance', 'diverged')}" for name, row in rows.items())
    print(f"sweep: {done} trials{more}; final distance: {text}; {os.path.relpath(folder)}", file=sys.stderr)
