"""A study in pictures: one HTML page that needs no network, the same bytes for the same trials."""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import (
    plot_optimization_history,
    plot_parallel_coordinate,
    plot_param_importances,
    plot_pareto_front,
    plot_slice,
)
from plotly.graph_objects import Figure

from scforget.sweeps import studies
from scforget.sweeps.studies import OBJECTIVES

_NEED = 2  # trials before there is anything to draw


def _drawings(study: Study) -> dict[str, Callable[[], Figure]]:
    found: dict[str, Callable[[], Figure]] = {
        "Pareto front: distance to the retrained models against cost": partial(plot_pareto_front, study)
    }
    for place, name in enumerate(OBJECTIVES):
        wanted: dict[str, Any] = {"target": partial(_value, place), "target_name": name}
        found |= {
            f"History of {name}": partial(plot_optimization_history, study, **wanted),
            f"Settings and {name}": partial(plot_slice, study, **wanted),
            f"All settings together, {name}": partial(plot_parallel_coordinate, study, **wanted),
            f"Importance for {name}": partial(plot_param_importances, study, **wanted),
        }
    return found


def _value(place: int, trial: FrozenTrial) -> float:
    return float(trial.values[place])


def _bare(study: Study, trials: int | None) -> Study:
    """Copy finished trials, numbered by their places: plots show what else trials hold, and that differs every time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        bare = optuna.create_study(directions=study.directions)
        bare.set_metric_names(list(OBJECTIVES))
    bare.add_trials([
        optuna.create_trial(
            state=trial.state, values=trial.values, params=trial.params, distributions=trial.distributions,
            constraints=trial.constraints,
        )
        for trial in studies.finished(study, trials)
    ])  # fmt: skip
    return bare


def page(study: Study, title: str, trials: int | None = None) -> str:
    """Draw history, importance, parallel coordinates and slices of both objectives, and the Pareto front.

    A plot that a study has not enough trials for is a line that says so. Of a study that has gone on, the first
    ``trials`` can be drawn alone.
    """
    shown = html.escape(title)
    parts = [f"<!doctype html><meta charset='utf-8'><title>{shown}</title>"]
    parts.append("<style>body{font-family:sans-serif;margin:2em;max-width:75em}h2{margin-top:2em}</style>")
    parts.append(f"<h1>{shown}</h1>")
    bare, script = _bare(study, trials), True
    complete = len(bare.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)))
    for number, (heading, draw) in enumerate(_drawings(bare).items()):
        parts.append(f"<h2>{html.escape(heading)}</h2>")
        try:
            if complete < _NEED:
                raise ValueError(f"{complete} finished trials")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                figure = draw()
        except (ValueError, RuntimeError) as error:  # all trials alike, say
            parts.append(f"<p>Nothing to draw yet: {html.escape(str(error))}.</p>")
            continue
        figure.update_layout(title=None, template="plotly_white")
        parts.append(figure.to_html(full_html=False, include_plotlyjs=script, div_id=f"plot{number}"))
        script = False
    return "\n".join(parts) + "\n"
