"""The single-cell paper's pictures of methods, from audits, with what its own lack: intervals, retrains and chance.

Built as those of :mod:`scforget.report.figures` are. The AUC's intervals are over cells and models; the advantage's are
their images under 2·|AUC − ½|, which is not 0 when nothing leaks: its mean and 95 % point by chance stand beside it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import scipy

from scforget.arrays import FloatArray
from scforget.audit.equivalence import welch
from scforget.report.figures import BAND, DASHES, INK, SOFT, new_figure, styled
from scforget.report.tables import PRIMARY_GROUP, Audit, Audits, bounds, dig, look, number, ordered, value

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Measure = Literal["advantage", "auc"]
_LABELS = {"advantage": "advantage 2·|AUC − ½|", "auc": "AUC"}
_FLOOR = {"advantage": 0.0, "auc": 0.5}


class Estimate(NamedTuple):
    """A number and its interval; NaN where there is none."""

    centre: float
    low: float
    high: float

    @property
    def reach(self) -> FloatArray:
        """Distances to the ends, ``[2, 1]``, as matplotlib wants them; 0 where there is no interval."""
        return np.nan_to_num(np.array([[self.centre - self.low], [self.high - self.centre]])).clip(0)


def auc_of(audit: Audit | None, attack: str, group: str = PRIMARY_GROUP) -> Estimate:
    """AUC of an attack against a group of controls, mean over models, with its interval over cells and models."""
    found = dig(audit, "attacks", attack, group)
    return Estimate(value(found, "auc"), *bounds(found, "interval"))


def advantage_of(audit: Audit | None, attack: str, group: str = PRIMARY_GROUP) -> Estimate:
    """2·|AUC − ½| of the models' mean AUC, with the image of the AUC's interval: from 0 where that holds ½.

    Notes
    -----
    P0 averages each model's advantage instead, which is larger where models disagree on the direction: the
    extragradient's models have 0.300 on average and 2·|0.429 − ½| = 0.142 by their mean AUC.
    """
    auc = auc_of(audit, attack, group)
    low, high = sorted(2 * abs(end - 0.5) for end in (auc.low, auc.high))
    return Estimate(2 * abs(auc.centre - 0.5), 0.0 if auc.low <= 0.5 <= auc.high else low, high)


def estimate(measure: Measure, audit: Audit | None, attack: str, group: str) -> Estimate:
    """Either of the two."""
    return (advantage_of if measure == "advantage" else auc_of)(audit, attack, group)


def mark(axes: Axes, x: float, y: float, verdict: object, **errors: Any) -> None:
    """Draw a point with its error bars in the colour and the shape of a verdict."""
    seen = look(verdict)
    axes.errorbar(x, y, color=seen.colour, marker=seen.marker, mfc=seen.fill, markersize=6, capsize=3, zorder=3,
                  elinewidth=1.1, **errors)  # fmt: skip


def legend(figure: Figure, audits: Audits, lines: Sequence[Any] = ()) -> None:
    """Say below a figure what its shapes mean, and its lines."""
    from matplotlib.lines import Line2D

    seen = dict.fromkeys(look(dig(audits[method], "verdict")) for method in ordered(audits))
    shapes = [Line2D([], [], linestyle="", color=s.colour, mfc=s.fill, marker=s.marker, label=s.words) for s in seen]
    figure.legend(handles=[*shapes, *lines], loc="outside lower center", ncols=4)


def bands(axes: Axes, audits: Audits, measure: Measure, attack: str, group: str, *, upright: bool = True) -> list[Any]:
    """Draw the retrains' interval as a band, and chance as lines; returned for the legend.

    ``upright``: the measure is on the x axis.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    span, line = (axes.axvspan, axes.axvline) if upright else (axes.axhspan, axes.axhline)
    shown: list[Any] = []
    target, null = (
        estimate(measure, audits.get("retrain"), attack, group),
        dig(audits.get("retrain"), "attacks", attack, group),
    )
    if np.isfinite(target.centre):
        span(target.low, target.high, color=BAND, linewidth=0, zorder=0)
        line(target.centre, color=INK, linewidth=1, linestyle=DASHES[1], zorder=1)
        shown.append(Patch(color=BAND, label="Retrains, 95 %"))
        shown.append(Line2D([], [], color=INK, linewidth=1, linestyle=DASHES[1], label="Retrains, mean"))
    middle, limit = value(null, "null", "mean"), value(null, "null", "q95")
    if np.isfinite(limit):
        places = [limit] if measure == "advantage" else [0.5 - limit / 2, 0.5 + limit / 2]
        for place in places:
            line(place, color=SOFT, linewidth=1.2, linestyle=DASHES[2], zorder=1)
        shown.append(Line2D([], [], color=SOFT, linewidth=1.2, linestyle=DASHES[2], label="No leak, 95 %"))
        if measure == "advantage":
            line(middle, color=SOFT, linewidth=1, linestyle=DASHES[3], zorder=1)
            shown.append(Line2D([], [], color=SOFT, linewidth=1, linestyle=DASHES[3], label="No leak, mean"))
    return shown


