"""The pipeline as DVC sees it: hashes as DVC computes them, identities of runs, dvc.yaml against everything else."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from scforget import cli, closing, config, pipeline, stages
from scforget.attacks import ATTACKS
from scforget.errors import ArtifactError, ConfigError
from scforget.methods import METHODS
from scforget.pipeline import Inputs, Item, Pipeline

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "scforget"


# hashes and identities, in a small repository of DVC's own making


TOY = {
    "dvc.yaml": """\
stages:
  look:
    matrix: {dataset: "${pipeline.datasets}", method: [ssd, reset]}
    cmd: "true"
    deps: ["data/${item.dataset}", src/code.py, src/room]
    params: [seed, "methods.${item.method}", "datasets.${item.dataset}.train.seeds"]
  close:
    cmd: "true"
    deps: [data]
""",
    "params.yaml": """\
seed: 42
pipeline: {datasets: [one, two]}
datasets:
  one: {train: {seeds: [0, 1]}}
  two: {train: {seeds: [2]}}
methods:
  ssd: {alpha: .inf, lam: 1e-3, layer: null, label: "0"}
  reset: {blocks: [decoder, heads], rate: 5.0, on: true}
""",
    ".dvcignore": "__pycache__\n*.pyc\nmlruns\n",
    "data/one/cells.csv": "a,b\r\n1,2\r\n",
    "data/one/deep/er/x": "",
    "data/one/deep-er": "sorts by text, not by folder",
    "data/one/deep.txt": "x",
    "data/one/Zß é.bin": "a name that is not ASCII",
    "data/two/.hidden": "hidden",
    "data/two/only": "x\n",
    "src/code.py": "print()\n",
    "src/room/__init__.py": "",
    "src/room/b.py": "b = 1\n",
    "src/room/__pycache__/b.cpython-311.pyc": "compiled",
    "src/room/inner/__pycache__/c.cpython-311.pyc": "compiled",
}


def dvc(root: Path, *arguments: str) -> None:
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("toy")
    for name, content in TOY.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content.encode())
    dvc(root, "init", "-q", "--no-scm")
    dvc(root, "add", "-q", "data")
    (root / ".dvcignore").write_text(TOY[".dvcignore"])
    dvc(root, "repro", "-q")
    return root


def test_dvc_md5_of_files_and_folders_is_what_dvc_records(toy):
    (recorded,) = config.read_yaml(toy / "data.dvc")["outs"]
    assert pipeline.dvc_md5(toy / "data") == recorded["md5"]
    lock = config.read_yaml(toy / "dvc.lock")["stages"]
    deps = {dep["path"]: dep["md5"] for stage in lock.values() for dep in stage["deps"]}
    assert set(deps) == {"data", "data/one", "data/two", "src/code.py", "src/room"}
    for path, md5 in deps.items():
        assert pipeline.dvc_md5(toy / path) == md5, path
    assert deps["src/room"].endswith(".dir")


def test_recorded_equals_inputs_hashed_from_the_files(toy):
    found = Pipeline(toy)
    recorded = found.recorded()
    assert list(recorded) == found.items()
    for item in found.items():
        assert recorded[item] == found.inputs(item)
        assert recorded[item].fingerprint == found.inputs(item).fingerprint
    assert len({inputs.fingerprint for inputs in recorded.values()}) == len(recorded)


def test_items_are_the_product_of_the_axes_in_the_order_of_the_file(toy):
    assert [item.name for item in Pipeline(toy).items()] == [
        "look@one-ssd", "look@one-reset", "look@two-ssd", "look@two-reset", "close"
    ]  # fmt: skip
    assert Pipeline(toy).items("close") == [Item("close")]
    # DVC names them the same.
    assert list(config.read_yaml(toy / "dvc.lock")["stages"]) == [item.name for item in Pipeline(toy).items()]


def test_inputs_hold_the_item_s_own_params_only(toy):
    inputs = Pipeline(toy).inputs(Item("look", ("two", "reset")))
    assert inputs.params == {
        "seed": 42,
        "methods.reset": {"blocks": ["decoder", "heads"], "rate": 5.0, "on": True},
        "datasets.two.train.seeds": [2],
    }
    assert list(inputs.deps) == ["data/two", "src/code.py", "src/room"]
    found = Pipeline(toy)
    assert found.param_keys(inputs.item) == list(inputs.params)


def test_inputs_change_with_a_file_and_with_a_param_of_their_own(toy, tmp_path):
    root = tmp_path / "copy"
    subprocess.run(["cp", "-r", toy, root], check=True)
    before = {item: inputs.fingerprint for item, inputs in Pipeline(root).recorded().items()}

    def moved() -> set[str]:
        found = Pipeline(root)
        return {item.name for item in found.items() if found.inputs(item).fingerprint != before[item]}

    assert moved() == set()
    (root / "src/room/__pycache__/new.pyc").write_text("compiled anew")
    assert moved() == set()
    (root / "params.yaml").write_text(TOY["params.yaml"].replace("lam: 1e-3", "lam: 0.001"))
    assert moved() == set()
    (root / "params.yaml").write_text(TOY["params.yaml"].replace("lam: 1e-3", "lam: 2e-3"))
    assert moved() == {"look@one-ssd", "look@two-ssd"}
    (root / "params.yaml").write_text(TOY["params.yaml"])
    (root / "data/one/deep/er/x").rename(root / "data/one/deep/er/y")
    assert moved() == {"look@one-ssd", "look@one-reset", "close"}


def test_recorded_is_empty_before_the_first_run_and_skips_what_is_new(toy, tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text(TOY[name])
    assert Pipeline(tmp_path).recorded() == {}
    (tmp_path / "dvc.lock").write_bytes((toy / "dvc.lock").read_bytes())
    (tmp_path / "params.yaml").write_text(TOY["params.yaml"].replace("[one, two]", "[two, three]"))
    assert [item.name for item in Pipeline(tmp_path).recorded()] == ["look@two-ssd", "look@two-reset", "close"]


def test_astray_names_small_outs_that_are_not_as_recorded(toy, tmp_path):
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text(TOY[name])
    for name in ("results/a.json", "results/b.json", "work/model"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    lock = config.read_yaml(toy / "dvc.lock")
    for item, names in (("look@one-ssd", ["results/a.json", "work/model"]), ("close", ["results/b.json"])):
        outs = [{"path": name, "md5": pipeline.dvc_md5(tmp_path / name)} for name in names]
        lock["stages"][item]["outs"] = outs
    YAML(typ="safe", pure=True).dump(lock, tmp_path / "dvc.lock")
    found = Pipeline(tmp_path)
    assert found.astray() == {}
    (tmp_path / "work/model").unlink()  # large: restored by DVC when it is needed, not tracked
    assert found.astray() == {}
    (tmp_path / "results/a.json").unlink()
    (tmp_path / "results/b.json").write_text("made by hand")
    assert {item.name: path for item, path in found.astray().items()} == {
        "look@one-ssd": "results/a.json", "close": "results/b.json"
    }  # fmt: skip


def test_dvc_md5_of_nothing_and_params_that_are_not_there_say_so(toy, tmp_path):
    with pytest.raises(ArtifactError, match="no such file, and a stage depends on it; run `dvc repro`"):
        pipeline.dvc_md5(tmp_path / "none")
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_text(TOY[name])
    (tmp_path / "params.yaml").write_text(TOY["params.yaml"].replace("two: {train", "tow: {train"))
    (tmp_path / "data/two").mkdir(parents=True)
    (tmp_path / "src").symlink_to(toy / "src")
    with pytest.raises(ConfigError, match=r"datasets\.two\.train\.seeds: missing; a stage of dvc\.yaml tracks it"):
        Pipeline(tmp_path).inputs(Item("look", ("two", "ssd")))


@pytest.mark.parametrize("name", ["dvc.yaml", "dvc.lock"])
@pytest.mark.parametrize("content", ["", "stages:\n", "[]\n", "schema: '2.0'\n", "<<<<<<< HEAD\n"])
def test_a_broken_file_of_dvc_is_a_config_error(tmp_path, name, content):
    for file in ("dvc.yaml", "params.yaml"):
        (tmp_path / file).write_text(TOY[file])
    (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError) as caught:
        Pipeline(tmp_path).recorded()
    assert caught.value.path == tmp_path / name
    assert "\n" not in str(caught.value)


INPUTS = Inputs(
    Item("unlearn", ("pbmc", "nk", "ssd")),
    {"work/train/pbmc": "all.dir", "src/fisher.py": "f"},
    {"seed": 42, "train.seeds": [0, 1], "unlearn.ssd": {"lam": 1.0}},
)


def test_model_fingerprint_ignores_the_list_of_seeds():
    longer = Inputs(INPUTS.item, INPUTS.deps, {**INPUTS.params, "train.seeds": [0, 1, 2]})
    assert longer.fingerprint != INPUTS.fingerprint
    assert longer.model_fingerprint(1, {}) == INPUTS.model_fingerprint(1, {})


def test_model_fingerprint_depends_on_all_else():
    own = {"work/train/pbmc": "one"}
    others = [
        INPUTS.model_fingerprint(0, own),
        INPUTS.model_fingerprint(1, own),
        INPUTS.model_fingerprint(0, {"work/train/pbmc": "two"}),
        INPUTS.model_fingerprint(0, {}),
        INPUTS.fingerprint,
        Inputs(INPUTS.item, {**INPUTS.deps, "src/fisher.py": "g"}, INPUTS.params).model_fingerprint(0, own),
        Inputs(INPUTS.item, INPUTS.deps, {**INPUTS.params, "seed": 43}).model_fingerprint(0, own),
        Inputs(INPUTS.item, INPUTS.deps, {**INPUTS.params, "unlearn.ssd": {"lam": 2.0}}).model_fingerprint(0, own),
        Inputs(Item("unlearn", ("pbmc", "b", "ssd")), INPUTS.deps, INPUTS.params).model_fingerprint(0, own),
    ]
    assert len(set(others)) == len(others)
    assert all(re.fullmatch("[0-9a-f]{32}", fingerprint) for fingerprint in others)
    # Which original a model starts from matters; the other originals do not.
    fewer = Inputs(INPUTS.item, {**INPUTS.deps, "work/train/pbmc": "fewer.dir"}, INPUTS.params)
    assert fewer.model_fingerprint(0, own) == INPUTS.model_fingerprint(0, own)


def test_fingerprint_does_not_depend_on_the_order_of_keys():
    turned = Inputs(INPUTS.item, dict(reversed(INPUTS.deps.items())), dict(reversed(INPUTS.params.items())))
    assert turned.fingerprint == INPUTS.fingerprint


# dvc.yaml, params.yaml, the registries and the files


DVC: dict[str, Any] = config.read_yaml(ROOT / "dvc.yaml")["stages"]
PARAMS: dict[str, Any] = config.read_yaml(ROOT / "params.yaml")


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
    """Each costs two to three seconds of imports before it does anything: a change here is a decision."""
    counts = {stage: len(Pipeline(ROOT).items(stage)) for stage in DVC}
    assert counts == {
        "prepare": 1, "split": 1, "train": 1, "retrain": 2, "unlearn": 6, "reference": 2, "audit": 6, "report": 1,
        "track": 1,
    }  # fmt: skip
    assert sum(counts.values()) == 21


def test_stages_are_commands_and_functions_of_the_same_name():
    commands = {
        command.callback.__name__: command for command in cli.app.registered_commands
        if command.rich_help_panel == cli.PIPELINE
    }  # fmt: skip
    assert list(DVC) == list(commands)
    for stage, described in DVC.items():
        room = stages if hasattr(stages, stage) else closing
        assert callable(getattr(room, stage))
        axes = list(described.get("matrix", {}))
        assert described["cmd"] == " ".join(["scforget", stage, *(f"${{item.{axis}}}" for axis in axes)])
        function = commands[stage].callback
        assert list(function.__annotations__)[: len(axes)] == axes  # the command's arguments, in this order


def test_axes_are_the_lists_of_params():
    for described in DVC.values():
        for axis, value in described.get("matrix", {}).items():
            assert value == f"${{pipeline.{axis}s}}"


def test_every_method_has_a_file_a_section_and_a_place_in_the_pipeline():
    assert list(PARAMS["unlearn"]) == list(METHODS)
    files = {path.stem for path in (SOURCE / "methods").glob("*.py")} - {"__init__"}
    assert files == set(METHODS)
    assert PARAMS["pipeline"]["methods"] == list(METHODS)
    assert "unlearn.${item.method}" in DVC["unlearn"]["params"]
    assert "src/scforget/methods/${item.method}.py" in DVC["unlearn"]["deps"]
    for name, method in METHODS.items():
        assert method.run.__module__ == f"scforget.methods.{name}"
        assert method.run.__name__ == name


def test_every_attack_has_a_file_and_a_section():
    assert list(PARAMS["audit"]["attacks"]) == list(ATTACKS)
    files = {path.stem for path in (SOURCE / "attacks").glob("*.py")} - {"__init__"}
    assert files == set(ATTACKS)


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
                    assert any(dep == out or dep.startswith(f"{out}/") for out in made), (item.name, dep)


def test_every_param_that_a_stage_tracks_is_there():
    project = Pipeline(ROOT)
    for item in project.items():
        for key in project.param_keys(item):
            value: Any = PARAMS
            for part in key.split("."):
                value = value[part]


def test_timings_are_an_out_on_which_only_the_end_of_the_pipeline_depends():
    for stage, described in DVC.items():
        volatile = [out for out in described.get("outs", []) if isinstance(out, str) and out.endswith("cost.json")]
        assert len(volatile) == (stage in ("train", "retrain", "unlearn"))
        if stage not in ("report", "track"):
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
    "unlearn": ["methods/{method}.py", "loading.py"],
    "reference": ["scoring.py", "attacks", "audit"],
    "audit": ["scoring.py", "attacks", "audit"],
}
SCIENCE = ("methods", "attacks", "audit", "fisher", "training", "tasks", "data", "models", "scoring", "loading",
           "seeding")  # fmt: skip
# Imported, but no result comes from it: downloads happen outside the pipeline; of the splits, what reads them back
# knows the names of the cell sets alone; the controls are drawn by `reference`, and `audit` reads them back.
DRAWN_BEFORE = {"data/splits.py"}
HARMLESS = {
    "prepare": {"data/public.py"},
    **dict.fromkeys(("train", "retrain", "unlearn", "reference"), DRAWN_BEFORE),
    "audit": {*DRAWN_BEFORE, "data/controls.py"},
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
        "fisher.py", "data/splits.py", "models/vae.py", "tasks.py", "training.py"
    }  # fmt: skip


@pytest.mark.parametrize("stage", RUNS)
def test_every_stage_names_the_science_that_it_runs(stage):
    for item, deps in filled(stage):
        named = [dep.removeprefix("src/scforget/") for dep in deps if dep.startswith("src/scforget/")]
        needed = closure([seed.format(method=item.keys[-1]) for seed in RUNS[stage]]) - HARMLESS.get(stage, set())
        missing = {file for file in needed if not any(file == dep or file.startswith(f"{dep}/") for dep in named)}
        assert missing == set(), item.name


def test_ignored_files_are_those_of_dvcignore():
    patterns = {line for line in (ROOT / ".dvcignore").read_text().splitlines() if line}
    assert patterns == {*pipeline._IGNORED, "*.pyc", "mlruns"}  # *.pyc lie in __pycache__, mlruns in no dependency
