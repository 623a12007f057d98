"""dvc.yaml, params.yaml, the registries and the code say the same."""

from __future__ import annotations

import ast
from collections.abc import Set
from pathlib import Path
from typing import Any

import pytest

from scforget import auditing, cli, cli_classifier, closing, config, pipeline, stages
from scforget.attacks import ATTACKS, CLASS_ATTACKS
from scforget.methods import CLASSIFIER_METHODS, METHODS
from scforget.pipeline import Item, Pipeline

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "scforget"

# dvc.yaml, params.yaml, the registries and the files


DVC: dict[str, Any] = config.read_yaml(ROOT / "dvc.yaml")["stages"]
PARAMS: dict[str, Any] = config.read_yaml(ROOT / "params.yaml")
CLASSIFIED = [stage for stage in DVC if stage.endswith("_classifier")]


def filled(stage: str) -> list[tuple[Item, list[str]]]:
    """Items of a stage, each with its deps."""
    project = Pipeline(ROOT)
    axes = list(DVC[stage].get("matrix", {}))
    found = []
    for item in project.items(stage):
        values = {f"${{item.{axis}}}": key for axis, key in zip(axes, item.keys, strict=True)}
        deps = DVC[stage]["deps"]
        for pattern, value in values.items():
            deps = [dep.replace(pattern, value) for dep in deps]
        found.append((item, deps))
    return found


def test_the_default_pipeline_has_as_many_items_as_it_is_known_to_have():
    """Each costs seven seconds of imports, MLflow and DVC's lock before it does anything: a change is a decision."""
    counts = {stage: len(Pipeline(ROOT).items(stage)) for stage in DVC}
    assert counts == {
        "prepare": 1, "split": 1, "train": 1, "retrain": 3, "shadows": 2, "unlearn": 3, "reference": 3, "audit": 3,
        "sweep": 3, "report": 1, "track": 1,
        "prepare_classifier": 2, "train_classifier": 2, "retrain_classifier": 2, "shadows_classifier": 4,
        "unlearn_classifier": 2, "reference_classifier": 2, "audit_classifier": 2,
    }  # fmt: skip
    assert sum(counts.values()) == 38


def test_stages_are_commands_and_functions_of_the_same_name():
    commands = {
        command.callback.__name__: command for command in cli.app.registered_commands
        if command.rich_help_panel == cli.PIPELINE
    }  # fmt: skip
    assert [stage for stage in DVC if stage not in ("sweep", *CLASSIFIED)] == list(commands)
    for stage, described in DVC.items():
        if stage in CLASSIFIED:
            continue
        if stage == "sweep":  # a command of its own: people run it with budgets of theirs
            own = "--dataset ${item.dataset} --scenario ${item.scenario}"
            assert described["cmd"] == f"scforget sweep ${{item.method}} {own}"
            continue
        (room,) = [room for room in (stages, auditing, closing) if stage in vars(room)]
        assert callable(getattr(room, stage))
        axes = list(described.get("matrix", {}))
        assert described["cmd"] == " ".join(["scforget", stage, *(f"${{item.{axis}}}" for axis in axes)])
        function = commands[stage].callback
        assert list(function.__annotations__)[: len(axes)] == axes  # the command's arguments, in this order


def test_a_classifiers_stage_is_a_command_of_their_group_and_the_same_function():
    commands = {command.callback.__name__: command.callback for command in cli_classifier.app.registered_commands}
    assert [stage.removesuffix("_classifier") for stage in CLASSIFIED] == list(commands)
    for stage in CLASSIFIED:
        kind, axes = stage.removesuffix("_classifier"), list(DVC[stage]["matrix"])
        assert DVC[stage]["cmd"] == " ".join(["scforget classifier", kind, *(f"${{item.{axis}}}" for axis in axes)])
        assert list(commands[kind].__annotations__)[: len(axes)] == axes
        if kind != "prepare":  # which reads other data
            assert callable(getattr(auditing if kind in ("reference", "audit") else stages, kind))
            assert axes == list(DVC[kind]["matrix"])


