"""SQLite as the service's database: one file, one writer, many readers (WAL).

A transaction is run whole in a thread of its connection: a way into a thread and back costs more than most
statements. So what waits for a connection waits in that thread's queue.
"""

import asyncio
import os
import sqlite3
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import (
    URL,
    Connection,
    CursorResult,
    Engine,
    Executable,
    QueuePool,
    Table,
    create_engine,
    event,
)
from sqlalchemy.dialects.sqlite import Insert, insert

from orchestrator.errors import InvariantError
from orchestrator.store.backend import Transaction, Work
from orchestrator.store.group_commit import GroupCommit

T = TypeVar("T")

BUSY_S = 5.0
"""For a lock that another process holds: its longest transaction is the deletion of a run tree."""
READERS = 4

_EVERY_CONNECTION = (
    # A committed transaction survives a loss of power, not only of the process.
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    # What is deleted is overwritten with zeros, not only unlinked.
    "PRAGMA secure_delete=ON",
    "PRAGMA trusted_schema=OFF",
)


class _InThread:
    """`Transaction` whose statements are done when they return: nobody ever waits in it."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def execute(
        self, statement: Executable, parameters: Sequence[Mapping[str, Any]] | Mapping[str, Any] | None = None
    ) -> CursorResult[Any]:
        """See `Transaction`."""
        return self._connection.execute(statement, parameters)

    async def run_sync(self, work: Callable[[Connection], T]) -> T:
        """See `Transaction`."""
        return work(self._connection)


class _Connections:
    """Connections to the file, each used by one thread at a time."""

    def __init__(self, path: Path, count: int, *, begin: str, pragmas: tuple[str, ...]) -> None:
        self._engine = _engine(path, count, begin=begin, pragmas=pragmas)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="sqlite")

    async def transact(self, work: Work[T]) -> T:
        """Run it in a transaction. Cancelled before its turn it is left out, later it is finished unheard."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._transact, work)

    async def close(self) -> None:
        """Wait for what is under way, and close them."""
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._engine.dispose)

    def _transact(self, work: Work[T]) -> T:
        with self._engine.begin() as connection:
            return _done(work(_InThread(connection)))


class Sqlite:
    """`Backend` over one file."""

    def __init__(self, path: Path) -> None:
        self.name = f"the database {path}"
        self._path = path
        self._writer = _Connections(path, 1, begin="BEGIN IMMEDIATE", pragmas=("PRAGMA journal_mode=WAL",))
        self._readers = _Connections(path, READERS, begin="BEGIN", pragmas=("PRAGMA query_only=ON",))
        self._lane = GroupCommit(self._writer.transact)

    async def migrate(self, upgrade: Callable[[Connection], None]) -> None:
        """See `Backend.migrate`. Whoever else migrates holds the write lock."""
        await asyncio.to_thread(_touch, self._path)

        async def work(connection: Transaction) -> None:
            await connection.run_sync(upgrade)

        await self._writer.transact(work)

    async def read(self, work: Work[T]) -> T:
        """See `Backend.read`. It sees the database as it was when it began."""
        return await self._readers.transact(work)

    async def write(self, work: Work[T], *, lane: str) -> T:
        """See `Backend.write`. There is one lane."""
        return await self._lane.run(work)

    async def was_committed(self, mark: str) -> bool | None:
        """See `Backend.was_committed`. Never asked: a failed commit of SQLite is one that did not happen."""
        raise NotImplementedError(mark)

    def insert(self, table: Table) -> Insert:
        """See `Backend.insert`."""
        return _insert(table)

    async def lock(self, connection: Transaction, table: Table) -> None:
        """See `Backend.lock`. A transaction that writes has locked everything."""

    async def scrub(self) -> None:
        """See `Backend.scrub`. The journal has pages as they were; while somebody reads, it stays."""
        await asyncio.to_thread(self._empty_journal)

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._lane.close()
        await self._readers.close()
        await self._writer.close()

    def _empty_journal(self) -> None:
        with closing(sqlite3.connect(self._path, timeout=BUSY_S, isolation_level=None)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()


@cache
def _insert(table: Table) -> Insert:
    # One for all, so that what SQLAlchemy makes of it is made once.
    return insert(table)


def _done(work: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine that never has to wait."""
    try:
        work.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    work.close()
    raise InvariantError("a transaction waited for something else than its statements")


def _engine(path: Path, connections: int, *, begin: str, pragmas: tuple[str, ...]) -> Engine:
    engine = create_engine(
        URL.create("sqlite+pysqlite", database=str(path)),
        # Transactions begin where we say so, and how.
        connect_args={"isolation_level": None, "timeout": BUSY_S, "check_same_thread": False},
        poolclass=QueuePool,
        pool_size=connections,
        max_overflow=0,
        hide_parameters=True,
    )

    @event.listens_for(engine, "connect")
    def set_up(connection: sqlite3.Connection, _record: object) -> None:
        for pragma in (*_EVERY_CONNECTION, *pragmas):
            connection.execute(pragma).close()

    @event.listens_for(engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        connection.connection.cursor().execute(begin)

    return engine


def _touch(path: Path) -> None:
    """Make the file, for its owner alone; the journal beside it inherits its mode."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
