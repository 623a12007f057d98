"""Figures of the ablations: size of the forget set, strength of a method, what an attacker learns from, and curves.

Every point has its interval; what a colour says, a marker or a dash says as well.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scforget.errors import EmptyGroupError
from scforget.report.figures import BAND, DASHES, INK, PALE, SERIES, SOFT, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
FloatArray = npt.NDArray[np.float64]

MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<")
#: Beside each axis: of differences from the retrained models, and of values as they are.
DIFFERENCES = {
    "membership": "AUC beyond retrained", "trace": "trace beyond retrained",
    "elbo": "held-out ELBO\nbeyond retrained (nats)",
}  # fmt: skip
VALUES = {
    "membership": "AUC", "trace": "trace", "distance": "distance to the retrained models",
    "elbo": "held-out ELBO (nats per cell)",
}  # fmt: skip
KINDS = {"cluster_subset": "cells of one cluster", "scattered": "scattered cells"}
FEATURES = {
    "encoder": "μ, log σ²", "encoder_and_sums": "all of the encoder", "decoder": "reconstruction",
    "scalars": "sums and norms", "all": "all",
}  # fmt: skip


def _need(what: str, rows: Sequence[object]) -> None:
    if not rows:
        raise EmptyGroupError(what, "no row with a model", "at least one")


def _ends(found: Record, value: str, interval: str) -> tuple[float, FloatArray]:
    """A value, and how far the ends of its interval lie below and above it, ``[2, 1]``; 0 where there is none."""
    centre = float(found[value])
    ends = [centre if end is None else float(end) for end in found[interval]]
    return centre, np.array([[centre - ends[0]], [ends[1] - centre]])


def _points(axes: Axes, x: Sequence[float], found: Sequence[Record], i: int, label: str) -> None:
    """Draw differences from the retrained models with their intervals, one series."""
    values = [_ends(one, "difference", "difference_interval") for one in found]
    axes.errorbar(
        x, [value for value, _ in values], yerr=np.hstack([ends for _, ends in values]), color=SERIES[i % 7],
        marker=MARKERS[i % 9], linestyle=DASHES[i % 4], linewidth=1, markersize=4.5, capsize=2, label=label,
    )  # fmt: skip


def _margin(axes: Axes, margin: float | None) -> None:
    """Shade what does not matter, about 0."""
    if margin is not None:
        axes.axhspan(-margin, margin, facecolor=BAND, edgecolor=SOFT, linestyle=":", linewidth=0.5)
    axes.axhline(0, color=INK, linewidth=0.7)


def _legend(figure: Figure, axes: Axes, columns: int = 4) -> None:
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


@styled
def size_figure(rows: Sequence[Record], margins: Mapping[str, float], title: str = "") -> Figure:
    """Draw difference of AUC and trace from the retrained models against the size of the forget set.

    Parameters
    ----------
    rows
        Of the size ablation: ``kind``, ``size``, ``method``, ``membership`` and ``trace`` with ``difference`` and
        ``difference_interval``.
    margins
        By ``membership`` and ``trace``: what does not matter; shaded.
    title
        Above the picture.

    Raises
    ------
    EmptyGroupError
        If no row has a model.
    """
    rows = [row for row in rows if row["models"]]
    _need("size ablation", rows)
    figure = new_figure(7.2, 5.4, title)
    panels = figure.subplots(2, 2, sharex=True, sharey="row")
    sizes = sorted({row["size"] for row in rows})
    methods = list(dict.fromkeys(row["method"] for row in rows))
    for line, name in zip(panels, ("membership", "trace"), strict=True):
        for axes, (kind, words) in zip(line, KINDS.items(), strict=True):
            _margin(axes, margins.get(name))
            for i, method in enumerate(methods):
                its = [row for row in rows if row["kind"] == kind and row["method"] == method]
                # side by side, so that intervals of one size do not hide each other
                at = [sizes.index(row["size"]) + 0.12 * (i - (len(methods) - 1) / 2) for row in its]
                _points(axes, at, [row[name] for row in its], i, method)
            axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
            if name == "membership":
                axes.set_title(words)
            else:
                axes.set_xlabel("forgotten cells")
        line[0].set_ylabel(DIFFERENCES[name])
    _legend(figure, panels[0, 0])
    return figure


def _split(values: Record) -> tuple[Any, str]:
    """The value of the last key, and the others as a series' name."""
    *others, last = values.items()
    return last[1], ", ".join(
        f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in others
    )


