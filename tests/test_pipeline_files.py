"""The pipeline as DVC sees it: hashes as DVC computes them, identities of runs, dvc.yaml against everything else."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from scforget import config, pipeline
from scforget.errors import ArtifactError, ConfigError
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
