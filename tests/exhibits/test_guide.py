import numpy as np
import pytest
from scipy.stats import beta

from scforget.errors import DataError
from scforget.exhibits import guide as g


def audit(aucs, traces, verdict="FORGOTTEN", utility="kept", passes=0.2, **changes):
    primary = {"margin": 0.02, "models_needed": 1}
    return {
        "verdict": verdict,
        "models": len(aucs),
        "trace_per_seed": list(traces),
        "attacks": {"elbo": {"same_group": {"per_seed": list(aucs), "auc": float(np.mean(aucs))}}},
        "primary": {
            "membership": primary | {"difference": float(np.mean(aucs)) - 0.55},
            "trace": primary | {"margin": 1.0, "difference": float(np.mean(traces))},
        },
        "utility": {"verdict": utility, "outside": {"elbo": {"mean": -376.0}, "marker_r": {"mean": 0.6}}},
        "cost": {"passes_ratio": passes, "seconds": 2.0, "seconds_ratio": 0.5},
        "failed_seeds": {},
        "nothing_to_forget": False,
    } | changes


def retrain():
    found = audit([0.50, 0.55, 0.55, 0.60], [0.1, -0.2, 3.0, 0.4], "TARGET", passes=1.0)
    return found | {"primary": None}


def place(**methods):
    original = audit([0.9] * 4, [9] * 4, "NOT_FORGOTTEN", passes=1.1)
    return {"original": original, "retrain": retrain()} | methods


GOOD = ([0.55, 0.56, 0.54, 0.60], [0.1, -2.0, 0.3, 0.2])


def test_within_margins_counts_models_that_are_inside_by_both_statistics():
    audits = place(one=audit(*GOOD))
    aucs, traces = GOOD
    slow = sum(
        abs(a - 0.55) <= 0.02 and abs(t - np.mean([0.1, -0.2, 3.0, 0.4])) <= 1
        for a, t in zip(aucs, traces, strict=True)
    )
    assert g.within_margins(audits, "one") == (slow, 4) == (2, 4)


def test_within_margins_judges_a_retrain_by_the_others():
    two = audit([0.50, 0.53], [0.1, -0.2], "TARGET", primary=None)  # 0.03 apart, each 0.015 from their common mean
    assert g.within_margins({"retrain": two, "one": audit(*GOOD)}, "retrain") == (0, 2)
    three = audit([0.55, 0.55, 0.61], [0.1, -0.2, 0.1], "TARGET", primary=None)
    assert g.within_margins({"retrain": three, "one": audit(*GOOD)}, "retrain") == (0, 3)
    near = audit([0.55, 0.55, 0.56], [0.1, -2.0, 0.1], "TARGET", primary=None)  # the second's trace is 1.4 off
    assert g.within_margins({"retrain": near, "one": audit(*GOOD)}, "retrain") == (2, 3)
    assert g.within_margins(place(), "retrain") == (0, 4)  # no verdict's margins are known without a method


def test_within_margins_says_when_there_is_nothing_to_judge_by():
    audits = place(one=audit(*GOOD), bare={"verdict": None})
    alone = {"one": audit(*GOOD)}
    assert g.within_margins(audits, "bare") == g.within_margins(alone, "one") == (0, 0)


def test_guide_gives_the_exact_interval_of_the_share():
    table = g.guide({"a/b": place(one=audit(*GOOD))}, {"a/b": "cluster"}).set_index("method")
    row = table.loc["one"]
    wanted = beta.ppf(0.025, 2, 3), beta.ppf(0.975, 3, 2)
    np.testing.assert_allclose([row["success_lo"], row["success_hi"]], wanted)
    assert row["success"] == 0.5
    assert np.isnan(table.loc["original", "passes_ratio"])


@pytest.mark.parametrize(
    "spoilt",
    [
        {"verdict": "UNDETERMINED"},
        {"verdict": "OVER_FORGOTTEN"},
        {"utility": {"verdict": "lost"}},
        {"utility": {"verdict": "undetermined"}},
        {"failed_seeds": {"3": "NaN"}},
        {"cost": {"passes_ratio": 1.2}},
        {"cost": {}},
    ],
)
def test_choose_takes_the_cheapest_that_fits_and_no_other(spoilt):
    cheap, dear = audit(*GOOD, passes=0.1), audit(*GOOD, passes=0.5)
    kinds = {"a/b": "subset"}
    assert g.choose(g.guide({"a/b": place(cheap=cheap, dear=dear)}, kinds)) == {"subset": "cheap"}
    assert g.choose(g.guide({"a/b": place(cheap=cheap | spoilt, dear=dear)}, kinds)) == {"subset": "dear"}
    assert g.choose(g.guide({"a/b": place(cheap=cheap | spoilt)}, kinds)) == {"subset": "retrain"}


def test_choose_asks_for_success_at_every_place_of_a_kind():
    fine, bad = audit(*GOOD), audit(*GOOD, verdict="NOT_FORGOTTEN")
    places = {"a/b": place(one=fine, two=fine), "c/d": place(one=bad, three=fine), "e/f": place(one=fine)}
    kinds = {"a/b": "cluster", "c/d": "cluster", "e/f": "scattered"}
    table = g.guide(places, kinds)
    assert g.choose(table) == {"cluster": "retrain", "scattered": "one"}
    assert set(table.loc[table["recommended"], "method"]) == {"retrain", "one"}


def test_guide_refuses_a_place_of_no_known_kind():
    for kinds in ({}, {"a/b": "galaxy"}):
        with pytest.raises(DataError, match="a/b"):
            g.guide({"a/b": place()}, kinds)


def test_to_markdown_is_honest_about_what_is_open():
    needs = {"membership": {"margin": 0.02, "models_needed": 3}, "trace": {"margin": 1.0, "models_needed": 1}}
    never = {"membership": {"margin": 0.02, "models_needed": None}, "trace": {"margin": 1.0, "models_needed": 1}}
    audits = place(
        open=audit(*GOOD, verdict="UNDETERMINED", primary=needs),
        never=audit(*GOOD, verdict="UNDETERMINED", primary=never),
        ruined=audit(*GOOD, utility="lost"),
    )
    audits["original"]["nothing_to_forget"] = True
    text = g.to_markdown(g.guide({"a/b": audits}, {"a/b": "cluster"}))
    assert "**Retrain.** No method is shown to forget a whole cell type" in text
    assert "`open` in a/b (3 times as many models should decide)" in text
    assert "`never` in a/b (no practical number of models decides)" in text
    assert "the utility is lost or undetermined: `ruined`" in text
    assert "the original is not shown to remember" in text
    assert text.count("Not measured: no scenario of this kind was run. Retrain.") == 3


def test_to_markdown_names_the_method_with_its_cost_and_share():
    text = g.to_markdown(g.guide({"a/b": place(one=audit(*GOOD))}, {"a/b": "donor"}))
    assert "**Use `one`.**" in text
    assert "20 % of a retrain's passes over cells, 2.0 s a model" in text
    assert "2 of 4 lie within the margins" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + 3
    assert len({line.count("|") for line in rows}) == 1


def test_to_markdown_escapes_names():
    text = g.to_markdown(g.guide({"a/<b>|c": place(one=audit(*GOOD))}, {"a/<b>|c": "donor"}))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert all("<b>" not in row and "&lt;b&gt;\\|c" in row for row in rows[2:])
