"""Pictures of an audit, each a matplotlib ``Figure`` built with the object-oriented API: no global state is touched.

What a colour says, a shape, a line style or a word says as well. Equal inputs give equal bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np
import numpy.typing as npt

from scforget.errors import DataError, EmptyGroupError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

P = ParamSpec("P")
R = TypeVar("R")
FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

INK, SOFT, PALE, BAND = "#1a1a1a", "#595959", "#f0f0f0", "#d9e6f0"
# Okabe and Ito's colours, darkened to be read on white; neighbours differ in lightness, so they differ in grey too.
SERIES = ("#b3400a", "#0b5a94", "#b98300", "#00735a", "#8e3a80", "#3d94c9", "#7a7a7a")
#: What the columns of a history that end so are drawn on.
CURVES = {"ELBO (nats per cell)": "_elbo", "KL (nats)": "kl", "loss": "_loss", "accuracy": "_accuracy",
          "divergence (nats)": "_divergence"}  # fmt: skip
DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
STYLE = {
    "font.family": "DejaVu Sans",  # ships with matplotlib: the same shapes on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "text.parse_math": False,  # a "$" in a cluster's name is a "$"
    "svg.hashsalt": "scforget",
}


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Draw in the style of the project, whatever matplotlib is set to."""

    @wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        from matplotlib import rc_context

        with rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def new_figure(width: float, height: float, title: str) -> Figure:
    """Return an empty figure of so many inches, outside pyplot's registry."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=10, fontweight="bold")
    return figure


@styled
def png_bytes(figure: Figure, *, dpi: int = 144) -> bytes:
    """Return a figure as PNG of 256 colours; the same figure gives the same bytes (no date, no software version).

    A palette makes a plot a third as large, and a report holds hundreds of them.
    """
    from PIL import Image

    drawn, palette = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=dpi, metadata={"Software": None})
    with Image.open(drawn) as image:
        few = image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(palette, format="png", optimize=True)
    return palette.getvalue()


@styled
def svg_text(figure: Figure) -> str:
    """Return a figure as SVG, text drawn as paths; the same figure gives the same text (no date, salted ids)."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", dpi=144, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _panels(history: pd.DataFrame) -> dict[str, list[str]]:
    """Columns that hold numbers, by the axis they are drawn on; all of them on one where none has an axis."""
    drawn = [name for name in history.columns if name not in {"seed", "epoch"} and history[name].notna().any()]
    found = {axis: [name for name in drawn if name.endswith(ends)] for axis, ends in CURVES.items()}
    return {axis: names for axis, names in (found if any(found.values()) else {"": drawn}).items() if names}


@styled
def training_curves(history: pd.DataFrame, title: str) -> Figure:
    """Draw what was recorded of each epoch: a thin line for each seed, a thick one for their mean.

    Parameters
    ----------
    history
        Columns ``seed``, ``epoch``, and others, which share a panel with those that end alike (``CURVES``).
    title
        Above the picture.

    Raises
    ------
    DataError
        If there is no row, no seed, no epoch, or nothing to draw.
    """
    panels = _panels(history) if {"seed", "epoch"} <= set(history.columns) else {}
    if not panels:
        what = f"{len(history)} rows of {list(history.columns)}"
        raise DataError("training history", what, "rows with seed, epoch and values")
    figure = new_figure(3.6 * max(len(panels), 2), 2.9, title)
    for axes, (axis, names) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for i, column in enumerate(names):
            paint = {"color": SERIES[i % len(SERIES)], "linestyle": DASHES[i % len(DASHES)]}
            for _, run in history.groupby("seed", sort=True):
                axes.plot(run["epoch"], run[column], linewidth=0.7, alpha=0.5, **paint)
            mean = history.groupby("epoch", sort=True)[column].mean()
            axes.plot(mean.index, mean, linewidth=1.8, label=column.replace("_", " "), **paint)
        axes.legend(loc="best")
        axes.set(xlabel="epoch", ylabel=axis)
    return figure


