"""The service's database: opening it, and running transactions in it.

Rules:

1. A transaction that was begun is finished, also when who asked for it is cancelled meanwhile.
2. Every wait has an end. A database that is away, or that lets transactions collide, is tried again for
   `patience_s`; all together, nothing takes longer than `ANSWER_S` more.
3. Whatever the database, a driver or the system raises becomes a `StoreError` with one sentence, in which
   neither a secret of the URL nor anything of a statement occurs.
4. When the connection breaks during a commit, the database is asked, once it is back, whether it was
   committed, and the transaction is run again only if it was not. Only if the database stays away is it not
   known, and the sentence says so.
"""

import asyncio
import functools
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Table, make_url, text
from sqlalchemy.dialects.postgresql import Insert as PostgresqlInsert
from sqlalchemy.dialects.sqlite import Insert as SqliteInsert
from sqlalchemy.exc import ArgumentError

from orchestrator.errors import StoreError
from orchestrator.shielding import run_shielded
from orchestrator.store.backend import DATABASE_ERRORS, Backend, Transaction, UnsureError, Work
from orchestrator.store.failures import Retry, failure_of
from orchestrator.store.migrate import upgrade
from orchestrator.store.postgresql import MIGRATION_S, Postgresql
from orchestrator.store.sqlite import Sqlite

T = TypeVar("T")

PATIENCE_S = 10.0
"""A PostgreSQL server that is restarted is back after this long."""
ANSWER_S = 30.0
"""A statement and its commit, at the worst; what takes longer hangs."""
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 1.0

_URL_HELP = "a store's URL is sqlite:///FILE or postgresql://USER@HOST/DATABASE"


