from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from overlaps import RATIOS, factorisation, overlap_result
from scforget.errors import EmptyGroupError
from scforget.exhibits.claims import CLAIMS, COLUMNS, VERDICTS, claims, decide, holds, to_markdown
from scforget.exhibits.measured import Estimate, Measured, Statement, minus, ratio, spread, within

INSIDE = Estimate(0.3, 0.2, 0.4, "e")


def said(value: float, width: float, **limit: float) -> Statement:
    return Statement("s", Estimate(value, value - width, value + width, "e"), **limit)


def verdicts(result: dict[str, Any], more: dict[str, Any] | None = None) -> dict[str, str]:
    table = claims(result, more or {}, request="rare")
    return dict(zip(table["claim"], table["verdict"], strict=True))


def one(found: dict[str, str], part: str) -> str:
    (verdict,) = [verdict for claim, verdict in found.items() if part in claim]
    return verdict


@pytest.mark.parametrize(
    ("number", "ours", "statement", "wanted"),
    [
        (0.3, INSIDE, said(2, 0.5, above=1), "survives"),
        (0.2, INSIDE, None, "survives"),
        (0.19, INSIDE, None, "changes"),
        (0.5, INSIDE, said(2, 0.5, above=1), "changes"),
        (0.3, INSIDE, said(0.5, 0.4, above=1), "falls"),
        (0.3, INSIDE, said(1, 0.5, above=1), "undetermined"),
        (0.5, INSIDE, said(1, 0.5, below=1), "undetermined"),
        (None, INSIDE, said(0.5, 0.4, below=1), "survives"),
        (None, INSIDE, said(2, 0.5, below=1), "falls"),
        (0.3, None, said(2, 0.5, above=1), "not measured"),
        (0.3, INSIDE, Statement("s", None, above=1), "not measured"),
        (0.3, Estimate(np.nan, 0, 1, "e"), None, "not measured"),
        (0.3, Estimate(0.3, np.nan, np.nan, "e"), None, "undetermined"),
    ],
)
def test_decide_follows_the_rule(
    number: float | None, ours: Estimate | None, statement: Statement | None, wanted: str
) -> None:
    assert decide(number, ours, statement) == wanted


def test_holds_leaves_an_interval_that_ends_at_the_limit_undecided() -> None:
    assert holds(said(0.5, 0.5, above=1)) is None
    assert holds(said(0.5, 0.5, below=1)) is None
    assert holds(said(0.5, 0.49, below=1)) is True
    assert holds(said(0.5, 0.49, above=1)) is False


def test_ratio_is_the_delta_method_where_intervals_are_lognormal() -> None:
    s, t = 0.2, 0.3
    first = Estimate(0.4, 0.4 * np.exp(-1.96 * s), 0.4 * np.exp(1.96 * s), "e")
    second = Estimate(0.1, 0.1 * np.exp(-1.96 * t), 0.1 * np.exp(1.96 * t), "e")
    found = ratio(first, second, "r")
    assert found is not None
    both = 1.96 * np.hypot(s, t)
    np.testing.assert_allclose(found[:3], [4, 4 * np.exp(-both), 4 * np.exp(both)])


def test_ratio_covers_the_true_ratio_of_two_independent_estimates() -> None:
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(2000):
        logs = np.log([0.5, 0.2]) + rng.normal(size=2) * [0.1, 0.4]
        pair = [
            Estimate(np.exp(at), np.exp(at - 1.96 * sd), np.exp(at + 1.96 * sd), "e")
            for at, sd in zip(logs, (0.1, 0.4), strict=True)
        ]
        found = ratio(pair[0], pair[1], "r")
        assert found is not None
        hits.append(found.low <= 2.5 <= found.high)
    assert 0.935 < np.mean(hits) < 0.965


def test_minus_takes_the_far_end_of_what_is_subtracted() -> None:
    found = minus(Estimate(5, 4, 8, "e"), Estimate(1, 0.5, 3, "e"), "d")
    assert found is not None
    np.testing.assert_allclose(found[:3], [4, 4 - np.hypot(1, 2), 4 + np.hypot(3, 0.5)])
    assert minus(None, INSIDE, "d") is None