def _bar_panel(
    axes: Axes, audits: Audits, methods: Sequence[str], *, measure: Measure, attack: str, group: str
) -> list[Any]:  # fmt: skip
    """Draw a bar for each method with its interval, and P0's mean of the models' own advantages."""
    from matplotlib.lines import Line2D

    shown = bands(axes, audits, measure, attack, group)
    for row, method in enumerate(methods):
        found = estimate(measure, audits.get(method), attack, group)
        if not np.isfinite(found.centre):
            axes.annotate("not measured", (_FLOOR[measure], row), (4, 0), textcoords="offset points", va="center",
                          color=SOFT, fontsize=8)  # fmt: skip
            continue
        seen = look(dig(audits[method], "verdict"))
        axes.barh(row, found.centre - _FLOOR[measure], left=_FLOOR[measure], height=0.6, color=seen.colour, alpha=0.3,
                  edgecolor=seen.colour, linewidth=0.8, zorder=2)  # fmt: skip
        mark(axes, found.centre, row, dig(audits[method], "verdict"), xerr=found.reach)
        published = value(audits[method], "attacks", attack, group, "advantage")
        if measure == "advantage" and published - found.centre > 5e-3:
            axes.plot(published, row, "x", color=INK, markersize=6, zorder=4)
    axes.axvline(_FLOOR[measure], color=INK, linewidth=0.7)
    axes.set(ylim=(len(methods) - 0.4, -0.6), xlabel=_LABELS[measure])
    if measure == "advantage":
        axes.set_xlim(0, None)
        shown.append(Line2D([], [], linestyle="", marker="x", color=INK, label="Mean of the models' own"))
    return shown


def _bars(places: Mapping[str, Audits], measure: Measure, attack: str, group: str, title: str) -> Figure:
    methods = list(dict.fromkeys(method for audits in places.values() for method in ordered(audits)))
    figure = new_figure(2.0 + max(5.2, 2.9 * len(places)), 1.7 + 0.3 * len(methods), title)
    panels = figure.subplots(1, len(places), sharey=True, squeeze=False)[0]
    lines: list[Any] = []
    for axes, (place, audits) in zip(panels, places.items(), strict=True):
        shown = _bar_panel(axes, audits, methods, measure=measure, attack=attack, group=group)
        lines = max(lines, shown, key=len)
        if place:
            sizes = [value(audits.get("retrain"), "groups", name) for name in ("forget", group)]
            counts = "" if np.isnan(sizes).any() else f"\n{sizes[0]:.0f} cells, {sizes[1]:.0f} controls"
            axes.set_title(f"{place}{counts}", fontsize=8.5)
    panels[0].set_yticks(range(len(methods)), methods)
    everyone = {f"{place}/{method}": audit for place, audits in places.items() for method, audit in audits.items()}
    legend(figure, everyone, lines)
    return figure


@styled
def advantage_bars(
    audits: Audits, *, attack: str = "elbo", group: str = PRIMARY_GROUP, title: str = ""
) -> Figure:  # fmt: skip
    """Draw each method's advantage with its 95 % interval, the retrains' as a band, chance as two lines (P0, Fig. 1).

    The cross is P0's number, the mean of the models' own advantages, where it is another.
    """
    return _bars({"": audits}, "advantage", attack, group, title)


