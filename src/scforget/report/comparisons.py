"""Pictures that compare methods: how far each is from the retrains, what that cost, which attacks bite.

Built as those of :mod:`scforget.report.figures` are.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scforget.attacks import LEARNED
from scforget.report.figures import BAND, DASHES, INK, SERIES, SOFT, FloatArray, new_figure, roc_points, styled
from scforget.report.tables import (
    PRIMARY_GROUP,
    REFERENCES,
    Audit,
    Audits,
    Look,
    bounds,
    dig,
    look,
    margin,
    number,
    ordered,
    score_of,
    value,
)  # fmt: skip

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def mark(axes: Axes, x: float, y: float, verdict: object, **errors: Any) -> None:
    """Draw a point in the look of a verdict, with error bars as matplotlib wants them."""
    seen = look(verdict)
    style: dict[str, Any] = {"color": seen.colour, "mfc": seen.fill, "marker": seen.marker, "markersize": 7}
    axes.errorbar(x, y, capsize=3, zorder=3, **style, **errors)


def _reach(audit: Audit, key: str) -> FloatArray:
    """Distances from a difference to the ends of its interval, as matplotlib wants them; 0 where there is none."""
    centre, (low, high) = value(audit, "primary", key, "difference"), bounds(audit, "primary", key, "interval")
    return np.nan_to_num(np.abs([[centre - low], [high - centre]]))


def verdict_legend(figure: Figure, audits: Audits) -> None:
    """Say below a picture what the looks of its verdicts mean."""
    from matplotlib.lines import Line2D

    seen = dict.fromkeys(look(dig(audits[method], "verdict")) for method in ordered(audits))
    handles = [Line2D([], [], linestyle="", color=s.colour, mfc=s.fill, marker=s.marker, label=s.words) for s in seen]
    figure.legend(handles=handles, loc="outside lower center", ncols=5)


def _distance_panel(axes: Axes, audits: Audits, key: str, label: str) -> None:
    """Draw one primary statistic, a row for each method; symmetric-log axis when something is very far off."""
    wide, reach = margin(audits, key), 0.0
    axes.axvspan(-wide, wide, color=BAND, linewidth=0)
    axes.axvline(0, color=SOFT, linewidth=0.7)
    for row, method in enumerate(ordered(audits)):
        centre = value(audits[method], "primary", key, "difference")
        if np.isfinite(centre):
            mark(axes, centre, row, dig(audits[method], "verdict"), xerr=_reach(audits[method], key))
            reach = max(reach, abs(centre))
        elif method == "retrain":
            floors = [value(audit, "primary", key, "noise_floor") for audit in audits.values()]
            mark(axes, 0.0, row, "TARGET", xerr=max(np.nan_to_num(floors)))
        else:
            axes.annotate("not measured", (0, row), va="center", ha="center", color=SOFT, fontsize=8)
    if wide and reach > 30 * wide:
        axes.set_xscale("symlog", linthresh=3 * wide)
        axes.xaxis.set_major_formatter("{x:g}")
    right = not value(audits.get("original"), "primary", key, "difference") < 0
    words = "←  over-forgotten    remembered  →" if right else "←  remembered    over-forgotten  →"
    axes.set(xlabel=f"{label}\n{words}", ylim=(len(audits) - 0.4, -0.6))
    axes.set_title(f"{key.capitalize()} (margin ±{number(wide, 2)})", fontweight="bold")


@styled
def distance_to_target(audits: Audits) -> Figure:
    """Draw how far each method is from the retrained models: the two primary statistics with 90 % intervals.

    The shaded band is the margin: an interval inside it is a match. The retrain's own bar is the noise floor.
    """
    figure = new_figure(7.2, 1.5 + 0.36 * len(audits), "")
    panels = figure.subplots(1, 2, sharey=True)
    _distance_panel(panels[0], audits, "membership", "AUC minus the retrains' AUC")
    _distance_panel(panels[1], audits, "trace", "trace minus the retrains' trace")
    panels[0].set_yticks(range(len(audits)), ordered(audits))
    verdict_legend(figure, audits)
    return figure


def _apart(heights: FloatArray, gap: float) -> FloatArray:
    """Move ascending heights in [0, 1] as little as need be, so that neighbours stand at least a gap apart."""
    steps = np.arange(len(heights)) * gap
    up = np.maximum.accumulate(heights - steps) + steps  # each pushed up by those below
    return np.minimum(up, 1 - steps[::-1])  # and the topmost back under the edge


def _names_beside(axes: Axes, points: Mapping[str, tuple[float, float]], names: Mapping[str, str]) -> None:
    """Write names in a column of their own, each as near to the height of its point as the others leave room."""
    if not points:
        return
    ranked = sorted(points, key=lambda method: (points[method][1], method))
    ends = np.column_stack([axes.get_xlim(), axes.get_ylim()])
    scaled = axes.transScale.transform([*ends, *(points[method] for method in ranked)])[:, 1]
    places = _apart((scaled[2:] - scaled[0]) / (scaled[1] - scaled[0]), min(0.058, 1 / len(points)))
    line = {"arrowstyle": "-", "color": SOFT, "linewidth": 0.4, "relpos": (0, 0.5)}
    for method, place in zip(ranked, places, strict=True):
        axes.annotate(names[method], points[method], (1.03, place), textcoords="axes fraction", va="center",
                      fontsize=7.5, arrowprops=line)  # fmt: skip


def _cost_axes(axes: Axes, margin_width: float, costs: list[float], traces: list[float]) -> None:
    """Band, axes and labels of cost against trace; symmetric-log in trace when something is very far off."""
    axes.axhspan(-margin_width, margin_width, color=BAND, linewidth=0)
    axes.axvline(1, color=SOFT, linewidth=0.7, linestyle=DASHES[1])
    axes.set(xlabel="passes ÷ those of a retrain by the same recipe", ylabel="trace minus the retrains' trace")
    if margin_width and max(map(abs, traces), default=0) > 30 * margin_width:
        axes.set_yscale("symlog", linthresh=3 * margin_width)
        axes.yaxis.set_major_formatter("{x:g}")
    if min(costs, default=1) > 0 and max(costs, default=0) > 1.5:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    else:
        axes.set_xlim(0, max(axes.get_xlim()[1], 1.2))


@styled
def cost_against_trace(audits: Audits) -> Figure:
    """Draw the trace that is left (90 % interval) against passes over cells as a fraction of a retrain's."""
    figure = new_figure(7.2, 3.8 + 0.12 * len(audits), "")
    axes = figure.subplots()
    traces = {method: value(audit, "primary", "trace", "difference") for method, audit in audits.items()}
    traces |= {"retrain": 0.0} if "retrain" in audits else {}
    known = sorted((m for m in traces if np.isfinite(traces[m])), key=lambda m: (traces[m], m))
    costs = {method: value(audits[method], "cost", "passes_ratio") for method in known if method != "original"}
    costs = {method: cost for method, cost in costs.items() if np.isfinite(cost)}
    _cost_axes(axes, margin(audits, "trace"), list(costs.values()), [traces[method] for method in known])
    if "original" in known:  # where every method starts; what it cost is not the question
        axes.axhline(traces["original"], color=SOFT, linewidth=0.9, linestyle=DASHES[2])
        place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate("original", (0, traces["original"]), (4, 3), **place)
    for method, cost in costs.items():
        mark(axes, cost, traces[method], dig(audits[method], "verdict"), yerr=_reach(audits[method], "trace"))
    _names_beside(axes, {method: (cost, traces[method]) for method, cost in costs.items()}, {m: m for m in costs})
    verdict_legend(figure, audits)
    return figure


