"""Figures of the Fisher analysis: how alike the information of forgotten and of retained cells is, and where.

Every point has its interval; what a colour says, a marker or a place says as well. The grey box beside a point is what
as many random retained cells show: overlap below it is of the kind of cell, overlap within it of their number alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from scforget.arrays import FloatArray
from scforget.errors import EmptyGroupError
from scforget.exhibits.measured import dig
from scforget.report.figures import BAND, INK, SERIES, SOFT, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = Mapping[str, Any]

GROUPS = {
    "encoder": "encoder", "bottleneck": "bottleneck", "decoder_hidden": "decoder\nhidden",
    "decoder_output": "decoder\noutput", "global": "all",
}  # fmt: skip
OUTPUT = {"scale_shared": "output,\nshared", "scale_condition": "output,\ncluster's"}
CLASSIFIER = {"hidden": "hidden", "output": "output", "global": "all"}
WORDS = {
    "nb": "NB", "zinb": "ZINB", "log_mse": "squared error", "conditional": "told the cluster",
    "probe": "linear classifier", "deep": "deep classifier", "matched": "classifier of the VAE's size",
}  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def named(kind: str) -> str:
    """Name a kind of model for people."""
    return f"latent {kind.removeprefix('latent_')}" if kind.startswith("latent_") else WORDS.get(kind, kind)


def place(result: Record, kind: str, request: str) -> Record:
    """Everything about one kind of model under one request.

    Raises
    ------
    EmptyGroupError
        If it was not measured.
    """
    family = "variants" if kind in result["variants"] else "classifiers"
    found = dig(result, family, kind, "requests", request)
    if found is None:
        raise EmptyGroupError(f"Fisher analysis of {kind}, {request}", "nothing", "a kind and a request that it holds")
    return dict(found)


def around(value: float, ends: Sequence[float]) -> FloatArray:
    """How far an interval reaches below and above, ``[2, 1]``; 0 on a side where it does not hold the value."""
    return np.array([[max(value - ends[0], 0)], [max(ends[1] - value, 0)]])


def _mark(axes: Axes, x: float, found: tuple[float, Sequence[float]], series: int, label: str, **how: Any) -> None:
    value, ends = found
    axes.errorbar(
        [x], [value], yerr=around(value, ends), color=SERIES[series], marker=MARKERS[series], linestyle="none",
        markersize=5, capsize=2, linewidth=1, label=label, **how,
    )  # fmt: skip


def _null(axes: Axes, x: float, found: Record, width: float = 0.4) -> None:
    """A box where as many random retained cells lie."""
    low, high = (min(end, 1.0) for end in found["range"])
    axes.bar(
        [x], [high - low], width, bottom=[low], facecolor=BAND, edgecolor=SOFT, linestyle=":", linewidth=0.7, zorder=0,
        label="as many random cells",
    )  # fmt: skip


def _range(models: Sequence[Record], group: str) -> list[float]:
    values = [dig(model, "published", "groups", group, "cosine") for model in models]
    return [float(value) for value in values if value is not None]


def _layers(axes: Axes, found: Record, groups: Mapping[str, str]) -> None:
    """Overlap part by part, with all that it is to be read beside."""
    held = {group: words for group, words in groups.items() if group in found["overlap"]}
    for x, group in enumerate(held):
        one = found["overlap"][group]
        _null(axes, x, one["same_size"], 0.8)
        _mark(axes, x - 0.2, (one["unbiased"], one["interval"]), 0, "exact, noise removed")
        if published := _range(found["models"], group):
            mean, ends = float(np.mean(published)), [min(published), max(published)]
            _mark(axes, x, (mean, ends), 1, "paper's estimator (range of models)", mfc="white")
        far = one["unrelated"]
        _mark(axes, x + 0.2, (far["unbiased"], far["interval"]), 2, "against another kind of cell")
        ceiling = min(one["halves"]["unbiased"], 1.0)
        axes.plot([x], [ceiling], "_", color=INK, markersize=14, label="halves of the retained")
    axes.set_xticks(range(len(held)), list(held.values()), fontsize=8)
    axes.set_ylim(-0.02, 1.05)


def legend(figure: Figure, *every: Axes, columns: int = 3) -> None:
    """Name each series once, below the picture."""
    named_: dict[str, Any] = {}
    for axes in every:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            named_.setdefault(label, handle)
    figure.legend(list(named_.values()), list(named_), loc="outside lower center", ncols=columns)


@styled
def layer_figure(result: Record, request: str, kind: str | None = None, title: str = "") -> Figure:
    """Draw overlap by layer group for one request: exact, by the published estimator, and ceiling, null and floor.

    Parameters
    ----------
    result
        Of the stage ``overlap``.
    request
        Name of a forget request.
    kind
        Of VAE; the originals' if None.
    title
        Above the picture.

    Raises
    ------
    EmptyGroupError
        If the kind or the request was not measured.
    """
    found = place(result, kind or result["base"], request)
    figure = new_figure(6.4, 3.8, title)
    axes = figure.subplots()
    _layers(axes, found, GROUPS | {"dispersion": "dispersion"})
    axes.set_ylabel("overlap (cosine of Fisher diagonals)")
    legend(figure, axes, columns=2)
    return figure


@styled
def request_figure(result: Record, requests: Sequence[str], kind: str | None = None, title: str = "") -> Figure:
    """Draw the same for several requests side by side: structured ones against scattered cells.

    Raises
    ------
    EmptyGroupError
        Without a request, or if one was not measured.
    """
    if not requests:
        raise EmptyGroupError("requests of a picture", "none", "at least one")
    figure = new_figure(max(4.0, 3.1 * len(requests)), 3.6, title)
    panels = figure.subplots(1, len(requests), sharey=True, squeeze=False)[0]
    for axes, request in zip(panels, requests, strict=True):
        found = place(result, kind or result["base"], request)
        _layers(axes, found, GROUPS)
        axes.set_title(f"{request} ({found['models'][0]['forget_cells']} cells)")
        axes.tick_params("x", labelrotation=30)
    panels[0].set_ylabel("overlap")
    legend(figure, *panels)
    return figure


def _grouped(
    axes: Axes, rows: Sequence[tuple[str, Record]], groups: Mapping[str, str], first: int = 0
) -> None:  # fmt: skip
    """Kinds of models side by side within each group, each by its own marker."""
    held = {g: words for g, words in groups.items() if any(g in found["overlap"] for _, found in rows)}
    step = 0.8 / len(rows)
    for i, (kind, found) in enumerate(rows):
        for x, group in enumerate(held):
            if group in found["overlap"]:
                one, at = found["overlap"][group], x + step * (i - (len(rows) - 1) / 2)
                _null(axes, at, one["same_size"], 0.8 * step)
                _mark(axes, at, (one["unbiased"], one["interval"]), first + i, named(kind))
    axes.set_xticks(range(len(held)), list(held.values()), fontsize=8)
    axes.set_ylim(-0.02, 1.05)


@styled
def kind_figure(result: Record, request: str, title: str = "") -> Figure:
    """Draw kinds of VAE side by side: likelihoods, a smaller latent space, and a decoder that is told the cluster.

    Raises
    ------
    EmptyGroupError
        If the request was not measured.
    """
    kinds = [result["base"], *sorted(set(result["variants"]) - {result["base"]})]
    figure = new_figure(7.6, 3.6, title)
    axes = figure.subplots()
    _grouped(axes, [(kind, place(result, kind, request)) for kind in kinds], GROUPS | OUTPUT)
    axes.set_ylabel("overlap (exact, noise removed)")
    legend(figure, axes)
    return figure


@styled
def classifier_figure(result: Record, request: str, title: str = "") -> Figure:
    """Draw the VAE beside classifiers on one scale: whether the decoder's sharing makes the overlap.

    Raises
    ------
    EmptyGroupError
        If the request or all classifiers were not measured.
    """
    kinds = [kind for kind in ("probe", "deep", "matched") if kind in result["classifiers"]]
    if not kinds:
        raise EmptyGroupError("classifiers of a picture", "none", "at least one")
    figure = new_figure(7.6, 3.6, title)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=[len(GROUPS), 2 + len(CLASSIFIER)])
    vaes = [kind for kind in dict.fromkeys((result["base"], "log_mse")) if kind in result["variants"]]
    _grouped(left, [(kind, place(result, kind, request)) for kind in vaes], GROUPS)
    _grouped(right, [(kind, place(result, kind, request)) for kind in kinds], CLASSIFIER, first=len(vaes))
    left.set(title="VAE", ylabel="overlap (exact, noise removed)")
    right.set_title("classifiers")
    legend(figure, left, right)
    return figure
