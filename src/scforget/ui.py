"""The pages a person looks at, on this machine alone: MLflow's over the runs, optuna-dashboard's over the studies."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

from scforget import tracking
from scforget.errors import ScforgetError

HOST = "127.0.0.1"
_PR_SET_PDEATHSIG = 1  # of prctl(2)
_libc = ctypes.CDLL(None)
_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # Its job queue is for judging LLM traces: five more processes that nobody here asked for.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    "PYTHONWARNINGS": "ignore",
}


class Page(NamedTuple):
    """A server to start: its name, its port, its command, what it reads, whether people want to see its log."""

    name: str
    port: int
    command: list[str]
    input: bytes = b""
    loud: bool = True


def _mlflow(root: Path, address: str, port: int) -> Page:
    tracking.Store(root)  # makes the database if there is none, and ends in one line if it cannot be opened
    command = [sys.executable, "-m", "mlflow", "ui", "--backend-store-uri", address]
    return Page("MLflow", port, [*command, "--host", HOST, "--port", str(port), "--workers", "1"])


def _has_studies(storage: str) -> bool:
    """Whether a database that can be opened holds Optuna's tables."""
    import sqlalchemy

    try:
        engine = sqlalchemy.create_engine(storage, poolclass=sqlalchemy.NullPool)
        with engine.connect() as connection:
            return sqlalchemy.inspect(connection).has_table("studies")
    except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
        shown, why = tracking.without_user(storage, str(error))
        raise ScforgetError(f"studies at {shown}: {why}") from error


def _studies(root: Path, port: int, storage: str | None) -> Page | None:
    """Show the studies of a database, else those of the project's journal; ``None`` if there are none."""
    if storage is None:
        journal = tracking.home(root) / "studies" / "studies.journal"
        if not journal.is_file():
            return None
        storage = str(journal)
    elif not _has_studies(storage):
        return None
    command = [sys.executable, "-m", "optuna_dashboard._cli", "--from-config", "/dev/stdin", "--server", "wsgiref"]
    # not among the arguments, which every user of the machine can read: it may hold a password
    settings = f"[optuna_dashboard]\nstorage = {json.dumps(storage, ensure_ascii=False)}\n".encode()
    return Page("Studies", port, [*command, "--host", HOST, "--port", str(port)], settings, loud=False)


def _check_free(port: int, option: str) -> None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as servers do: one that just ended is no bar
        try:
            probe.bind((HOST, port))
        except (OSError, OverflowError) as error:
            raise ScforgetError(f"port {port} on {HOST}: {error}; choose another with {option}") from error


def _end_with_parent() -> None:
    """Have Linux end this process when its parent ends, however it does; no threads are about at this fork."""
    if sys.platform == "linux":
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _start(page: Page, log: IO[bytes]) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        page.command, env={**os.environ, **_ENVIRONMENT}, stdin=subprocess.PIPE,
        stderr=None if page.loud else log, preexec_fn=_end_with_parent,  # noqa: PLW1509
    )  # fmt: skip
    assert process.stdin is not None
    process.stdin.write(page.input)
    process.stdin.close()
    return process


@contextmanager
def _running(pages: list[Page], log: IO[bytes]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Keep the servers side by side; none outlives this."""
    started: list[subprocess.Popen[bytes]] = []
    try:
        for page in pages:
            started.append(_start(page, log))
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait()


def _last_line(page: Page, log: IO[bytes]) -> str:
    log.seek(0)
    said = "" if page.loud else log.read().decode(errors="replace").strip()
    return f": {said.splitlines()[-1]}" if said else ""


def _interrupt(_number: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _keep(pages: list[Page]) -> None:
    """Run the servers until Ctrl-C, SIGTERM, or the end of one."""
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with tempfile.TemporaryFile() as log, _running(pages, log) as processes:
            while all(process.poll() is None for process in processes):
                time.sleep(0.2)
            ended = next(page for page, process in zip(pages, processes, strict=True) if process.poll() is not None)
            raise ScforgetError(f"{ended.name} ended by itself{_last_line(ended, log)}")
    except KeyboardInterrupt:
        pass
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def serve(root: Path, port: int, studies_port: int, storage: str | None = None) -> None:
    """Show runs and studies until Ctrl-C, SIGTERM, or the end of one of the two.

    Runs on a server (``MLFLOW_TRACKING_URI``) are shown by that; then the studies alone are shown here.

    Parameters
    ----------
    root
        The project's folder.
    port, studies_port
        Of MLflow and of optuna-dashboard, on 127.0.0.1.
    storage
        Database of the studies (``postgresql+psycopg://…``); ``None``: ``studies/studies.journal``.

    Raises
    ------
    TrackingError
        If the runs' database cannot be opened.
    ScforgetError
        If the studies cannot be opened, a port is taken, a page ends by itself, or there is none to show: the runs are
        on a server and studies there are none.
    """
    address = tracking.uri(root)
    found = []
    if address.startswith("sqlite"):
        _check_free(port, "--port")
        found.append(_mlflow(root, address, port))
    if studies := _studies(root, studies_port, storage):
        if found and studies_port == port:
            raise ScforgetError(f"port {port} is asked for twice; choose another with --studies-port")
        _check_free(studies_port, "--studies-port")
        found.append(studies)
    elsewhere = f"MLFLOW_TRACKING_URI is {address}: open it in a browser"
    if not found:
        raise ScforgetError(elsewhere)
    if found == [studies]:
        _say(elsewhere)
    for page in found:
        _say(f"{page.name}: http://{HOST}:{page.port} (Ctrl-C ends it)")
    if studies is None:
        _say("Studies: none yet; `scforget sweep` makes them")
    _keep(found)
