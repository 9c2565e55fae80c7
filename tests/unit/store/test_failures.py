import socket
import sqlite3
import ssl

import asyncpg
import pytest
from sqlalchemy.exc import DBAPIError, OperationalError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from orchestrator.store.failures import AWAY, Retry, failure_of

SECRET = "the text of a question"  # noqa: S105 - that no sentence may repeat


class CodedError(Exception):
    """What SQLAlchemy makes of asyncpg's errors."""

    def __init__(self, sqlstate: str) -> None:
        super().__init__(SECRET)
        self.sqlstate = sqlstate


def sqlite_error(name: str) -> sqlite3.Error:
    error = sqlite3.OperationalError(SECRET)
    error.sqlite_errorname = name
    return error


def wrapped(error: BaseException) -> DBAPIError:
    return OperationalError(f"SELECT '{SECRET}'", {"question": SECRET}, error)


@pytest.mark.parametrize(
    ("error", "retry", "reason"),
    [
        (sqlite_error("SQLITE_FULL"), Retry.NEVER, "disk is full"),
        (sqlite_error("SQLITE_CANTOPEN_ISDIR"), Retry.NEVER, "cannot be opened"),
        (sqlite_error("SQLITE_IOERR_WRITE"), Retry.NEVER, "its disk fails"),
        (sqlite_error("SQLITE_BUSY_SNAPSHOT"), Retry.AT_ONCE, "another process"),
        (sqlite_error("SQLITE_CORRUPT"), Retry.NEVER, "restore it"),
        (sqlite_error("SQLITE_MISUSE"), Retry.NEVER, "SQLITE_MISUSE"),
        (CodedError("53100"), Retry.NEVER, "disk is full"),
        (CodedError("28P01"), Retry.NEVER, "password"),
        (CodedError("3D000"), Retry.NEVER, "does not exist"),
        (CodedError("40001"), Retry.AT_ONCE, "40001"),
        (CodedError("40P01"), Retry.AT_ONCE, "40P01"),
        (CodedError("57P01"), Retry.WHEN_BACK, AWAY),
        (CodedError("08006"), Retry.WHEN_BACK, AWAY),
        (CodedError("53300"), Retry.WHEN_BACK, "too many connections"),
        (CodedError("57014"), Retry.NEVER, "in time"),
        (CodedError("23505"), Retry.NEVER, "23505"),
        (asyncpg.InterfaceError("connection is closed"), Retry.WHEN_BACK, AWAY),
        (ConnectionRefusedError(), Retry.WHEN_BACK, AWAY),
        (TimeoutError(), Retry.WHEN_BACK, AWAY),
        (socket.gaierror(), Retry.WHEN_BACK, "host's name"),
        (ssl.SSLCertVerificationError(), Retry.NEVER, "certificate"),
    ],
)
def test_every_failure_has_its_sentence_bare_and_wrapped(error: Exception, retry: Retry, reason: str) -> None:
    for one in (error, wrapped(error)):
        failure = failure_of(one)
        assert failure.retry is retry
        assert reason in failure.reason
        assert SECRET not in failure.reason


def test_a_pool_that_is_used_up_is_waited_for() -> None:
    assert failure_of(NoConnectionFree(SECRET)).retry is Retry.WHEN_BACK


def test_what_nobody_knows_is_told_by_its_kind_alone() -> None:
    assert failure_of(wrapped(KeyError(SECRET))).reason == "failed (KeyError)"
