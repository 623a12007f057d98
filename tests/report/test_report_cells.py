"""Every forget cell is drawn where it stands, beside what a retrained model shows, few or many."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from scforget import artifacts, pictures
from scforget.artifacts import Workspace
from scforget.errors import DataError, EmptyGroupError
from scforget.report import cells, figures

BAND = (-2.0, 1.8)


def table(n, labels=("NK", "B"), shift=0.0, half=0.5):
    """``n`` cells in no order, kinds in turn."""
    z = np.random.default_rng(n).normal(shift, 2, n)
    return pd.DataFrame({"label": np.resize(labels, n), "z": z, "low": z - half, "high": z + half})


def drawn(axes):
    """(place, z) of every cell, by place; lines of two points are axes and bars."""
    points = [line.get_xydata() for line in axes.lines if line.get_marker() in {"o", "s"}]
    found = np.concatenate(points)
    return found[np.argsort(found[:, 0])]


@pytest.mark.parametrize("n", [1, 20, 500])
def test_cell_scores_draws_every_cell_once_from_the_most_exposed_on(n):
    data = table(n)
    found = drawn(cells.cell_scores(data, BAND).axes[0])
    assert found[:, 0].tolist() == list(range(1, n + 1))
    assert found[:, 1].tolist() == sorted(data["z"], reverse=True)


def test_cell_scores_draws_a_bar_for_each_of_a_few_cells_and_a_band_for_a_crowd():
    data = table(20)
    bars = cells.cell_scores(data, BAND).axes[0].collections
    ends = sorted(tuple(np.round(bar[:, 1], 9)) for found in bars for bar in found.get_segments())
    assert ends == sorted(tuple(np.round(pair, 9)) for pair in data[["low", "high"]].to_numpy())
    (band,) = cells.cell_scores(table(500), BAND).axes[0].collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.max() == table(500)["high"].max()
    assert heights.min() == table(500)["low"].min()


def test_cell_scores_shades_what_a_retrain_shows_and_counts_what_is_above():
    data = table(40)
    axes = cells.cell_scores(data, BAND).axes[0]
    (shaded,) = axes.patches
    box = shaded.get_extents().transformed(axes.transData.inverted())
    assert [box.y0, box.y1] == pytest.approx(list(BAND))
    above = int((data["z"] > BAND[1]).sum())
    assert 0 < above < 40
    assert axes.get_title(loc="left").startswith(f"{above} of 40 above")
    bare = cells.cell_scores(data, (np.nan, np.nan)).axes[0]
    assert not bare.patches
    assert not bare.get_title(loc="left")


def test_cell_scores_gives_each_common_kind_a_row_and_a_colour_and_the_rest_one():
    labels = [f"kind {i}" for i in range(11) for _ in range(12 - i)]
    figure = cells.cell_scores(table(len(labels), labels), BAND)
    top, rows = figure.axes
    names = [label.get_text() for label in rows.get_yticklabels()]
    assert names == [*(f"kind {i} ({12 - i})" for i in range(8)), "other (9)"]
    colours = [to_hex(line.get_color()) for line in rows.lines]
    assert colours[-1] == figures.SOFT
    assert len(set(colours[:6])) == 6
    assert figures.SOFT not in colours[:-1]
    assert [len(line.get_xdata()) for line in rows.lines] == [12, 11, 10, 9, 8, 7, 6, 5, 9]
    points = [line for line in top.lines if line.get_marker() == "s"]
    assert [to_hex(line.get_color()) for line in points] == colours
    for tick, point in zip(rows.lines, points, strict=True):
        assert list(tick.get_xdata()) == list(point.get_xdata())


def test_cell_scores_names_a_single_kind_on_the_axis_and_cells_without_one_too():
    figure = cells.cell_scores(table(5, ["a$b$"]), BAND)
    assert len(figure.axes) == 1
    assert "forget set (a$b$)" in figure.axes[0].get_xlabel()
    data = table(5).assign(label=[np.nan, "NK", np.nan, np.nan, "NK"])
    rows = cells.cell_scores(data, BAND).axes[1]
    assert [label.get_text() for label in rows.get_yticklabels()] == ["no label (3)", "NK (2)"]


def test_cell_scores_shortens_long_names_so_that_the_picture_keeps_its_width():
    rows = cells.cell_scores(table(6, ["x" * 90, "B"]), BAND).axes[1]
    assert rows.get_yticklabels()[1].get_text() == f"{'x' * 27}… (3)"


@pytest.mark.parametrize(("shift", "scale"), [(0.0, "linear"), (30.0, "linear"), (-5000.0, "symlog")])
def test_cell_scores_compresses_the_axis_when_cells_are_far_off(shift, scale):
    figure = cells.cell_scores(table(30, shift=shift), BAND)
    axes = figure.axes[0]
    assert axes.get_yscale() == scale
    assert figures.png_bytes(figure, dpi=40).startswith(b"\x89PNG")
    if scale == "symlog":
        assert not [at for at in axes.get_yticks() if 0 < abs(at) <= 2 * abs(BAND[0])]


@pytest.mark.parametrize("n", [20, 500])
def test_cell_scores_bears_cells_without_an_interval(n):
    data = table(n).assign(low=np.nan, high=np.nan)  # one model only
    assert figures.png_bytes(cells.cell_scores(data, BAND), dpi=40).startswith(b"\x89PNG")


def test_cell_scores_refuses_what_it_cannot_draw():
    with pytest.raises(DataError, match="no low, high"):
        cells.cell_scores(table(3)[["label", "z"]], BAND)
    with pytest.raises(EmptyGroupError, match="forget cells"):
        cells.cell_scores(table(3).iloc[:0], BAND)
    with pytest.raises(DataError, match="1 not finite"):
        cells.cell_scores(table(3).assign(z=[1.0, np.inf, 2.0]), BAND)


@pytest.mark.parametrize(("n", "labels"), [(20, ["NK"]), (30, list("ABCDEFGHIJ")), (500, ["NK"])])
def test_cell_scores_is_the_same_small_file_twice(n, labels):
    before, data = dict(mpl.rcParams), table(n, labels)
    png = figures.png_bytes(cells.cell_scores(data, BAND, "nk, ssd"))
    assert png == figures.png_bytes(cells.cell_scores(data, BAND, "nk, ssd"))
    assert len(png) < 60_000
    assert dict(mpl.rcParams) == before
    pd.testing.assert_frame_equal(data, table(n, labels))


@pytest.fixture
def workspace(tmp_path):
    """Results of the two judging stages, the cells of ``ssd`` in their table."""
    place, rng = Workspace(tmp_path), np.random.default_rng(0)
    forget = np.arange(9) < 4
    scores = {"original/elbo": rng.normal(size=(2, 9)), "retrain/elbo": rng.normal(size=(3, 9))}
    reference = place.results("reference", "pbmc", "nk")
    artifacts.write_arrays(reference / "scores.npz", {"forget": forget, "same_group": ~forget, **scores})
    for method in ("ssd", "old"):
        folder = place.results("audit", "pbmc", "nk", method)
        artifacts.write_arrays(folder / "scores.npz", {f"{method}/elbo": rng.normal(size=(2, 9))})
        artifacts.write_json(folder / "result.json", {"exposure": {"null_band": [-1.5, 1.25]}})
    made = table(4).assign(cell=list("abcd"), donor="", rank=1)
    artifacts.write_table(place.results("audit", "pbmc", "nk", "ssd") / "cells.csv", made)
    return place


def test_audited_draws_single_cells_of_a_method_whose_table_is_there(workspace):
    found = pictures.audited(workspace, "pbmc", "nk", "ssd")
    assert set(found) == {"roc", "score_histograms", "cell_scores"}
    axes = found["cell_scores"].axes[0]
    assert drawn(axes)[:, 1] == pytest.approx(sorted(table(4)["z"], reverse=True))
    box = axes.patches[0].get_extents().transformed(axes.transData.inverted())
    assert [box.y0, box.y1] == pytest.approx([-1.5, 1.25])
    for method in ("original", "retrain", "old"):
        assert set(pictures.audited(workspace, "pbmc", "nk", method)) == {"roc", "score_histograms"}
