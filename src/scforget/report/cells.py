"""The picture of single cells: how well each forget cell is still known, beside what a retrained model shows.

Built as those of :mod:`scforget.report.figures` are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from scforget.errors import DataError, EmptyGroupError
from scforget.report.figures import BAND, PALE, SERIES, SOFT, new_figure, styled

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = ("label", "z", "low", "high")
#: Kinds of cells with a colour and a row of their own; the rest share one.
LABELS = 8
OTHER, UNNAMED = "other", "no label"
RANGE = "#b4b9be"
LONGEST = 28  # characters of a kind's name that fit beside the picture
CROWD = 60  # so many cells and more: their intervals become one band
# A z this many times farther out than the band would press the band into a line.
FAR = 30


def _kinds(labels: pd.Series) -> tuple[list[str], list[str]]:
    """Kind of each cell, and the kinds in the order of the rows: most cells first, ``other`` last."""
    names = [str(label) for label in labels.astype(object).where(labels.notna(), UNNAMED)]
    common = sorted(set(names), key=lambda name: (-names.count(name), name))
    if len(common) <= LABELS:
        return names, common
    kept = common[:LABELS]
    return [name if name in kept else OTHER for name in names], [*kept, OTHER]


def _compress(axes: Axes, reach: float, band: float) -> None:
    """Make the axis symmetric-logarithmic where some cell is so far out that the band could not be seen."""
    if band > 0 and reach > FAR * band:
        axes.set_yscale("symlog", linthresh=2 * band)
        axes.yaxis.set_major_formatter("{x:g}")
        bottom, top = axes.get_ylim()
        clear = [at for at in axes.get_yticks() if bottom <= at <= top and (at == 0 or abs(at) > 2 * band)]
        axes.set_yticks(clear)  # inside the linear part the ticks of the logarithm would lie on each other


def _colour(kind: str, index: int) -> str:
    return SOFT if kind == OTHER else SERIES[index % len(SERIES[:-1])]  # the last one is grey, as the rest is


def _scores(axes: Axes, ranked: pd.DataFrame, of_kind: npt.NDArray[np.str_], kinds: list[str]) -> None:
    """Draw a point for each cell and its interval: a bar, or one band for a crowd, in which no bar could be told."""
    place = np.arange(1, len(ranked) + 1)
    if crowd := len(ranked) >= CROWD:
        paint: dict[str, Any] = {"color": RANGE, "linewidth": 0, "antialiased": False}  # sharp edges: a small file
        axes.fill_between(place, ranked["low"], ranked["high"], step="mid", **paint)
    for index, kind in enumerate(kinds):
        rows, at = ranked[of_kind == kind], place[of_kind == kind]
        colour = _colour(kind, index)
        if not crowd:
            axes.vlines(at, rows["low"], rows["high"], color=colour, linewidth=1.3)
        marker, size = ("s", 2) if crowd else ("o", 5)
        axes.plot(at, rows["z"], marker, color=colour, markersize=size, antialiased=not crowd)


def _rows(axes: Axes, of_kind: npt.NDArray[np.str_], kinds: list[str]) -> None:
    """Draw a row for each kind, with a tick where each of its cells stands in the ranking."""
    for index, kind in enumerate(kinds):
        at = np.flatnonzero(of_kind == kind) + 1
        axes.plot(at, np.full(at.size, index), "|", color=_colour(kind, index), markersize=7, antialiased=False)
    names = [kind if len(kind) <= LONGEST else f"{kind[: LONGEST - 1]}…" for kind in kinds]
    labels = [f"{name} ({(of_kind == kind).sum()})" for name, kind in zip(names, kinds, strict=True)]
    axes.set_yticks(range(len(kinds)), labels, fontsize=6.5)
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.set_facecolor(PALE)
    axes.tick_params(length=0, axis="y")
    axes.spines[:].set_visible(False)


@styled
def cell_scores(cells: pd.DataFrame, null_band: tuple[float, float], title: str = "") -> Figure:
    """Draw every forget cell's z against the retrained models, the most exposed first, with its interval over models.

    Parameters
    ----------
    cells
        Rows with ``label``, ``z``, ``low`` and ``high``, in standard deviations of the retrained models; the ends are
        NaN where there is one model only.
    null_band
        Range of z that a single retrained model shows; (NaN, NaN) where it is not known, and nothing is shaded.
    title
        Above the picture.

    Raises
    ------
    DataError
        If a column is missing or a z not finite.
    EmptyGroupError
        If there is no cell.
    """
    if missing := [name for name in COLUMNS if name not in cells]:
        raise DataError("table of forget cells", f"no {', '.join(missing)}", f"columns {', '.join(COLUMNS)}")
    if cells.empty:
        raise EmptyGroupError("forget cells", 0, "at least 1")
    if bad := int((~np.isfinite(cells["z"])).sum()):
        raise DataError("z of forget cells", f"{bad} not finite", "numbers")
    ranked = cells.sort_values("z", ascending=False, kind="stable").reset_index(drop=True)
    names, kinds = _kinds(ranked["label"])
    of_kind, n = np.array(names), len(ranked)
    rows = len(kinds) if len(kinds) > 1 else 0  # of one kind alone there is nothing to compare
    figure = new_figure(6.4, 3.0 + 0.15 * rows, title)
    axes, *below = figure.subplots(2 if rows else 1, 1, sharex=True, squeeze=False,
                                   height_ratios=[2.4, 0.15 * rows] if rows else None)[:, 0]  # fmt: skip
    low, high = null_band
    if np.isfinite([low, high]).all():
        axes.axhspan(low, high, color=BAND, linewidth=0)
        above = int((ranked["z"] > high).sum())
        axes.set_title(f"{above} of {n} above what one retrained model shows (shaded)")
    axes.axhline(0, color=SOFT, linewidth=0.7)
    _scores(axes, ranked, of_kind, kinds)
    for panel in below:
        _rows(panel, of_kind, kinds)
    ends = ranked[["z", "low", "high"]].to_numpy(dtype=np.float64)
    _compress(axes, float(np.nanmax(np.abs(ends))), float(np.nanmax([0.0, abs(low), abs(high)])))
    last = [axes, *below][-1]
    what = "forget set" if rows else f"forget set ({kinds[0]})"
    last.set(xlim=(0.5 - 0.01 * n, n + 0.5 + 0.01 * n), xlabel=f"{what}, the most exposed first")
    last.xaxis.get_major_locator().set_params(integer=True)
    axes.set_ylabel("z (retrains' spreads)")
    return figure
