"""PostgreSQL and MLflow's server for tests: on loopback, in a temporary folder, ended with the test run."""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import psycopg

HOST = "127.0.0.1"
_libc = ctypes.CDLL(None)


def _ends_with_parent(how: signal.Signals) -> Callable[[], None]:
    """For ``preexec_fn``: Linux sends the signal when this test run ends, be it by SIGKILL (prctl PR_SET_PDEATHSIG)."""
    return lambda: _libc.prctl(1, how)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 120
    while not ready():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            process.wait()
            raise RuntimeError(f"{process.args} did not start:\n{log.read_text()}")
        time.sleep(0.05)


def postgres_programs() -> Path | None:
    """Folder of Debian's ``initdb`` and ``postgres``, which is on nobody's PATH; the newest of several."""
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: -int(path.parent.name))
    if config := shutil.which("pg_config"):
        told = subprocess.run([config, "--bindir"], capture_output=True, text=True, check=True).stdout.strip()
        folders.append(Path(told))
    return next((folder for folder in folders if (folder / "initdb").exists()), None)


class Postgres:
    """A cluster of this test run's own; any local user may enter."""

    def __init__(self, port: int) -> None:
        self.port, self._names = port, count()

    def address(self, name: str) -> str:
        return f"postgresql+psycopg://postgres@{HOST}:{self.port}/{name}"

    def connect(self, database: str = "postgres") -> psycopg.Connection[tuple[Any, ...]]:
        return psycopg.connect(host=HOST, port=self.port, user="postgres", dbname=database, autocommit=True)

    def database(self) -> str:
        """Name of a new one."""
        name = f"test{next(self._names)}"
        with self.connect() as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return name

    def answers(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True


@contextmanager
def postgres_server(programs: Path) -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="scforget-postgres-"))  # not under pytest's own, which others cannot enter
    own = {}
    if os.geteuid() == 0:  # it refuses to run as root
        shutil.chown(folder, "postgres", "postgres")
        own = {"user": "postgres", "group": "postgres", "extra_groups": []}
    log, port = folder / "log", free_port()
    initialise = [programs / "initdb", "-D", folder / "data", "-U", "postgres", "--auth=trust", "-E", "UTF8"]
    start = [programs / "postgres", "-D", folder / "data", "-p", str(port), "-k", folder, "-F"]
    start += ["-c", f"listen_addresses={HOST}", "-c", "max_connections=50"]
    try:
        with log.open("wb") as stream:
            streams = {"stdout": stream, "stderr": stream, "cwd": folder}
            made = subprocess.run([*initialise, "--no-sync", "--locale=C"], check=False, **streams, **own)
            if made.returncode:
                raise RuntimeError(f"initdb failed:\n{log.read_text()}")
            process = subprocess.Popen(start, preexec_fn=_ends_with_parent(signal.SIGINT), **streams, **own)  # noqa: PLW1509
        server = Postgres(port)
        try:
            _until(server.answers, process, log)
            yield server
        finally:
            process.send_signal(signal.SIGINT)  # disconnects who is left
            process.wait()
    finally:
        shutil.rmtree(folder)


class MlflowServer:
    """MLflow's server as a team has it: runs in a database, artifacts served by it. Can be killed and started again."""

    def __init__(self, backend: str, artifacts: Path, port: int) -> None:
        self.uri = f"http://{HOST}:{port}"
        self._command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", backend]
        self._command += ["--artifacts-destination", str(artifacts), "--host", HOST, "--port", str(port)]
        self._command += ["--workers", "1"]
        self._log = artifacts.parent / f"mlflow-{port}.log"
        self._process: subprocess.Popen[bytes] | None = None

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def start(self) -> None:
        plain = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")}
        own = {
            "MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        with self._log.open("ab") as stream:
            self._process = subprocess.Popen(
                self._command, env={**plain, **own}, stdout=stream, stderr=stream,
                start_new_session=True, preexec_fn=_ends_with_parent(signal.SIGTERM),  # noqa: PLW1509
            )  # fmt: skip
        _until(self._healthy, self._process, self._log)

    def _end(self, how: signal.Signals) -> None:
        if self._process is not None:
            os.killpg(self._process.pid, how)  # it is two processes
            self._process.wait()
            self._process = None

    def kill(self) -> None:
        """As the kernel does when memory is short: no request is finished."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)


@contextmanager
def mlflow_server(backend: str, artifacts: Path, port: int | None = None) -> Iterator[MlflowServer]:
    server = MlflowServer(backend, artifacts, port or free_port())
    try:
        server.start()
        yield server
    finally:
        server.kill()
