from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from overlaps import overlap_result
from scforget.errors import EmptyGroupError
from scforget.exhibits.fisher import classifier_figure, kind_figure, layer_figure, request_figure
from scforget.exhibits.fisher_more import factorisation_figure, ladder_figure, rank_figure, scatter_figure
from scforget.report.figures import png_bytes

RESULT = overlap_result(requests=("rare", "scattered"))


def points(axes: Axes, label: str) -> list[tuple[float, float]]:
    """Where the points of a series lie."""
    return [
        (float(one[0].get_xdata()[0]), float(one[0].get_ydata()[0]))
        for one in axes.containers if one.get_label() == label and hasattr(one, "has_yerr")
    ]  # fmt: skip


def bars(axes: Axes, label: str) -> list[list[float]]:
    """Ends of the intervals of a series."""
    found = []
    for one in axes.containers:
        if one.get_label() == label and hasattr(one, "has_yerr"):
            (segment,) = one[2][0].get_segments()
            found.append([float(segment[:, 1].min()), float(segment[:, 1].max())])
    return found


def boxes(axes: Axes) -> list[list[float]]:
    """Ends of the grey boxes."""
    return [[patch.get_y(), patch.get_y() + patch.get_height()] for patch in axes.patches]


def ticks(axes: Axes) -> list[str]:
    return [tick.get_text().replace("\n", " ") for tick in axes.get_xticklabels()]


def labels(figure: Figure) -> list[str]:
    return [text.get_text() for one in figure.legends for text in one.get_texts()]


def test_layer_figure_draws_estimate_null_floor_and_published_of_each_part() -> None:
    result = overlap_result({"nb": {"encoder": 0.2, "global": 0.5}})
    axes = layer_figure(result, "rare").axes[0]
    assert ticks(axes) == ["encoder", "bottleneck", "decoder hidden", "decoder output", "all", "dispersion"]
    exact = points(axes, "exact, noise removed")
    assert [y for _, y in exact] == pytest.approx([0.2, 0.4, 0.4, 0.4, 0.5, 0.4])
    np.testing.assert_allclose(bars(axes, "exact, noise removed")[0], [0.2 / 1.1, 0.22])
    np.testing.assert_allclose(bars(axes, "paper's estimator (range of models)")[0], [0.29, 0.31])
    np.testing.assert_allclose(bars(axes, "against another kind of cell")[0], [0.03, 0.08])
    np.testing.assert_allclose(boxes(axes), [[0.9, 1.0]] * 6)


def test_layer_figure_keeps_an_estimate_outside_its_interval() -> None:
    result = overlap_result({"nb": {}})
    group = result["variants"]["nb"]["requests"]["rare"]["overlap"]["encoder"]
    group["interval"] = [0.1, 0.3]  # a bootstrap's percentiles need not hold the estimate of 0.4
    axes = layer_figure(result, "rare").axes[0]
    np.testing.assert_allclose(bars(axes, "exact, noise removed")[0], [0.1, 0.4])