def test_spread_of_one_model_has_no_interval_and_null_is_nan() -> None:
    found = spread([0.4], "s")
    assert found is not None
    assert found.value == pytest.approx(0.4)
    assert np.isnan([found.low, found.high]).all()
    assert spread([], "s") is None
    assert np.isnan(within(None, [None, 1.0], "e")[:2]).all()


def test_claims_have_one_row_each_and_known_verdicts() -> None:
    table = claims(overlap_result(), {}, request="rare")
    assert list(table.columns) == COLUMNS
    assert list(table["claim"]) == [claim.name for claim in CLAIMS]
    assert table["claim"].is_unique
    assert set(table["verdict"]) <= set(VERDICTS)
    row = table[table["claim"].str.endswith("all parameters")].iloc[0]
    np.testing.assert_allclose([row["ours"], row["low"], row["high"]], [0.4, 0.4 / 1.1, 0.44])


def test_claims_survive_where_the_published_numbers_are_found() -> None:
    base = {
        "encoder": 0.273, "bottleneck": 0.291, "decoder_hidden": 0.232, "decoder_output": 0.362, "global": 0.306,
        "scale_condition": 1.2e-8,
    }  # fmt: skip
    classes = {"output": 0.018, "global": 0.018}
    found = verdicts(
        overlap_result(
            {
                "nb": base, "log_mse": base, "latent_8": base | {"global": 0.846, "bottleneck": 0.858},
                "conditional": base | {"encoder": 0.433, "bottleneck": 0.508, "decoder_hidden": 0.346},
            },
            {"probe": classes, "deep": {"hidden": 0.262, "output": 0.01, "global": 0.051}, "matched": classes},
        )
    )  # fmt: skip
    for part in (
        "VAE: encoder", "VAE: bottleneck", "VAE: decoder, hidden", "VAE: decoder, output", "all parameters",
        "linear classifier of", "17 times", "gap arises", "Abstract", "shared output layer alone",
        "classifier: shared hidden", "class-specific output", "not on size", "smaller latent space overlaps",
        "concentrates", "columns do not", "overlaps: encoder", "overlaps: bottleneck", "overlaps: decoder, hidden",
        "overestimates", "dominant source", "cos σ from", "1/√C",
    ):  # fmt: skip
        assert one(found, part) == "survives", part
    assert one(found, "implied") == "falls"  # 0.306 is less than what random cells overlap
    assert one(found, "because of the NB") == "falls"  # the gap of 0.83 and 0.51 is there under squared error


def test_claims_fall_where_classifiers_overlap_more() -> None:
    classes = {"hidden": 0.8, "output": 0.9, "global": 0.9}
    found = verdicts(overlap_result(classifiers={"probe": classes, "deep": classes, "matched": classes}))
    for part in ("VAE: encoder", "all parameters", "linear classifier of", "17 times", "gap arises", "Abstract"):
        assert one(found, part) == "falls", part
    assert one(found, "class-specific output") == "undetermined"


def test_any_vae_means_every_kind_that_was_measured() -> None:
    kinds: dict[str, dict[str, float]] = {"nb": {}, "log_mse": {}, "latent_8": {"global": 0.02}}
    assert one(verdicts(overlap_result(kinds)), "Abstract") == "undetermined"
    kinds["latent_8"]["global"] = 0.005
    assert one(verdicts(overlap_result(kinds)), "Abstract") == "falls"
    kinds["latent_8"]["global"] = 0.4
    assert one(verdicts(overlap_result(kinds)), "Abstract") == "survives"


@pytest.mark.parametrize(("left", "wanted"), [(1.0, "survives"), (1.11, "falls"), (1.05, "undetermined")])
def test_the_softmax_is_judged_by_what_is_left_without_it(left: float, wanted: str) -> None:
    found = verdicts(overlap_result(ratios=RATIOS | {"uncoupled": left, "likelihood": 1.11}))
    assert one(found, "dominant source") == wanted