@styled
def sensitivity_figure(
    grids: Mapping[str, Sequence[Record]], originals: Record, margins: Mapping[str, float], title: str = ""
) -> Figure:
    """Draw trace and held-out ELBO, as differences from the retrained models, against a setting, grid by grid.

    Parameters
    ----------
    grids
        By name, rows of a sensitivity analysis: the last of ``values`` is the horizontal axis, others make series.
    originals
        Record of the originals: what doing nothing comes to.
    margins
        By ``trace`` and ``elbo``; shaded.
    title
        Above the picture.

    Raises
    ------
    EmptyGroupError
        If no row of a grid has a model.
    """
    figure = new_figure(max(3.4, 2.4 * len(grids)), 4.8, title)
    panels = figure.subplots(2, len(grids), sharey="row", squeeze=False)
    for column, (heading, every) in enumerate(grids.items()):
        rows = [row for row in every if row["models"]]
        _need(f"sensitivity to {heading}", rows)
        ticks = sorted({_split(row["values"])[0] for row in rows})
        series = list(dict.fromkeys(_split(row["values"])[1] for row in rows))
        for axes, name in zip(panels[:, column], ("trace", "elbo"), strict=True):
            _margin(axes, margins.get(name))
            start = originals[name]["difference"]
            axes.axhline(start, color=SOFT, linestyle=DASHES[2], linewidth=1.2, label="original")
            for i, words in enumerate(series):
                its = [row for row in rows if _split(row["values"])[1] == words]
                at = [ticks.index(_split(row["values"])[0]) + 0.12 * (i - (len(series) - 1) / 2) for row in its]
                _points(axes, at, [row[name] for row in its], i, words or heading)
            axes.set_yscale("symlog", linthresh=10)
            axes.yaxis.set_major_formatter("{x:g}")
            axes.set_xticks(range(len(ticks)), [f"{tick:g}" for tick in ticks])
        panels[0, column].set_title(heading, fontsize=8)
        panels[1, column].set_xlabel(list(rows[0]["values"])[-1])
        panels[0, column].legend(fontsize=6)
    for axes, name in zip(panels[:, 0], ("trace", "elbo"), strict=True):
        axes.set_ylabel(DIFFERENCES[name])
    return figure


@styled
def feature_figure(tables: Mapping[str, Sequence[Record]], title: str = "") -> Figure:
    """Draw the learned attack's AUC by what it sees, for originals and retrained models; a panel for each request.

    Parameters
    ----------
    tables
        By request, rows of the feature ablation.
    title
        Above the picture.

    Raises
    ------
    EmptyGroupError
        If there is no request, or one without rows.
    """
    _need("feature ablation", list(tables))
    figure = new_figure(max(4.0, 3.6 * len(tables)), 3.2, title)
    panels = figure.subplots(1, len(tables), sharey=True, squeeze=False)[0]
    for axes, (request, rows) in zip(panels, tables.items(), strict=True):
        _need(f"feature ablation of {request}", rows)
        axes.axhline(0.5, color=SOFT, linewidth=0.7)
        for i, (label, value, interval) in enumerate(
            (("original", "mean", "interval"), ("retrained", "retrain_mean", "retrain_interval"))
        ):
            found = [_ends(row, value, interval) for row in rows]
            axes.errorbar(
                np.arange(len(rows)) + 0.2 * (i - 0.5), [one for one, _ in found],
                yerr=np.hstack([ends for _, ends in found]), color=SERIES[i], marker=MARKERS[i], linestyle="none",
                markersize=5, capsize=2, label=label,
            )  # fmt: skip
        names = [f"{FEATURES.get(row['features'], row['features'])}\n({row['columns']})" for row in rows]
        axes.set_xticks(range(len(rows)), names, fontsize=7, rotation=20)
        axes.set_title(request)
    panels[0].set_ylabel("AUC of the learned attack")
    _legend(figure, panels[0])
    return figure


def _curve(axes: Axes, x: Sequence[float], found: Sequence[Record], i: int, method: str) -> None:
    """Draw the means of one method's runs, a band of their intervals, and a bar at the finished models."""
    values = [_ends(one, "mean", "interval") for one in found]
    y, spread = np.array([value for value, _ in values]), np.hstack([ends for _, ends in values])
    colour = INK if method == "retrain" else SERIES[i % 7]
    axes.fill_between(x, y - spread[0], y + spread[1], color=colour, alpha=0.12, linewidth=0)
    axes.plot(
        x, y, color=colour, linestyle=DASHES[i % 4], linewidth=1.2, marker=MARKERS[i % 9], markersize=5,
        markevery=[len(y) - 1], label=method,
    )  # fmt: skip
    axes.errorbar(x[-1], y[-1], yerr=spread[:, -1:], color=colour, capsize=2)


@styled
def curve_figure(
    rows: Sequence[Record], seconds: Sequence[Record], floor: Record, measure: str = "distance", title: str = ""
) -> Figure:
    """Draw a measure against passes over cells and against seconds: means of runs, bands of their intervals.

    Parameters
    ----------
    rows, seconds
        Of the learning curves, row by row the same places.
    floor
        Record of the measure by any method: ``retrain_mean`` and ``retrain_interval`` of the finished retrained models.
    measure
        ``distance``, ``membership``, ``trace`` or ``elbo``.
    title
        Above the picture.

    Raises
    ------
    EmptyGroupError
        If there is no row.
    """
    _need("learning curves", rows)
    figure = new_figure(7.2, 4.4, title)
    panels = figure.subplots(1, 2, sharey=True)
    low, high = (floor["retrain_mean"] if end is None else end for end in floor["retrain_interval"])
    for axes, unit, source in zip(panels, ("passes", "seconds"), (rows, seconds), strict=True):
        axes.axhspan(low, high, facecolor=PALE, edgecolor=SOFT, linestyle=":", linewidth=0.5)
        axes.axhline(floor["retrain_mean"], color=SOFT, linewidth=0.7)
        for i, method in enumerate(dict.fromkeys(row["method"] for row in rows)):
            places = [j for j, row in enumerate(rows) if row["method"] == method]
            _curve(axes, [source[j][unit]["mean"] for j in places], [rows[j][measure] for j in places], i, method)
        axes.set(xscale="log", xlabel=f"{unit}{' over cells' if unit == 'passes' else ''}")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    if measure == "distance":
        # an interval of a few runs may reach below 0, where no distance is: the axis ends a little below the means
        panels[0].set(yscale="log", ylim=(0.3 * min(row[measure]["mean"] for row in rows), None))
        panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_ylabel(VALUES[measure])
    _legend(figure, panels[0])
    return figure