def test_axes_are_the_lists_of_params():
    for stage, described in DVC.items():
        for axis, value in described.get("matrix", {}).items():
            if stage in CLASSIFIED:
                assert value == f"${{pipeline.classifiers.{axis}s}}"
                continue
            section = "sweep" if stage == "sweep" and axis != "dataset" else "pipeline"
            assert value == f"${{{section}.{axis}s}}"


def test_the_full_sweep_depends_on_what_the_small_one_does():
    full = config.read_yaml(ROOT / "pipelines" / "sweep" / "dvc.yaml")["stages"]["sweep"]
    small = DVC["sweep"]
    assert full["deps"] == small["deps"]
    assert full["params"] == [key.replace("sweep.trials", "sweep.full.trials") for key in small["params"]]
    assert full["cmd"] == f"{small['cmd']} --trials ${{sweep.full.trials}}"


def test_sweep_is_a_command_that_takes_what_its_stages_give(monkeypatch):
    """As DVC would call it, in the pipeline and in the pipeline of the full search."""
    calls: list[Any] = []

    def noted(*arguments: Any, **options: Any) -> None:
        calls.append((arguments, options))

    monkeypatch.setattr("scforget.sweeps.sweep.sweep", noted)
    values = {"${item.method}": "ssd", "${item.dataset}": "pbmc68k", "${item.scenario}": "scattered",
              "${sweep.full.trials}": "40"}  # fmt: skip
    full = config.read_yaml(ROOT / "pipelines" / "sweep" / "dvc.yaml")["stages"]["sweep"]
    for described in (DVC["sweep"], full):
        command = described["cmd"]
        for pattern, value in values.items():
            command = command.replace(pattern, value)
        program, *arguments = command.split()
        assert program == "scforget"
        cli.app(arguments, standalone_mode=False)
    plain = {"timeout": None, "storage": None}
    assert calls == [
        (("ssd", "pbmc68k", "scattered"), {"trials": None, **plain}),
        (("ssd", "pbmc68k", "scattered"), {"trials": 40, **plain}),
    ]


def test_every_request_that_is_swept_has_retrained_models_and_another_to_develop_on():
    for section in (PARAMS["sweep"], PARAMS["sweep"]["full"]):
        for scenario in section["scenarios"]:
            assert scenario in PARAMS["pipeline"]["scenarios"]
            for dataset in PARAMS["pipeline"]["datasets"]:
                assert PARAMS["sweep"]["development"][scenario] in PARAMS["datasets"][dataset]["scenarios"]
    assert len(PARAMS["train"]["seeds"]) - PARAMS["sweep"]["seeds"] >= 2


def test_every_method_has_a_file_a_section_and_a_place_in_the_pipeline():
    assert list(PARAMS["unlearn"]) == list(METHODS)
    files = {path.stem for path in (SOURCE / "methods").glob("*.py")} - {"__init__"}
    assert files == {*METHODS, *CLASSIFIER_METHODS}
    assert PARAMS["pipeline"]["methods"] == [name for name in METHODS if not name.endswith("_published")]
    assert {"pipeline.methods", "unlearn"} <= set(DVC["unlearn"]["params"])
    assert "src/scforget/methods" in DVC["unlearn"]["deps"]
    for name, method in METHODS.items():
        assert method.run.__module__ == f"scforget.methods.{name}"
        assert method.run.__name__ == name


def test_every_method_of_classifiers_has_a_section_and_a_place_in_the_pipeline():
    assert list(PARAMS["unlearn_classifier"]) == list(CLASSIFIER_METHODS)
    assert PARAMS["pipeline"]["classifiers"]["methods"] == list(CLASSIFIER_METHODS)
    for name, method in CLASSIFIER_METHODS.items():
        assert method.run.__module__ == f"scforget.methods.{name}"
        assert method.run.__name__ in {name, f"class_{name}", "class_finetune"}


def test_methods_that_serve_both_families_are_one_function():
    assert {name for name in METHODS if name in CLASSIFIER_METHODS} == {"retain_finetune", "ssd", "scrub", "ungan"}
    for name in ("ssd", "ungan"):
        assert METHODS[name].run is CLASSIFIER_METHODS[name].run


