import subprocess
import sys
import xml.etree.ElementTree as ET

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import betabinom

from scforget.errors import DataError, EmptyGroupError
from scforget.report import comparisons, figures, tables


def texts(figure):
    return [found.get_text() for found in figure.findobj(mpl.text.Text)]


def points(axes):
    """(x, y) of each error bar, and the ends of its bar."""
    for container in axes.containers:
        line, _, bars = container
        yield line.get_xydata()[0], bars[0].get_segments()[0]


@pytest.fixture
def draw(audits, scores, history):
    """Draw each picture anew."""
    members, controls, retrain = scores
    rng = np.random.default_rng(3)
    labels = np.repeat(["T & B", "NK <56>", "a$b$"], 40)
    everything = {
        "training_curves": lambda: figures.training_curves(history, "x < y & $z$"),
        "roc": lambda: figures.roc({"original": (members, controls), "a<b": (members[:, :9], controls)}, "t"),
        "score_histograms": lambda: figures.score_histograms(members, controls, retrain, title="t", label="a score"),
        "umap": lambda: figures.umap(xy, labels, labels == "NK <56>", "t & u"),
        "distance_to_target": lambda: comparisons.distance_to_target(audits),
        "cost_against_trace": lambda: comparisons.cost_against_trace(audits),
        "attack_grid": lambda: comparisons.attack_grid(audits),
    }
    xy = rng.normal(size=(120, 2))
    return everything


NAMES = [
    "training_curves",
    "roc",
    "score_histograms",
    "umap",
    "distance_to_target",
    "cost_against_trace",
    "attack_grid",
]


@pytest.mark.parametrize("name", NAMES)
def test_bytes_are_the_same_for_the_same_picture(draw, name):
    before = dict(mpl.rcParams)
    svg, png = figures.svg_text(draw[name]()), figures.png_bytes(draw[name](), dpi=60)
    assert svg == figures.svg_text(draw[name]())
    assert png == figures.png_bytes(draw[name](), dpi=60)
    assert "<dc:date>" not in svg
    assert b"Software" not in png
    assert ET.fromstring(svg).tag.endswith("svg")
    assert dict(mpl.rcParams) == before


def test_svg_is_the_same_in_another_process_and_pyplot_stays_out():
    code = """
import hashlib, sys
from scforget.report import figures
assert "matplotlib" not in sys.modules, "importing the room must be cheap"
svg = figures.svg_text(figures.roc({"a": ([[1.0, 3, 5]], [[0.0, 2, 4]])}))
assert "matplotlib.pyplot" not in sys.modules
print(hashlib.sha256(svg.encode()).hexdigest())
"""
    runs = [
        subprocess.run([sys.executable, "-c", code], env={"PYTHONHASHSEED": seed}, capture_output=True, check=True)
        for seed in ("1", "2")
    ]
    assert runs[0].stdout == runs[1].stdout != b""


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from([0.5, 0.9, 0.95]))
def test_null_band_is_beta_binomial(members, controls, level):
    ranks = np.arange(1, controls + 1)
    exact = betabinom(members, ranks, controls - ranks + 1)
    low, high = np.rint(figures.null_band(members, controls, ranks, level) * members)
    tail = (1 - level) / 2
    # A quantile may sit on a step of the cdf; then either side of the step is right, up to rounding.
    assert np.all(exact.cdf(low) >= tail - 1e-9)
    assert np.all(exact.cdf(low - 1) <= tail + 1e-9)
    assert np.all(exact.cdf(high) >= 1 - tail - 1e-9)
    assert np.all(exact.cdf(high - 1) <= 1 - tail + 1e-9)


def test_null_band_covers_curves_without_a_leak():
    rng = np.random.default_rng(0)
    ranks = figures._ranks(60)
    low, high = figures.null_band(30, 60, ranks)
    fpr, tpr = figures.roc_points(rng.normal(size=(4000, 30)), rng.normal(size=(4000, 60)))
    inside = ((tpr[:, :-1] >= low) & (tpr[:, :-1] <= high)).mean(axis=0)
    assert inside.min() > 0.94
    assert fpr[0] == 0


def test_null_band_of_large_groups_is_finite():
    low, high = figures.null_band(500, 5000, figures._ranks(5000))
    assert np.isfinite([low, high]).all()
    assert np.all(low <= high)


