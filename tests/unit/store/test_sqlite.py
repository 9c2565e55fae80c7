"""Transactions of SQLite in their threads: one way in and out, and nothing of it lost or left behind."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import text

from orchestrator.errors import InvariantError
from orchestrator.store.backend import Transaction
from orchestrator.store.sqlite import READERS, Sqlite


@pytest.fixture
async def sqlite(tmp_path: Path) -> AsyncIterator[Sqlite]:
    backend = Sqlite(tmp_path / "rlm.db")

    async def work(connection: Transaction) -> None:
        await connection.execute(text("CREATE TABLE numbers (number INTEGER)"))

    await backend.write(work, lane="")
    yield backend
    await backend.close()


async def add(connection: Transaction) -> None:
    await connection.execute(text("INSERT INTO numbers VALUES (1)"))


async def count(connection: Transaction) -> int:
    number: int = (await connection.execute(text("SELECT count(*) FROM numbers"))).scalar_one()
    return number


async def test_a_transaction_does_not_run_on_the_loop(sqlite: Sqlite) -> None:
    async def work(connection: Transaction) -> int:
        await connection.execute(text("SELECT 1"))
        return threading.get_ident()

    assert await sqlite.read(work) != threading.get_ident()
    assert await sqlite.write(work, lane="") != threading.get_ident()


async def test_one_that_waits_for_something_else_is_refused_and_undone(sqlite: Sqlite) -> None:
    async def work(connection: Transaction) -> None:
        await add(connection)
        await asyncio.sleep(0)

    with pytest.raises(InvariantError, match="waited for something else"):
        await sqlite.write(work, lane="")
    assert await sqlite.read(count) == 0


async def test_more_readers_than_connections_wait_for_their_turn(sqlite: Sqlite) -> None:
    await sqlite.write(add, lane="")
    assert await asyncio.gather(*(sqlite.read(count) for _ in range(20 * READERS))) == [1] * 20 * READERS


async def test_a_reader_that_is_cancelled_before_its_turn_never_reads(sqlite: Sqlite) -> None:
    go, read = threading.Event(), list[int]()

    async def wait(_: Transaction) -> None:
        go.wait(timeout=30)

    async def look(_: Transaction) -> None:
        read.append(1)

    waiting = [asyncio.create_task(sqlite.read(wait)) for _ in range(READERS)]
    await asyncio.sleep(0)
    late = asyncio.create_task(sqlite.read(look))
    await asyncio.sleep(0)
    late.cancel()
    with pytest.raises(asyncio.CancelledError):
        await late
    go.set()
    await asyncio.gather(*waiting)
    assert await sqlite.read(count) == 0
    assert not read
