"""A `scforget` that starts fast: DVC's stages ask one warm process, which forks for each command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

SERVER = """
import json, os, socket, sys
import mlflow.store.tracking.sqlalchemy_store, torch, umap
from scforget import cli, closing, replay, stages
torch.optim.Adam([torch.nn.Parameter(torch.zeros(1))])  # the first one imports for a second
listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen()
print("ready", flush=True)
while True:
    connection, _ = listener.accept()
    message, streams, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    child = os.fork()
    if not child:
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        arguments, folder, environment = json.loads(message)
        os.chdir(folder)
        os.environ.clear()
        os.environ.update(environment)
        sys.argv = ["scforget", *arguments]
        code = 1
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code or 0
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    for stream in streams:
        os.close(stream)
    connection.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    connection.close()
"""

CLIENT = """#!{python} -SE
import json, os, socket, sys
with socket.socket(socket.AF_UNIX) as server:
    server.connect({address!r})
    message = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
    socket.send_fds(server, [message], [0, 1, 2])
    sys.exit(int(server.recv(9) or 1))
"""


class Shell:
    """Runs commands in the repository's surroundings."""

    def __init__(self, folder: Path) -> None:
        address, stand_in = folder / "socket", folder / "scforget"
        stand_in.write_text(CLIENT.format(python=sys.executable, address=str(address)))
        stand_in.chmod(0o755)
        plain = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
        single = {f"{library}_NUM_THREADS": "1" for library in ("OMP", "OPENBLAS", "MKL", "NUMBA")}
        self.environment = {
            **plain,
            **single,
            "DVC_NO_ANALYTICS": "1",
            "GIT_CONFIG_GLOBAL": os.devnull,
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_LOGGING_LEVEL": "WARNING",
            "PATH": os.pathsep.join([str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
            "SCFORGET_WORKERS": "2",
        }
        self._server = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", SERVER, str(address)],
            env=self.environment, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self._server.stdout is not None
        assert self._server.stdout.readline() == "ready\n"

    def run(self, root: Path, *command: str, code: int = 0, **environment: str) -> str:
        done = subprocess.run(
            command, cwd=root, env={**self.environment, **environment}, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stdout
        return done.stdout

    def dvc(self, root: Path, *arguments: str) -> str:
        return self.run(root, sys.executable, "-m", "dvc", *arguments)

    def close(self) -> None:
        self._server.kill()
        self._server.communicate()
