"""Pictures of the mixture-of-Gaussians worlds, from their plain results."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scforget.errors import DataError
from scforget.report.figures import BAND, INK, SERIES, SOFT, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
#: Marker of each population; methods take the rest in turn.
_MARKERS = {"original": "o", "retrain": "s", "apart": "D"}
_OTHERS = "^v<>PX*hdp"


def _style(kind: str, methods: list[str]) -> dict[str, Any]:
    """Colour, marker and filling of a population."""
    if kind in _MARKERS:
        fill = "white" if kind == "apart" else INK
        return {"color": INK, "marker": _MARKERS[kind], "markerfacecolor": fill}
    index = methods.index(kind)
    fill = SERIES[index % len(SERIES)] if index % 2 == 0 else "white"
    return {"color": SERIES[index % len(SERIES)], "marker": _OTHERS[index % len(_OTHERS)], "markerfacecolor": fill}


def _once(axes: Axes) -> tuple[list[Any], list[str]]:
    """Handles and labels of a legend in which each label comes once."""
    handles, labels = axes.get_legend_handles_labels()
    first = {label: handle for handle, label in zip(handles[::-1], labels[::-1], strict=True)}
    return [first[label] for label in dict.fromkeys(labels)], list(dict.fromkeys(labels))


@styled
def membership(worlds: Sequence[Record]) -> Figure:
    """Draw the membership AUC of every population in every world with its interval, and the trace below.

    Parameters
    ----------
    worlds
        ``worlds`` of the result; one draw of each world.

    Raises
    ------
    DataError
        If there is none.
    """
    if not worlds:
        raise DataError("worlds", 0, "at least one")
    names = list(dict.fromkeys(kind for row in worlds for kind in row["populations"] if kind not in _MARKERS))
    kinds = [*_MARKERS, *names]
    figure = new_figure(9.0, 6.4, "What is left of the forgotten points, world by world")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for axes, statistic in ((upper, "auc"), (lower, "trace")):
        for at, row in enumerate(worlds):
            band = row["populations"]["retrain"][f"{statistic}_per_model"]
            axes.fill_between([at - 0.45, at + 0.45], min(band), max(band), color=BAND, linewidth=0, zorder=0)
            for place, kind in enumerate(kinds):
                if kind not in row["populations"]:
                    continue
                one = row["populations"][kind]
                value, (low, high) = one[statistic], one[f"{statistic}_interval"]
                x, style = at - 0.4 + 0.8 * place / max(len(kinds) - 1, 1), _style(kind, names)
                single = one[f"{statistic}_per_model"]
                axes.plot([x, x], [low, high], color=style["color"], linewidth=0.8)
                axes.plot([x, x], [min(single), max(single)], color=style["color"], linewidth=2.2)
                axes.plot([x], [value], linestyle="none", markersize=4.5, label=kind, **style)
    upper.axhline(0.5, color=SOFT, linewidth=0.8)
    lower.axhline(0.0, color=SOFT, linewidth=0.8)
    lower.set_yscale("symlog", linthresh=1.0)
    lower.margins(y=0.1)
    lower.yaxis.set_major_formatter("{x:g}")
    upper.set_ylabel("membership AUC\n(0.5: nothing leaks)")
    lower.set_ylabel("trace\n(spreads of the retrains)")
    said = [("leaks" if row["leaks"] else "nothing\nto forget") for row in worlds]
    labels = [f"{row['world'].replace('_', chr(10))}\n({word})" for row, word in zip(worlds, said, strict=True)]
    lower.set_xticks(range(len(worlds)), labels, fontsize=7.5)
    upper.set_title(
        "thin: 95 % interval (AUC: of models and points); thick: the single models; band: the single retrains"
    )
    figure.legend(*_once(upper), loc="outside lower center", ncols=6)
    return figure


@styled
def bound_against_likelihood(worlds: Sequence[Record], arrays: Mapping[str, npt.NDArray[Any]]) -> Figure:
    """Draw the audit's score against the exact log-likelihood, point by point, for an original and a retrain a world.

    Parameters
    ----------
    worlds
        As for :func:`membership`.
    arrays
        Of the result: ``world/draw/score_original`` and so on.
    """
    if not worlds:
        raise DataError("worlds", 0, "at least one")
    columns = min(4, len(worlds))
    rows = -(-len(worlds) // columns)
    figure = new_figure(2.3 * columns, 2.5 * rows + 0.5, "The score (ELBO at z = μ) and the exact log-likelihood")
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, row in zip(panels, worlds, strict=False):
        prefix, F = f"{row['world']}/{row['draw']}", row["likelihood"]["forgotten"]
        for kind, colour, marker in (("original", SERIES[0], "o"), ("retrain", SERIES[1], "s")):
            x, y = (arrays[f"{prefix}/{name}_{kind}"] for name in ("log_likelihood", "score"))
            axes.plot(x[F:], y[F:], ".", color=colour, markersize=2, alpha=0.5, label=f"{kind}, fresh points")
            axes.plot(
                x[:F], y[:F], marker, color=colour, markersize=4, markerfacecolor="none", label=f"{kind}, forgotten"
            )
        ends = np.array([*axes.get_xlim()])
        axes.plot(ends, ends, color=SOFT, linewidth=0.7, label="equal")
        gaps = " and ".join(f"{row['likelihood'][kind]['gap']:.2f}" for kind in ("original", "retrain"))
        axes.set_title(f"{row['world'].replace('_', ' ')}\nKL(q ‖ posterior) {gaps}", fontsize=7.5)
        axes.tick_params(labelsize=7)
    for axes in panels[len(worlds) :]:
        axes.set_visible(False)
    for axes in panels[: len(worlds)][-columns:]:
        axes.set_xlabel("exact log p(x) (nats)", fontsize=8)
    for axes in panels[::columns]:
        axes.set_ylabel("score (nats)", fontsize=8)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    return figure


@styled
def plane(arrays: Mapping[str, npt.NDArray[Any]], prefix: str) -> Figure:
    """Draw a world in the plane: its law, and what an original and a retrained model take for it.

    Parameters
    ----------
    arrays
        Of the result.
    prefix
        ``world/draw`` of a world of dimension 2.

    Raises
    ------
    DataError
        If that world is no plane.
    """
    if f"{prefix}/truth" not in arrays:
        raise DataError("picture of a world", f"{prefix} without densities", "a world of dimension 2")
    axis, points, forgotten = (arrays[f"{prefix}/{name}"] for name in ("axis", "points", "forgotten"))
    figure = new_figure(8.4, 3.9, "A world in the plane: log-density, training points, forgotten points")
    titles = {"truth": "the law itself", "original": "an original", "retrain": "a retrain without the forgotten"}
    for axes, (name, title) in zip(figure.subplots(1, 3, sharex=True, sharey=True), titles.items(), strict=True):
        density = arrays[f"{prefix}/{name}"]
        levels = density.max() - np.array([12.0, 8.0, 5.0, 3.0, 1.5, 0.5])
        axes.contour(axis, axis, density, levels=levels, colors=SOFT, linestyles="-", linewidths=0.7)
        axes.contourf(axis, axis, density, levels=[*levels, density.max() + 1], cmap="Greys", alpha=0.35)
        axes.plot(points[~forgotten, 0], points[~forgotten, 1], "o", color=SERIES[1], markersize=3.5, label="retained")
        axes.plot(
            points[forgotten, 0], points[forgotten, 1], "^", color=SERIES[0], markersize=5,
            markerfacecolor="white" if name == "retrain" else SERIES[0], label="forgotten",
        )  # fmt: skip
        axes.set(title=title, aspect="equal", xlabel="x₁")
        if name == "truth":
            axes.set_ylabel("x₂")
            axes.legend(loc="upper right")
    return figure
