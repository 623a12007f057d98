"""Promoting: the searched keys of params.yaml change, all at once or not at all, and nothing else does."""

from __future__ import annotations

import difflib
import shutil
from pathlib import Path
from typing import Any

import pytest

from scforget import config, schema
from scforget.errors import ArtifactError, ConfigError, DataError
from scforget.sweeps.promote import promote

ROOT = Path(__file__).parents[2]
TUNED = {
    "ssd": {"alpha": 2.345, "lam": 0.05, "reference": "R"},
    "partial_reset": {"learning_rate": 0.001234, "max_epochs": 24},
    "gradient_ascent": {"finetune.max_epochs": 12, "steps": 3},
}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    return tmp_path


def found(
    root: Path, method: str, settings: dict[str, Any] | None, *, scenario: str = "scattered", trials: int = 6,
    folder: str = "results/sweep", **more: Any,
) -> Path:  # fmt: skip
    """What a sweep leaves."""
    study = {"dataset": "pbmc68k", "scenario": scenario, "method": method, "trials": trials}
    record: dict[str, Any] = {"study": study, **more}
    if settings is not None:
        record["tuned"] = {"trial": 4, "settings": settings}
    path = root / folder / "pbmc68k" / scenario / method / "best.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(config.dump_yaml(record))
    return path


def changed(root: Path) -> list[tuple[str, str]]:
    """Lines of params.yaml before and after, of those that differ."""
    before, after = ((folder / "params.yaml").read_text().splitlines() for folder in (ROOT, root))
    assert len(before) == len(after)
    return [(one, other) for one, other in zip(before, after, strict=True) if one != other]


def section(root: Path, method: str) -> Any:
    return getattr(schema.load(root / "params.yaml").unlearn, method)


def test_promote_changes_the_searched_lines_alone_and_keeps_their_comments(root):
    found(root, "ssd", TUNED["ssd"])
    lines = promote(root, "ssd", None, None)
    rows = changed(root)
    assert [after.split("#")[0].strip() for _, after in rows] == ["alpha: 2.345", "lam: 0.05", "reference: R"]
    for before, after in rows:
        assert before.partition("#")[2] == after.partition("#")[2]
    assert any("#" in before for before, _ in rows)
    assert lines == [
        "unlearn.ssd.alpha: 5.0 -> 2.345", "unlearn.ssd.lam: 1.0 -> 0.05", "unlearn.ssd.reference: D -> R",
        "from trial 4 of results/sweep/pbmc68k/scattered/ssd/best.yaml",
    ]  # fmt: skip


def test_promote_changes_what_follows_a_searched_setting_too(root):
    found(root, "partial_reset", TUNED["partial_reset"])
    promote(root, "partial_reset", None, None)
    now = section(root, "partial_reset")
    assert (now.learning_rate, now.max_epochs, now.patience) == (0.001234, 24, 24)
    assert len(changed(root)) == 3


def test_promote_reaches_nested_settings(root):
    found(root, "gradient_ascent", TUNED["gradient_ascent"])
    promote(root, "gradient_ascent", None, None)
    now = section(root, "gradient_ascent")
    assert (now.steps, now.finetune.max_epochs) == (3, 12)
    assert len(changed(root)) == 2


def test_promote_of_what_params_yaml_has_changes_nothing(root):
    now = section(root, "ssd")
    found(root, "ssd", {"alpha": now.alpha, "reference": now.reference})
    assert promote(root, "ssd", None, None) == ["from trial 4 of results/sweep/pbmc68k/scattered/ssd/best.yaml"]
    assert (root / "params.yaml").read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_promote_writes_settings_that_only_fit_together(root):
    """Not one after the other: half-way, the first of them would be refused, or worse, be left alone in the file."""
    zero = {"action": "zero", "alpha": 0.0}
    found(root, "ssd", zero)  # alpha 0 is refused while action is dampen, and is the first of the two in no order
    promote(root, "ssd", None, None)
    back = {"alpha": 3.0, "action": "dampen"}
    shutil.rmtree(root / "results")
    found(root, "ssd", back)
    promote(root, "ssd", None, None)
    now = section(root, "ssd")
    assert (now.action, now.alpha) == ("dampen", 3.0)