def test_every_attack_has_a_file_and_a_section():
    assert list(PARAMS["audit_classifier"]["attacks"]) == list(CLASS_ATTACKS)
    assert list(PARAMS["audit"]["attacks"]) == list(ATTACKS)
    files = {path.stem for path in (SOURCE / "attacks").glob("*.py")} - {"__init__"}
    # what attacks share, a second way to compare populations, and the attack that has no settings
    assert files - {"references", "nets", "kaggle", "gene_list"} == {*ATTACKS, *CLASS_ATTACKS}


def test_every_dependency_is_a_file_or_made_by_a_stage():
    project, made = Pipeline(ROOT), set()
    for stage, described in DVC.items():
        outs = [next(iter(out)) if isinstance(out, dict) else out for out in described.get("outs", [])]
        axes = list(described.get("matrix", {}))
        for item in project.items(stage):
            for out in outs:
                for axis, key in zip(axes, item.keys, strict=True):
                    out = out.replace(f"${{item.{axis}}}", key)  # noqa: PLW2901
                made.add(out)
    tops = {path.split("/")[0] for path in made}
    assert tops == {"work", "results", "report"}
    for stage in DVC:
        for item, deps in filled(stage):
            for dep in deps:
                if dep.startswith("src/"):
                    assert (ROOT / dep).exists(), (item.name, dep)
                elif dep.split("/")[0] == "data":
                    assert dep == f"data/{item.keys[0]}"
                elif dep != "results":
                    assert any(f"{dep}/".startswith(f"{out}/") or out.startswith(f"{dep}/") for out in made), (
                        item.name,
                        dep,
                    )


def test_every_param_that_a_stage_tracks_is_there():
    project = Pipeline(ROOT)
    for item in project.items():
        for key in project.param_keys(item):
            place: Any = PARAMS
            *parents, last = key.split(".")
            for part in parents:
                place = place[part]
            assert last in place, (item.name, key)


def test_timings_are_an_out_on_which_only_the_end_of_the_pipeline_depends():
    for stage, described in DVC.items():
        volatile = [out for out in described.get("outs", []) if isinstance(out, str) and out.endswith("cost.json")]
        assert len(volatile) == (stage.removesuffix("_classifier") in ("train", "retrain", "shadows"))
        if stage not in ("report", "track"):
            assert not any(dep.startswith("results/unlearn") for dep in described["deps"])  # its timings are inside
            assert not any(dep.endswith("cost.json") or dep == "results" for dep in described["deps"])
            assert not any(
                dep.rstrip("/").split("/")[:1] == ["results"] and "." not in dep for dep in described["deps"]
            )


def test_resumed_models_lie_outside_every_out():
    for described in DVC.values():
        for out in described.get("outs", []):
            assert not str(out).startswith("work/.resume")
            assert out != "work"


# Which science a stage runs, and so must name among its deps; what it imports from there follows.
RUNS = {
    "prepare": ["data/prepare.py", "data/sources.py"],
    "split": ["data/genes.py", "data/splits.py", "seeding.py"],
    "train": ["training.py", "loading.py"],
    "retrain": ["training.py", "loading.py"],
    "shadows": ["training.py", "loading.py", "data/splits.py"],
    "unlearn": ["methods", "loading.py"],
    "reference": ["scoring.py", "attacks", "audit"],
    "audit": ["scoring.py", "attacks", "audit"],
    "sweep": ["sweeps", "training.py", "search.py", "engine.py"],
    "prepare_classifier": ["data/class_splits.py", "data/images.py", "data/items.py", "data/prepare.py",
                           "data/sources.py", "data/splits.py", "seeding.py"],
    "train_classifier": ["class_training.py", "families.py"],
    "retrain_classifier": ["class_training.py", "families.py"],
    "shadows_classifier": ["class_training.py", "families.py", "shadows.py", "data/splits.py"],
    "unlearn_classifier": ["methods", "families.py"],
    "reference_classifier": ["class_scoring.py", "attacks", "audit"],
    "audit_classifier": ["class_scoring.py", "attacks", "audit"],
}  # fmt: skip
SCIENCE = ("methods", "attacks", "audit", "fisher", "training", "tasks", "data", "models", "scoring", "loading",
           "seeding", "critics", "curvature", "gaussian", "percell", "private", "published", "engine", "search",
           "sweeps", "theory", "exhibits", "class_tasks", "class_training", "class_scoring", "cramer", "shadows",
           "families")  # fmt: skip
