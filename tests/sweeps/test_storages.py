"""Storages that cannot be reached or read end in one line without a password; a torn journal is mended."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest
from optuna.exceptions import StorageInternalError
from optuna.storages import InMemoryStorage
from sqlalchemy.exc import OperationalError

from scforget.errors import StudyError
from scforget.sweeps import storages, studies
from servers import free_port
from studying import SPACE, judge, toy

SECRETS = ("s3cret", "s3%40cret", "s3@cret", "hidden")


def refused(where: str) -> str:
    """The one line, which shows no password."""
    with pytest.raises(StudyError) as caught:
        toy(storages.open_storage(where))
    said = str(caught.value)
    assert caught.value.exit_code == 3
    assert "\n" not in said
    assert len(said) < 500
    assert not [secret for secret in SECRETS if secret in said]
    return said


def test_address_is_a_journal_of_the_project_unless_told_otherwise():
    assert storages.address(Path("/lab"), None) == "/lab/studies/studies.journal"
    assert storages.address(Path("/lab"), "postgresql+psycopg://host/optuna") == "postgresql+psycopg://host/optuna"


@pytest.mark.parametrize(
    ("where", "shown"),
    [
        ("postgresql+psycopg://me:s3cret@{}/optuna", "postgresql+psycopg://…@{}/optuna"),
        ("postgresql+psycopg://me:s3%40cret@{}/optuna", "postgresql+psycopg://…@{}/optuna"),
        ("postgresql+psycopg://{}/optuna?user=me&password=s3cret", "postgresql+psycopg://{}/optuna"),
        ("postgresql+psycopg://{}/optuna", "postgresql+psycopg://{}/optuna"),
    ],
)
def test_open_storage_of_a_database_that_is_away_says_so(where, shown):
    place = f"127.0.0.1:{free_port()}"
    said = refused(where.format(place))
    assert said.startswith(f"study storage {shown.format(place)}: ")
    assert "refused" in said
    assert said.endswith("finished trials are safe: run the same command again")


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("nosuch://me:s3cret@127.0.0.1/optuna", "nosuch"),
        ("postgresql+nosuch://me:s3cret@127.0.0.1/optuna", "postgresql.nosuch"),
        ("mysql+mysqldb://me:s3cret@127.0.0.1/optuna", "MySQLdb"),
        ("postgresql+psycopg://me:s3cret@127.0.0.1:port/optuna", "port"),
        ("postgresql+psycopg://me:s3@cret@/no/such?password=hidden", ""),
        ("://me:s3cret@x", ""),
    ],
)
def test_open_storage_of_an_address_that_is_none_says_so(where, why):
    assert why in refused(where)


@pytest.mark.parametrize(
    "content",
    [b"seed: 42\nprotocol: 1\n", b"\x00\xff\x1f\n\n", b"{}\n{}\n", b"[1]\n[2]\n", b'"a"\n', b'{"op_code":9}\n{}\n'],
    ids=["yaml", "binary", "json", "lists", "text", "other"],
)  # fmt: skip
def test_open_storage_of_a_file_that_is_no_journal_says_so_and_leaves_it(tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    assert "not a readable journal of studies; name another file" in refused(str(path))
    assert path.read_bytes() == content


def test_open_storage_of_a_folder_or_below_a_file_says_so(tmp_path):
    assert "Is a directory" in refused(str(tmp_path))
    (tmp_path / "file").touch()
    assert str(tmp_path / "file" / "journal") in refused(str(tmp_path / "file" / "journal"))


def test_a_journal_without_permission_ends_in_one_line(tmp_path, monkeypatch):
    """Permissions do not hold back a superuser: the refusals are put in their place."""
    path = str(tmp_path / "journal")
    toy(storages.open_storage(path))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    storage = storages.open_storage(path)
    study = toy(storage)
    with monkeypatch.context() as patch:
        patch.setattr(os, "symlink", refuse)  # a folder that may be read only: no lock, no new line
        with pytest.raises(StudyError, match="Permission denied"):
            toy(storage)
        with pytest.raises(StudyError, match="Permission denied"):
            studies.run(study, studies.Objective(SPACE, judge, 2), 2)
    monkeypatch.setattr("builtins.open", refuse)
    assert "Permission denied" in refused(path)


@pytest.mark.parametrize("kind", [StorageInternalError, lambda said: OperationalError(said, None, OSError(said))])
@pytest.mark.parametrize(
    "call", ["get_all_trials", "create_new_trial", "set_trial_user_attr", "set_trial_state_values"]
)
def test_run_ends_in_one_line_when_the_storage_fails_later_on(monkeypatch, kind, call):
    storage = InMemoryStorage()
    study = toy(storage, first=None)
    studies.run(study, studies.Objective(SPACE, judge, 2), 2)

    def fail(*_: Any, **__: Any) -> None:
        raise kind("server closed the connection\nunexpectedly")

    monkeypatch.setattr(storage, call, fail)
    with pytest.raises(StudyError) as caught:
        studies.run(study, studies.Objective(SPACE, judge, 4), 4)
    assert "server closed the connection" in str(caught.value)
    assert "\n" not in str(caught.value)


# journals


def test_a_line_that_a_crash_tore_costs_that_line_only(tmp_path):
    """Optuna would append to it, and never read the journal again."""
    path = tmp_path / "journal"
    study = toy(storages.open_storage(str(path)))
    studies.run(study, studies.Objective(SPACE, judge, 3), 3)
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    before = len(studies.finished(toy(storages.open_storage(str(path)))))
    assert before == 2  # the last line said that the third is finished
    kept = whole[: whole[:-7].rfind(b"\n") + 1]
    assert path.read_bytes().startswith(kept + b'{"op_code":')  # that the study was opened is noted too
    again = toy(storages.open_storage(str(path)))
    studies.run(again, studies.Objective(SPACE, judge, 4), 4, timeout=0.0)
    again.set_user_attr("more", 1)
    assert toy(storages.open_storage(str(path))).user_attrs["more"] == 1
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_line_that_is_being_written_is_left_to_its_writer(tmp_path, monkeypatch):
    path = tmp_path / "journal"
    toy(storages.open_storage(str(path)))
    whole = path.read_bytes()
    path.write_bytes(whole[:-7])
    plain = storages.JournalFileSymlinkLock.acquire

    def acquire(lock: Any) -> bool:
        path.write_bytes(whole)  # who had the lock has finished
        return plain(lock)

    with monkeypatch.context() as patch:
        patch.setattr(storages.JournalFileSymlinkLock, "acquire", acquire)
        storages._mend(path)
    assert path.read_bytes() == whole


def test_a_relative_journal_has_a_lock_that_leads_to_it(tmp_path, monkeypatch):
    """Of a lock that leads nowhere Optuna cannot tell the age, and it waits for ever for a killed worker's."""
    monkeypatch.chdir(tmp_path)
    locks: list[bool] = []
    plain = os.symlink

    def symlink(target: Any, link: Any) -> None:
        plain(target, link)
        locks.append(Path(link).exists())

    monkeypatch.setattr(os, "symlink", symlink)
    toy(storages.open_storage("deep/journal"))
    assert locks
    assert all(locks)
    assert (tmp_path / "deep" / "journal").exists()


def test_open_storage_reaches_no_network_for_a_journal(tmp_path, monkeypatch):
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError

    monkeypatch.setattr(socket.socket, "connect", refuse)
    study = toy(storages.open_storage(str(tmp_path / "journal")))
    studies.run(study, studies.Objective(SPACE, judge, 1), 1)
    assert len(studies.finished(study)) == 1