cells = st.lists(st.integers(0, 6), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(cells, cells)
def test_roc_points_equal_the_best_threshold_by_brute_force(members, controls):
    f, u = np.array([members], dtype=float), np.array([controls], dtype=float)
    fpr, tpr = figures.roc_points(f, u)
    for limit, found in zip(fpr, tpr[0], strict=True):
        best = max(np.mean(f[0] >= t) for t in [*f[0], *u[0], np.inf] if np.mean(u[0] >= t) <= limit + 1e-12)
        assert found == pytest.approx(best)


def test_roc_draws_mean_and_range_over_models(scores):
    members, controls, _ = scores
    figure = figures.roc({"ssd": (members, controls)})
    linear, log = figure.axes
    curve = next(line for line in linear.lines if line.get_label() == "ssd")
    _, rates = figures.roc_points(members, controls)
    assert np.array_equal(curve.get_ydata(), rates.mean(axis=0))
    assert (linear.get_xscale(), log.get_xscale(), log.get_yscale()) == ("linear", "log", "log")


@pytest.mark.parametrize("curves", [{}, {"a": ([], [1.0])}, {"a": ([1.0], [])}])
def test_roc_refuses_empty_groups(curves):
    with pytest.raises(EmptyGroupError, match="ROC"):
        figures.roc(curves)


@pytest.mark.parametrize(
    "pair", [(np.array([[1.0, np.nan]]), np.ones((1, 3))), (np.ones((2, 3)), np.ones((3, 3)))], ids=["nan", "models"]
)
def test_roc_refuses_scores_that_do_not_belong_together(pair):
    with pytest.raises(DataError, match="'ssd'"):
        figures.roc({"ssd": pair})


def test_score_histograms_drop_cells_without_score_and_say_how_many(scores):
    members, controls, retrain = scores
    members[2, 4] = np.nan
    figure = figures.score_histograms(members, controls, retrain, label="a score")
    assert [axes.get_ylabel().split("\n")[1] for axes in figure.axes] == [
        "13 × 5 models",
        "17 × 5 models",
        "14 × 8 models",
    ]
    assert figure.axes[0].lines[0].get_xdata()[0] == np.median(np.delete(members, 4, axis=1))
    assert len(figure.axes[2].lines[1].get_xdata()) == 14


def test_score_histograms_refuse_an_empty_group(scores):
    with pytest.raises(EmptyGroupError, match="histogram"):
        figures.score_histograms(scores[0], [np.nan], scores[2], label="")


def test_training_curves_average_seeds_and_miss_what_is_missing(history):
    assert [axes.get_ylabel() for axes in figures.training_curves(history, "t").axes] == list(figures.CURVES)[:2]
    figure = figures.training_curves(history.drop(columns="kl"), "t")
    (left,) = figure.axes
    mean = next(line for line in left.lines if line.get_label().startswith("stop"))
    assert mean.get_ydata() == pytest.approx(history.groupby("epoch")["stop_elbo"].mean().to_numpy())
    assert len(left.lines) == 2 * (3 + 1)
    history["stop_elbo"] = np.nan
    assert len(figures.training_curves(history, "t").axes[0].lines) == 4


def test_training_curves_of_a_classifier_are_its_loss_and_accuracy():
    rows = [{"seed": seed, "epoch": e, "train_loss": 1 / e, "train_accuracy": e / 9} for seed in (0, 1) for e in (1, 2)]
    loss, accuracy = figures.training_curves(pd.DataFrame(rows), "t").axes
    assert [axes.get_ylabel() for axes in (loss, accuracy)] == ["loss", "accuracy"]
    assert loss.lines[-1].get_ydata().tolist() == [1, 0.5]


def test_training_curves_share_an_axis_where_no_column_has_one_of_its_own():
    rows = [{"seed": 0, "epoch": e, "noise": 2 * e, "other": 1, "empty": np.nan} for e in (1, 2)]
    (axes,) = figures.training_curves(pd.DataFrame(rows), "t").axes
    assert [line.get_label() for line in axes.lines[1::2]] == ["noise", "other"]


def test_training_curves_refuse_an_empty_history(history):
    for bad in (history.iloc[:0], history.drop(columns="seed"), history[["seed", "epoch"]]):
        with pytest.raises(DataError, match="training history"):
            figures.training_curves(bad, "t")


def test_umap_marks_the_forget_cells_and_names_the_groups(draw):
    figure = draw["umap"]()
    marked = next(c for c in figure.axes[0].collections if c.get_label() == "forget set")
    assert len(marked.get_offsets()) == 40
    assert {"T & B", "NK <56>", "a$b$"} <= set(texts(figure))
    assert not any(text.get_parse_math() for text in figure.findobj(mpl.text.Text) if "$" in text.get_text())


def test_distance_to_target_draws_differences_intervals_and_margins(audits):
    figure = comparisons.distance_to_target(audits)
    for axes, key, margin in zip(figure.axes, ("membership", "trace"), (0.02, 1.0), strict=True):
        found = {int(at[1]): (at[0], bar[:, 0]) for at, bar in points(axes)}
        for row, method in enumerate(tables.ordered(audits)):
            x, bar = found[row]
            if method == "retrain":
                assert x == 0
                assert bar == pytest.approx([-0.3 * margin, 0.3 * margin])
            else:
                wanted = audits[method]["primary"][key]
                assert x == wanted["difference"]
                assert bar == pytest.approx(wanted["interval"])
        band = axes.patches[0].get_extents().transformed(axes.transData.inverted())
        assert [band.x0, band.x1] == pytest.approx([-margin, margin])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == tables.ordered(audits)


def test_distance_to_target_compresses_the_axis_of_a_wrecked_model(audits):
    assert comparisons.distance_to_target(audits).axes[1].get_xscale() == "linear"
    audits["gradient_ascent"]["primary"]["trace"].update(difference=-1e5, interval=[-2e5, -1e4])
    figure = comparisons.distance_to_target(audits)
    assert [axes.get_xscale() for axes in figure.axes] == ["linear", "symlog"]
    figures.png_bytes(figure, dpi=50)


def test_distance_to_target_turns_its_words_with_the_original(audits):
    assert "remembered  →" in comparisons.distance_to_target(audits).axes[0].get_xlabel()
    audits["original"]["primary"]["membership"]["difference"] = -0.2
    assert "←  remembered" in comparisons.distance_to_target(audits).axes[0].get_xlabel()


def test_cost_against_trace_shows_methods_with_a_cost_and_the_original_as_a_line(audits):
    audits["ssd"]["cost"]["passes_ratio"] = None
    figure = comparisons.cost_against_trace(audits)
    found = {tuple(at) for at, _ in points(figure.axes[0])}
    assert found == {(1.0, 0.0), (0.21, 0.3), (0.33, 1.2), (0.11, -6.4)}
    assert "original" in texts(figure)
    assert "ssd" not in texts(figure)
    line = next(line for line in figure.axes[0].lines if list(line.get_ydata()) == [11.0, 11.0])
    assert line.get_marker() == "None"


def test_attack_grid_outlines_what_is_outside_the_null_band(audits):
    audits["ssd"]["attacks"].pop("kl")
    axes = comparisons.attack_grid(audits).axes[0]
    order, attacks = tables.ordered(audits), ["elbo", "kl", "knn", "reconstruction"]
    cells = {(round(t.get_position()[1] - 0.5), round(t.get_position()[0] - 0.5)): t for t in axes.texts}
    assert len(cells) == 24
    for (i, j), text in cells.items():
        record = audits[order[i]]["attacks"].get(attacks[j])
        if record is None:
            assert text.get_text() == "–"
        else:
            assert text.get_text() == f"{record['same_group']['auc']:.2f}"
            assert (text.get_weight() == "bold") == (record["same_group"]["advantage"] > 0.222)


def test_attack_grid_outlines_no_learned_attack_and_puts_them_last(audits):
    strong = {**audits["ssd"]["attacks"]["elbo"]["same_group"], "auc": 0.97, "advantage": 0.94}
    audits["ssd"]["attacks"] |= {
        "elbo": {"same_group": strong},
        "mlp": {"same_group": {**strong, "null": None}},
        "a_new_one": {"same_group": strong},
        "published_mlp": {"same_group": {**strong, "null": None}},
    }
    figure = comparisons.attack_grid(audits)
    assert figures.png_bytes(figure, dpi=30).startswith(b"\x89PNG")
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert names == ["a_new_one", "elbo", "kl", "knn", "reconstruction", "mlp", "published_mlp"]
    row = tables.ordered(audits).index("ssd") + 0.5
    outlined = {
        names[int(text.get_position()[0])]: text.get_bbox_patch().get_edgecolor()[3] > 0
        for text in axes.texts
        if text.get_position()[1] == row and text.get_text() == "0.97"
    }
    assert outlined == {"elbo": True, "a_new_one": True, "mlp": False, "published_mlp": False}
    assert "learned attacks have none" in axes.get_title(loc="left")


def test_pictures_of_audits_survive_gaps(gaps):
    broken = list(gaps("ssd"))
    for audits in [*broken[::30], {}, {"ssd": {}}, {"retrain": {}}]:
        for picture in (comparisons.distance_to_target, comparisons.cost_against_trace, comparisons.attack_grid):
            assert figures.png_bytes(picture(audits), dpi=30).startswith(b"\x89PNG")