@styled
def frontier(table: pd.DataFrame, margin_width: float) -> Figure:
    """Draw many recipes' trace (90 % interval) against their cost, a panel for each scenario.

    Parameters
    ----------
    table
        Rows with ``scenario``, ``recipe``, ``passes_ratio``, ``trace``, ``trace_lo``, ``trace_hi``, ``elbo``: the
        differences to the retrains. Recipes of one label are joined by a line in the order of their cost. Hollow:
        the held-out ELBO is below the retrains'.
    """
    scenarios = list(dict.fromkeys(table["scenario"]))
    figure = new_figure(9.6, 0.6 + 3.3 * len(scenarios), "")
    panels = figure.subplots(len(scenarios), 1, squeeze=False)[:, 0]
    labels = list(dict.fromkeys(table["recipe"]))
    for axes, scenario in zip(panels, scenarios, strict=True):
        rows = table[table["scenario"] == scenario]
        _cost_axes(axes, margin_width, [0.0], list(rows["trace"]))
        for index, label in enumerate(labels):
            line = rows[rows["recipe"] == label].sort_values("passes_ratio")
            colour, marker = SERIES[index % len(SERIES)], "osD^v<>Ph"[index // len(SERIES) % 9]
            axes.plot(line["passes_ratio"], line["trace"], color=colour, linewidth=0.9, alpha=0.7)
            for row in line.to_dict("records"):
                errors = [[row["trace"] - row["trace_lo"]], [row["trace_hi"] - row["trace"]]]
                filled = colour if row["elbo"] >= 0 else "white"
                axes.errorbar(row["passes_ratio"], row["trace"], yerr=errors, color=colour, marker=marker,
                              mfc=filled, markersize=5, elinewidth=0.7)  # fmt: skip
            axes.plot([], [], color=colour, marker=marker, linewidth=0.9, label=label)
        axes.axvline(0.2, color=SOFT, linewidth=0.7, linestyle=DASHES[2])
        axes.set_title(f"{scenario} (hollow: held-out ELBO below the retrains')", fontweight="bold")
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside right upper", fontsize=7)
    return figure


def _front(points: Mapping[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other one beats in both coordinates, from left to right."""
    best: list[tuple[float, float]] = []
    for x, y in sorted(points.values()):
        if not best or y < best[-1][1]:
            best.append((x, y))
    return best


def _called(method: str, audit: Audit) -> str:
    """A method's name, and what became of the utility unless it was kept."""
    utility = dig(audit, "utility", "verdict")
    return f"{method} (utility {utility})" if utility in ("lost", "undetermined") else method


def _passes_points(audits: Audits, key: str) -> dict[str, tuple[float, float]]:
    """Passes ratio and distance to the retrains, of methods that have both; the retrains are their own target."""
    found = {
        method: (value(audit, "cost", "passes_ratio"), abs(value(audit, "primary", key, "difference")))
        for method, audit in audits.items()
        if method != "original"  # where every method starts; what it cost is not the question
    }
    found |= {"retrain": (1.0, 0.0)} if "retrain" in audits else {}
    return {method: at for method, at in found.items() if np.isfinite(at).all()}


def _margin_scale(axes: Axes, wide: float, furthest: float) -> None:
    """Make the distances linear inside the margin and logarithmic beyond, and shade the margin."""
    axes.axhspan(0, wide, color=BAND, linewidth=0)
    axes.set_yscale("symlog", linthresh=wide)
    axes.set_ylim(-0.05 * wide, 1.5 * max(furthest, wide))
    decades = [wide * step * 10**power for power in range(9) for step in (1, 3)]
    axes.set_yticks([0, *(at for at in decades if at <= 1.5 * furthest)])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("")


def _passes_panel(axes: Axes, audits: Audits, key: str) -> None:
    """Draw one primary statistic's distance to the retrains against passes over cells."""
    points, wide = _passes_points(audits, key), margin(audits, key)
    start = abs(value(audits.get("original"), "primary", key, "difference"))
    if wide:
        _margin_scale(axes, wide, float(np.nanmax([start, 0.0, *(y for _, y in points.values())])))
    if points and min(x for x, _ in points.values()) > 0:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:g}")
    if np.isfinite(start):
        axes.axhline(start, color=SOFT, linewidth=0.9, linestyle=DASHES[2])
        place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate("original", (0, start), (4, 3), **place)
    axes.axvline(1, color=SOFT, linewidth=0.7, linestyle=DASHES[1])
    front = np.array(_front(points)).reshape(-1, 2)
    axes.step(front[:, 0], front[:, 1], where="post", color=SOFT, linewidth=0.8)
    for method, (x, y) in points.items():
        low, high = bounds(audits[method], "primary", key, "interval")
        ends = np.array([0.0 if low <= 0 <= high else min(abs(low), abs(high)), max(abs(low), abs(high))])
        mark(axes, x, y, dig(audits[method], "verdict"), yerr=np.nan_to_num(np.abs(ends - y))[:, None])
    axes.set_title(f"{key.capitalize()} (shaded: margin {number(wide, 2)})", fontweight="bold")
    axes.set_ylabel("|difference from the retrains|")
    _names_beside(axes, points, {method: _called(method, audits[method]) for method in points})


@styled
def distance_against_passes(audits: Audits, title: str = "") -> Figure:
    """Draw how far each method is from the retrains against its passes over cells, one panel a primary statistic.

    The bars are 90 % intervals of the distance, the band is the margin, and the steps join the methods that no other
    one beats in both.
    """
    figure = new_figure(7.2, 3.6 + 0.26 * len(audits), title)
    upper, lower = figure.subplots(2, 1, sharex=True)
    _passes_panel(upper, audits, "trace")
    _passes_panel(lower, audits, "membership")
    words = "passes ÷ those of a retrain by the same recipe\nsteps: no other method is both nearer and cheaper"
    lower.set_xlabel(words)
    verdict_legend(figure, audits)
    return figure


def _mean_roc(axes: Axes, scores: tuple[FloatArray, FloatArray], **style: Any) -> None:
    x, rates = roc_points(*scores)
    axes.step(x, rates.mean(axis=0), where="post", **style)


def _roc_legend(figure: Figure, looks: Iterable[Look]) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [
        Line2D([], [], color=SOFT, linestyle=DASHES[2], linewidth=1.4, label="Originals"),
        Line2D([], [], color=INK, linewidth=0.9, label="Retrains"),
        Patch(color=INK, alpha=0.2, linewidth=0, label="Range of the retrains"),
    ]
    handles += [Line2D([], [], color=s.colour, mfc=s.fill, marker=s.marker, label=s.words) for s in looks]
    figure.legend(handles=handles, loc="outside lower center", ncols=4)


@styled
def roc_overlay(curves: Mapping[str, tuple[FloatArray, FloatArray]], audits: Audits, title: str = "") -> Figure:
    """Draw the ROC curves of all methods, each over those of the originals and the retrains: means over the models.

    Parameters
    ----------
    curves
        method -> (scores of members ``[M, F]``, of controls ``[M, U]``), higher = more member-like; ``original`` and
        ``retrain`` among them.
    audits
        method -> audit; gives the verdicts and the AUC.
    title
        Above the picture.
    """
    methods = [name for name in curves if name not in REFERENCES]
    columns = min(max(len(methods), 3), 5)
    rows = -(-max(len(methods), 1) // columns)
    figure = new_figure(1.92 * columns, 1.2 + 2.05 * rows, title)
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
    x, target = roc_points(*curves["retrain"])
    for axes, method in zip(panels, methods, strict=False):
        seen = look(dig(audits[method], "verdict"))
        axes.fill_between(x, target.min(0), target.max(0), step="post", color=INK, alpha=0.2, linewidth=0)
        _mean_roc(axes, curves["retrain"], color=INK, linewidth=0.9)
        _mean_roc(axes, curves["original"], color=SOFT, linestyle=DASHES[2], linewidth=1.4)
        _mean_roc(axes, curves[method], color=seen.colour, linewidth=1.8)
        auc = number(value(audits[method], "attacks", score_of(audits[method]), PRIMARY_GROUP, "auc"))
        axes.set_title(f"{seen.glyph} {method}\nAUC {auc}", fontsize=8, color=seen.colour)
        axes.set(xlim=(0, 1), ylim=(0, 1.01), box_aspect=1, xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    for axes in panels[len(methods) :]:
        axes.set_visible(False)
    for axes in panels[: len(methods)][-columns:]:
        axes.set_xlabel("false positive rate", fontsize=8)
        axes.tick_params(labelbottom=True)
    panels[len(methods) // 2 // columns * columns].set_ylabel("true positive rate", fontsize=8)
    _roc_legend(figure, dict.fromkeys(look(dig(audits[method], "verdict")) for method in methods))
    return figure


@styled
def attack_grid(audits: Audits) -> Figure:
    """Draw each attack's AUC on each method; outlined and bold where the advantage passes its null's 95 % point."""
    methods = ordered(audits)
    known = {name for audit in audits.values() for name in dig(audit, "attacks") or {}}
    attacks = sorted(known, key=lambda name: (name in LEARNED, name))
    cells = [[dig(audits[m], "attacks", name, PRIMARY_GROUP) for name in attacks] for m in methods]
    auc = np.array([[value(cell, "auc") for cell in row] for row in cells]).reshape(len(methods), len(attacks))
    figure = new_figure(2.2 + 0.62 * len(attacks), 1.5 + 0.42 * len(methods), "")
    axes = figure.subplots()
    axes.pcolormesh(np.ma.masked_invalid(auc), cmap="PuOr_r", vmin=-0.1, vmax=1.1, edgecolors="white", linewidth=2)
    for (i, j), found in np.ndenumerate(auc):
        leak = value(cells[i][j], "advantage") > value(cells[i][j], "null", "q95")
        colour = "white" if abs(found - 0.5) > 0.4 else INK
        box = {"boxstyle": "square,pad=0.6", "fill": False, "edgecolor": colour if leak else "none"}
        style: dict[str, Any] = {"color": colour, "weight": "bold" if leak else "normal", "bbox": box}
        axes.text(j + 0.5, i + 0.5, number(found, 2), ha="center", va="center", **style)
    axes.set_xticks(np.arange(len(attacks)) + 0.5, attacks, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(methods)) + 0.5, methods)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    axes.set_title(
        "AUC against same-group controls\noutlined: outside the no-leak 95 % band (learned attacks have none)",
        fontsize=8,
    )
    return figure
