"""PostgreSQL (13 or later) as the service's database, for more than one process."""

import asyncio
from collections.abc import Callable
from functools import cache, partial
from typing import Any, TypeVar

import asyncpg
from sqlalchemy import Connection, NullPool, Table, Text, cast, func, select, text
from sqlalchemy.dialects.postgresql import Insert, insert
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from orchestrator.store.backend import DATABASE_ERRORS, Transaction, UnsureError, Work
from orchestrator.store.failures import Retry, failure_of
from orchestrator.store.group_commit import GroupCommit

T = TypeVar("T")

CONNECTIONS = 10
READERS = 6
"""Of them, at the most, with those who only read: a thousand streams that open at once wait for each other,
and nobody who writes waits for them."""
CONNECT_S = 5.0
STATEMENT_S = 10.0
"""The server ends a longer one, and so a wait for a lock ..."""
_CLIENT_S = STATEMENT_S + 3.0
"""... and where the server itself is not heard of any more, we do."""
IDLE_S = 60.0
"""The server ends a transaction of a process that has stopped in the middle."""
MIGRATION_S = 600.0
_NOT_YET_GIVEN = "22023"
"""SQLSTATE, of a transaction's number in the future."""
_LOCKS = 0x726C6D
"""Ours, "rlm": other programs of the same server have advisory locks too."""


class Postgresql:
    """`Backend` over a server.

    Args:
        url: Its parts, for `name`.
        dsn: What asyncpg connects to; it knows libpq's parameters and environment.
    """

    def __init__(self, url: URL, dsn: str) -> None:
        at = f" at {url.host}" + (f":{url.port}" if url.port else "") if url.host else ""
        self.name = f"the database {url.database or ''}{at}".strip()
        self._dsn = dsn
        self._engine = _engine(
            dsn, statement_s=STATEMENT_S, pool_size=CONNECTIONS, max_overflow=0, pool_timeout=STATEMENT_S
        )
        self._lanes: dict[str, GroupCommit] = {}
        self._readers = asyncio.Semaphore(READERS)

    async def migrate(self, upgrade: Callable[[Connection], None]) -> None:
        """See `Backend.migrate`."""
        engine = _engine(self._dsn, statement_s=MIGRATION_S, poolclass=NullPool)
        try:
            async with engine.begin() as connection:
                await connection.execute(select(func.pg_advisory_xact_lock(_LOCKS, 0)))
                await connection.run_sync(upgrade)
        finally:
            await engine.dispose()

    async def read(self, work: Work[T]) -> T:
        """See `Backend.read`. Each statement sees what was committed before it."""
        async with self._readers, self._engine.begin() as connection:
            return await work(connection)

    async def write(self, work: Work[T], *, lane: str) -> T:
        """See `Backend.write`."""
        if not lane:
            return await self._transact(work)
        group = self._lanes.setdefault(lane, GroupCommit(self._transact))
        try:
            return await group.run(work)
        finally:
            if group.is_idle:
                self._lanes.pop(lane, None)

    async def was_committed(self, mark: str) -> bool | None:
        """See `Backend.was_committed`."""
        statement = text("SELECT pg_xact_status(CAST(CAST(:mark AS text) AS xid8))")
        try:
            async with self._engine.begin() as connection:
                status = (await connection.execute(statement, {"mark": mark})).scalar_one()
        except DBAPIError as error:
            if getattr(error.orig, "sqlstate", None) != _NOT_YET_GIVEN:
                raise
            # It was lost in a crash with its number, which a commit would have put on the disk.
            return False
        return {"committed": True, "aborted": False}.get(status)

    def insert(self, table: Table) -> Insert:
        """See `Backend.insert`."""
        return _insert(table)

    async def lock(self, connection: Transaction, table: Table) -> None:
        """See `Backend.lock`."""
        await connection.execute(
            select(func.pg_advisory_xact_lock(_LOCKS, func.hashtext(cast(table.name, Text))))
        )

    async def scrub(self) -> None:
        """See `Backend.scrub`. The server's autovacuum does."""

    async def close(self) -> None:
        """See `Backend.close`."""
        for group in list(self._lanes.values()):
            await group.close()
        await self._engine.dispose()

    async def _transact(self, work: Work[T]) -> T:
        async with self._engine.connect() as connection:
            result = await work(connection)
            mark = await _mark(connection)
            return await _commit(connection, mark, result)


@cache
def _insert(table: Table) -> Insert:
    # One for all, so that what SQLAlchemy makes of it is made once.
    return insert(table)


async def _mark(connection: AsyncConnection) -> str | None:
    """The transaction's number, by which the server knows what became of it; None if it wrote nothing."""
    number = await connection.execute(text("SELECT CAST(pg_current_xact_id_if_assigned() AS text)"))
    mark: str | None = number.scalar_one()
    return mark


async def _commit(connection: AsyncConnection, mark: str | None, result: T) -> T:
    try:
        await connection.commit()
    except DATABASE_ERRORS as error:
        if failure_of(error).retry is Retry.AT_ONCE:
            # The server said that it did not.
            raise
        raise UnsureError(mark, result) from error
    return result


def _engine(dsn: str, *, statement_s: float, **pool: Any) -> AsyncEngine:
    connect = partial(
        asyncpg.connect,
        dsn,
        timeout=CONNECT_S,
        command_timeout=statement_s + (_CLIENT_S - STATEMENT_S),
        server_settings={
            "application_name": "rlm",
            "statement_timeout": str(int(statement_s * 1_000)),
            "idle_in_transaction_session_timeout": str(int(IDLE_S * 1_000)),
        },
    )
    return create_async_engine("postgresql+asyncpg://", async_creator=connect, hide_parameters=True, **pool)
