"""Pictures of Proposition 1 and Corollary 2, of designs that fulfil them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scforget.report.figures import DASHES, INK, SERIES, SOFT, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
_MARKERS = ("o", "s", "^", "D", "v")


def _plain(axis: Axis) -> None:
    """Readers know 0.01 sooner than a power of ten."""
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


@styled
def convergence(record: Record) -> Figure:
    """Draw the error of the factorised cosine against the number of independent pairs, and what 1/√n would be.

    Parameters
    ----------
    record
        ``convergence`` of :func:`scforget.theory.propositions.run`.
    """
    n, error = np.asarray(record["draws"], dtype=float), np.asarray(record["error"], dtype=float)
    figure = new_figure(4.8, 3.4, "")
    axes = figure.subplots()
    axes.loglog(n, error, "o-", color=SERIES[0], label="mean error of cos σ · cos ν")
    reference = error[0] * np.sqrt(n[0] / n)
    axes.loglog(n, reference, linestyle=DASHES[1], color=SOFT, label="1/√n")
    for axis in (axes.xaxis, axes.yaxis):
        _plain(axis)
    slope = f"slope {record['slope']:.3f} ({record['low']:.3f}, {record['high']:.3f})"
    axes.set(xlabel="independent pairs of residual and latent", ylabel="absolute error", title=slope)
    axes.legend()
    return figure


@styled
def bounds(record: Record, outputs: int) -> Figure:
    """Draw the smallest cosine that adversaries found against each bound, by how many genes differ.

    Parameters
    ----------
    record
        ``simulated_bounds`` of :func:`scforget.theory.propositions.run`.
    outputs
        D, of which the rows are drawn.
    """
    rows = [row for row in record["profiles"] if row["outputs"] == outputs]
    sizes = sorted({row["largest"] for row in rows})
    figure = new_figure(7.6, 3.4, "")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, kind, exact, words in (
        (panels[0], "smallest_both", "exact_both", "both profiles differ"),
        (panels[1], "smallest_one", "exact_one", "one profile differs"),
    ):
        for index, largest in enumerate(sizes):
            own = sorted((row for row in rows if row["largest"] == largest), key=lambda row: row["differing"])
            x = [row["differing"] for row in own]
            colour = SERIES[index % len(SERIES)]
            axes.plot(
                x, [row[exact] for row in own], linestyle=DASHES[index % 4], color=colour, label=f"V = {largest:g}"
            )
            axes.plot(x, [row[kind] for row in own], _MARKERS[index % 5], color=INK, markerfacecolor="none")
            if kind == "smallest_both":
                axes.plot(x, [row["published"] for row in own], linestyle=":", color=colour, linewidth=0.9)
        axes.set(xlabel="M, genes that differ", title=words, xscale="log", ylim=(0, 1.02))
        _plain(axes.xaxis)
    panels[0].set_ylabel("cosine of the profiles")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(sizes))
    figure.suptitle(
        f"D = {outputs}: lines the exact worst case, marks the least found, dots the published bound",
        x=0.01,
        ha="left",
        fontsize=9,
    )
    return figure