def null_band(members: int, controls: int, ranks: IntArray, level: float = 0.95) -> FloatArray:
    """Return the range ``[2, K]`` of the true positive rate, threshold by threshold, when nothing leaks.

    Parameters
    ----------
    members, controls
        Numbers of cells F and U.
    ranks : ``[K]``, 1 to U
        A threshold lies at the k-th highest control.
    level
        Coverage of each point of the band, in (0, 1).

    Notes
    -----
    All orders of F + U scores being equally likely, the number j of members above the k-th highest control is negative
    hypergeometric: P(j) = C(j+k−1, j)·C(F−j+U−k, F−j) / C(F+U, F). Exact for scores without ties.
    """
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, members + controls + 1)))])
    j, k = np.arange(members + 1)[:, None], np.asarray(ranks)[None, :]

    def log_choose(n: Any, m: Any) -> Any:
        return log_factorial[n] - log_factorial[m] - log_factorial[n - m]

    log_p = log_choose(j + k - 1, j) + log_choose(members - j + controls - k, members - j)
    below = np.exp(log_p - log_choose(members + controls, members)).cumsum(axis=0)
    tail = (1 - level) / 2
    return np.array([(below < tail).sum(0), (below < 1 - tail).sum(0)]) / members


def _ranks(n_controls: int) -> IntArray:
    """Ranks of controls at which a curve is drawn: all, or some 300 that are dense where the FPR is small."""
    ranks = [np.linspace(1, n_controls, min(n_controls, 200)), np.geomspace(1, n_controls, 100)]
    return np.unique(np.concatenate(ranks).round().astype(np.int64))


