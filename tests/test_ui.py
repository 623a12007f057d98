"""Both pages: they open together, end together, whatever ends them, and say in one line why they cannot."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend

from scforget import tracking, ui
from scforget.errors import ScforgetError
from servers import free_port


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "DVC_ROOT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def kept(monkeypatch) -> list[ui.Page]:
    """What would be served."""
    pages: list[ui.Page] = []
    monkeypatch.setattr(ui, "_keep", pages.extend)
    monkeypatch.setattr(tracking, "Store", lambda _root: None)
    return pages


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((ui.HOST, port)) == 0


def waited(condition: Callable[[], bool]) -> bool:
    end = time.monotonic() + 120
    while not (found := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return found


def journal(root: Path, name: str) -> None:
    (root / "studies").mkdir()
    storage = JournalStorage(JournalFileBackend(str(root / "studies/studies.journal")))
    optuna.create_study(storage=storage, study_name=name)


def stand_in(name: str, port: int, code: str = "") -> ui.Page:
    """A page that starts fast, or fails as told."""
    command = ["-c", code] if code else ["-m", "http.server", str(port), "--bind", ui.HOST]
    return ui.Page(name, port, [sys.executable, *command], loud=False)


# together


SERVE = "import sys; from pathlib import Path; from scforget import ui; ui.serve(Path.cwd(), *map(int, sys.argv[1:]))"


def test_serve_shows_runs_and_studies_and_leaves_nothing_when_it_is_killed(tmp_path):
    journal(tmp_path, "ssd half")
    ports = [free_port(), free_port()]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", SERVE, *map(str, ports)], cwd=tmp_path, stdout=log, stderr=log,
            env={**os.environ, "DVC_ROOT": "", "MLFLOW_TRACKING_URI": ""},
        )  # fmt: skip
    try:
        assert waited(lambda: process.poll() is not None or all(map(answers, ports)))
        said = (tmp_path / "log").read_text()
        assert process.poll() is None, said
        assert f"MLflow: http://127.0.0.1:{ports[0]} (Ctrl-C ends it)\n" in said
        assert f"Studies: http://127.0.0.1:{ports[1]} (Ctrl-C ends it)\n" in said
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[0]}/") as page:
            assert b"MLflow" in page.read()
        with urllib.request.urlopen(f"http://127.0.0.1:{ports[1]}/api/studies") as page:
            assert [study["study_name"] for study in json.load(page)["study_summaries"]] == ["ssd half"]
    finally:
        process.kill()
        process.wait()
    assert waited(lambda: not any(map(answers, ports)))


# What a shell starts in the background ignores Ctrl-C, and so do its children: the tests may be among them.
KEEP = """
import signal, sys
from scforget import ui
signal.signal(signal.SIGINT, signal.default_int_handler)
pages = [ui.Page(port, int(port), [sys.executable, "-m", "http.server", port, "--bind", ui.HOST], loud=False)
         for port in sys.argv[1:]]
ui._keep(pages)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_keep_ends_every_page_when_it_is_asked_to_end(how):
    ports = [free_port(), free_port()]
    process = subprocess.Popen([sys.executable, "-c", KEEP, *map(str, ports)], stderr=subprocess.PIPE, text=True)
    assert waited(lambda: all(map(answers, ports)))
    process.send_signal(how)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (0, "")
    assert not any(map(answers, ports))


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("import time; time.sleep(1)", ""),
        ("import time; time.sleep(1); 1 / 0", ": ZeroDivisionError: division by zero"),
    ],
)
def test_keep_ends_the_other_page_when_one_ends(code, why):
    port = free_port()
    with pytest.raises(ScforgetError) as caught:
        ui._keep([stand_in("MLflow", port), stand_in("Studies", 0, code)])
    assert str(caught.value) == f"Studies ended by itself{why}"
    assert not answers(port)


# which pages


def test_serve_without_studies_says_so_and_opens_mlflow_alone(tmp_path, kept, capsys):
    port = free_port()
    ui.serve(tmp_path, port, free_port())
    (page,) = kept
    assert page.command[1:4] == ["-m", "mlflow", "ui"]
    options = dict(zip(page.command[4::2], page.command[5::2], strict=True))
    address = f"sqlite:///{tmp_path}/mlruns/mlflow.db"
    assert options == {"--backend-store-uri": address, "--host": "127.0.0.1", "--port": str(port), "--workers": "1"}
    assert capsys.readouterr().err.splitlines() == [
        f"MLflow: http://127.0.0.1:{port} (Ctrl-C ends it)", "Studies: none yet; `scforget sweep` makes them"
    ]  # fmt: skip


def test_serve_of_runs_on_a_server_shows_the_studies_alone(tmp_path, kept, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ada:s3cret@lab:5000")
    line = "MLFLOW_TRACKING_URI is http://lab:5000: open it in a browser"
    with pytest.raises(ScforgetError) as caught:
        ui.serve(tmp_path, 1, 2)
    assert str(caught.value) == line
    journal(tmp_path, "ssd half")
    port = free_port()
    ui.serve(tmp_path, port, port)
    assert [page.name for page in kept] == ["Studies"]
    assert capsys.readouterr().err.splitlines() == [line, f"Studies: http://127.0.0.1:{port} (Ctrl-C ends it)"]


def test_serve_on_a_taken_port_names_it_and_the_option(tmp_path, kept):
    journal(tmp_path, "ssd half")
    with socket.socket() as taken:
        taken.bind((ui.HOST, 0))
        taken.listen()
        port, other = taken.getsockname()[1], free_port()
        for ports, option in (((port, other), "--port"), ((other, port), "--studies-port")):
            with pytest.raises(ScforgetError) as caught:
                ui.serve(tmp_path, *ports)
            assert str(caught.value).startswith(f"port {port} on 127.0.0.1: ")
            assert str(caught.value).endswith(f"already in use; choose another with {option}")
    with pytest.raises(ScforgetError, match="is asked for twice; choose another with --studies-port"):
        ui.serve(tmp_path, other, other)
    with pytest.raises(ScforgetError, match=r"port 99999 on 127\.0\.0\.1: "):
        ui.serve(tmp_path, 99999, other)
    assert kept == []


@pytest.mark.postgres
def test_serve_shows_the_studies_of_a_database_whose_password_no_one_sees(tmp_path, kept, postgres):
    storage = postgres.replace("postgres@", "postgres:s3cret@")  # any will do here
    ui.serve(tmp_path, free_port(), free_port(), storage)
    assert [page.name for page in kept] == ["MLflow"]
    store = RDBStorage(storage)
    optuna.create_study(storage=store, study_name="ssd half")
    store.engine.dispose()
    kept.clear()
    ui.serve(tmp_path, free_port(), free_port(), storage)
    assert [page.name for page in kept] == ["MLflow", "Studies"]
    assert "s3cret" not in " ".join(kept[1].command)
    assert json.dumps(storage) in kept[1].input.decode()


@pytest.mark.parametrize("storage", ["postgresql+psycopg://ada:s3cret@127.0.0.1:1/studies", "no address at all"])
def test_serve_of_studies_that_cannot_be_opened_is_one_line_without_password(tmp_path, kept, storage):
    with pytest.raises(ScforgetError) as caught:
        ui.serve(tmp_path, free_port(), free_port(), storage)
    assert str(caught.value).startswith("studies at ")
    assert "\n" not in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert kept == []
