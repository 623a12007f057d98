"""More of the paper's pictures: privacy against utility, single models, forget types, latent spaces and traces."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from scforget.arrays import FloatArray
from scforget.audit.intervals import mean_interval
from scforget.errors import DataError, EmptyGroupError
from scforget.exhibits.paper import advantage_of, bands, legend, mark
from scforget.report.comparisons import _names_beside
from scforget.report.figures import BAND, DASHES, INK, SERIES, SOFT, new_figure, styled
from scforget.report.tables import PRIMARY_GROUP, Audit, Audits, bounds, dig, look, margin, number, ordered, value

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Primary = Literal["membership", "trace"]
_WORDS = {"membership": "AUC", "trace": "trace (standard deviations of the retrains)"}
_LEVEL = 0.95


def per_model(audit: Audit | None, key: Primary) -> FloatArray:
    """One primary statistic of each model, ``[M]``; empty where it is not known.

    A retrain's trace is measured against the others, as the audit does.
    """
    path = ("trace_per_seed",) if key == "trace" else ("attacks", "elbo", PRIMARY_GROUP, "per_seed")
    return np.asarray(dig(audit, *path) or [], dtype=np.float64)


def _far_scale(axes: Axes, wide: float, reach: float) -> None:
    """Make the x axis linear within thrice a width and logarithmic beyond, where something is very far off."""
    if not wide > 0 or reach <= 30 * wide:
        return
    axes.set_xscale("symlog", linthresh=3 * wide)
    powers = 10.0 ** np.arange(np.ceil(np.log10(3 * wide)), np.floor(np.log10(reach)) + 1)
    axes.set_xticks([*-powers[::-1], 0, *powers])
    axes.xaxis.set_major_formatter("{x:g}")


def _utility_panel(axes: Axes, audits: Audits, metric: str, *, attack: str, group: str) -> list[Any]:
    """Draw advantage against a metric's difference from the retrains' mean; symmetric-log axis where one is far off."""
    shown = bands(axes, audits, "advantage", attack, group, upright=False)
    retrain = dig(audits.get("retrain"), "utility", "outside")
    centre = float(np.nan_to_num(value(retrain, metric)))
    target = np.array(bounds(retrain, metric, "interval")) - centre
    if np.isfinite(target).all():
        axes.axvspan(*target, color=BAND, linewidth=0, zorder=0)
    points: dict[str, tuple[float, float]] = {}
    for method in ordered(audits):
        advantage, reading = advantage_of(audits[method], attack, group), dig(audits[method], "utility", "outside")
        x, ends = value(reading, metric) - centre, np.array(bounds(reading, metric, "interval")) - centre
        if np.isfinite([x, advantage.centre]).all():
            points[method] = (x, advantage.centre)
            reach = np.nan_to_num(np.abs(ends - x))[:, None]
            mark(axes, *points[method], dig(audits[method], "verdict"), xerr=reach, yerr=advantage.reach, alpha=0.75)
    _far_scale(axes, float(np.nan_to_num(target[1])), max((abs(x) for x, _ in points.values()), default=0))
    axes.set(ylim=(0, None), ylabel="advantage 2·|AUC − ½|")
    _names_beside(axes, points, {method: method for method in points})
    return shown


@styled
def advantage_against_utility(
    audits: Audits, *, attack: str = "elbo", group: str = PRIMARY_GROUP, title: str = ""
) -> Figure:  # fmt: skip
    """Draw advantage against held-out ELBO and against marker correlation, with 95 % intervals both ways (P0, Fig. 2).

    Utility is that of unseen cells outside the forgotten group, its interval over models. The target is where the
    retrains' two bands cross, not the bottom.
    """
    figure = new_figure(7.2, 4.4 + 0.22 * len(audits), title)
    upper, lower = figure.subplots(2, 1)
    shown = _utility_panel(upper, audits, "elbo", attack=attack, group=group)
    _utility_panel(lower, audits, "marker_r", attack=attack, group=group)
    upper.set_xlabel("held-out ELBO minus the retrains' (nats per cell)  better →")
    lower.set_xlabel("marker-gene correlation r minus the retrains'  better →")
    legend(figure, audits, shown)
    return figure


def _target_band(axes: Axes, audits: Audits, key: Primary) -> None:
    """Shade the margin around the retrains' mean; symmetric-log axis when a model is very far off."""
    wide, retrains = margin(audits, key), per_model(audits.get("retrain"), key)
    if not retrains.size:
        return
    centre = float(retrains.mean())
    axes.axvspan(centre - wide, centre + wide, color=BAND, linewidth=0, zorder=0)
    axes.axvline(centre, color=INK, linewidth=1, linestyle=DASHES[1], zorder=1)
    reach = max(float(np.abs(found - centre).max(initial=0)) for found in (per_model(a, key) for a in audits.values()))
    _far_scale(axes, wide, reach)


