"""The command line: it teaches, starts at once, and ends every expected error in one line and its exit code."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer

from scforget import artifacts, cli, errors, registry, ui
from scforget.artifacts import Workspace
from spoiling import put

ROOT = Path(__file__).parents[1]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process, in a folder of its own: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("SCFORGET_DEBUG", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that they are restored
        monkeypatch.delenv(name)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["scforget", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def commands() -> list[tuple[tuple[str, ...], typer.models.CommandInfo]]:
    found = []
    for app, before in ((cli.app, ()), (cli.data, ("data",)), (cli.searches, ("sweep",))):
        for info in app.registered_commands:
            found.append(((*before, info.name or info.callback.__name__), info))
    return found


@pytest.mark.parametrize(("path", "info"), commands(), ids=[" ".join(path) for path, _ in commands()])
def test_help_of_every_command_says_what_it_does_and_what_it_takes(command, path, info):
    code, out, err = command(*path, "--help")
    assert (code, err) == (0, "")
    flat = " ".join(out.split())
    assert flat.startswith("Usage: ")
    assert f"scforget {' '.join(path)} " in flat
    sentence = " ".join(info.callback.__doc__.split())
    assert len(sentence) > 30
    assert sentence in flat
    for name, hint in info.callback.__annotations__.items():
        if name == "return":
            continue
        (about,) = eval(hint, vars(cli)).__metadata__
        assert " ".join(about.help.split()) in flat, name


def test_help_lists_every_command_with_the_pipeline_in_its_order(command):
    code, out, _ = command("--help")
    assert code == 0
    places = [out.index(f"\n  {path[0]} ") for path, _ in commands() if len(path) == 1]
    assert places == sorted(places)
    assert "dvc repro" in out
    assert "params.yaml" in out


def test_no_arguments_teach_too(command):
    for arguments in ((), ("data",), ("sweep",)):
        _, out, err = command(*arguments)
        assert "scforget" in (out + err).splitlines()[0]
        assert "Commands" in out + err


ERRORS = [
    (errors.ConfigError("params.yaml", "seed", "missing"), 2),
    (errors.DataError("cells", "none", "some"), 3),
    (errors.EmptyGroupError("controls", 1, "at least 10"), 3),
    (errors.ArtifactError("work/x", "no such file"), 3),
    (errors.NonFiniteError(3, "the loss"), 4),
    (errors.TooManyDivergedError("train@pbmc", "3 of 4", "why"), 4),
    (errors.TrackingError("http://x", "no answer"), 5),
    (errors.ScforgetError("plain"), 1),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[type(error).__name__ for error, _ in ERRORS])
def test_main_ends_an_expected_error_in_one_line_and_its_code(command, monkeypatch, error, code):
    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    assert command("anything") == (code, "", f"scforget: {error}\n")


def test_main_keeps_an_error_on_one_line_whatever_it_names(command):
    code, _, err = command("profile", "two\nlines")
    assert code == 2
    assert err == "scforget: profiles/two lines.yaml: no such profile; there are: none\n"


def test_main_shows_the_traceback_on_request(command, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scforget", "--debug", "profile", "none"])
    with pytest.raises(errors.ConfigError):
        cli.main()


def test_main_uses_one_thread_unless_told_otherwise(command, monkeypatch):
    monkeypatch.setenv("MKL_NUM_THREADS", "3")
    command("--help")
    assert [os.environ[f"{name}_NUM_THREADS"] for name in ("OMP", "OPENBLAS", "MKL")] == ["1", "1", "3"]


def test_import_loads_nothing_heavy():
    """A command that fails at once, `--help` and shell completion shall not wait for torch."""
    heavy = ["numpy", "torch", "pandas", "scipy", "anndata", "scanpy", "mlflow", "pydantic", "matplotlib", "sklearn"]
    heavy += ["optuna", "plotly", "psycopg"]
    code = f"import sys, scforget; a = set(sys.modules); import scforget.cli; print([m for m in {heavy} if m in a], " \
           f"[m for m in {heavy} if m in sys.modules])"  # fmt: skip
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[] []\n"


def test_profile_writes_its_values_and_says_what_next(command, tmp_path):
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "quick.yaml").write_text("seed: 7\n")
    assert command("profile", "quick") == (
        0, "", "params.yaml now has the values of profiles/quick.yaml; run `dvc repro`\n"
    )  # fmt: skip
    assert "\nseed: 7\n" in (tmp_path / "params.yaml").read_text()
    code, _, err = command("profile", "quik")
    assert code == 2
    assert err == "scforget: profiles/quik.yaml: no such profile; there are: quick\n"


@pytest.fixture
def audited(tmp_path) -> Workspace:
    """A project with the audit of one method in one scenario, of which the records say only what is asked for here."""
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    put("pipeline", "scenarios", value=["cd56_nk"])(tmp_path)
    put("sweep", "methods", value=[])(tmp_path)
    put("pipeline", "methods", value=["ssd"])(tmp_path)
    workspace, place = Workspace(tmp_path), ("pbmc68k", "cd56_nk")
    original = {"verdict": "NOT_FORGOTTEN", "groups": {"forget": 14}, "published_criterion": False}
    reference = {"original": original, "retrain": {"verdict": "TARGET"}}
    artifacts.write_json(workspace.results("reference", *place) / "result.json", reference)
    record = {"verdict": "UNDETERMINED", "explanation": "Undetermined: too few models.", "published_criterion": True}
    artifacts.write_json(workspace.results("audit", *place, "ssd") / "result.json", record)
    for stage in (("train", "pbmc68k"), ("retrain", *place), ("unlearn", *place, "ssd")):
        artifacts.write_json(workspace.results(*stage) / "result.json", {"seeds": {}, "failed": {}})
    return workspace


EXPLAIN = ("audit", "pbmc68k", "cd56_nk", "--explain")


def test_audit_explain_says_in_plain_words_what_was_found_and_runs_nothing(command, audited):
    before = {path: path.read_bytes() for path in audited.root.rglob("*") if path.is_file()}
    question = "pbmc68k / cd56_nk: forget 14 cells (kind cluster, cluster CD56+ NK)"
    assert command(*EXPLAIN) == (0, f"""\
{question}
{"=" * len(question)}

