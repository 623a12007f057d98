"""A store on a server, played by a few lines of HTTP: who may enter, who was first, and a server that goes away."""

from __future__ import annotations

import json
import threading
import traceback
from base64 import b64encode
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from scforget import tracking
from scforget.errors import TrackingError
from scforget.tracking import Run, Store
from servers import free_port

ENVIRONMENT = (
    "MLFLOW_TRACKING_URI", "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_HTTP_REQUEST_MAX_RETRIES",
    "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_DISABLE_TELEMETRY", "MLFLOW_LOGGING_LEVEL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "DVC_ROOT",
)  # fmt: skip
VIEWS = [{"key": key, "value": view} for key, view in tracking._VIEWS.items()]
EXPERIMENT = {
    "experiment": {
        "experiment_id": "7", "name": "scforget", "artifact_location": "mlflow-artifacts:/7", "tags": VIEWS,
    }
}  # fmt: skip
MISSING = {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such experiment"}
THERE = {"error_code": "RESOURCE_ALREADY_EXISTS", "message": "Experiment(name=scforget) already exists."}
PASSWORD = "s3cr/t@x"


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, "")  # so that it is restored, whatever Store sets
        monkeypatch.delenv(name)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")


class Played:
    """Answers what it is told, in turn and then always the last, and remembers who asked for what."""

    def __init__(self, port: int) -> None:
        self.place, self.asked = f"127.0.0.1:{port}", []
        self.answers: dict[str, list[tuple[int, object]]] = {"get-by-name": [(200, EXPERIMENT)]}

    def answer(self, path: str, authorization: str | None) -> tuple[int, object]:
        name = path.partition("?")[0].rpartition("/")[2]
        self.asked.append((name, authorization))
        told = self.answers[name]
        return told.pop(0) if len(told) > 1 else told[0]


@pytest.fixture
def server() -> Iterator[Played]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, answer = played.answer(self.path, self.headers.get("Authorization"))
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        played = Played(running.server_port)
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield played
        running.shutdown()
        thread.join()


def basic(user: str, password: str) -> str:
    return "Basic " + b64encode(f"{user}:{password}".encode()).decode()


# who may enter


@pytest.mark.parametrize("written", ["s3cr%2Ft%40x", PASSWORD], ids=["encoded", "as it is"])
def test_store_hands_user_and_password_of_the_address_to_mlflow_alone(server, tmp_path, monkeypatch, written):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:{written}@{server.place}")
    store = Store(tmp_path)
    assert server.asked == [("get-by-name", basic("ada", PASSWORD))]
    assert store.uri == tracking.uri(tmp_path) == f"http://{server.place}"


def test_store_enters_with_mlflow_s_own_variables(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    Store(tmp_path)
    assert server.asked == [("get-by-name", basic("ada", PASSWORD))]


def test_store_takes_the_user_of_the_address_with_the_password_of_the_variable(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada@{server.place}")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    Store(tmp_path)
    assert server.asked == [("get-by-name", basic("ada", PASSWORD))]


@pytest.mark.parametrize("closed", [False, True], ids=["refused", "no server"])
def test_store_shows_no_password_when_it_cannot_enter(server, tmp_path, monkeypatch, capfd, closed):
    server.answers["get-by-name"] = [(401, {"error_code": "UNAUTHENTICATED", "message": "You are not authenticated."})]
    place = f"127.0.0.1:{free_port()}" if closed else server.place
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ada:{PASSWORD}@{place}")
    with pytest.raises(TrackingError) as caught:
        Store(tmp_path)
    tracking.say(caught.value)
    shown = "".join(traceback.format_exception(caught.value)) + "".join(capfd.readouterr())
    assert f"MLflow at http://{place}: " in shown
    assert "s3cr" not in shown
    assert closed or "not authenticated" in shown


@pytest.mark.parametrize(
    ("address", "message", "shown"),
    [
        ("postgresql+psycopg://ada:s3cret@db/x", "no ada:s3cret@db\nmore", ("postgresql+psycopg://db/x", "no ***@db")),
        ("sqlite:////home/ada@lab/x.db", "disk full", ("sqlite:////home/ada@lab/x.db", "disk full")),
        ("https://lab.example.org", "x" * 300, ("https://lab.example.org", "x" * 200)),
        ("nonsense", "not an address", ("nonsense", "not an address")),
    ],
)
def test_without_user_leaves_one_line_without_password(address, message, shown):
    assert tracking.without_user(address, message) == shown


# who was first


def test_store_saves_the_views_that_the_experiment_lacks(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
    bare = {"experiment": {**EXPERIMENT["experiment"], "tags": VIEWS[:1]}}
    server.answers = {"get-by-name": [(200, bare)], "set-experiment-tag": [(200, {})]}
    Store(tmp_path)
    assert [name for name, _ in server.asked] == ["get-by-name", "set-experiment-tag"]


def test_store_that_is_not_the_first_to_make_the_experiment_takes_the_other_s(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
    server.answers = {"get-by-name": [(404, MISSING), (200, EXPERIMENT)], "create": [(400, THERE)]}
    store = Store(tmp_path)
    assert store._experiment == "7"
    assert [name for name, _ in server.asked] == ["get-by-name", "create", "get-by-name"]


def test_store_that_may_not_make_the_experiment_says_why(server, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
    denied = {"error_code": "PERMISSION_DENIED", "message": "Permission denied"}
    server.answers = {"get-by-name": [(404, MISSING)], "create": [(403, denied)]}
    with pytest.raises(TrackingError, match="Permission denied"):
        Store(tmp_path)


# a server that goes away


@pytest.fixture
def opened(server, tmp_path, monkeypatch) -> Callable[[], Store]:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://{server.place}")
    return lambda: Store(tmp_path)


def test_log_asks_a_server_that_failed_no_second_time(server, opened):
    store = opened()
    server.answers["search"] = [(500, {"error_code": "INTERNAL_ERROR", "message": "no database"})]
    with pytest.raises(TrackingError, match="too many 500 error responses") as first:
        store.log(Run("r", "f"), "live")
    asked = len(server.asked)
    for again in (lambda: store.log(Run("s", "g"), "live"), opened):
        with pytest.raises(TrackingError) as caught:
            again()
        assert caught.value is first.value
    assert len(server.asked) == asked


def test_say_prints_a_line_once(capsys):
    for error in (TrackingError("http://a", "gone"), TrackingError("http://a", "gone"), TrackingError("http://b", "?")):
        tracking.say(error)
    assert [line.split(";")[0] for line in capsys.readouterr().err.splitlines()] == [
        "scforget: MLflow at http://a: gone", "scforget: MLflow at http://b: ?"
    ]  # fmt: skip