def _box(axes: Axes, models: FloatArray, row: int, audit: Audit) -> None:
    """Draw a box, each model as a dot (spread by rank, so that equal ones are seen) and the mean with its interval."""
    seen = look(dig(audit, "verdict"))
    line = {"color": seen.colour, "linewidth": 0.9}
    axes.boxplot(models, positions=[row], widths=0.62, orientation="horizontal", showfliers=False, manage_ticks=False,
                 boxprops=line, whiskerprops=line, capprops=line, medianprops=line)  # fmt: skip
    heights = row + 0.22 * (np.argsort(np.argsort(models, kind="stable")) % 3 - 1)
    axes.plot(models, heights, ".", color=seen.colour, markersize=4, alpha=0.6)
    low, high = mean_interval(models, _LEVEL)
    mean = float(models.mean())
    mark(axes, mean, row, dig(audit, "verdict"), xerr=np.nan_to_num(np.array([[mean - low], [high - mean]])))


@styled
def seed_boxes(audits: Audits, key: Primary = "membership", *, title: str = "") -> Figure:
    """Draw a primary statistic of every single model: boxes, dots, and the mean with its 95 % interval over models.

    The band is the retrains' mean ± the margin: where one model has to lie to count in the guide's success rate.
    """
    figure = new_figure(7.2, 1.6 + 0.32 * len(audits), title)
    axes = figure.subplots()
    _target_band(axes, audits, key)
    for row, method in enumerate(ordered(audits)):
        if (models := per_model(audits[method], key)).size:
            _box(axes, models, row, audits[method])
        else:
            axes.annotate("not measured", (0.02, row), xycoords=axes.get_yaxis_transform(), va="center", color=SOFT)
    axes.set(ylim=(len(audits) - 0.4, -0.6), xlabel=f"{_WORDS[key]}, one dot a model")
    axes.set_yticks(range(len(audits)), ordered(audits))
    legend(figure, audits)
    return figure


@styled
def by_forget_type(places: Mapping[str, Audits], key: Primary = "trace", *, title: str = "") -> Figure:
    """Draw how far each method is from the retrains, a column for each scenario, 90 % intervals, margins shaded.

    Parameters
    ----------
    places
        Scenario -> method -> audit; methods stand in the order of their first scenario.

    Raises
    ------
    EmptyGroupError
        Without a scenario.
    """
    if not places:
        raise EmptyGroupError("scenarios of a picture", 0, "at least one")
    methods = list(dict.fromkeys(m for audits in places.values() for m in ordered(audits) if m != "retrain"))
    figure = new_figure(1.8 + max(5.4, 2.5 * len(places)), 1.7 + 0.3 * len(methods), title)
    panels = figure.subplots(1, len(places), sharex=True, sharey=True, squeeze=False)[0]
    reach, widest = 0.0, max(margin(audits, key) for audits in places.values())
    for axes, (place, audits) in zip(panels, places.items(), strict=True):
        wide = margin(audits, key)
        axes.axvspan(-wide, wide, color=BAND, linewidth=0)
        axes.axvline(0, color=INK, linewidth=0.7)
        for row, method in enumerate(methods):
            found = dig(audits.get(method), "primary", key)
            centre, (low, high) = value(found, "difference"), bounds(found, "interval")
            if np.isfinite(centre):
                error = np.nan_to_num(np.array([[centre - low], [high - centre]]))
                mark(axes, centre, row, dig(audits[method], "verdict"), xerr=error)
                reach = max(reach, abs(centre))
            else:
                axes.annotate("not measured", (0, row), ha="center", va="center", color=SOFT, fontsize=7.5)
        axes.set(ylim=(len(methods) - 0.4, -0.6), xlabel=f"{key} minus the retrains'")
        axes.set_title(f"{place}\nmargin ±{number(wide, 2)}", fontsize=8.5)
    _far_scale(panels[0], widest, reach)
    panels[0].set_yticks(range(len(methods)), methods)
    legend(figure, {f"{p}/{m}": a for p, audits in places.items() for m, a in audits.items() if m != "retrain"})
    return figure