class Database:
    """An open database. `open_database` makes it."""

    def __init__(
        self, backend: Backend, *, patience_s: float = PATIENCE_S, answer_s: float = ANSWER_S
    ) -> None:
        self._backend = backend
        self._patience_s = patience_s
        self._answer_s = answer_s
        self._left_behind: set[asyncio.Future[Any]] = set()

    @property
    def name(self) -> str:
        """Which database it is, for people; without any secret."""
        return self._backend.name

    def insert(self, table: Table) -> "PostgresqlInsert | SqliteInsert":
        """An INSERT that can leave a row that is there as it is."""
        return self._backend.insert(table)

    async def lock(self, connection: Transaction, table: Table) -> None:
        """Nobody else that locks this table goes on, until the transaction ends."""
        await self._backend.lock(connection, table)

    async def read(self, work: Work[T]) -> T:
        """Run a transaction that writes nothing.

        Raises:
            StoreError: The database does not answer.
        """
        return await self._finish(self._persist(lambda: self._backend.read(work)))

    async def write(self, work: Work[T], *, lane: str = "") -> T:
        """Run a transaction; durable when this returns.

        Args:
            work: Its statements. Whatever it raises undoes them.
            lane: Whose locks it needs. Works of one lane may be committed together.

        Raises:
            StoreError: Nothing was written, unless the sentence says that it is not known.
        """
        return await self._finish(self._persist(lambda: self._backend.write(work, lane=lane)))

    async def scrub(self) -> None:
        """Let go of what was deleted: no page of the file keeps it where that can be had now."""
        await self._finish(self._persist(self._backend.scrub))

    async def ping(self) -> None:
        """Whether the database answers now.

        Raises:
            StoreError: It does not.
        """

        async def work(connection: Transaction) -> None:
            await connection.execute(text("SELECT 1"))

        await self._finish(self._persist(lambda: self._backend.read(work), patience_s=0.0))

    async def migrate(self, *, up_to: str = "head") -> None:
        """Bring the tables up to what this version needs, or to a step on the way there. Several processes
        may do so at once.

        Raises:
            StoreError: The database does not answer, or is a later version's.
        """
        take_steps = functools.partial(upgrade, up_to=up_to)
        await self._finish(self._persist(lambda: self._backend.migrate(take_steps)), answer_s=MIGRATION_S)

    async def close(self) -> None:
        """Close it. What hangs is left behind, and told when it ends."""
        for task in self._left_behind:
            task.cancel()
        if self._left_behind:
            await asyncio.wait(self._left_behind, timeout=self._answer_s)
        async with asyncio.timeout(self._answer_s):
            await self._backend.close()

    async def _finish(self, work: Coroutine[Any, Any, T], *, answer_s: float | None = None) -> T:
        answer_s = self._answer_s if answer_s is None else answer_s
        return await run_shielded(self._bounded(work, self._patience_s + answer_s))

    async def _bounded(self, work: Coroutine[Any, Any, T], deadline_s: float) -> T:
        """Not `asyncio.timeout`: what hangs in a thread hears of no cancellation."""
        task = asyncio.ensure_future(work)
        await asyncio.wait({task}, timeout=deadline_s)
        if task.done():
            return task.result()
        self._left_behind.add(task)
        task.add_done_callback(self._forget)
        # What still waits for its turn is withdrawn.
        task.cancel()
        await asyncio.sleep(0)
        raise StoreError(f"{self.name} has not answered for {deadline_s:.0f} s; {_NOT_KNOWN}")

    def _forget(self, task: asyncio.Future[Any]) -> None:
        self._left_behind.discard(task)
        if not task.cancelled():
            task.exception()

    async def _persist(self, attempt: Callable[[], Awaitable[T]], *, patience_s: float | None = None) -> T:
        """Try until it works, can't work, or patience is over."""
        loop = asyncio.get_running_loop()
        over = loop.time() + (self._patience_s if patience_s is None else patience_s)
        pause_s = _FIRST_PAUSE_S
        unsure: UnsureError | None = None
        while True:
            try:
                if unsure is None:
                    return await attempt()
                was_committed = unsure.mark is None or await self._backend.was_committed(unsure.mark)
                if was_committed:
                    result: T = unsure.result
                    return result
                if was_committed is False:
                    unsure = None
                    continue
                reason = "does not say what became of a transaction"
            except UnsureError as error:
                unsure = error
                reason = "broke off a commit"
            except DATABASE_ERRORS as error:
                failure = failure_of(error)
                reason = failure.reason
                if failure.retry is Retry.NEVER:
                    # Not `from error`: its text has values of the statement in it.
                    raise StoreError(self._sentence(reason, unsure)) from None
            if loop.time() + pause_s > over:
                raise StoreError(self._sentence(reason, unsure))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _sentence(self, reason: str, unsure: UnsureError | None) -> str:
        return f"{self.name} {reason}" + (f"; {_NOT_KNOWN}" if unsure is not None else "")


_NOT_KNOWN = "whether the last transaction was stored is not known"


@asynccontextmanager
async def open_database(
    url: str, *, patience_s: float = PATIENCE_S, up_to: str = "head"
) -> AsyncIterator[Database]:
    """The database at this URL, its tables up to date, for the length of the block.

    Args:
        url: `sqlite:///FILE`, or `postgresql://...` with what libpq knows: parameters, and PGPASSWORD or
            PGPASSFILE in the environment instead of a password in the URL.
        patience_s: How long a database that is away is waited for, at each call.
        up_to: The last step of its migrations to take; for tests of those behind it.

    Raises:
        StoreError: It cannot be opened; the sentence says why.
    """
    database = Database(_backend(url), patience_s=patience_s)
    try:
        await database.migrate(up_to=up_to)
        yield database
    finally:
        await run_shielded(database.close())


def _backend(url: str) -> Backend:
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        # Not `from`: the text of these holds the URL.
        raise StoreError(_URL_HELP) from None
    match parts.drivername:
        case "sqlite" | "sqlite+aiosqlite":
            if not parts.database or parts.database == ":memory:" or parts.query:
                raise StoreError(f"{_URL_HELP}; this one names no file")
            return Sqlite(Path(parts.database))
        case "postgresql" | "postgres" | "postgresql+asyncpg":
            return Postgresql(parts, "postgresql" + url[url.index("://") :])
        case _:
            raise StoreError(_URL_HELP)
