"""The rules of `Database`, over a backend whose failures are scripted."""

import asyncio
from collections.abc import Callable
from typing import Any, cast

import pytest
from sqlalchemy import Connection, Table
from sqlalchemy.dialects.sqlite import Insert

from orchestrator.errors import InvariantError, StoreError
from orchestrator.store.backend import T, Transaction, UnsureError, Work
from orchestrator.store.database import Database

LOST, UNSURE = ConnectionResetError(), UnsureError("77", None)
NOT_KNOWN = "is not known"


class Scripted:
    """A backend that fails as it was told to, and then works."""

    name = "the database books"

    def __init__(self, *script: Exception, told: tuple[bool | Exception | None, ...] = ()) -> None:
        self._script = list(script)
        self._told = list(told)
        self.runs = 0
        """Of transactions, to their end."""
        self.hangs: asyncio.Event | None = None

    async def write(self, work: Work[T], *, lane: str) -> T:
        if self.hangs is not None:
            await self.hangs.wait()
        failure = self._script.pop(0) if self._script else None
        if failure is not None and not isinstance(failure, UnsureError):
            raise failure
        result = await work(cast(Transaction, None))
        self.runs += 1
        if failure is not None:
            raise UnsureError(failure.mark, result)
        return result

    async def read(self, work: Work[T]) -> T:
        return await self.write(work, lane="")

    async def was_committed(self, mark: str) -> bool | None:
        assert mark == "77"
        told = self._told.pop(0)
        if isinstance(told, Exception):
            raise told
        return told

    async def migrate(self, upgrade: Callable[[Connection], None]) -> None:
        raise NotImplementedError

    def insert(self, table: Table) -> Insert:
        raise NotImplementedError

    async def lock(self, connection: Transaction, table: Table) -> None:
        raise NotImplementedError

    async def scrub(self) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        pass


async def answer(_: Any) -> int:
    return 42


async def test_a_database_that_is_away_for_a_moment_is_waited_for() -> None:
    backend = Scripted(LOST, LOST)
    assert await Database(backend).write(answer) == 42
    assert backend.runs == 1


async def test_one_that_stays_away_is_told() -> None:
    backend = Scripted(*[LOST] * 99)
    with pytest.raises(StoreError, match=r"^the database books does not answer$"):
        await Database(backend, patience_s=0.2).write(answer)
    assert backend.runs == 0


async def test_what_a_transaction_raises_itself_is_raised_and_not_tried_again() -> None:
    backend = Scripted()

    async def refuse(_: Any) -> None:
        backend.runs += 1
        raise InvariantError("no")

    with pytest.raises(InvariantError):
        await Database(backend).write(refuse)
    assert backend.runs == 1


async def test_a_commit_that_broke_off_and_happened_is_not_run_again() -> None:
    backend = Scripted(UNSURE, told=(LOST, None, True))
    assert await Database(backend).write(answer) == 42
    assert backend.runs == 1


async def test_a_commit_that_broke_off_and_did_not_happen_is_run_again() -> None:
    backend = Scripted(UNSURE, told=(None, False))
    assert await Database(backend).write(answer) == 42
    assert backend.runs == 2


async def test_a_transaction_that_wrote_nothing_needs_no_commit() -> None:
    backend = Scripted(UnsureError(None, None))
    assert await Database(backend).write(answer) == 42
    assert backend.runs == 1


async def test_when_nobody_can_say_what_became_of_a_commit_that_is_told() -> None:
    backend = Scripted(UNSURE, told=(LOST,) * 99)
    with pytest.raises(StoreError, match=NOT_KNOWN):
        await Database(backend, patience_s=0.2).write(answer)
    assert backend.runs == 1


async def test_a_ping_waits_for_nobody() -> None:
    with pytest.raises(StoreError, match="does not answer"):
        await Database(Scripted(LOST), patience_s=60.0).ping()


async def test_what_hangs_is_given_up_and_told_as_not_known() -> None:
    backend = Scripted()
    backend.hangs = asyncio.Event()
    database = Database(backend, patience_s=0.0, answer_s=0.05)
    with pytest.raises(StoreError, match=NOT_KNOWN):
        await database.write(answer)
    backend.hangs.set()
    await database.close()
    assert backend.runs == 0


async def test_a_transaction_that_was_begun_is_finished_when_its_task_is_cancelled() -> None:
    backend = Scripted()
    backend.hangs = asyncio.Event()
    writing = asyncio.create_task(Database(backend).write(answer))
    for _ in range(5):
        await asyncio.sleep(0)
    writing.cancel()
    backend.hangs.set()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert backend.runs == 1
