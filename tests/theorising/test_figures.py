"""The whole theory pipeline on a tiny project, to its pictures, its claims and its guide."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import spoiling
from scforget import auditing, stages
from scforget.config import read_yaml
from scforget.context import open_theory
from scforget.errors import ArtifactError, ConfigError
from scforget.theorising import ablation, figures, overlap, worlds

SMALL: dict[str, Any] = {"max_epochs": 3, "patience": 3, "kl_warmup_epochs": 1}


def shrink(params: Any) -> None:
    """Two worlds of two methods, propositions of a few vectors."""
    theory = params["theory"]
    theory["request"] = "half"
    theory["proposition"].update(draws=[30, 100], repeats=2, strengths=[0, 10], means=[1.0], inverse_dispersions=[5.0])
    theory["proposition"]["bounds"].update(
        outputs=[20], differing=[1, 5], largest=[3.0], classes=[3], profiles=20, starts=1
    )
    known = theory["worlds"]["worlds"]
    own = {name: known[name] for name in ("separated_component", "plane")}
    for world in own.values():
        world["points"] = 24
        world["training"].update(SMALL)
    theory["worlds"].update(
        worlds=own, originals=3, retrains=4, apart=3, fresh={"aside": 10, "unseen": 60, "controls": 60},
        likelihood_points=4, bootstrap_draws=20, quadrature={"reach": 4.0, "nodes": 41, "hermite": 6},
    )  # fmt: skip
    theory["worlds"]["methods"] = {"ssd": theory["worlds"]["methods"]["ssd"]}


@pytest.fixture(scope="module")
def drawn(project: Path) -> Path:
    spoiling.edit(project, shrink)
    with spoiling.stages_in(project):
        stages.shadows("tiny", "0")
        stages.unlearn("tiny", "half")
        auditing.reference("tiny", "half")
        auditing.audit("tiny", "half")
        overlap.overlap_stage("tiny")
        ablation.ablation_stage("tiny")
        worlds.proposition_stage()
        worlds.worlds_stage()
        with pytest.MonkeyPatch.context() as patch:  # UMAP compiles for ten seconds
            patch.setattr(figures, "_embed", lambda job: np.asarray(job.latent)[:, :2])
            figures.figures_stage()
    return project / "report" / "theory" / "figures"


def test_figures_stage_draws_every_picture_twice(drawn: Path) -> None:
    pictures = {path.relative_to(drawn).with_suffix("").as_posix() for path in drawn.rglob("*.png")}
    assert pictures == {path.relative_to(drawn).with_suffix("").as_posix() for path in drawn.rglob("*.svg")}
    assert json.loads((drawn / "result.json").read_text())["pictures"] == len(pictures)
    wanted = {
        "tiny/half/advantage", "tiny/half/auc", "tiny/half/attacks", "tiny/half/advantage_against_utility",
        "tiny/half/seeds_trace", "tiny/half/maps", "tiny/forget_types", "tiny/requests_matched_knn", "tiny/sizes",
        "tiny/settings", "tiny/features", "tiny/learning_distance", "tiny/overlap_requests", "tiny/half/overlap_kinds",
        "tiny/half/overlap_scatter", "tiny/half/overlap_factorisation", "proposition/convergence", "worlds/membership",
        "worlds/plane",
    }  # fmt: skip
    assert wanted <= pictures


def test_figures_stage_writes_claims_and_the_guide(drawn: Path) -> None:
    claims = (drawn / "claims.md").read_text()
    assert "17 times" in claims
    assert (drawn / "tiny" / "claims.csv").read_text().count("\n") > 30
    guide = (drawn / "guide.csv").read_text()
    assert "partial_reset" in guide
    assert "# " not in guide
    assert (drawn / "guide.md").read_text()


def test_figures_stage_refuses_a_request_that_the_pipeline_lacks(drawn: Path, project: Path) -> None:
    before = (project / "params.yaml").read_text()
    spoiling.put("theory", "request", value="other")(project)
    try:
        with spoiling.stages_in(project), pytest.raises(ConfigError, match="'other' is not in pipeline"):
            figures.figures_stage()
    finally:
        (project / "params.yaml").write_text(before)


def test_figures_stage_names_the_record_that_is_missing(drawn: Path, project: Path) -> None:
    path = project / "report" / "theory" / "overlap" / "tiny" / "result.json"
    content = path.read_bytes()
    path.unlink()
    try:
        with spoiling.stages_in(project), pytest.raises(ArtifactError, match=r"overlap/tiny/result\.json"):
            figures.Exhibition(open_theory("figures")).claims()
    finally:
        path.write_bytes(content)


def test_the_projects_own_theory_names_requests_of_its_pipeline() -> None:
    params = read_yaml(spoiling.ROOT / "params.yaml")
    own, known = params["theory"], params["pipeline"]["scenarios"]
    ablated = own["ablation"]
    assert {own["request"], ablated["scenario"], ablated["conditional_scenario"], *ablated["feature_scenarios"]} <= set(
        known
    )
    assert ablated["conditional_scenario"] == own["request"]  # so that the claims have it
    assert own["models"] <= len(params["train"]["seeds"])