# Imported, but no result comes from it: downloads happen outside the pipeline; of the splits, what reads them back
# knows the names of the cell sets alone; the controls are drawn by `reference`, and `audit` reads them back; the ranges
# beside a method's settings are for sweeps.
# A scorer asks its family for settings and files; nothing is trained there. Classifiers share the loop of training.py
# with VAEs, and through it see tasks.py.
DRAWN_BEFORE = frozenset({"data/splits.py"})
NOT_TRAINED = {"families.py", "training.py", "class_tasks.py", "class_training.py", "shadows.py", "optimisers.py"}
OF_VAES = {"tasks.py"}
HARMLESS: dict[str, Set[str]] = {
    "prepare": {"data/public.py"},
    "prepare_classifier": {"data/public.py"},
    **dict.fromkeys(("train", "retrain", "sweep"), DRAWN_BEFORE),
    "reference": {*DRAWN_BEFORE, *NOT_TRAINED},
    "unlearn": {*DRAWN_BEFORE, "search.py"},
    "audit": {*DRAWN_BEFORE, *NOT_TRAINED, "data/controls.py"},
    "train_classifier": {*DRAWN_BEFORE, *OF_VAES, "shadows.py"},
    "retrain_classifier": {*DRAWN_BEFORE, *OF_VAES, "shadows.py"},
    "shadows_classifier": OF_VAES,
    # the folder of methods is one dependency, and what the VAEs' alone import comes with it
    "unlearn_classifier": {
        *DRAWN_BEFORE,
        "search.py",
        "shadows.py",
        "critics.py",
        "gaussian.py",
        "private.py",
        "published.py",
    },
    "reference_classifier": {*DRAWN_BEFORE, *NOT_TRAINED, *OF_VAES},
    "audit_classifier": {*DRAWN_BEFORE, *NOT_TRAINED, *OF_VAES},
}


def imported(path: Path) -> set[str]:
    """Files of the science rooms that a file imports, relative to the package."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not (node.module or "").startswith("scforget"):
            continue
        for alias in node.names:
            parts = [*node.module.split(".")[1:], alias.name]
            for end in (len(parts), len(parts) - 1):
                candidate = SOURCE.joinpath(*parts[:end]).with_suffix(".py")
                if end and parts[0] in SCIENCE and candidate.is_file():
                    found.add(candidate.relative_to(SOURCE).as_posix())
                    break
    return found


def closure(seeds: list[str]) -> set[str]:
    waiting = [
        file for seed in seeds for path in [SOURCE / seed] for file in (path.glob("*.py") if path.is_dir() else [path])
    ]
    found: set[str] = set()
    while waiting:
        path = waiting.pop()
        name = path.relative_to(SOURCE).as_posix()
        if name not in found:
            found.add(name)
            waiting += [SOURCE / other for other in imported(path)]
    return found


def test_imported_finds_modules_names_and_rooms():
    assert imported(SOURCE / "methods/ssd.py") == {
        "fisher.py", "curvature.py", "search.py", "data/splits.py", "tasks.py", "training.py"
    }  # fmt: skip


@pytest.mark.parametrize("stage", RUNS)
def test_every_stage_names_the_science_that_it_runs(stage):
    for item, deps in filled(stage):
        named = [dep.removeprefix("src/scforget/") for dep in deps if dep.startswith("src/scforget/")]
        own = [f"methods/{item.keys[2]}.py"] if stage == "sweep" else []
        needed = closure([*RUNS[stage], *own]) - HARMLESS.get(stage, set())
        missing = {file for file in needed if not any(file == dep or file.startswith(f"{dep}/") for dep in named)}
        assert missing == set(), item.name


def test_ignored_files_are_those_of_dvcignore():
    patterns = {line for line in (ROOT / ".dvcignore").read_text().splitlines() if line}
    assert patterns == {*pipeline._IGNORED, "*.pyc", "mlruns"}  # *.pyc lie in __pycache__, mlruns in no dependency
