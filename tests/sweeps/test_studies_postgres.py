"""Workers on one study in PostgreSQL: one is killed, nothing is lost, nothing is made twice."""

from __future__ import annotations

import gc
import multiprocessing
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator

import pytest
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from scforget.errors import StudyError
from scforget.sweeps import storages, studies
from servers import Postgres
from studying import FIRST, SPACE, Worker, judge, judged, toy

pytestmark = [pytest.mark.postgres, pytest.mark.xdist_group("postgres")]

N = 8


def until(ready: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not ready():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.fixture(autouse=True)
def _connections() -> Iterator[None]:
    """Optuna's heartbeats and failed openings leave theirs to the garbage collector, of which psycopg complains."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture
def opened_later(postgres: str) -> Iterator[Callable[[], RDBStorage]]:
    """Opens the database when it is asked to, and closes it after the test."""
    found: list[RDBStorage] = []

    def make() -> RDBStorage:
        storage = storages.open_storage(postgres)
        assert isinstance(storage, RDBStorage)
        found.append(storage)
        return storage

    yield make
    while found:
        close(found.pop())


def close(storage: RDBStorage) -> None:
    storage.remove_session()
    storage.engine.dispose()


@pytest.fixture
def opened(opened_later: Callable[[], RDBStorage]) -> RDBStorage:
    return opened_later()


def test_workers_lose_nothing_and_repeat_nothing_when_one_is_killed(postgres, opened_later, tmp_path):
    """It was on another machine: that its trial is free is known by heartbeats that have stopped."""
    logs = [tmp_path / name for name in ("killed", "living", "later")]
    killed = Worker(postgres, logs[0], N, hangs_at=2, node="another machine", grace=3)
    living = Worker(postgres, logs[1], N, awaits=str(logs[0]), grace=3)
    started = [killed.start(), living.start()]  # both at once, in a database that has no tables
    until(lambda: logs[0].exists() and len(judged(logs[0])) == 2)
    started[0].send_signal(signal.SIGKILL)
    said = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [-signal.SIGKILL, 0], said

    study = toy(opened_later())
    done = studies.finished(study)
    assert [studies.ordinal(study, trial.number) for trial in done] == list(range(N))
    (_, _, lost), attempts = judged(logs[0])[1], Counter()
    for log in logs[:2]:
        attempts.update(str(values) for _, _, values in judged(log))
    assert attempts.pop(str(lost)) == 2  # as it was killed, and once again
    assert set(attempts.values()) == {1}
    assert [values for _, _, values in judged(logs[1])].count(lost) == 1
    assert sum(trial.params == lost for trial in done) == 1
    assert len(done) == len({str(trial.params) for trial in done}) == N
    assert [trial.user_attrs.get("default", False) for trial in done] == [True] + [False] * (N - 1)
    assert done[0].params == FIRST

    before = {trial.number: (trial.params, trial.values) for trial in done}
    assert Worker(postgres, logs[2], N + 3).run() == (0, "")
    after = {trial.number: (trial.params, trial.values) for trial in studies.finished(study)}
    assert len(after) == N + 3
    assert {number: after[number] for number in before} == before
    assert len(judged(logs[2])) == 3


def test_a_worker_by_itself_draws_in_a_database_what_it_draws_in_a_journal(opened, tmp_path):
    found = []
    for storage in (opened, storages.open_storage(str(tmp_path / "journal"))):
        study = toy(storage)
        studies.run(study, studies.Objective(SPACE, judge, N), N)
        found.append([(trial.params, trial.values, trial.state) for trial in studies.finished(study)])
    assert found[0] == found[1]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage")
def test_a_retried_trial_of_a_stale_worker_is_not_taken_for_dead_while_it_is_taken_up(opened):
    """Between the queue and its new worker's signature it must not bear the old one's."""
    study = toy(opened)
    trial = study.ask()
    trial.set_user_attr("worker", ["another machine", 1, 0.0])
    opened.set_trial_state_values(trial._trial_id, TrialState.FAIL)
    callback = opened.get_heartbeat_stale_trial_callback()
    assert callback is not None
    callback(study, study.trials[0])
    assert "worker" not in study.ask().user_attrs


def test_open_storage_can_make_the_tables_while_others_do(postgres, opened_later):
    """Of `CREATE TYPE` and the like at once all but one fail."""
    fork = multiprocessing.get_context("fork")
    start = fork.Barrier(4)

    def open_it() -> None:
        start.wait(timeout=60)
        close(storages.open_storage(postgres))

    processes = [fork.Process(target=open_it) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert opened_later().get_all_studies() == []


def test_a_database_that_is_not_there_ends_in_one_line(postgres_cluster: Postgres):
    with pytest.raises(StudyError) as caught:
        storages.open_storage(postgres_cluster.address("nowhere"))
    assert 'database "nowhere" does not exist' in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_database_that_goes_away_ends_in_one_line(opened, postgres, postgres_cluster: Postgres):
    study = toy(opened)

    def cut(values, place):
        name = postgres.rsplit("/", 1)[1]
        with postgres_cluster.connect() as connection:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
            connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        return judge(values, place)

    with pytest.raises(StudyError) as caught:
        studies.run(study, studies.Objective(SPACE, cut, 2), 2)
    assert "\n" not in str(caught.value)
