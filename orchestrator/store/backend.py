"""What differs between databases, behind one port."""

import sqlite3
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import asyncpg
from sqlalchemy import Connection, CursorResult, Executable, Table
from sqlalchemy.dialects.postgresql import Insert as PostgresqlInsert
from sqlalchemy.dialects.sqlite import Insert as SqliteInsert
from sqlalchemy.exc import SQLAlchemyError

T = TypeVar("T")


class Transaction(Protocol):
    """A connection in the middle of a transaction. SQLAlchemy's `AsyncConnection` is one."""

    async def execute(
        self, statement: Executable, parameters: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None
    ) -> CursorResult[Any]:
        """One statement, or one for each of several parameters. Its rows are there until the next one."""
        ...

    async def run_sync(self, work: Callable[[Connection], T]) -> T:
        """For what knows SQLAlchemy's connections that are not asynchronous."""
        ...


Work: TypeAlias = Callable[[Transaction], Coroutine[Any, Any, T]]
"""Statements of one transaction. It touches and awaits nothing but the connection: it may be run in a thread,
and is called again when a transaction has to be tried again."""

DATABASE_ERRORS = (
    SQLAlchemyError,
    sqlite3.Error,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    OSError,
    EOFError,
    TimeoutError,
)
"""Every way in which a database fails; asyncpg's come as they are while connecting. None is a bug of ours."""


class UnsureError(Exception):
    """The connection broke while a transaction was being committed.

    Attributes:
        mark: By which the database can tell later whether it was; None when it had written nothing.
        result: What the transaction came to, if it was.
    """

    def __init__(self, mark: str | None, result: Any) -> None:
        super().__init__(mark)
        self.mark = mark
        self.result = result


class Backend(Protocol):
    """One kind of database, opened.

    Methods raise what driver and SQLAlchemy raise, and `UnsureError`; `Database` makes our errors of it.
    """

    name: str
    """For people: which database it is, without any secret."""

    async def migrate(self, upgrade: Callable[[Connection], None]) -> None:
        """Run this in a transaction, when nobody else migrates."""
        ...

    async def read(self, work: Work[T]) -> T:
        """In a transaction that writes nothing."""
        ...

    async def write(self, work: Work[T], *, lane: str) -> T:
        """In a transaction. Works of one lane would wait for each other's locks, and may be committed
        together; an empty lane is nobody else's.
        """
        ...

    async def was_committed(self, mark: str) -> bool | None:
        """Whether the transaction of an `UnsureError` was; None while it is being decided."""
        ...

    def insert(self, table: Table) -> "PostgresqlInsert | SqliteInsert":
        """An INSERT of this database, which can leave a row that is there as it is."""
        ...

    async def lock(self, connection: Transaction, table: Table) -> None:
        """Keep others that lock this table waiting, until the transaction ends."""
        ...

    async def scrub(self) -> None:
        """Let go of what was deleted, as far as that is possible now."""
        ...

    async def close(self) -> None:
        """Every connection. Nothing may be under way."""
        ...
