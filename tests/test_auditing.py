"""Which methods are audited anew: by what they depend on, each for itself, whatever else the pipeline holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from scforget import artifacts, auditing, config, scoring
from scforget.artifacts import Workspace
from scforget.attacks.mlp import PublishedAttacker
from scforget.attacks.references import References
from scforget.audit import AuditSettings
from scforget.audit.assess import describe_target, with_references
from scforget.audit.scene import Groups, Population, Scene
from scforget.auditing import Audits
from scforget.context import Context
from scforget.errors import ArtifactError
from scforget.pipeline import Item, Pipeline

AUDIT = config.read_yaml(Path(__file__).parents[1] / "params.yaml")["audit"]
SETTINGS = AuditSettings.model_validate({**AUDIT, "bootstrap_draws": 20, "null_draws": 50, "permutation_draws": 50})
ITEM = Item("audit", ("tiny", "half"))
N = 60
PART = np.repeat([0, 1, 2], [15, 35, 10])
PARAMS: dict[str, Any] = {
    "seed": 42,
    "pipeline": {"datasets": ["tiny"], "scenarios": ["half"], "methods": ["ssd", "scrub"]},
    "unlearn": {"ssd": {"alpha": 10.0}, "scrub": {"epochs": 3}, "influence": {"damping": 0.1}},
}
STAGES = {
    "audit": {
        "matrix": {"dataset": "${pipeline.datasets}", "scenario": "${pipeline.scenarios}"},
        "cmd": "true",
        "deps": ["code.py", "work/unlearn/${item.dataset}/${item.scenario}"],
        "params": ["seed", "pipeline.methods", "unlearn"],
    }
}


def population(seed: int, models: int) -> Population:
    rng = np.random.default_rng(seed)
    elbo = -100 + np.random.default_rng(99).normal(size=N) + 0.1 * rng.normal(size=(models, N))
    rows = [{"outside": {"elbo": -100 + rng.normal(), "marker_r": 0.4, "kl": 5.0}} for _ in range(models)]
    return Population(list(range(models)), {"elbo": elbo}, rows, np.zeros((N, 2)), rng.normal(size=(models, 2, N)))


def make_scene() -> Scene:
    controls = dict.fromkeys(scoring.CONTROLS, PART == 1)
    members = (np.arange(8)[:, None] % 2 == np.arange(N) % 2) & (PART < 2)
    target = population(1, 6)
    shadows = population(2, 8).scores["elbo"] + members
    references = References(target.scores["elbo"], shadows, members, PART == 2)
    originals, target = (
        with_references(own, references, SETTINGS, own=own is target) for own in (population(3, 4), target)
    )
    names = np.array([f"cell_{cell}" for cell in range(N)])
    return Scene(originals, target, Groups(PART == 0, controls), references, names, names, np.full(N, ""))


class Scorer:
    """Stands in for the scorer: knows each method's models by their file, and keeps count of what it scored."""

    attacker: PublishedAttacker | None = None

    def __init__(self) -> None:
        self.scored: list[str] = []

    def population(self, folder: Path) -> Population:
        self.scored.append(folder.name)
        return population(int((folder / "0.safetensors").read_text()), 4)

    def more(self, *_: object) -> dict[str, Any]:
        return {}


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """What the stages before leave: the reference of a scenario, and two methods' models."""
    workspace, made = Workspace(tmp_path), make_scene()
    folder = workspace.results("reference", *ITEM.keys)
    attacker = PublishedAttacker((np.ones((1, 9), np.float32),), (np.zeros(1, np.float32),), np.arange(3))
    published = {f"attacker/{name}": values for name, values in attacker.to_arrays().items()}
    artifacts.write_arrays(folder / "scores.npz", {**scoring.scene_arrays(made), **published})
    original = {"seeds": made.originals.seeds, "utility_rows": made.originals.utility}
    target = describe_target(made, SETTINGS, 42)
    artifacts.write_json(folder / "result.json", {"original": original, "retrain": target})
    for seed, method in enumerate(PARAMS["unlearn"]):
        write_models(workspace, method, 10 + seed)
    (tmp_path / "code.py").write_text("")
    (tmp_path / "dvc.yaml").write_text(json.dumps({"stages": STAGES}))
    return workspace


def write_models(workspace: Workspace, method: str, seed: int) -> None:
    folder = workspace.work("unlearn", *ITEM.keys, method)
    artifacts.write_bytes(folder / "0.safetensors", str(seed).encode())


@pytest.fixture
def scorer() -> Scorer:
    return Scorer()