@styled
def auc_bars(audits: Audits, *, attack: str = "elbo", group: str = PRIMARY_GROUP, title: str = "") -> Figure:
    """Draw each method's AUC from ½ with its 95 % interval; the band is the retrains', the target."""
    return _bars({"": audits}, "auc", attack, group, title)


@styled
def place_bars(
    places: Mapping[str, Audits], measure: Measure = "advantage", *, attack: str = "elbo",
    group: str = PRIMARY_GROUP, title: str = "",
) -> Figure:  # fmt: skip
    """Draw data sets or scenarios side by side, a panel each: its own retrains, its own chance, the same methods.

    Parameters
    ----------
    places
        ``dataset/scenario`` -> method -> audit; a method that a place lacks is said not to be measured there.
    """
    return _bars(places, measure, attack, group, title)


def difference_from_retrain(own: Sequence[float], retrain: Sequence[float], level: float = 0.95) -> Estimate:
    """Difference of the models' mean AUC from the retrains', with Welch's interval; the cells being given.

    With a single model of either kind there is no interval.
    """
    one, two = np.asarray(own, dtype=np.float64), np.asarray(retrain, dtype=np.float64)
    if not (one.size and two.size):
        return Estimate(np.nan, np.nan, np.nan)
    centre = float(one.mean() - two.mean())
    if min(one.size, two.size) < 2:
        return Estimate(centre, np.nan, np.nan)
    error, freedom = welch(one, two)
    width = float(scipy.stats.t.ppf((1 + level) / 2, freedom)) * error
    return Estimate(centre, centre - width, centre + width)


@styled
def attack_heatmap(audits: Audits, *, group: str = PRIMARY_GROUP, title: str = "") -> Figure:
    """Draw each attack's AUC on each method, shaded by its difference from the retrains' AUC.

    Below the AUC stands the difference ± half its 95 % interval over models; bold where that does not hold 0.
    """
    methods = ordered(audits)
    attacks = sorted({name for audit in audits.values() for name in dig(audit, "attacks") or {}})
    figure = new_figure(1.9 + 0.98 * len(attacks), 1.6 + 0.42 * len(methods), title)
    axes = figure.subplots()
    shades = np.full((len(methods), len(attacks)), np.nan)
    for (i, j), _ in np.ndenumerate(shades):
        cell = dig(audits[methods[i]], "attacks", attacks[j], group)
        base = dig(audits.get("retrain"), "attacks", attacks[j], group)
        found = difference_from_retrain(dig(cell, "per_seed") or [], dig(base, "per_seed") or [])
        words, apart = number(value(cell, "auc"), 2), False
        if methods[i] != "retrain" and np.isfinite(found.centre):
            shades[i, j] = found.centre
            apart = not found.low <= 0 <= found.high and np.isfinite(found.low)
            half = f" ± {number((found.high - found.low) / 2, 2)}" if np.isfinite(found.low) else ""
            words = f"{words}\n{number(found.centre, 2, sign=True)}{half}"
        dark = bool(abs(shades[i, j]) > 0.28)
        axes.text(j + 0.5, i + 0.5, words, ha="center", va="center", fontsize=7, linespacing=1.25,
                  color="white" if dark else INK, weight="bold" if apart else "normal")  # fmt: skip
    mesh = axes.pcolormesh(np.ma.masked_invalid(shades), cmap="PuOr_r", vmin=-0.4, vmax=0.4, edgecolors="white",
                           linewidth=2)  # fmt: skip
    figure.colorbar(mesh, ax=axes, label="AUC minus the retrains' AUC", extend="both", aspect=30)
    axes.set_xticks(np.arange(len(attacks)) + 0.5, attacks, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(np.arange(len(methods)) + 0.5, methods)
    axes.tick_params(length=0)
    axes.invert_yaxis()
    axes.spines[:].set_visible(False)
    words = (
        "AUC, and its difference from the retrains' ± half its 95 % interval over models, each by itself (bold: not 0)"
    )
    axes.set_title(words, fontsize=8)
    return figure
