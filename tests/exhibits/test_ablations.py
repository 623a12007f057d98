from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from scforget.errors import EmptyGroupError
from scforget.exhibits.ablations import KINDS, curve_figure, feature_figure, sensitivity_figure, size_figure
from scforget.report.figures import png_bytes

Row = dict[str, Any]
MARGINS = {"membership": 0.02, "trace": 1.0, "elbo": 5.0}


def compared(value: float, width: float | None = 0.5) -> Row:
    """A record of one statistic; without a width, of a single model."""
    ends = [None, None] if width is None else [value - width, value + 2 * width]
    return {
        "mean": value, "interval": ends, "difference": value, "difference_interval": ends,
        "retrain_mean": 0.1, "retrain_interval": [0.05, 0.2],
    }  # fmt: skip


def row(value: float, width: float | None = 0.5, **label: Any) -> Row:
    names = ("membership", "trace", "distance", "elbo")
    return {"models": 3, **label, **{name: compared(value + i, width) for i, name in enumerate(names)}}


def bars(figure: Figure, panel: int) -> list[np.ndarray]:
    """Ends of the intervals drawn in a panel: ``[points, 2]`` of each series."""
    axes = figure.axes[panel]
    return [
        np.array([[segment[:, 1].min(), segment[:, 1].max()] for segment in container[2][0].get_segments()])
        for container in axes.containers
    ]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for legend in figure.legends for text in legend.get_texts()]


def test_size_figure_draws_each_kind_with_its_intervals() -> None:
    rows = [
        row(size / 10 + i, kind=kind, size=size, method=method)
        for kind in KINDS for size in (10, 30) for i, method in enumerate(("original", "ssd"))
    ]  # fmt: skip
    figure = size_figure(rows, MARGINS)
    assert len(figure.axes) == 4
    assert labels(figure) == ["original", "ssd"]
    first, second = bars(figure, 0)
    np.testing.assert_allclose(first, [[0.5, 2], [2.5, 4]])
    np.testing.assert_allclose(second, [[1.5, 3], [3.5, 5]])
    assert [tick.get_text() for tick in figure.axes[2].get_xticklabels()] == ["10", "30"]


def test_size_figure_leaves_out_what_diverged() -> None:
    rows = [row(1.0, kind=kind, size=10, method="original") for kind in KINDS]
    lost = {"kind": "scattered", "size": 10, "method": "ssd", "models": 0, "failed": 3}
    assert labels(size_figure([*rows, lost], MARGINS)) == ["original"]
    with pytest.raises(EmptyGroupError, match="size ablation"):
        size_figure([lost], MARGINS)


def test_sensitivity_figure_makes_series_of_the_other_keys() -> None:
    steps = [row(s * d, method="a", values={"steps": s, "damping": d}) for s in (5, 50) for d in (0.1, 1.0)]
    lam = [row(value, None, method="b", values={"lam": value}) for value in (5.0, 20.0)]
    figure = sensitivity_figure({"ascent": steps, "game": lam}, row(9.0), MARGINS)
    assert len(figure.axes) == 4
    texts = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert texts == ["original", "steps 5", "steps 50"]
    assert [axes.get_xlabel() for axes in figure.axes[2:]] == ["damping", "lam"]
    np.testing.assert_allclose(bars(figure, 0)[1], [[5.5, 7], [50.5, 52]])
    np.testing.assert_allclose(bars(figure, 1)[0], [[6, 6], [21, 21]])  # a single model has no interval


def test_feature_figure_shows_originals_beside_retrained_models() -> None:
    rows = [
        {**row(value), "features": name, "columns": n}
        for value, name, n in ((0.6, "encoder", 64), (0.7, "decoder", 1), (0.65, "all", 69))
    ]
    figure = feature_figure({"nk": [{**one, **compared(one["membership"]["mean"], 0.1)} for one in rows]})
    own, base = bars(figure, 0)
    np.testing.assert_allclose(own, [[0.5, 0.8], [0.6, 0.9], [0.55, 0.85]])
    np.testing.assert_allclose(base, [[0.05, 0.2]] * 3)
    ticks = [tick.get_text() for tick in figure.axes[0].get_xticklabels()]
    assert ticks == ["μ, log σ²\n(64)", "reconstruction\n(1)", "all\n(69)"]


def test_curve_figure_draws_passes_and_seconds() -> None:
    places = [("retrain", 1), ("retrain", 2), ("ssd", 1)]
    rows = [row(5.0 / n, 0.1, method=method) | {"passes": {"mean": 100.0 * n}} for method, n in places]
    seconds = [{"method": method, "seconds": {"mean": 0.5 * n}} for method, n in places]
    figure = curve_figure(rows, seconds, compared(1.0))
    assert labels(figure) == ["retrain", "ssd"]
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[0].lines}
    np.testing.assert_allclose(lines["retrain"], [[100, 7], [200, 4.5]])
    lines = {line.get_label(): line.get_xydata() for line in figure.axes[1].lines}
    np.testing.assert_allclose(lines["ssd"], [[0.5, 7]])
    with pytest.raises(EmptyGroupError, match="learning curves"):
        curve_figure([], [], compared(1.0))


def test_figures_are_the_same_bytes_again() -> None:
    rows = [row(1.0, kind=kind, size=10, method="original") for kind in KINDS]
    assert png_bytes(size_figure(rows, MARGINS)) == png_bytes(size_figure(rows, MARGINS))
