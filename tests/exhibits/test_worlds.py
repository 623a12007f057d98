import copy

import numpy as np
import pytest

from scforget.errors import DataError
from scforget.exhibits.worlds import bound_against_likelihood, membership, plane
from scforget.report.figures import png_bytes


def population(auc, trace):
    return {
        "auc": auc, "auc_interval": [auc - 0.1, auc + 0.1], "auc_per_model": [auc - 0.02, auc + 0.02],
        "trace_per_model": [trace - 0.5, trace + 0.5], "trace": trace, "trace_interval": [trace - 1, trace + 1],
    }  # fmt: skip


def world(name, leaks):
    populations = {"original": population(0.7, 4.0), "retrain": population(0.5, 0.0), "apart": population(0.51, 0.1)}
    if leaks:
        populations |= {"ssd": population(0.6, -9.0), "scrub": population(0.65, 3.0)}
    gap = {"forgotten": 3, "original": {"gap": 0.4}, "retrain": {"gap": 2.0}}
    return {"world": name, "draw": 0, "forgotten": 3, "leaks": leaks, "populations": populations, "likelihood": gap}


@pytest.fixture
def worlds():
    return [world("far_scattered", True), world("near", False)]


@pytest.fixture
def arrays():
    rng, found = np.random.default_rng(0), {}
    axis = np.linspace(-3, 3, 21)
    for name in ("far_scattered", "near"):
        for kind in ("original", "retrain"):
            for what in ("score", "log_likelihood"):
                found[f"{name}/0/{what}_{kind}"] = rng.normal(size=10)
    density = -0.5 * (axis[:, None] ** 2 + axis**2)
    plane = {"axis": axis, "truth": density, "original": density + 0.1, "retrain": density * 2}
    plane |= {"points": rng.normal(size=(9, 2)), "forgotten": np.arange(9) < 3}
    return found | {f"near/0/{name}": values for name, values in plane.items()}


def texts(figure):
    return " ".join(
        text.get_text() for axes in figure.axes for text in [*axes.texts, axes.title, *axes.get_xticklabels()]
    )


def test_membership_shows_each_population_once_and_says_where_nothing_is(worlds):
    figure = membership(worlds)
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["original", "retrain", "apart", "ssd", "scrub"]
    assert "(leaks)" in texts(figure)
    assert "(nothing\nto forget)" in texts(figure)


def test_membership_draws_every_value_with_its_interval(worlds):
    upper = membership(worlds).axes[0]
    drawn = [tuple(line.get_ydata()) for line in upper.lines]
    for row in worlds:
        for one in row["populations"].values():
            assert (one["auc"],) in drawn
            assert tuple(one["auc_interval"]) in drawn
            assert tuple(one["auc_per_model"]) in drawn


def test_membership_tells_populations_apart_without_colour(worlds):
    upper = membership(worlds).axes[0]
    marks = {
        line.get_label(): (line.get_marker(), line.get_markerfacecolor())
        for line in upper.lines
        if line.get_label() in worlds[0]["populations"]
    }
    assert len({mark for mark, _ in marks.values()}) == len(marks) == 5


def test_membership_refuses_nothing():
    with pytest.raises(DataError, match="worlds"):
        membership([])


def test_bound_against_likelihood_draws_a_panel_a_world(worlds, arrays):
    figure = bound_against_likelihood(worlds, arrays)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert len(shown) == 2
    first = {line.get_label(): line for line in shown[0].lines}
    np.testing.assert_array_equal(
        first["original, forgotten"].get_xdata(), arrays["far_scattered/0/log_likelihood_original"][:3]
    )
    np.testing.assert_array_equal(
        first["retrain, fresh points"].get_ydata(), arrays["far_scattered/0/score_retrain"][3:]
    )


def test_plane_draws_law_original_and_retrain(arrays):
    figure = plane(arrays, "near/0")
    assert len(figure.axes) == 3
    for axes in figure.axes:
        lengths = {line.get_label(): len(line.get_xdata()) for line in axes.lines}
        assert lengths == {"retained": 6, "forgotten": 3}
    with pytest.raises(DataError, match="dimension 2"):
        plane(arrays, "far_scattered/0")


def test_pictures_of_equal_results_are_equal_bytes(worlds, arrays):
    for draw in (lambda: membership(copy.deepcopy(worlds)), lambda: plane(dict(arrays), "near/0")):
        assert png_bytes(draw(), dpi=40) == png_bytes(draw(), dpi=40)