def test_request_figure_has_a_panel_for_each_request() -> None:
    figure = request_figure(RESULT, ["rare", "scattered"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["rare (19 cells)", "scattered (19 cells)"]
    assert len(labels(figure)) == len(set(labels(figure))) == 5
    with pytest.raises(EmptyGroupError, match="requests"):
        request_figure(RESULT, [])


def test_kind_figure_puts_kinds_side_by_side_and_the_clusters_columns_where_there_are_some() -> None:
    result = overlap_result()
    for kind in ("nb", "log_mse", "latent_8"):
        del result["variants"][kind]["requests"]["rare"]["overlap"]["scale_condition"]
    figure = kind_figure(result, "rare")
    (axes,) = figure.axes
    assert ticks(axes)[-2:] == ["output, shared", "output, cluster's"]
    assert set(labels(figure)) == {"NB", "told the cluster", "latent 8", "squared error", "as many random cells"}
    assert [len(points(axes, name)) for name in ("NB", "told the cluster")] == [6, 7]
    columns = [x for name in ("NB", "told the cluster", "latent 8", "squared error") for x, _ in points(axes, name)]
    assert len({round(x, 6) for x in columns}) == len(columns)  # none hides another


def test_classifier_figure_shares_its_axis_with_the_vae() -> None:
    figure = classifier_figure(RESULT, "rare")
    left, right = figure.axes
    assert left.get_ylim() == right.get_ylim()
    assert ticks(right) == ["hidden", "output", "all"]
    assert [y for _, y in points(right, "linear classifier")] == pytest.approx([0.02, 0.02])
    assert [y for _, y in points(right, "deep classifier")] == pytest.approx([0.26, 0.01, 0.02])
    with pytest.raises(EmptyGroupError, match="classifiers"):
        classifier_figure({**RESULT, "classifiers": {}}, "rare")


def test_scatter_figure_writes_the_correlation_of_random_cells_where_it_is_known() -> None:
    drawn = {f"{kind}/rare": np.random.default_rng(0).normal(size=(50, 2)) for kind in ("vae", "probe")}
    figure = scatter_figure(RESULT, drawn, "rare")
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    assert titles == ["VAE, NB\nr = 0.70 (0.70 to 0.70); random 0.70", "linear classifier\nr = 0.70 (0.70 to 0.70)"]
    np.testing.assert_allclose(figure.axes[0].collections[0].get_offsets(), drawn["vae/rare"])
    with pytest.raises(EmptyGroupError, match="scattered"):
        scatter_figure(RESULT, drawn, "scattered")


def test_rank_figure_sets_forgotten_cells_beside_as_many_random_ones() -> None:
    result = overlap_result({"nb": {}})
    for model in result["variants"]["nb"]["requests"]["rare"]["models"]:
        model["exact_same_size"]["effective_rank"]["forget"]["entropy"] = 3000.0
        model["exact_same_size"]["top_1_percent"] = 0.6
    first, second, third = rank_figure(result, "rare").axes
    names = ("forgotten", "as many random cells", "retained")
    assert [points(first, name)[0][1] for name in names] == pytest.approx([1000, 3000, 4000])
    assert points(second, "retained")[0][1] == pytest.approx(400)
    assert [points(third, name)[0][1] for name in names[:2]] == pytest.approx([0.2, 0.6])


def test_factorisation_figure_has_a_row_for_each_loss_and_every_variant() -> None:
    figure = factorisation_figure(RESULT, "rare")
    assert len(figure.axes) == 4
    measured, ratio = figure.axes[:2]
    assert [y for _, y in points(measured, "measured")] == pytest.approx([0.37] * 4)
    assert [y for _, y in points(ratio, "product of the data's factors")] == pytest.approx([1.11, 1.0, 1.0, 1.1])
    assert points(ratio, "residuals' σ against the Fisher")[0][1] == pytest.approx(1.7)
    np.testing.assert_allclose(bars(ratio, "product of the data's factors")[0], [1.09, 1.13])
    with pytest.raises(EmptyGroupError, match="factorisation"):
        factorisation_figure(RESULT, "rare", ["latent_8"])


def test_ladder_figure_ends_at_the_first_model_without_noise() -> None:
    axes = ladder_figure(RESULT, ["rare", "scattered"]).axes[0]
    first, second = axes.get_lines()
    np.testing.assert_allclose(first.get_ydata(), [0.3, 0.2, 0.35, 0.39, 0.4])
    assert first.get_label() == "rare"
    assert (np.asarray(first.get_xdata()) < np.asarray(second.get_xdata())).all()
    result = overlap_result()
    del result["variants"]["nb"]["requests"]["rare"]["models"][0]["ladder"]
    with pytest.raises(EmptyGroupError, match="ladder"):
        ladder_figure(result, ["rare"])


@pytest.mark.parametrize("draw", [layer_figure, kind_figure, classifier_figure, rank_figure, factorisation_figure])
def test_figures_give_equal_bytes_and_refuse_unknown_requests(draw: Any) -> None:
    assert png_bytes(draw(RESULT, "rare"), dpi=40) == png_bytes(draw(RESULT, "rare"), dpi=40)
    with pytest.raises(EmptyGroupError, match="donor"):
        draw(RESULT, "donor")