@styled
def latent_maps(
    coordinates: Mapping[str, npt.ArrayLike], labels: npt.ArrayLike, forget: npt.ArrayLike, title: str = ""
) -> Figure:
    """Draw the latent spaces of several models side by side: the original, methods, a retrain.

    Parameters
    ----------
    coordinates
        Name of a panel -> ``[N, 2]``, such as a UMAP of its latent means. Each has axes of its own: nothing says that
        two models' maps are turned alike, so that only what lies beside what can be compared.
    labels, forget : ``[N]``, ``[N]`` bool
        The group of each cell, and which cells are forget cells.

    Raises
    ------
    DataError
        If a map has other than one place for each cell, or there is none.
    """
    group, chosen = np.asarray(labels).astype(str), np.asarray(forget, dtype=bool)
    maps = {name: np.asarray(at, dtype=np.float64) for name, at in coordinates.items()}
    if not maps or any(at.shape != (len(group), 2) for at in maps.values()) or len(chosen) != len(group):
        raise DataError("latent maps", {name: at.shape for name, at in maps.items()}, f"[{len(group)}, 2] each")
    columns = min(len(maps), 4)
    rows = -(-len(maps) // columns)
    figure = new_figure(0.4 + 2.5 * columns, 1.2 + 2.5 * rows, title)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    size = float(np.clip(2500 / max(len(group), 1), 1, 9))
    for axes, (name, at) in zip(panels, maps.items(), strict=False):
        for i, label in enumerate(np.unique(group)):
            cells = at[(group == label) & ~chosen]
            # seven colours and six shapes: no two of up to 42 groups are drawn alike
            axes.scatter(*cells.T, s=size, color=SERIES[i % 7], marker="osDv<>"[i // 7 % 6], alpha=0.45, linewidths=0,
                         rasterized=True, label=label)  # fmt: skip
        axes.scatter(*at[chosen].T, s=18, c="white", marker="^", edgecolors=INK, linewidths=0.8, zorder=5,
                     label="forget cells")  # fmt: skip
        axes.set(xticks=[], yticks=[], title=name, box_aspect=1)
    for axes in panels[len(maps) :]:
        axes.set_visible(False)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=4, markerscale=1.5, fontsize=7)
    return figure


def _traces(axes: Axes, history: pd.DataFrame, column: str, at_chance: float, words: str) -> None:
    """Draw a column over epochs, a thin line for each model, a thick one for their mean with its 95 % interval."""
    axes.axhline(at_chance, color=SOFT, linewidth=1, linestyle=DASHES[2])
    for _, run in history.groupby("seed", sort=True):
        axes.plot(run["epoch"], run[column], color=SERIES[1], linewidth=0.7, alpha=0.45)
    epochs = np.unique(history["epoch"].to_numpy())
    rows = [history.loc[history["epoch"] == epoch, column].to_numpy() for epoch in epochs]
    ends = np.array([mean_interval(models, _LEVEL) for models in rows])
    axes.fill_between(epochs, *ends.T, color=SERIES[1], alpha=0.25, linewidth=0)
    axes.plot(epochs, [models.mean() for models in rows], color=SERIES[1], linewidth=1.8)
    axes.set(xlabel="epoch", ylabel=words)


@styled
def extragradient_traces(
    history: pd.DataFrame, audits: Audits, *, method: str = "extragradient", title: str = ""
) -> Figure:  # fmt: skip
    """Draw the critics over the game, and each model's AUC when it is over.

    Parameters
    ----------
    history
        Columns ``seed``, ``epoch``, ``payoff`` (minus the critics' cross-entropy, nats) and ``ema_auc`` (of the
        averaged critics); the dotted lines are where critics that guess would be.
    audits
        method -> audit. Right: each model's AUC of the ELBO attack with DeLong's 95 % interval over cells, beside the
        retrains' mean ± the margin. It is this, not the critics' defeat, that says whether cells are forgotten.

    Raises
    ------
    DataError
        If there is no history or a column lacks.
    """
    needed = {"seed", "epoch", "payoff", "ema_auc"}
    if history.empty or not needed <= set(history.columns):
        found = f"{len(history)} rows of {list(history.columns)}"
        raise DataError("history of the game", found, f"rows with {sorted(needed)}")
    figure = new_figure(9.6, 3.1, title)
    left, middle, right = figure.subplots(1, 3)
    _traces(left, history, "payoff", -float(np.log(2)), "pay-off (nats)")
    _traces(middle, history, "ema_auc", 0.5, "averaged critics' AUC")
    models = per_model(audits.get(method), "membership")
    ends = np.array(dig(audits.get(method), "attacks", "elbo", PRIMARY_GROUP, "per_seed_intervals") or [])
    retrains, wide = per_model(audits.get("retrain"), "membership"), margin(audits, "membership")
    if retrains.size:
        right.axhspan(retrains.mean() - wide, retrains.mean() + wide, color=BAND, linewidth=0)
        right.axhline(float(retrains.mean()), color=INK, linewidth=1, linestyle=DASHES[1])
        right.set_title("shaded: retrains ± margin", fontsize=8)
    for i, auc in enumerate(models):
        error = np.abs(ends[i] - auc)[:, None] if len(ends) == len(models) else None
        mark(right, i, auc, dig(audits[method], "verdict"), yerr=error)
    right.axhline(0.5, color=SOFT, linewidth=1, linestyle=DASHES[2])
    right.set(xlabel="model", ylabel="ELBO attack's AUC", xticks=range(len(models)))
    right.set_xticklabels(map(str, dig(audits.get(method), "seeds") or range(len(models))))
    return figure
