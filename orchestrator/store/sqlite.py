"""SQLite as the service's database: one file, one writer, many readers (WAL)."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import aiosqlite
from sqlalchemy import URL, Connection, Table, event
from sqlalchemy.dialects.sqlite import Insert, insert
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import AsyncAdaptedQueuePool

from orchestrator.store.backend import Work
from orchestrator.store.group_commit import GroupCommit

T = TypeVar("T")

BUSY_S = 5.0
"""For a lock that another process holds: its longest transaction is the deletion of a run tree."""
READERS = 4
_CONNECTION_S = 30.0
"""For one of our own connections to be free: a thousand streams that open at once take four seconds of it."""

_EVERY_CONNECTION = (
    # A committed transaction survives a loss of power, not only of the process.
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    # What is deleted is overwritten with zeros, not only unlinked.
    "PRAGMA secure_delete=ON",
    "PRAGMA trusted_schema=OFF",
)


class Sqlite:
    """`Backend` over one file."""

    def __init__(self, path: Path) -> None:
        self.name = f"the database {path}"
        self._path = path
        self._writer = _engine(path, 1, begin="BEGIN IMMEDIATE", pragmas=("PRAGMA journal_mode=WAL",))
        self._readers = _engine(path, READERS, begin="BEGIN", pragmas=("PRAGMA query_only=ON",))
        self._lane = GroupCommit(self._transact)

    async def migrate(self, upgrade: Callable[[Connection], None]) -> None:
        """See `Backend.migrate`. Whoever else migrates holds the write lock."""
        await asyncio.to_thread(_touch, self._path)

        async def work(connection: AsyncConnection) -> None:
            await connection.run_sync(upgrade)

        await self._transact(work)

    async def read(self, work: Work[T]) -> T:
        """See `Backend.read`. It sees the database as it was when it began."""
        async with self._readers.begin() as connection:
            return await work(connection)

    async def write(self, work: Work[T], *, lane: str) -> T:
        """See `Backend.write`. There is one lane."""
        return await self._lane.run(work)

    async def was_committed(self, mark: str) -> bool | None:
        """See `Backend.was_committed`. Never asked: a failed commit of SQLite is one that did not happen."""
        raise NotImplementedError(mark)

    def insert(self, table: Table) -> Insert:
        """See `Backend.insert`."""
        return insert(table)

    async def lock(self, connection: AsyncConnection, table: Table) -> None:
        """See `Backend.lock`. A transaction that writes has locked everything."""

    async def scrub(self) -> None:
        """See `Backend.scrub`. The journal has pages as they were; while somebody reads, it stays."""
        connection = await aiosqlite.connect(self._path, timeout=BUSY_S, isolation_level=None)
        try:
            await connection.execute_fetchall("PRAGMA wal_checkpoint(TRUNCATE)")
        finally:
            await connection.close()

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._lane.close()
        await self._readers.dispose()
        await self._writer.dispose()

    async def _transact(self, work: Work[T]) -> T:
        async with self._writer.begin() as connection:
            return await work(connection)


def _engine(path: Path, connections: int, *, begin: str, pragmas: tuple[str, ...]) -> AsyncEngine:
    engine = create_async_engine(
        URL.create("sqlite+aiosqlite", database=str(path)),
        # Transactions begin where we say so, and how.
        connect_args={"isolation_level": None, "timeout": BUSY_S},
        poolclass=AsyncAdaptedQueuePool,
        pool_size=connections,
        max_overflow=0,
        pool_timeout=_CONNECTION_S,
        hide_parameters=True,
    )

    @event.listens_for(engine.sync_engine, "connect")
    def set_up(connection: Any, _record: object) -> None:
        cursor = connection.cursor()
        for pragma in (*_EVERY_CONNECTION, *pragmas):
            cursor.execute(pragma)
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin_transaction(connection: Connection) -> None:
        connection.exec_driver_sql(begin)

    return engine


def _touch(path: Path) -> None:
    """Make the file, for its owner alone; the journal beside it inherits its mode."""
    os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
