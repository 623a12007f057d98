"""What a person or a disk does wrong ends in one line that says what was found, what was wanted and what to do."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scforget import cli, config, schema, stages
from scforget.engine import Numerics
from scforget.pipeline import Item, Pipeline
from spoiling import (
    CELLS,
    RAW,
    block,
    both,
    counts,
    entry,
    of_tiny,
    only_unseen,
    put,
    remove,
    scenario,
    stages_in,
    text,
    tiny_project,
    twins,
    write,
)

NUMERICS = {"numerics": str(Numerics("mkl", "none", "cpu", 1))}  # of so small a model

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A project whose models are made: prepared, split, trained, retrained, shadowed."""
    root = tmp_path_factory.mktemp("made")
    tiny_project(root)
    with stages_in(root):
        stages.prepare("tiny")
        stages.split("tiny")
        stages.train("tiny")
        stages.retrain("tiny", "half")
        stages.shadows("tiny", "0")
    return root


def outs(root: Path) -> dict[str, bytes]:
    """Every file that a stage could have left, but for the models that a later run takes up, and a lock."""
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for top in ("work", "results", "report", "mlruns")
        for path in (root / top).rglob("*")
        if path.is_file() and ".resume" not in path.parts and path.name != ".lock"
    }


@pytest.fixture
def project(made, tmp_path, monkeypatch) -> Path:
    root = tmp_path / "project"
    shutil.copytree(made, root, symlinks=True)
    monkeypatch.chdir(root)
    monkeypatch.setenv("SCFORGET_WORKERS", "1")
    for name in ("DVC_STAGE", "DVC_ROOT", "SCFORGET_DEBUG", "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
                 "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_LOGGING_LEVEL"):  # fmt: skip
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")  # nobody is there
    return root


