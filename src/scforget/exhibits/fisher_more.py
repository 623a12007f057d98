"""More figures of the Fisher analysis: single parameters, effective ranks, the factorisation, the estimator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scforget.arrays import FloatArray
from scforget.errors import EmptyGroupError
from scforget.exhibits.fisher import MARKERS, around, legend, named, place
from scforget.exhibits.measured import dig
from scforget.report.figures import DASHES, INK, SERIES, SOFT, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]
#: Steps from the paper's estimator to the exact one.
RUNGS = {
    "batches": "batches,\nas published", "equal_batches": "batches of\nequal size",
    "single_cells": "single cells,\ndropout on", "exact": "exact,\nall cells", "unbiased": "noise\nremoved",
}  # fmt: skip
VARIANTS = {
    "likelihood": "the Fisher", "permuted": "inputs dealt\nto other cells", "uncoupled": "no softmax\ncoupling",
    "residual": "plain\nresiduals",
}  # fmt: skip


def _points(axes: Axes, x: float, values: Sequence[float], series: int, label: str, **how: Any) -> None:
    """Mean of models and their range."""
    mean = float(np.mean(values))
    axes.errorbar(
        [x], [mean], yerr=around(mean, [min(values), max(values)]), color=SERIES[series], marker=MARKERS[series],
        linestyle="none", markersize=5, capsize=2, linewidth=1, label=label, **how,
    )  # fmt: skip


def _correlations(result: Record, kind: str, request: str) -> str:
    """Correlations over models: their mean and range, and the same of as many random cells."""
    models = place(result, kind, request)["models"]
    own = [dig(model, "exact" if "exact" in model else "observed", "log_correlation") for model in models]
    null = [dig(model, "exact_same_size", "log_correlation") for model in models if "exact_same_size" in model]
    words = f"r = {np.mean(own):.2f} ({min(own):.2f} to {max(own):.2f})"
    return words + (f"; random {np.mean(null):.2f}" if null else "")


@styled
def scatter_figure(result: Record, scatter: Mapping[str, FloatArray], request: str, title: str = "") -> Figure:
    """Draw log10 Fisher of retained against that of forgotten cells, parameter by parameter: VAE and classifiers.

    Parameters
    ----------
    result
        Of the stage ``overlap``.
    scatter
        ``kind/request`` -> ``[n, 2]``, log10 Fisher of forgotten and of retained cells, of the first model; ``vae`` is
        the originals' kind.
    request
        Name of a forget request.
    title
        Above the picture.

    Raises
    ------
    EmptyGroupError
        If there are no points of this request.

    Notes
    -----
    Correlations are the mean and range over models, then the mean of as many random cells. The lowest 0.2 % of each
    axis are left out of the picture, not of the correlations.
    """
    kinds = [kind for kind in ("vae", "probe", "deep", "matched") if f"{kind}/{request}" in scatter]
    if not kinds:
        raise EmptyGroupError(f"scatter of {request}", "no points", "those of at least one kind of model")
    figure = new_figure(max(3.4, 2.7 * len(kinds)), 3.2, title)
    for axes, kind in zip(figure.subplots(1, len(kinds), squeeze=False)[0], kinds, strict=True):
        points = scatter[f"{kind}/{request}"]
        shown = points[(points > np.quantile(points, 0.002, axis=0)).all(1)] if len(points) > 1000 else points
        ends = [float(shown.min()), float(shown.max())]
        axes.plot(ends, ends, color=SOFT, linewidth=0.8)
        axes.scatter(
            shown[:, 0], shown[:, 1], s=float(np.clip(3000 / len(shown), 2, 14)), color=SERIES[1], linewidths=0,
            alpha=float(np.clip(600 / len(shown), 0.12, 0.9)), rasterized=True,
        )  # fmt: skip
        own = result["base"] if kind == "vae" else kind
        heading = f"VAE, {named(own)}" if kind == "vae" else named(own)
        axes.set_title(f"{heading}\n{_correlations(result, own, request)}", fontsize=8)
        axes.set(xlabel="log10 F, forgotten", box_aspect=1)
    figure.axes[0].set_ylabel("log10 F, retained")
    return figure


@styled
def rank_figure(result: Record, request: str, title: str = "") -> Figure:
    """Draw effective ranks, and the share of top parameters in common, for each kind of VAE; ranges of models.

    Raises
    ------
    EmptyGroupError
        If the request was not measured.
    """
    from matplotlib.ticker import LogLocator

    kinds = [result["base"], *sorted(set(result["variants"]) - {result["base"]})]
    figure = new_figure(9.0, 3.5, title)
    panels = figure.subplots(1, 3)
    sides = (("exact", "forget", "forgotten"), ("exact_same_size", "forget", "as many random cells"),
             ("exact", "retain", "retained"))  # fmt: skip
    for x, kind in enumerate(kinds):
        models = place(result, kind, request)["models"]
        for axes, measure in zip(panels[:2], ("entropy", "participation"), strict=True):
            for i, (which, side, words) in enumerate(sides):
                values = [model[which]["effective_rank"][side][measure] for model in models]
                _points(axes, x + 0.22 * (i - 1), values, i, words)
        for i, (which, words) in enumerate((("exact", "forgotten"), ("exact_same_size", "as many random cells"))):
            _points(panels[2], x + 0.22 * (i - 0.5), [model[which]["top_1_percent"] for model in models], i, words)
    for axes, words in zip(
        panels, ("exp(entropy)", "participation ratio", "top 1 % in common with retained"), strict=True
    ):
        axes.set_title(words)
        axes.set_xticks(range(len(kinds)), [named(kind) for kind in kinds], rotation=30, ha="right", fontsize=8)
    for axes in panels[:2]:
        axes.set(yscale="log")
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter("")
    panels[2].set_ylim(0, 1)
    panels[0].set_ylabel("effective rank (parameters)")
    legend(figure, *panels)
    return figure


def _estimate(axes: Axes, x: float, found: Sequence[Record], series: int, label: str) -> None:
    """Mean over models, and the widest of their bootstrap intervals."""
    mean = float(np.mean([one["unbiased"] for one in found]))
    ends = [min(one["low"] for one in found), max(one["high"] for one in found)]
    axes.errorbar(
        [x], [mean], yerr=around(mean, ends), color=SERIES[series], marker=MARKERS[series], linestyle="none",
        markersize=5, capsize=2, linewidth=1, label=label,
    )  # fmt: skip


@styled
def factorisation_figure(result: Record, request: str, kinds: Sequence[str] | None = None, title: str = "") -> Figure:
    """Draw the decoder head's overlap beside the product of its factors' cosines, and their ratio.

    Parameters
    ----------
    kinds
        Of VAE, a row each; the originals' and, where there is one, that by squared error if None.

    Raises
    ------
    EmptyGroupError
        If nothing of this was measured.
    """
    kinds = list(kinds or dict.fromkeys((result["base"], "log_mse")))
    kinds = [kind for kind in kinds if dig(result, "variants", kind, "requests", request, "factorisation")]
    if not kinds:
        raise EmptyGroupError(f"factorisation, {request}", "no kind of model", "at least one")
    figure = new_figure(7.8, 2.6 * len(kinds) + 0.7, title)
    panels = figure.subplots(len(kinds), 2, squeeze=False, width_ratios=[1.2, 1])
    for (left, right), kind in zip(panels, kinds, strict=True):
        records = place(result, kind, request)["factorisation"]
        for x, name in enumerate(VARIANTS):
            rows = [row for record in records for row in record["variants"] if row["variant"] == name]
            _estimate(left, x - 0.15, [row["measured"] for row in rows], 0, "measured")
            _estimate(left, x + 0.15, [row["product"] for row in rows], 1, "product of the data's factors")
            _estimate(right, x, [row["ratio"] for row in rows], 1, "product of the data's factors")
        svd = {key: [record["svd"][key] for record in records] for key in ("product", "ratio")}
        _points(left, 0.4, svd["product"], 2, "product by singular vectors (range of models)")
        _points(right, 0.25, svd["ratio"], 2, "product by singular vectors (range of models)")
        for axes, key in ((left, "product"), (right, "ratio")):
            mixed = [record["published"][key] for record in records]
            _estimate(axes, len(VARIANTS), mixed, 4, "residuals' σ against the Fisher")
            axes.set_xticks(range(len(VARIANTS) + 1), [*VARIANTS.values(), "mismatched\nas published"], fontsize=7)
        right.axhline(1, color=INK, linewidth=0.7)
        left.set(ylabel=f"{named(kind)}: cosine", ylim=(-0.02, None))
        right.set(ylabel="product ÷ measured", ylim=(0, None))
    legend(figure, *panels.ravel(), columns=2)
    return figure


@styled
def ladder_figure(result: Record, requests: Sequence[str], kind: str | None = None, title: str = "") -> Figure:
    """Draw the overlap of all parameters of the first model from the paper's estimator to the exact one, step by step.

    Only the last step has an interval (of cells and models); the others are one number of one model.

    Raises
    ------
    EmptyGroupError
        If no request has a ladder.
    """
    kind = kind or result["base"]
    rows = [(name, place(result, kind, name)) for name in requests]
    rows = [(name, found) for name, found in rows if dig(found["models"][0], "ladder")]
    if not rows:
        raise EmptyGroupError(f"ladder of estimators of {kind}", "no request", "at least one")
    figure = new_figure(6.0, 3.4, title)
    axes = figure.subplots()
    for i, (name, found) in enumerate(rows):
        first, last = found["models"][0], found["overlap"]["global"]
        values = [first["ladder"][rung] for rung in list(RUNGS)[:3]]
        values += [first["exact"]["groups"]["global"]["cosine"], last["per_model"][0]]
        values[-1] = min(values[-1], 1.0)
        x = np.arange(len(RUNGS)) + 0.08 * (i - (len(rows) - 1) / 2)
        axes.plot(x, values, color=SERIES[i], marker=MARKERS[i], linestyle=DASHES[i % 4], markersize=5, label=name)
        low, high = (min(end, 1.0) for end in last["interval"])
        words = "95 %, cells and models" if i == len(rows) - 1 else "_interval"
        axes.vlines(x[-1] + 0.12, low, high, color=SERIES[i], linestyle=DASHES[i % 4], linewidth=1.2, label=words)
    axes.set_xticks(range(len(RUNGS)), list(RUNGS.values()), fontsize=8)
    axes.set(ylabel="overlap of all parameters", ylim=(0, 1.05))
    legend(figure, axes)
    return figure