def test_claims_of_absent_stages_and_kinds_are_not_measured() -> None:
    found = verdicts(overlap_result({"nb": {}}, {"deep": {"hidden": 0.26, "output": 0.1, "global": 0.1}}))
    for part in (
        "scrubbing",
        "encoder leaks",
        "smaller latent space overlaps",
        "columns do not",
        "17 times",
        "1/√C",
        "take part",
        "because of the NB",
    ):
        assert one(found, part) == "not measured", part
    assert one(found, "classifier: shared hidden") == "survives"


def test_claims_read_other_stages() -> None:
    attack = {"advantage": 0.72, "advantage_interval": [0.6, 0.8]}
    row = {"variant": "conditional", "method": "fisher_scrub", "learned_matched_knn": attack}
    pair = {"learned_matched_knn": {"difference": 0.1, "interval": [0.02, 0.2]}}
    pair |= {"variant": "conditional", "method": "fisher_scrub"}
    feature = {"features": "decoder", "beyond_encoder": {"difference": 0.1, "interval": [0.05, 0.2]}}
    more: dict[str, Any] = {"conditional": {"rows": [row], "contrasts": [pair]}, "features": {"rare": [feature]}}
    found = verdicts(overlap_result(), more)
    assert (one(found, "scrubbing"), one(found, "encoder leaks")) == ("survives", "falls")
    pair["learned_matched_knn"]["interval"] = [-0.3, -0.2]
    assert one(verdicts(overlap_result(), more), "scrubbing") == "falls"
    feature["beyond_encoder"]["interval"] = [None, None]
    assert one(verdicts(overlap_result(), more), "encoder leaks") == "undetermined"
    more["features"] = {"scattered": [feature]}
    assert one(verdicts(overlap_result(), more), "encoder leaks") == "not measured"


def test_claims_refuse_a_request_that_was_not_measured() -> None:
    with pytest.raises(EmptyGroupError, match="b_cells"):
        claims(overlap_result(), {}, request="b_cells")


def test_proposition_is_tried_on_squared_error_where_there_is_some() -> None:
    assert Measured(overlap_result(), {}, "rare").squared == "log_mse"
    assert Measured(overlap_result({"nb": {}}), {}, "rare").squared == "nb"


def test_to_markdown_has_a_row_for_each_claim_and_a_column_for_each_data_set() -> None:
    first = claims(overlap_result(), {}, request="rare")
    second = claims(overlap_result({"nb": {}}), {}, request="rare")
    text = to_markdown({"one|set": first, "other": second})
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(rows) == len(CLAIMS) + 2
    assert {line.replace("\\|", "").count("|") for line in rows} == {6}
    assert "not measured" in text
    assert re.search(r"\bnan\b", text) is None
    for table in (first, second):
        assert table["verdict"].value_counts().sum() == len(CLAIMS)
    assert f"{(second['verdict'] == 'not measured').sum()} not measured" in text
    with pytest.raises(EmptyGroupError):
        to_markdown({})


def test_ratio_takes_the_far_end_of_what_is_divided_by() -> None:
    found = ratio(Estimate(1, np.exp(-1), np.exp(4), "e"), Estimate(1, np.exp(-0.5), np.exp(2), "e"), "r")
    assert found is not None
    np.testing.assert_allclose(np.log(found[:3]), [0, -np.hypot(1, 2), np.hypot(4, 0.5)], atol=1e-12)


def test_factor_is_as_wide_as_the_intervals_of_all_models() -> None:
    result = overlap_result({"nb": {}})
    records = [factorisation(RATIOS | {"likelihood": value}) for value in (0.8, 1.0, 1.3)]
    result["variants"]["nb"]["requests"]["rare"]["factorisation"] = records
    found = Measured(result, {}, "rare").factor("nb", "likelihood", "ratio")
    assert found is not None
    np.testing.assert_allclose(found[:3], [3.1 / 3, 0.78, 1.32])
