import numpy as np
import pandas as pd
import pytest
from scipy import stats

from scforget.errors import DataError, EmptyGroupError
from scforget.exhibits import paper
from scforget.exhibits import paper_scatter as scatter
from scforget.report.figures import png_bytes


def audit(auc, verdict, seed, **changes):
    generator = np.random.default_rng(seed)
    models = (auc + 0.02 * generator.normal(size=4)).clip(0, 1)
    low, high = max(0.0, auc - 0.15), min(1.0, auc + 0.15)
    attack = {
        "auc": float(models.mean()),
        "interval": [low, high],
        "advantage": float(np.mean(2 * np.abs(models - 0.5))),
        "per_seed": models.tolist(),
        "per_seed_intervals": [[low, high]] * 4,
        "null": {"mean": 0.1, "q95": 0.25},
    }
    utility = {
        m: {"mean": at, "interval": [at - w, at + w]} for m, at, w in (("elbo", -376, 1), ("marker_r", 0.6, 0.01))
    }
    primary = {
        key: {
            "difference": scale * (auc - 0.55),
            "interval": [scale * (auc - 0.6), scale * (auc - 0.5)],
            "margin": wide,
        }
        for key, scale, wide in (("membership", 1, 0.02), ("trace", 20, 1.0))
    }
    return {
        "verdict": verdict,
        "seeds": [0, 1, 2, 3],
        "groups": {"forget": 19, "same_group": 10},
        "trace_per_seed": (20 * (models - 0.55)).tolist(),
        "attacks": {"elbo": {"same_group": attack}, "mlp": {"same_group": attack | {"null": None}}},
        "primary": primary,
        "utility": {"verdict": "kept", "outside": utility},
    } | changes


@pytest.fixture
def audits():
    return {
        "original": audit(0.85, "NOT_FORGOTTEN", 0),
        "retrain": audit(0.55, "TARGET", 1, primary=None),
        "one": audit(0.42, "OVER_FORGOTTEN", 2),
        "two": audit(0.57, "FORGOTTEN", 3),
        "bare": {"verdict": None},
    }


def words(figure):
    figure.canvas.draw()
    texts = [text.get_text() for axes in figure.axes for text in axes.texts]
    texts += [label.get_text() for axes in figure.axes for label in (*axes.get_yticklabels(), *axes.get_xticklabels())]
    legends = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
    return texts + legends + [axes.get_title("left") for axes in figure.axes]


def with_interval(low, auc, high, **more):
    return {"attacks": {"elbo": {"same_group": {"auc": auc, "interval": [low, high]} | more}}}


@pytest.mark.parametrize(
    ("ends", "wanted"),
    [((0.6, 0.7, 0.9), (0.4, 0.2, 0.8)), ((0.1, 0.3, 0.4), (0.4, 0.2, 0.8)), ((0.45, 0.5, 0.8), (0.0, 0.0, 0.6))],
)
def test_advantage_of_maps_the_auc_s_interval(ends, wanted):
    np.testing.assert_allclose(paper.advantage_of(with_interval(*ends), "elbo"), wanted)
    low, _, high = ends
    inside = 2 * np.abs(np.linspace(low, high, 2001) - 0.5)  # the image, by brute force
    np.testing.assert_allclose([inside.min(), inside.max()], wanted[1:], atol=1e-3)


def test_advantage_of_what_is_missing_is_unknown():
    assert np.isnan(paper.advantage_of(None, "elbo").centre)
    assert np.isnan(paper.advantage_of({"attacks": {}}, "elbo").high)


def test_difference_from_retrain_is_welch_s():
    own, base = [0.7, 0.72, 0.69], [0.5, 0.55, 0.61, 0.52]
    wanted = stats.ttest_ind(own, base, equal_var=False).confidence_interval(0.95)
    found = paper.difference_from_retrain(own, base)
    np.testing.assert_allclose(found[1:], wanted)
    assert np.isnan(paper.difference_from_retrain([0.7], base).low)
    assert np.isnan(paper.difference_from_retrain([], base).centre)