@pytest.fixture
def audits(workspace: Workspace, scorer: Scorer) -> Callable[..., Audits]:
    """Audits as a new process finds them, with some sections of params.yaml changed."""

    def make(**changes: Any) -> Audits:
        (workspace.root / "params.yaml").write_text(json.dumps({**PARAMS, **changes}))
        inputs = Pipeline(workspace.root).inputs(ITEM)
        params: Any = SimpleNamespace(audit=SETTINGS, seed=42)
        stand_in: Any = scorer
        return Audits(Context(workspace, params, inputs), stand_in)

    return make


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in auditing.FILES}


def test_audits_leave_the_record_the_scores_and_the_cells_of_a_method(
    audits: Callable[..., Audits], scorer: Scorer
) -> None:
    folder = audits().make("ssd")
    record = artifacts.read_json(folder / "result.json")
    assert (record["method"], record["models"], record["fingerprint"]) == ("ssd", 4, folder.name)
    assert record["verdict"] in ("FORGOTTEN", "UNDETERMINED")  # made by the law of the retrains
    scores = artifacts.read_arrays(folder / "scores.npz")
    np.testing.assert_array_equal(scores["ssd/elbo"], population(10, 4).scores["elbo"])
    assert {"ssd/likelihood_ratio", "ssd/lira_online", "ssd/rmia_online", "ssd/attackers", "ssd/latent"} < set(scores)
    assert len(artifacts.read_table(folder / "cells.csv")) == (PART == 0).sum()
    assert scorer.attacker is not None  # the reference's, so that every method is scored by the same net


def test_audits_do_not_score_a_method_that_is_judged_already(audits: Callable[..., Audits], scorer: Scorer) -> None:
    one = audits()
    folder = one.make("ssd")
    before = contents(folder)
    assert one.make("ssd") == audits().make("ssd") == folder
    assert scorer.scored == ["ssd"]
    assert contents(folder) == before


def test_audits_of_two_methods_have_folders_of_their_own(audits: Callable[..., Audits], scorer: Scorer) -> None:
    one = audits()
    assert one.make("ssd") != one.make("scrub")
    assert scorer.scored == ["ssd", "scrub"]


def test_audits_leave_a_judged_method_when_a_further_one_is_added(
    audits: Callable[..., Audits], scorer: Scorer, workspace: Workspace
) -> None:
    folder = audits().make("ssd")
    more = {**PARAMS["pipeline"], "methods": ["influence", "ssd", "scrub"]}
    write_models(workspace, "influence", 20)
    again = audits(pipeline=more)
    assert again.make("ssd") == folder
    assert scorer.scored == ["ssd"]
    again.make("influence")
    assert scorer.scored == ["ssd", "influence"]


@pytest.mark.parametrize("change", ["setting", "models"])
def test_audits_score_a_changed_method_anew_and_leave_the_others(
    audits: Callable[..., Audits], scorer: Scorer, workspace: Workspace, change: str
) -> None:
    one = audits()
    ssd, scrub = one.make("ssd"), one.make("scrub")
    changes = {}
    if change == "setting":
        changes = {"unlearn": {**PARAMS["unlearn"], "ssd": {"alpha": 11.0}}}
    else:
        write_models(workspace, "ssd", 30)
    again = audits(**changes)
    assert again.make("scrub") == scrub
    assert again.make("ssd") != ssd
    assert scorer.scored == ["ssd", "scrub", "ssd"]


def test_audits_score_every_method_anew_after_a_change_that_matters_to_all(
    audits: Callable[..., Audits], scorer: Scorer, workspace: Workspace
) -> None:
    folders = {audits().make("ssd"), audits(seed=43).make("ssd")}
    (workspace.root / "code.py").write_text("changed = True")
    folders.add(audits().make("ssd"))
    assert len(folders) == 3
    assert scorer.scored == ["ssd"] * 3


def test_audits_make_an_interrupted_audit_again_the_same(audits: Callable[..., Audits], scorer: Scorer) -> None:
    folder = audits().make("ssd")
    before = contents(folder)
    (folder / auditing.FILES[-1]).unlink()
    assert audits().make("ssd") == folder
    assert contents(folder) == before
    assert scorer.scored == ["ssd", "ssd"]


def test_audits_name_a_reference_or_models_that_are_missing(
    audits: Callable[..., Audits], workspace: Workspace
) -> None:
    one = audits()
    with pytest.raises(ArtifactError, match="unlearn/tiny/half/fisher_scrub: no such file"):
        one.make("fisher_scrub")
    (workspace.results("reference", *ITEM.keys) / "scores.npz").unlink()
    with pytest.raises(ArtifactError, match=r"scores\.npz: no such file; run the stage that makes it"):
        audits()