def roc_points(members: FloatArray, controls: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Return FPR limits ``[K]`` and each model's TPR ``[M, K]`` at the most permissive threshold that keeps them.

    The members strictly above the k-th highest control are flagged with a FPR of at most (k−1)/U, ties as blocks.
    """
    ranks = _ranks(controls.shape[1])
    thresholds = -np.sort(-controls, axis=1)[:, ranks - 1]
    pairs = zip(np.sort(members, axis=1), thresholds, strict=True)
    above = [m.size - np.searchsorted(m, at, side="right") for m, at in pairs]
    rates = np.column_stack([np.array(above) / members.shape[1], np.ones(len(members))])
    return np.append((ranks - 1) / controls.shape[1], 1.0), rates


@styled
def roc(curves: Mapping[str, tuple[npt.ArrayLike, npt.ArrayLike]], title: str = "") -> Figure:
    """Draw ROC curves on linear and logarithmic axes: the mean over models, and the range of the models as a band.

    Parameters
    ----------
    curves
        method -> (scores of members ``[M, F]``, of controls ``[M, U]``), higher = more member-like.
    title
        Above the picture.

    Raises
    ------
    EmptyGroupError, DataError
        If there is no curve, one without cells, or one with NaN or with unequal numbers of models.
    """
    scores = {name: [np.atleast_2d(np.asarray(s, dtype=np.float64)) for s in pair] for name, pair in curves.items()}
    if not scores or not all(s.size for pair in scores.values() for s in pair):
        raise EmptyGroupError("ROC", {name: [s.shape for s in pair] for name, pair in scores.items()}, "scored cells")
    if bad := [m for m, (f, u) in scores.items() if len(f) != len(u) or not np.isfinite([*f.flat, *u.flat]).all()]:
        raise DataError("ROC scores", bad, "finite scores of members and controls under the same models")
    figure = new_figure(7.2, 4.3, title)
    panels = figure.subplots(1, 2)
    n_members, n_controls = (s.shape[1] for s in next(iter(scores.values())))
    band = np.column_stack([null_band(n_members, n_controls, _ranks(n_controls)), [1, 1]])
    for axes in panels:
        x = np.append((_ranks(n_controls) - 1) / n_controls, 1.0)
        paint: dict[str, Any] = {"facecolor": PALE, "edgecolor": SOFT, "linestyle": ":"}
        axes.fill_between(x, *band, step="post", label="no leak, 95 %", **paint)
        axes.plot([1e-6, 1], [1e-6, 1], color=SOFT, linewidth=0.7, label="chance")
        for i, (name, (members, controls)) in enumerate(scores.items()):
            x, rates = roc_points(members, controls)
            colour = INK if name == "retrain" else SERIES[i % len(SERIES)]
            axes.fill_between(x, rates.min(0), rates.max(0), step="post", color=colour, alpha=0.12, linewidth=0)
            axes.step(x, rates.mean(0), where="post", color=colour, linestyle=DASHES[i % 4], linewidth=1.5, label=name)
        axes.set(xlabel="false positive rate", ylabel="true positive rate", xlim=(0, 1), ylim=(0, 1.01), box_aspect=1)
    floor = 0.7 / max(n_members, n_controls, 2)
    panels[1].set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.05), ylabel="")
    for axis in (panels[1].xaxis, panels[1].yaxis):  # readers know 0.01 sooner than a power of ten
        axis.set_major_formatter("{x:g}")
        axis.set_minor_formatter("")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


@styled
def score_histograms(
    forget: npt.ArrayLike, controls: npt.ArrayLike, retrain_forget: npt.ArrayLike, *, title: str = "", label: str
) -> Figure:  # fmt: skip
    """Draw scores under the audited models (forget cells, controls) above those of forget cells under retrains.

    If the cells are forgotten, the first row looks like the third. Ticks are cells, the dark line is the median.

    Parameters
    ----------
    forget, controls, retrain_forget : ``[M, F]``, ``[M, U]``, ``[K, F]``, or one model's row
        Scores, higher = more member-like.
    title, label
        Above the picture, and below its axis.

    Raises
    ------
    EmptyGroupError
        If a row holds no finite score.
    """
    rows = (
        ("Forget set, this model", forget, SERIES[0]),
        ("Controls, this model", controls, SOFT),
        ("Forget set, retrained", retrain_forget, SERIES[1]),
    )
    scores = [np.atleast_2d(np.asarray(row[1], dtype=np.float64)) for row in rows]
    scores = [s[:, np.isfinite(s).all(axis=0)] for s in scores]
    if not all(s.size for s in scores):
        raise EmptyGroupError("score histogram", [s.shape for s in scores], "finite scores in each group")
    edges = np.histogram_bin_edges(np.concatenate([s.ravel() for s in scores]), bins=30)
    figure = new_figure(7.2, 3.4, title)
    panels = figure.subplots(3, 1, sharex=True, sharey=True)
    for axes, (name, _, colour), s in zip(panels, rows, scores, strict=True):
        axes.hist(s.ravel(), edges, density=True, histtype="stepfilled", facecolor=colour + "33", edgecolor=colour)
        axes.axvline(np.median(s), color=INK, linewidth=1.3)
        axes.plot(s.mean(axis=0), np.zeros(s.shape[1]), "|", color=colour, markersize=8, clip_on=False)
        sizes = f"{s.shape[1]} × {s.shape[0]} models"
        axes.set_ylabel(f"{name}\n{sizes}", rotation=0, ha="right", va="center", fontsize=8)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    panels[-1].set_xlabel(label)
    return figure


@styled
def umap(coordinates: npt.ArrayLike, labels: npt.ArrayLike, highlight: npt.ArrayLike, title: str) -> Figure:
    """Draw cells in two dimensions, groups named where they lie, forget cells as dark-rimmed triangles.

    Parameters
    ----------
    coordinates, labels, highlight : ``[N, 2]``, ``[N]``, ``[N]`` bool
        An embedding of the latent means, the group of each cell, and which cells are forget cells.
    title
        Above the picture.
    """
    from matplotlib.patheffects import withStroke

    at, group, chosen = np.asarray(coordinates), np.asarray(labels).astype(str), np.asarray(highlight, dtype=bool)
    figure = new_figure(6.0, 5.0, title)
    axes = figure.subplots()
    halo = [withStroke(linewidth=2.5, foreground="white")]
    size = float(np.clip(6000 / max(len(at), 1), 2, 20))
    for i, name in enumerate(np.unique(group)):
        cells = at[group == name]
        # A raster inside the SVG: tens of thousands of circles would make the page heavy.
        axes.scatter(cells[:, 0], cells[:, 1], s=size, color=SERIES[i % 7], alpha=0.5, linewidths=0, rasterized=True)
        axes.annotate(name, np.median(cells, axis=0), fontsize=8, ha="center", path_effects=halo, zorder=4)
    axes.scatter(
        at[chosen, 0], at[chosen, 1], s=26, c=SERIES[0], marker="^", edgecolors=INK, label="forget set", zorder=5
    )
    axes.set(xticks=[], yticks=[], xlabel="UMAP 1", ylabel="UMAP 2")
    axes.set_aspect("equal", adjustable="datalim")
    axes.legend(loc="best")
    return figure