def test_advantage_bars_draw_the_bars_the_retrains_and_chance(audits):
    figure = paper.advantage_bars(audits)
    axes = figure.axes[0]
    bars = {round(patch.get_width(), 9) for patch in axes.patches}
    for method in ("original", "retrain", "one", "two"):
        assert round(paper.advantage_of(audits[method], "elbo").centre, 9) in bars
    places = [line.get_xdata()[0] for line in axes.lines if len(set(line.get_xdata())) == 1]
    assert {0.1, 0.25} <= set(places)
    seen = words(figure)
    assert "not measured" in seen
    assert {"Retrains, 95 %", "No leak, mean", "No leak, 95 %"} <= set(seen)


def test_advantage_bars_cross_shows_the_published_mean_where_models_disagree():
    split = with_interval(0.4, 0.5, 0.6, advantage=0.3) | {"verdict": "UNDETERMINED"}
    agreed = with_interval(0.55, 0.65, 0.7, advantage=0.3) | {"verdict": "UNDETERMINED"}
    for one, wanted in ((split, [0.3]), (agreed, [])):
        axes = paper.advantage_bars({"one": one}).axes[0]
        assert [line.get_xdata()[0] for line in axes.lines if line.get_marker() == "x"] == wanted


def test_bars_of_learned_attacks_claim_no_chance(audits):
    seen = words(paper.auc_bars(audits, attack="mlp"))
    assert not any("No leak" in text for text in seen)
    assert "No leak, 95 %" in words(paper.auc_bars(audits))


def test_place_bars_gives_every_place_its_own_panel_and_the_same_methods(audits):
    other = {name: one for name, one in audits.items() if name != "two"}
    figure = paper.place_bars({"a/b": audits, "c/d": other})
    assert [axes.get_title("left").split("\n")[0] for axes in figure.axes] == ["a/b", "c/d"]
    missing = [[text.get_text() for text in axes.texts].count("not measured") for axes in figure.axes]
    assert missing == [1, 2]
    assert "19 cells, 10 controls" in figure.axes[0].get_title("left")


def test_attack_heatmap_shades_differences_and_writes_numbers(audits):
    figure = paper.attack_heatmap(audits)
    rows = paper.ordered(audits)
    shades = figure.axes[0].collections[0].get_array().reshape(5, 2)
    one, base = (audits[name]["attacks"]["elbo"]["same_group"]["per_seed"] for name in ("one", "retrain"))
    assert shades[rows.index("one"), 0] == pytest.approx(np.mean(one) - np.mean(base))
    assert shades.mask[rows.index("retrain")].all()
    assert shades.mask[rows.index("bare")].all()
    bold = {text.get_text().split("\n")[0] for text in figure.axes[0].texts if text.get_weight() == "bold"}
    assert f"{np.mean(one):.2f}" in bold
    assert f"{audits['two']['attacks']['elbo']['same_group']['auc']:.2f}" not in bold


def test_per_model_reads_both_statistics(audits):
    assert scatter.per_model(audits["one"], "trace").tolist() == audits["one"]["trace_per_seed"]
    assert len(scatter.per_model(audits["one"], "membership")) == 4
    assert not scatter.per_model(audits["bare"], "trace").size


def test_advantage_against_utility_places_methods_beside_the_retrain(audits):
    audits["one"]["utility"]["outside"]["elbo"] = {"mean": -426.0, "interval": [-430.0, -422.0]}
    figure = scatter.advantage_against_utility(audits)
    upper, lower = figure.axes
    marks = [(line.get_xdata()[0], line.get_ydata()[0]) for line in upper.lines if len(line.get_xdata()) == 1]
    wanted = -50.0, paper.advantage_of(audits["one"], "elbo").centre
    assert any(np.allclose(at, wanted) for at in marks)
    assert upper.get_xscale() == "symlog"
    assert lower.get_xscale() == "linear"
    assert {"original", "retrain", "one", "two"} <= set(words(figure))


