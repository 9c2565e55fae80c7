"""What went wrong between us and the database: whether to try again, and one sentence for a person. Pure.

Libraries' own messages are not repeated: they hold statements, values, and sometimes the URL.

Sources: SQLite's result codes (https://www.sqlite.org/rescode.html), PostgreSQL's (its manual, appendix A,
"PostgreSQL Error Codes").
"""

import socket
import sqlite3
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from asyncpg import InterfaceError
from asyncpg.exceptions import ClientConfigurationError
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree


class Retry(Enum):
    """Whether the same transaction may succeed."""

    NEVER = "never"
    """Not before a person has done something."""
    AT_ONCE = "at_once"
    """It met another one; nothing is wrong."""
    WHEN_BACK = "when_back"
    """The server is away, or is starting."""


@dataclass(frozen=True, slots=True)
class Failure:
    """What a failed transaction means. It was not committed."""

    retry: Retry
    reason: str
    """Goes on the words "the database FILE"."""


_SQLITE = {
    "SQLITE_FULL": "could not be written: its disk is full",
    "SQLITE_CANTOPEN": "cannot be opened: its directory is missing or may not be written",
    "SQLITE_READONLY": "cannot be written: the file or its directory is read-only",
    "SQLITE_PERM": "may not be opened by this user",
    "SQLITE_BUSY": "is held by another process for too long",
    "SQLITE_LOCKED": "is held by another process for too long",
    "SQLITE_IOERR": "could not be read or written: its disk fails, or is full",
    "SQLITE_NOTADB": "is a file of another kind",
    "SQLITE_CORRUPT": "is damaged: restore it from a backup",
    "SQLITE_TOOBIG": "does not take so long a value",
}
_POSTGRESQL = {
    "28": "refuses the user or the password",
    "3D": "does not exist on its server",
    "42501": "does not allow this user what is needed: it must own its schema",
    "53100": "could not be written: its server's disk is full",
    "53200": "has no memory left on its server",
    "53300": "has too many connections on its server",
    "25006": "cannot be written: its server is a read-only replica",
    "57014": "did not answer in time",
    "55P03": "did not answer in time: another transaction held what was needed",
    "22": "does not take such a value",
}
_AT_ONCE = ("40001", "40P01")
_WHEN_BACK = ("08", "57P01", "57P02", "57P03", "53300", "25006")
AWAY = "does not answer"


def failure_of(error: BaseException) -> Failure:
    """What an exception of SQLAlchemy, a driver or the operating system means.

    A lost connection means "not committed" here; who lost it in the commit itself has to ask.
    """
    chain = list(_chain(error))
    for one in chain:
        if isinstance(one, sqlite3.Error):
            return _sqlite(one)
        code = getattr(one, "sqlstate", None)
        if isinstance(code, str) and code:
            return _postgresql(code)
    for one in chain:
        match one:
            case ClientConfigurationError():
                return Failure(
                    Retry.NEVER, "cannot be connected to: its URL or a PG... variable makes no sense"
                )
            case ssl.SSLCertVerificationError():
                return Failure(Retry.NEVER, "has a certificate that is not trusted")
            case socket.gaierror():
                return Failure(Retry.WHEN_BACK, f"{AWAY}: its host's name is not known")
            case NoConnectionFree():
                return Failure(Retry.WHEN_BACK, f"{AWAY}: every connection to it is in use")
            case OSError() | TimeoutError() | EOFError():
                return Failure(Retry.WHEN_BACK, AWAY)
            case InterfaceError() if not isinstance(one, ValueError):
                return Failure(Retry.WHEN_BACK, AWAY)
            case DBAPIError(connection_invalidated=True):
                return Failure(Retry.WHEN_BACK, AWAY)
            case _:
                pass
    return Failure(Retry.NEVER, f"failed ({type(chain[-1]).__name__})")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what the driver said, and what that was made of."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        origin = error.orig if isinstance(error, DBAPIError) else None
        error = origin or error.__cause__ or error.__context__


def _sqlite(error: sqlite3.Error) -> Failure:
    # The extended names begin with the plain ones: SQLITE_IOERR_WRITE.
    name = getattr(error, "sqlite_errorname", "")
    for known, reason in _SQLITE.items():
        if name.startswith(known):
            is_busy = known in {"SQLITE_BUSY", "SQLITE_LOCKED"}
            return Failure(Retry.AT_ONCE if is_busy else Retry.NEVER, reason)
    return Failure(Retry.NEVER, f"failed ({name or type(error).__name__})")


def _postgresql(code: str) -> Failure:
    retry = Retry.NEVER
    if code.startswith(_AT_ONCE):
        retry = Retry.AT_ONCE
    elif code.startswith(_WHEN_BACK):
        retry = Retry.WHEN_BACK
    for known, reason in _POSTGRESQL.items():
        if code.startswith(known):
            return Failure(retry, reason)
    return Failure(retry, AWAY if retry is Retry.WHEN_BACK else f"failed (SQLSTATE {code})")
