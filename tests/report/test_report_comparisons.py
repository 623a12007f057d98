"""Pictures of all methods of a scenario on common axes: distance against passes, and their ROC curves."""

import matplotlib as mpl
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scforget.report import comparisons, figures, tables


def texts(figure):
    return [found.get_text() for found in figure.findobj(mpl.text.Text)]


def points(axes):
    """Place of each error bar -> the ends of its bar."""
    found = {}
    for container in axes.containers:
        line, _, bars = container
        found[tuple(line.get_xydata()[0].tolist())] = bars[0].get_segments()[0][:, 1].tolist()
    return found


@pytest.fixture
def curves(scores):
    members, controls, retrain = scores
    rng = np.random.default_rng(1)
    return {
        "original": (members, controls),
        "retrain": (retrain, rng.normal(size=(8, 17))),
        "ssd": (members - 0.2, controls),
        "partial_reset": (members - 1.0, controls),
    }


@given(st.dictionaries(st.text(max_size=3), st.tuples(st.integers(0, 9), st.integers(0, 9)), max_size=12))
def test_front_is_what_no_point_beats(places):
    front = comparisons._front(places)
    everyone = set(places.values())
    beaten = {p for p in everyone if any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in everyone)}
    assert front == sorted(everyone - beaten)


@settings(max_examples=200)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=16), st.floats(0.001, 0.06))
def test_apart_keeps_the_order_the_gap_and_the_axes(heights, gap):
    found = comparisons._apart(np.sort(heights), gap)
    assert (np.diff(found) >= gap - 1e-9).all()
    assert found[0] >= -1e-9
    assert found[-1] <= 1 + 1e-9


def test_apart_moves_nothing_that_has_room():
    heights = np.array([0.0, 0.3, 0.5, 1.0])
    assert comparisons._apart(heights, 0.1) == pytest.approx(heights)


def test_distance_against_passes_shows_sizes_of_differences_and_their_intervals(audits):
    trace, membership = comparisons.distance_against_passes(audits).axes
    found = points(trace)
    # the retrain is its own target; the original's cost is not the question
    assert set(found) == {(1.0, 0.0), (0.04, 9.6), (0.21, 0.3), (0.33, 1.2), (0.11, 6.4)}
    assert found[0.11, 6.4] == pytest.approx([6.0, 6.8])  # -6.4 ± 0.4, turned over
    assert found[0.21, 0.3] == pytest.approx([0.0, 0.7])  # 0.3 ± 0.4 holds 0
    assert dict(list(points(membership)))[0.04] == pytest.approx(0.168)
    start = next(line for line in trace.lines if list(line.get_ydata()) == [11.0, 11.0])
    assert start.get_marker() == "None"


def test_distance_against_passes_joins_the_methods_that_nothing_beats(audits):
    axes = comparisons.distance_against_passes(audits).axes[0]
    steps = next(line for line in axes.lines if line.get_drawstyle() == "steps-post")
    assert steps.get_xydata().tolist() == [[0.04, 9.6], [0.11, 6.4], [0.21, 0.3], [1.0, 0.0]]


def test_distance_against_passes_says_what_became_of_the_utility(audits):
    said = texts(comparisons.distance_against_passes(audits))
    assert {"gradient_ascent (utility lost)", "retain_finetune (utility undetermined)", "ssd", "retrain"} <= set(said)


def test_distance_against_passes_leaves_out_what_was_not_measured(audits):
    audits["ssd"]["cost"]["passes_ratio"] = None
    audits["partial_reset"]["primary"]["trace"]["difference"] = None
    trace, membership = comparisons.distance_against_passes(audits).axes
    assert {x for x, _ in points(trace)} == {1.0, 0.33, 0.11}
    assert {x for x, _ in points(membership)} == {1.0, 0.21, 0.33, 0.11}


def test_distance_against_passes_is_linear_where_a_method_makes_no_pass(audits):
    assert comparisons.distance_against_passes(audits).axes[0].get_xscale() == "log"
    audits["ssd"]["cost"]["passes_ratio"] = 0.0
    figure = comparisons.distance_against_passes(audits)
    assert figure.axes[0].get_xscale() == "linear"
    assert (0.0, 9.6) in points(figure.axes[0])


def test_roc_overlay_draws_each_method_over_originals_and_retrains(audits, curves):
    figure = comparisons.roc_overlay(curves, audits, "t")
    ssd, partial_reset, empty = figure.axes
    assert ssd.get_title(loc="left") == "■ ssd\nAUC 0.698"
    assert partial_reset.get_title(loc="left") == "● partial_reset\nAUC 0.537"
    assert not empty.get_visible()
    drawn = [line.get_ydata() for line in ssd.lines]
    for found, name in zip(drawn, ("retrain", "original", "ssd"), strict=True):
        assert np.array_equal(found, figures.roc_points(*curves[name])[1].mean(axis=0))
    assert len({line.get_linestyle() + str(line.get_linewidth()) for line in ssd.lines}) == 3  # told apart in grey
    (band,) = ssd.collections
    _, target = figures.roc_points(*curves["retrain"])
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (target.min(), target.max())
    assert {"Range of the retrains", "Forgotten", "Not forgotten"} <= {t.get_text() for t in figure.legends[0].texts}


@pytest.mark.parametrize("count", [0, 1, 5, 7, 16])
def test_roc_overlay_has_a_panel_for_each_of_many_methods(curves, count):
    names = [f"m{index}" for index in range(count)]
    shown = {"original": curves["original"], "retrain": curves["retrain"]} | dict.fromkeys(names, curves["ssd"])
    figure = comparisons.roc_overlay(shown, {name: {} for name in shown})
    assert [axes.get_title(loc="left") for axes in figure.axes if axes.get_visible()] == [
        f"{tables.UNJUDGED.glyph} {name}\nAUC –" for name in names
    ]
    figures.png_bytes(figure, dpi=30)


def test_bytes_are_the_same_for_the_same_comparison(audits, curves):
    for draw in (lambda: comparisons.distance_against_passes(audits, "a$b"),
                 lambda: comparisons.roc_overlay(curves, audits, "a$b")):  # fmt: skip
        png = figures.png_bytes(draw(), dpi=60)
        assert png == figures.png_bytes(draw(), dpi=60)
        assert b"Software" not in png


def test_comparisons_survive_gaps(gaps, curves):
    broken = list(gaps("ssd"))
    for audits in [*broken[::20], {}, {"ssd": {}}, {"retrain": {}}]:
        assert figures.png_bytes(comparisons.distance_against_passes(audits), dpi=30).startswith(b"\x89PNG")
    for audits in broken[::60]:
        assert figures.png_bytes(comparisons.roc_overlay(curves, audits), dpi=30).startswith(b"\x89PNG")