@pytest.mark.parametrize("key", ["membership", "trace"])
def test_seed_boxes_show_every_model_and_the_margin(audits, key):
    figure = scatter.seed_boxes(audits, key)
    axes = figure.axes[0]
    dots = np.concatenate([line.get_xdata() for line in axes.lines if line.get_marker() == "."])
    every = [scatter.per_model(one, key) for one in audits.values()]
    np.testing.assert_allclose(np.sort(dots), np.sort(np.concatenate(every)))
    band = axes.patches[0]
    wide = {"membership": 0.02, "trace": 1.0}[key]
    assert band.get_width() == pytest.approx(2 * wide)
    assert band.get_x() + wide == pytest.approx(scatter.per_model(audits["retrain"], key).mean())


def test_by_forget_type_has_a_column_for_each_scenario(audits):
    figure = scatter.by_forget_type({"cluster": audits, "scattered": {"retrain": audits["retrain"]}})
    assert [axes.get_title("left").split("\n")[0] for axes in figure.axes] == ["cluster", "scattered"]
    texts = [[text.get_text() for text in axes.texts].count("not measured") for axes in figure.axes]
    assert texts == [1, 4]
    with pytest.raises(EmptyGroupError):
        scatter.by_forget_type({})


def test_latent_maps_put_every_cell_in_every_map():
    generator = np.random.default_rng(0)
    maps = {name: generator.normal(size=(40, 2)) for name in ("original", "one", "retrain")}
    forget = np.arange(40) < 7
    figure = scatter.latent_maps(maps, generator.integers(0, 9, 40), forget)
    for axes, (name, at) in zip(figure.axes, maps.items(), strict=True):
        drawn = np.concatenate([points.get_offsets() for points in axes.collections])
        np.testing.assert_allclose(np.sort(drawn, axis=0), np.sort(at, axis=0))
        np.testing.assert_allclose(axes.collections[-1].get_offsets(), at[:7])
        assert axes.get_title("left") == name
    for wrong in ({}, {"one": np.zeros((39, 2))}):
        with pytest.raises(DataError):
            scatter.latent_maps(wrong, np.zeros(40), forget)


def test_extragradient_traces_draw_every_model_and_the_mean(audits):
    history = pd.DataFrame(
        [
            {"seed": s, "epoch": e, "payoff": -0.1 * e - 0.01 * s, "ema_auc": 0.9 - 0.1 * s}
            for s in range(4)
            for e in (1, 2, 3)
        ]
    )
    figure = scatter.extragradient_traces(history, audits, method="one")
    left, middle, right = figure.axes
    mean = [line for line in middle.lines if line.get_linewidth() == 1.8]
    np.testing.assert_allclose(mean[0].get_ydata(), 0.75)
    assert len([line for line in left.lines if line.get_linewidth() == 0.7]) == 4
    shown = [line.get_ydata()[0] for line in right.lines if len(line.get_xdata()) == 1 and line.get_marker() == "D"]
    np.testing.assert_allclose(shown, audits["one"]["attacks"]["elbo"]["same_group"]["per_seed"])
    for bad in (history.iloc[:0], history.drop(columns="payoff")):
        with pytest.raises(DataError, match="history"):
            scatter.extragradient_traces(bad, audits)


def test_advantage_bars_are_the_same_bytes_twice(audits):
    assert png_bytes(paper.advantage_bars(audits), dpi=40) == png_bytes(paper.advantage_bars(audits), dpi=40)


@pytest.mark.parametrize(
    "draw",
    [
        paper.advantage_bars,
        paper.attack_heatmap,
        scatter.seed_boxes,
        scatter.advantage_against_utility,
        lambda audits: scatter.by_forget_type({"a": audits}),
    ],
)
def test_pictures_stand_missing_retrains(audits, draw):
    assert draw({"one": audits["one"], "bare": audits["bare"]}).axes