@pytest.fixture
def command(project, monkeypatch, capsys) -> Callable[..., tuple[int, list[str]]]:
    """Run the command line in this process: exit code and the lines on stderr."""

    def run(*arguments: str) -> tuple[int, list[str]]:
        monkeypatch.setattr(sys, "argv", ["scforget", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return int(ended.value.code or 0), capsys.readouterr().err.splitlines()

    return run


PREPARE, SPLIT, TRAIN = ["prepare", "tiny"], ["split", "tiny"], ["train", "tiny"]
UNLEARN, REFERENCE = ["unlearn", "tiny", "half", "ssd"], ["reference", "tiny", "half"]

Case = tuple[list[str], Callable[[Path], None], int, list[str]]
CASES: dict[str, Case] = {
    # data
    "no data": (PREPARE, remove("data"), 3, ["data/tiny: no such file", "`dvc repro` (data: `dvc pull`)"]),
    "no h5ad": (PREPARE, remove(RAW), 3, ["data/tiny: found none of them; wanted one .h5ad"]),
    "two files": (PREPARE, write("data/tiny/two.h5ad", b""), 3, ["found tiny.h5ad, two.h5ad; wanted one .h5ad"]),
    "not an h5ad": (PREPARE, write(RAW, b"garbage"), 3, ["tiny.h5ad: found OSError", "wanted a file that can be read"]),
    "empty h5ad": (PREPARE, write(RAW, b""), 3, ["wanted a file that can be read"]),
    "negative": (PREPARE, entry(-1), 3, ["found 1 negative values, the first (-1) in cell 'cell_000003', gene"]),
    "fractions": (PREPARE, entry(0.5), 3, ["found 1 non-integer values, the first (0.5)", "wanted raw counts"]),
    "nan": (PREPARE, entry(np.nan), 3, ["found 1 NaN values", "wanted raw counts (layers in the file: none)"]),
    "infinity": (PREPARE, entry(np.inf), 3, ["found 1 infinite values", "wanted raw counts"]),
    "twins": (PREPARE, counts(twins), 3, ["found barcode 'cell_000002' more than once", "names one cell"]),
    "no cells": (PREPARE, counts(lambda cells: cells[:0].copy()), 3, ["found an empty matrix, 0 cells", "counts"]),
    "poor cells": (PREPARE, of_tiny("prepare", "min_genes", value=999), 3, ["found 0 of 240 cells", "lower min_genes"]),
    "no label": (PREPARE, of_tiny("prepare", "label_column", value="type"), 3, ["no obs column 'type'", "cluster, do"]),
    "no layer": (PREPARE, of_tiny("prepare", "layer", value="raw"), 3, ["no layer 'raw'", "wanted null (for X)"]),
    "no donors": (SPLIT, scenario(kind="donor", donor="d"), 3, ["donor 'd': found no cell; wanted one of donor_0"]),
    "gene list": (SPLIT, of_tiny("split", "genes_from", value="none.txt"), 3, ["none.txt: no such file"]),
    "gene list of other bytes": (
        SPLIT, both(of_tiny("split", "genes_from", value="g.txt"), write("data/tiny/g.txt", b"\xff\xfe")), 3,
        ["gene list g.txt: found 1 of 1 genes not in the data", "wanted names of genes in the data"],
    ),
    # forget requests
    "empty cluster": (SPLIT, scenario(kind="cluster", cluster="9"), 3, ["'9': found no cell; wanted one of 0, 1, 2"]),
    "nothing": (SPLIT, scenario(kind="query", query="label == 'B'"), 3, ["selects no cell", "check spelling and q"]),
    "everything": (SPLIT, scenario(kind="query", query="n_genes > 0"), 3, ["selects every training cell", "to retain"]),
    "only unseen": (SPLIT, only_unseen, 3, ["no training cell (only cells the model never saw)", "at least one"]),
    "bad query": (SPLIT, scenario(kind="query", query="label =="), 3, ["query 'label ==': found invalid syntax"]),
    "bad column": (SPLIT, scenario(kind="query", query="celltype == 1"), 3, ["'celltype' is not defined", "columns c"]),
    "too many": (SPLIT, scenario(kind="scattered", cells=999), 3, ["training cells; wanted 999"]),
    "few controls": (
        SPLIT, put("audit", "min_controls", value=99), 3,
        ["found 54 unseen cells of the same kind; wanted at least audit.min_controls = 99 to compare with; a larger"],
    ),
    # params.yaml
    "unknown key": (PREPARE, text("seed: 42", "seed: 42\nsede: 42"), 2, ["sede: unknown key; check its spelling"]),
    "missing key": (PREPARE, text("seed: 42", ""), 2, ["seed: missing; every setting stands in the file"]),
    "wrong type": (PREPARE, text("seed: 42", "seed: x"), 2, ["seed: input should be a valid integer, found 'x' (str)"]),
    "quoted": (
        PREPARE, text("learning_rate: 1e-4", 'learning_rate: "1e-4"'), 2,
        ["unlearn.retain_finetune.learning_rate: input should be a valid number, found '1e-4' (str)"],
    ),
    "duplicate": (PREPARE, text("seed: 42", "seed: 42\nseed: 43"), 2, ["params.yaml: not readable", 'key "seed"']),
    "not yaml": (PREPARE, write("params.yaml", b"a: [1"), 2, ["params.yaml: not readable as YAML"]),
    "no params": (PREPARE, remove("params.yaml"), 2, ["params.yaml: no such file; run from the project's root"]),
    "empty params": (PREPARE, write("params.yaml", b""), 2, ["params.yaml: input should be a valid dictionary"]),
    "no dvc.yaml": (PREPARE, remove("dvc.yaml"), 2, ["dvc.yaml: no such file; run from the project's root"]),
    "method of pipeline": (
        PREPARE, put("pipeline", "methods", value=["ssd", "magic"]), 2,
        ["pipeline.methods: unknown method 'magic'; known: retain_finetune, gradient_ascent"],
    ),
    "dataset of pipeline": (PREPARE, put("pipeline", "datasets", value=["big"]), 2, ["'big', which has no section"]),
    "scenario of pipeline": (PREPARE, put("pipeline", "scenarios", value=["nk"]), 2, ["lacks 'nk'; it has half"]),
    # names on the command line
    "unknown dataset": (["train", "big"], lambda _: None, 2, ["train big is not part of it; it has tiny"]),
    "unknown scenario": (["retrain", "tiny", "nk"], lambda _: None, 2, ["tiny nk is not part of it; it has tiny half"]),
    "unknown method": (
        ["unlearn", "tiny", "half", "magic"], lambda _: None, 2,
        ["pipeline.methods: magic is not part of it; it has ssd, partial_reset"],
    ),
    "method not in the pipeline": (
        ["unlearn", "tiny", "half", "retain_finetune"], lambda _: None, 2, ["retain_finetune is not part of it"],
    ),
    # files between the stages
    "work is a file": (PREPARE, block("work"), 3, ["cells.h5ad: cannot write: Not a directory; check free space"]),
    "results is a file": (SPLIT, block("results"), 3, ["result.json: cannot write: Not a directory"]),
    "train is a file": (TRAIN, block("work/train"), 3, ["cannot write: Not a directory; check free space"]),
    "not prepared": (SPLIT, remove(CELLS), 3, ["cells.h5ad: no such file, and a stage depends on it; run `dvc repro`"]),
    "bad cells": (SPLIT, write(CELLS, b"garbage"), 3, ["not a readable h5ad", "delete it and run its stage again"]),
    "bad sets": (TRAIN, write("work/split/tiny/sets.npz", b"PK\3\4"), 3, ["sets.npz: not a readable npz", "run its"]),
    "bad genes": (TRAIN, write("work/split/tiny/genes.json", b"{"), 3, ["genes.json: not valid JSON", "delete it"]),
    "bad original": (UNLEARN, write("work/train/tiny/1.safetensors", b"x"), 3, ["1.safetensors: damaged", "delete it"]),
    "lost original": (UNLEARN, remove("work/train/tiny/1.safetensors"), 3, ["1.safetensors: no such file"]),
    "one original": (REFERENCE, remove("work/train/tiny/1.safetensors"), 3, ["found 1 models; wanted at least 2"]),
    "another net": (REFERENCE, of_tiny("model", "latent", value=5), 3, ["layers are not those of params.yaml"]),
    "no results": (["report"], lambda _: None, 3, ["reference/tiny/half/result.json: no such file; run the stage"]),
    "nothing to show": (["show"], lambda _: None, 3, ["reference/tiny/half/result.json: no such file"]),
    "broken lock": (["track"], write("dvc.lock", b"<<<<<<< HEAD\n"), 2, ["dvc.lock: stages: missing; restore"]),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_command_ends_bad_input_in_one_line_and_writes_nothing(command, project, monkeypatch, name):
    arguments, spoil, code, said = CASES[name]
    if name == "broken lock":
        monkeypatch.setattr("scforget.closing.Store", lambda _: None)
    spoil(project)
    before = outs(project)
    found, lines = command(*arguments)
    assert found == code, lines
    *progress, line = lines
    assert line.startswith("scforget: ")
    assert all(fragment in line for fragment in said), line
    assert len(line) < 500
    assert all(" models in " in other for other in progress)  # work done before, one line a stage
    after = outs(project)
    if name == "results is a file":
        # The cells of the split are whole; what a stage leaves without its result, DVC deletes.
        after = {path: after[path] for path in before}
    assert after == before


def test_command_that_finds_nothing_wrong_would_have_succeeded(command, project, monkeypatch):
    """The cases above fail for their own reasons: unspoilt, the same commands end well."""
    monkeypatch.setenv("DVC_STAGE", "x")
    for arguments in (PREPARE, SPLIT, TRAIN, UNLEARN, REFERENCE):
        code, lines = command(*arguments)
        assert code == 0, lines


def test_number_without_a_point_is_a_number_unquoted(project):
    text("learning_rate: 1e-4", "learning_rate: 2e-4")(project)
    assert schema.load(project / "params.yaml").unlearn.retain_finetune.learning_rate == 2e-4
    assert config.read_yaml(project / "params.yaml")["unlearn"]["retain_finetune"]["learning_rate"] == 2e-4


def test_training_that_diverges_ends_with_code_4(command, project):
    of_tiny("training", "learning_rate", value=float("inf"))(project)
    before = outs(project)
    code, lines = command(*TRAIN)
    assert code == 4
    assert lines[-1].startswith("scforget: train@tiny: 2 of 2 models diverged, and at least 2 must be left")
    assert "lower the learning rate" in lines[-1]
    assert outs(project) == before


def test_full_disk_ends_in_one_line_and_leaves_nothing_half_written(command, project, monkeypatch):
    before = outs(project)

    def full(_self: Path, _target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    for arguments in (PREPARE, SPLIT, TRAIN):
        code, lines = command(*arguments)
        assert code == 3
        assert len([line for line in lines if line.startswith("scforget: ")]) == 1
        assert "cannot write: No space left on device; check free space and permissions, then run again" in lines[-1]
    assert outs(project) == before
    assert not list(project.rglob("*.tmp"))


def checkpoint(root: Path, seed: int) -> Path:
    """Where training of an original keeps its state."""
    fingerprint = Pipeline(root).inputs(Item("train", ("tiny",))).model_fingerprint(seed, NUMERICS)
    return root / "work/.resume" / fingerprint / "checkpoint.safetensors"


# the server is down


def test_stage_by_hand_ends_5_when_the_server_is_down_with_its_results_on_disk(command, project):
    expected = outs(project)
    for name in ("work/prepare", "results/prepare"):
        shutil.rmtree(project / name)
    code, lines = command(*PREPARE)
    assert code == 5
    (line,) = lines
    assert line.startswith("scforget: MLflow at http://127.0.0.1:1: ")
    assert line.endswith("results are on disk, run `scforget track` when it answers")
    assert outs(project) == expected


def test_stage_under_dvc_ends_0_when_the_server_is_down_so_that_dvc_keeps_its_results(command, project, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "prepare@tiny")
    expected = outs(project)
    for name in ("work/prepare", "results/prepare"):
        shutil.rmtree(project / name)
    code, lines = command(*PREPARE)
    assert code == 0
    (line,) = lines
    assert line.startswith("scforget: MLflow at http://127.0.0.1:1: ")
    assert outs(project) == expected


@pytest.mark.parametrize("stage", [None, "track"])
def test_track_ends_5_when_the_server_is_down_even_under_dvc(command, monkeypatch, stage):
    if stage:
        monkeypatch.setenv("DVC_STAGE", stage)
    code, lines = command("track")
    assert code == 5
    assert len(lines) == 1
    assert lines[0].startswith("scforget: MLflow at http://127.0.0.1:1: ")


def test_stage_under_dvc_does_not_hide_an_error_of_its_own(command, project, monkeypatch):
    monkeypatch.setenv("DVC_STAGE", "prepare@tiny")
    (project / RAW).write_bytes(b"garbage")
    assert command(*PREPARE)[0] == 3


# the same through the installed command, in processes of its own


def scforget(root: Path, *arguments: str, limit: int | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    environment |= {"MLFLOW_TRACKING_URI": "http://127.0.0.1:1", "SCFORGET_WORKERS": "2"}

    def confined() -> None:
        if limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [str(Path(sys.executable).with_name("scforget")), *arguments]
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, preexec_fn=confined
    )


def test_installed_command_survives_a_disk_that_takes_no_more(project):
    """A real refusal of the kernel, in the middle of a file."""
    before = outs(project)
    done = scforget(project, *PREPARE, limit=20_000)
    assert done.returncode == 3
    assert done.stderr.splitlines() == [
        f"scforget: {project}/work/prepare/tiny/cells.h5ad: cannot write: File too large; "
        "check free space and permissions, then run again"
    ]
    assert outs(project) == before


def test_installed_command_names_a_damaged_checkpoint_from_its_worker(project, command, monkeypatch):
    shutil.rmtree(project / "work/.resume")
    path = checkpoint(project, 1)
    path.parent.mkdir(parents=True)
    path.write_bytes(b"garbage")
    before = outs(project)
    done = scforget(project, *TRAIN)
    assert (done.returncode, done.stdout) == (3, ""), done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"scforget: {path}: damaged (")
    assert line.endswith("delete it and run its stage again")
    assert outs(project) == before
    path.unlink()  # as it says
    monkeypatch.setenv("DVC_STAGE", "x")
    assert command(*TRAIN)[0] == 0
