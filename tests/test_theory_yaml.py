"""The theory pipeline's dvc.yaml and the code say the same, and it leaves the root pipeline's results alone."""

from __future__ import annotations

from typing import Any

import pytest
from typer.main import get_command

from scforget import cli, config
from scforget.pipeline import THEORY, Pipeline
from scforget.replay import _THEORY
from test_dvc_yaml import ROOT, SOURCE, closure

DVC: dict[str, Any] = config.read_yaml(ROOT / THEORY / "dvc.yaml")["stages"]
# Which science a stage runs; what that imports follows.
RUNS = {
    "overlap": ["theory/analysis.py", "theory/factorisation.py", "theory/nets.py", "theory/overlap.py", "training.py",
                "loading.py"],
    "proposition": ["theory/propositions.py"],
    "worlds": ["theory/worlds.py"],
    "ablation": ["theory/ablations.py", "theory/attackers.py", "theory/curves.py", "theory/judging.py",
                 "theory/sizes.py", "theory/variants.py", "training.py", "loading.py"],
    "figures": ["exhibits"],
}  # fmt: skip
# Imported, but no result comes from it: names of cell sets, ranges for sweeps, how pictures are styled, the report's
# tables; a settings class.
HARMLESS = {"data/splits.py", "search.py", "tasks.py", "training.py", "engine.py"}


def test_stages_are_commands_of_the_group_theory() -> None:
    group = get_command(cli.app).commands["theory"]  # type: ignore[attr-defined]
    assert set(group.commands) == set(DVC) == set(_THEORY)
    for stage, described in DVC.items():
        axes = [f"${{item.{axis}}}" for axis in described.get("matrix", {})]
        assert described["cmd"] == " ".join(["scforget", "theory", stage, *axes])
        assert [parameter.name for parameter in group.commands[stage].params] == list(described.get("matrix", {}))
        assert described["wdir"] == "../.."


def test_outs_lie_where_no_stage_of_the_root_pipeline_looks() -> None:
    for stage, described in DVC.items():
        (out,) = described["outs"]
        assert out.startswith(f"report/theory/{stage}")
    for described in config.read_yaml(ROOT / "dvc.yaml")["stages"].values():
        for dep in described.get("deps", []):
            assert dep != "report"
            assert not dep.startswith("report/theory")


@pytest.mark.parametrize("stage", RUNS)
def test_every_stage_names_the_science_that_it_runs(stage: str) -> None:
    named = [dep.removeprefix("src/scforget/") for dep in DVC[stage]["deps"] if dep.startswith("src/scforget/")]
    for dep in named:
        assert (SOURCE / dep).exists(), dep
    needed = closure(RUNS[stage])
    if stage in {"proposition", "figures"}:
        needed = {file for file in needed if file.startswith(("theory/", "exhibits/"))}
    missing = {file for file in needed if not any(file == dep or file.startswith(f"{dep}/") for dep in named)}
    assert missing - HARMLESS == set()


def test_every_param_that_a_stage_tracks_is_there() -> None:
    project = Pipeline(ROOT, THEORY)
    for item in project.items():
        for key in project.param_keys(item):
            place: Any = project.params
            for part in key.split("."):
                assert part in place, (item.name, key)
                place = place[part]


def test_every_section_of_theory_belongs_to_a_stage() -> None:
    tracked = {key for described in DVC.values() for key in described["params"]}
    params = config.read_yaml(ROOT / "params.yaml")["theory"]
    assert {f"theory.{key}" for key in params} <= tracked