original: NOT FORGOTTEN
  Utility not judged.
  The single-cell paper's own criterion is not met; it decides nothing here.

ssd: UNDETERMINED
  Undetermined: too few models.
  Utility not judged.
  The single-cell paper's own criterion is met; it decides nothing here.
""", "")  # fmt: skip
    assert {path: path.read_bytes() for path in audited.root.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("missing", ["reference/pbmc68k/cd56_nk", "audit/pbmc68k/cd56_nk/ssd"])
def test_audit_explain_before_the_audit_ends_in_one_line_that_says_what_to_run(command, audited, missing):
    path = audited.root / "results" / missing / "result.json"
    path.unlink()
    line = f"scforget: {path}: no such file; run the stage that makes it, or `dvc repro`\n"
    assert command(*EXPLAIN) == (3, "", line)


def test_audit_explain_of_an_unknown_request_names_the_known_ones(command, audited):
    code, out, err = command("audit", "pbmc68k", "nk", "--explain")
    assert (code, out) == (2, "")
    params = audited.root / "params.yaml"
    assert err == f"scforget: {params}: pipeline: pbmc68k nk is not part of it; it has pbmc68k cd56_nk\n"


def test_data_list_names_every_public_set_and_its_licence(command):
    code, out, err = command("data", "list")
    assert (code, err) == (0, "")
    assert [line.split(":")[0] for line in out.splitlines()] == ["fashion_mnist", "pbmc33k", "pbmc3k", "tabula_muris"]
    assert out.count("CC BY 4.0") == 2


def test_data_bundled_makes_the_files_that_are_under_dvc(command, tmp_path):
    from scforget.pipeline import dvc_md5

    assert command("data", "bundled")[0] == 0
    assert {path.name for path in (tmp_path / "data/pbmc68k").iterdir()} == {
        "ATTRIBUTION.md", "barcodes.tsv.gz", "cells.csv", "features.tsv.gz", "matrix.mtx.gz"
    }  # fmt: skip
    assert dvc_md5(tmp_path / "data") == "39deae8b7ae4cd6a9cfe9d68328ca248.dir"
    assert "39deae8b7ae4cd6a9cfe9d68328ca248.dir" in (ROOT / "data.dvc").read_text()


def test_ui_serves_what_its_options_say(command, monkeypatch, tmp_path):
    served = []
    monkeypatch.setattr(ui, "serve", lambda *asked: served.append(asked))
    assert command("ui")[0] == 0
    assert command("ui", "--port", "5123", "--studies-port", "5124", "--storage", "postgresql://h/d")[0] == 0
    assert served == [(tmp_path, 5000, 5001, None), (tmp_path, 5123, 5124, "postgresql://h/d")]


def test_promote_registers_what_its_arguments_say(command, monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(registry, "promote", lambda *arguments: asked.append(arguments))
    assert command("promote", "d", "s", "ssd")[0] == 0
    assert command("promote", "d", "s", "ssd", "--seed", "3")[0] == 0
    assert asked == [(tmp_path, "d", "s", "ssd", None), (tmp_path, "d", "s", "ssd", 3)]


@pytest.mark.parametrize("run", [(), ("run",)], ids=["plain", "run"])
def test_sweep_hands_on_what_it_was_asked(command, monkeypatch, run):
    """`sweep ssd` is `sweep run ssd`."""
    calls: list[object] = []
    monkeypatch.setattr("scforget.sweeps.sweep.sweep", lambda *names, **options: calls.append((names, options)))
    assert command("sweep", *run, "ssd", "--scenario", "scattered") == (0, "", "")
    asked = ("--dataset", "pbmc", "--trials", "40", "--timeout", "60", "--storage", "postgresql://lab")
    assert command("sweep", *run, "ssd", "--scenario", "scattered", *asked)[0] == 0
    assert calls == [
        (("ssd", None, "scattered"), {"trials": None, "timeout": None, "storage": None}),
        (("ssd", "pbmc", "scattered"), {"trials": 40, "timeout": 60.0, "storage": "postgresql://lab"}),
    ]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("ssd",), "--scenario"),
        (("run", "--scenario", "scattered"), "method"),
        (("ssd", "--scenario", "s", "--trials", "0"), "--trials"),
        (("ssd", "--scenario", "s", "--timeout", "-1"), "--timeout"),
        (("promote",), "method"),
    ],
)
def test_sweep_says_what_is_missing_or_wrong(command, monkeypatch, asked, said):
    monkeypatch.setattr("scforget.sweeps.sweep.sweep", None)
    code, out, err = command("sweep", *asked)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err


def test_sweep_interrupted_ends_without_a_traceback(command, monkeypatch):
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("scforget.sweeps.sweep.sweep", interrupted)
    code, out, err = command("sweep", "ssd", "--scenario", "scattered")
    assert code in (1, 130)
    assert out == ""
    assert "Traceback" not in err


def test_sweep_promote_prints_what_changed_and_what_to_do(command, monkeypatch, tmp_path):
    calls: list[tuple[object, ...]] = []

    def promoted(*arguments: object) -> list[str]:
        calls.append(arguments)
        return ["unlearn.ssd.alpha: 5.0 -> 2.0"]

    monkeypatch.setattr("scforget.sweeps.promote.promote", promoted)
    said = "unlearn.ssd.alpha: 5.0 -> 2.0\nlook at `git diff params.yaml`, run `dvc repro`, commit\n"
    assert command("sweep", "promote", "ssd") == (0, "", said)
    command("sweep", "promote", "ssd", "--scenario", "scattered", "--dataset", "pbmc68k")
    assert calls == [(tmp_path, "ssd", None, None), (tmp_path, "ssd", "pbmc68k", "scattered")]


def test_an_unknown_command_names_itself_and_where_to_look(command):
    code, _, err = command("tarin")
    assert code == 2
    assert "No such command 'tarin'" in err
    assert "scforget --help" in err
