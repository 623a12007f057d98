"""Where studies are kept: a journal of this machine, or a database for workers on several."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote

import optuna
from optuna.exceptions import ExperimentalWarning, StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import IntegrityError, InternalError, ProgrammingError, SQLAlchemyError

from scforget.errors import StudyError

# Seconds between two signs of life of a worker, and without one until its trial is given to another.
HEARTBEAT, GRACE = 30, 120
#: Attributes of a trial: who is at it; how many have died in it; which one it repeats.
WORKER, DEATHS, RETRY_OF = "worker", "deaths", "retry_of"
_MOST_DEATHS = 3  # of workers in one trial: settings that kill them again and again must not hold up a study
_FAILURES = (StorageInternalError, SQLAlchemyError, OSError)  # of a storage, once it is open
_TRIES, _PAUSE = 10, 0.5


def retry(study: Study, trial: FrozenTrial, died: bool = True) -> None:
    """Queue a trial again, with the settings it has drawn; one in which workers died too often counts as diverged."""
    kept = {key: value for key, value in trial.user_attrs.items() if key != WORKER}
    kept |= {DEATHS: int(kept.get(DEATHS, 0)) + died, RETRY_OF: trial.number}
    system = {key: value for key, value in trial.system_attrs.items() if not key.startswith("constraints")}
    constraints, state = {}, TrialState.WAITING
    if kept[DEATHS] >= _MOST_DEATHS and trial.params:
        kept["diverged"] = f"{kept[DEATHS]} workers died in it"
        constraints, state = {"diverged": 1.0}, TrialState.PRUNED
    study.add_trial(optuna.create_trial(
        state=state, params=trial.params, distributions=trial.distributions, user_attrs=kept, system_attrs=system,
        constraints=constraints,
    ))  # fmt: skip


def address(root: Path, storage: str | None) -> str:
    """Address of the storage: a database's, or the path of a journal; default ``studies/studies.journal``."""
    return storage or str(root / "studies" / "studies.journal")


def _shown(where: str) -> str:
    """Return an address without its user, password and options, of which one may be a password too."""
    scheme, separator, rest = where.partition("://")
    if not separator:
        return where
    user, _, place = rest.rpartition("@")
    return f"{scheme}://{'…@' if user else ''}{place.split('?', 1)[0]}"


def _mend(journal: Path) -> None:
    """Cut off a line that a crash left half-written, as what is appended to it would spoil the whole journal."""

    def torn() -> bool:
        content = journal.read_bytes()
        return content.startswith(b'{"op_code":') and not content.endswith(b"\n")

    if journal.exists() and torn():
        lock = JournalFileSymlinkLock(str(journal))
        lock.acquire()
        try:
            if torn():  # still: it was no living worker in the middle of writing
                with journal.open("rb+") as file:
                    file.truncate(journal.read_bytes().rfind(b"\n") + 1)
        finally:
            lock.release()


def open_storage(where: str, heartbeat: int = HEARTBEAT, grace: int = GRACE) -> BaseStorage:
    """Open a storage; raises :class:`StudyError` in one line if it does not answer."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        try:
            if "://" not in where:
                path = Path(where).absolute()  # Optuna's lock is a link to it from its folder
                path.parent.mkdir(parents=True, exist_ok=True)
                _mend(path)
                return JournalStorage(JournalFileBackend(str(path)))
            return _database(where, heartbeat, grace)
        except Exception as error:  # drivers, databases and files each have their own kinds
            raise _explained(where, error) from error


def _database(where: str, heartbeat: int, grace: int) -> RDBStorage:
    """Open a database; of workers that find no tables in it at once, one makes them and the others ask again."""
    for left in reversed(range(_TRIES)):
        try:
            return RDBStorage(
                where, heartbeat_interval=heartbeat, grace_period=grace, heartbeat_stale_trial_callback=retry
            )
        except (IntegrityError, InternalError, ProgrammingError, StorageInternalError):
            if not left:
                raise
            time.sleep(_PAUSE)
    raise AssertionError


def _explained(where: str, error: Exception) -> StudyError:
    if not isinstance(error, _FAILURES) and "://" not in where:
        return StudyError(where, "not a readable journal of studies; name another file, or restore it")
    lines = [line for line in str(error.__cause__ or error).splitlines() if line.strip()]
    why = (lines or [type(error).__name__])[0]
    for secret in _secrets(where):
        why = why.replace(secret, "…")
    return StudyError(_shown(where), why[:200])


def _secrets(where: str) -> list[str]:
    """What of an address must not be shown, the longest first."""
    rest = where.partition("://")[2]
    user, options = rest.rpartition("@")[0], rest.rpartition("?")[2] if "?" in rest else ""
    found = {user, user.partition(":")[2], options}
    return sorted(filter(None, found | {unquote(one) for one in found}), key=len, reverse=True)


@contextmanager
def answering(where: str) -> Iterator[None]:
    """A storage that fails later on ends in one line, too."""
    try:
        yield
    except _FAILURES as error:
        raise _explained(where, error) from error
    except AssertionError as error:  # by Optuna, of a trial whose end it could not write down
        if isinstance(error.__context__, _FAILURES):
            raise _explained(where, error.__context__) from error
        raise