def test_promote_takes_the_longer_study_of_the_same_request(root):
    found(root, "ssd", {"alpha": 2.0})
    found(root, "ssd", {"alpha": 3.0}, trials=40, folder="studies")
    promote(root, "ssd", None, None)
    assert section(root, "ssd").alpha == 3.0


def test_promote_takes_the_request_that_is_named(root):
    found(root, "ssd", {"alpha": 2.0})
    found(root, "ssd", {"alpha": 3.0}, scenario="cd56_nk", trials=40)
    found(root, "scrub", {"alpha_f": 3.0}, scenario="dendritic_half")
    promote(root, "ssd", None, "scattered")
    assert section(root, "ssd").alpha == 2.0
    promote(root, "ssd", "pbmc68k", "cd56_nk")
    assert section(root, "ssd").alpha == 3.0
    with pytest.raises(DataError, match="none"):
        promote(root, "ssd", "other", None)


def refused(root: Path, method: str, kind: type[Exception]) -> str:
    before = (root / "params.yaml").read_bytes()
    with pytest.raises(kind) as caught:
        promote(root, method, None, None)
    assert "\n" not in str(caught.value)
    assert (root / "params.yaml").read_bytes() == before
    assert {path.name for path in root.iterdir()} <= {"params.yaml", "results", "studies"}
    return str(caught.value)


def test_promote_refuses_a_study_without_a_feasible_trial(root):
    found(root, "ssd", None)
    assert "no trial that kept utility inside its margins" in refused(root, "ssd", DataError)


@pytest.mark.parametrize("method", ["ssd", "nonsense", "../.."])
def test_promote_refuses_a_method_that_was_not_searched(root, method):
    assert refused(root, method, DataError) == (
        f"sweeps of {method}: found none; wanted run `scforget sweep {method}` first"
    )


def test_promote_refuses_to_guess_between_two_requests(root):
    found(root, "ssd", {"alpha": 2.0})
    found(root, "ssd", {"alpha": 3.0}, scenario="cd56_nk")
    said = refused(root, "ssd", DataError)
    assert "pbmc68k cd56_nk, pbmc68k scattered" in said
    assert "--scenario" in said


@pytest.mark.parametrize(
    "settings", [{"alpha": -1.0}, {"alpha": "much"}, {"nonsense": 1.0}, {"alpha": 2.0, "lam": -1.0}, {"lam.x": 1.0}]
)
def test_promote_refuses_settings_that_the_method_does_not_take(root, settings):
    found(root, "ssd", settings)
    assert "unlearn.ssd" in refused(root, "ssd", ConfigError)


NO_RECORDS = ["", "[1, 2]", "study: 3", "study: {}", "study: {dataset: a, scenario: b, trials: x}"]


@pytest.mark.parametrize("content", NO_RECORDS)
def test_promote_refuses_a_file_that_is_no_record(root, content):
    found(root, "ssd", {"alpha": 2.0}).write_text(content)
    assert "not a sweep's record" in refused(root, "ssd", ArtifactError)


def test_promote_refuses_a_record_that_is_not_yaml(root):
    found(root, "ssd", {"alpha": 2.0}).write_text("a: [")
    assert "not readable as YAML" in refused(root, "ssd", ConfigError)


def test_the_diff_of_a_promotion_is_one_a_person_can_read(root):
    found(root, "scrub", {"alpha_f": 0.1234, "epochs": 7, "max_epochs": 3})
    promote(root, "scrub", None, None)
    before, after = ((folder / "params.yaml").read_text().splitlines() for folder in (ROOT, root))
    diff = [line for line in difflib.unified_diff(before, after, n=0, lineterm="") if line[0] in "+-"][2:]
    assert len(diff) == 6
