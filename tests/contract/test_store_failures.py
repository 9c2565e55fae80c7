"""A full disk, a server that is gone, a backup: what was acknowledged is there, and later calls work."""

import asyncio
import hashlib
import os
import shutil
import sqlite3
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from orchestrator.budget import ZERO, Amounts
from orchestrator.errors import StoreError
from orchestrator.ids import RunId, TenantId
from orchestrator.store.books import Quota
from orchestrator.store.database import Database, open_database
from orchestrator.store.port import LedgerEntry
from orchestrator.store.sql_events import SqlRunStore, SqlTreeBook
from orchestrator.store.sql_runs import SqlRunBook
from orchestrator.store.sql_usage import SqlUsageBook
from orchestrator.trajectory import Event, TurnStarted
from tests.fakes.tenancy import a_tenant, stored_run
from tests.postgres.server import PostgresServer

DISK_BYTES = 2 * 1024 * 1024
TEXT_BYTES = 64 * 1024
RUNS, EVENTS = 6, 20
GIVE_UP_S = 1.0
"""Of a server that stays away, in tests of that."""


def a_turn(run_id: RunId, seq: int) -> Event:
    return Event(run_id, seq, 1.5, TurnStarted(turn=seq, request_bytes=1))


def run(program: str, *arguments: str | Path) -> None:
    path = shutil.which(program)
    assert path is not None, f"this machine has no {program}"
    subprocess.run([path, *arguments], check=True)


async def stored_seqs(database: Database, tenant_id: TenantId, root: RunId, run_id: RunId) -> list[int]:
    store = SqlRunStore(database, tenant_id, root)
    return [event.seq async for event in store.events(run_id)]


# --- A full disk ------------------------------------------------------------------------------------------


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    disk = tmp_path / "disk"
    disk.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "rlm-test", disk)
    try:
        yield disk
    finally:
        run("umount", disk)


async def test_a_full_disk_is_told_and_what_was_acknowledged_is_there(small_disk: Path) -> None:
    async with open_database(f"sqlite:///{small_disk}/rlm.db") as database:
        anna = await a_tenant(database)
        root = await stored_run(database, anna)
        store = SqlRunStore(database, anna, root)
        seq = 0

        async def append() -> None:
            data = os.urandom(TEXT_BYTES)
            blobs = {hashlib.sha256(data).hexdigest(): data}
            entry = LedgerEntry(
                tenant_id=anna, run_id=root, call="c", attempt=1, confirmed=ZERO, unconfirmed=ZERO
            )
            await store.append(root, seq, [a_turn(root, seq)], blobs=blobs, ledger_entries=[entry])

        async def fill() -> None:
            nonlocal seq
            for _ in range(2 * DISK_BYTES // TEXT_BYTES):
                await append()
                seq += 1

        with pytest.raises(StoreError, match="disk is full"):
            await fill()
        assert seq > 5
        assert await stored_seqs(database, anna, root, root) == list(range(seq))
        # Somebody makes room.
        await asyncio.to_thread(run, "mount", "-o", f"remount,size={4 * DISK_BYTES}", small_disk)
        await append()
        seq += 1
    async with open_database(f"sqlite:///{small_disk}/rlm.db") as database:
        assert await stored_seqs(database, anna, root, root) == list(range(seq))


async def test_a_database_without_any_room_cannot_be_opened(small_disk: Path) -> None:
    await asyncio.to_thread((small_disk / "filler").write_bytes, b"x" * (DISK_BYTES - 8_192))
    with pytest.raises(StoreError, match="full"):
        async with open_database(f"sqlite:///{small_disk}/rlm.db"):
            pass


# --- A server that goes -----------------------------------------------------------------------------------


@pytest.fixture
async def running(postgres: PostgresServer) -> AsyncIterator[PostgresServer]:
    """The test server; it runs again afterwards, whatever became of it."""
    yield postgres
    await asyncio.to_thread(postgres.start)


@pytest.mark.docker
@pytest.mark.parametrize("how", ["kill", "stop"])
async def test_writers_ride_out_a_restart_and_nothing_is_lost_or_stored_twice(
    running: PostgresServer, how: str
) -> None:
    url = await asyncio.to_thread(running.new_database)
    async with open_database(url, patience_s=30.0) as database:
        anna = await a_tenant(database)
        roots = [await stored_run(database, anna) for _ in range(RUNS)]
        is_back, all_write = asyncio.Event(), asyncio.Barrier(RUNS + 1)

        async def write(root: RunId) -> int:
            """Until the server is back and has taken some more; how many there are."""
            store = SqlRunStore(database, anna, root)
            seq, left = 0, EVENTS
            while left:
                entry = LedgerEntry(
                    tenant_id=anna,
                    run_id=root,
                    call=f"turn-{seq}",
                    attempt=1,
                    confirmed=Amounts(1),
                    unconfirmed=ZERO,
                )
                await store.append(root, seq, [a_turn(root, seq)], ledger_entries=[entry])
                seq += 1
                left -= is_back.is_set()
                if seq == EVENTS:
                    await all_write.wait()
            return seq

        writing = asyncio.gather(*map(write, roots))
        await all_write.wait()
        await asyncio.to_thread(running.kill if how == "kill" else running.stop)
        await asyncio.to_thread(running.start)
        is_back.set()
        written = dict(zip(roots, await writing, strict=True))
        usage = SqlUsageBook(database)
        for root, count in written.items():
            assert await stored_seqs(database, anna, root, root) == list(range(count))
            positions = await SqlTreeBook(database).tree_events(root, 0, limit=2 * count)
            assert [position for position, _ in positions] == list(range(count))
            # What was paid is in the ledger once: all that is drawn beyond it comes back.
            await usage.grant(anna, {"day:2026-11-23": Quota()}, Amounts(2 * count), tree=root)
            assert await usage.reclaim(anna, tree=root) == Amounts(count)


@pytest.mark.docker
async def test_a_server_that_stays_away_is_told_and_works_again_when_it_is_back(
    running: PostgresServer,
) -> None:
    url = await asyncio.to_thread(running.new_database)
    async with open_database(url, patience_s=GIVE_UP_S) as database:
        anna = await a_tenant(database)
        root = await stored_run(database, anna)
        store = SqlRunStore(database, anna, root)
        await store.append(root, 0, [a_turn(root, 0)])
        await asyncio.to_thread(running.stop)
        with pytest.raises(StoreError):
            await store.append(root, 1, [a_turn(root, 1)])
        with pytest.raises(StoreError, match="does not answer"):
            await SqlRunBook(database).run(anna, root)
        with pytest.raises(StoreError):
            await database.ping()
        await asyncio.to_thread(running.start)
        await database.ping()
        assert await stored_seqs(database, anna, root, root) == [0]
        await store.append(root, 1, [a_turn(root, 1)])
        assert await stored_seqs(database, anna, root, root) == [0, 1]


# --- Backup and restore, as docs/store.md says ------------------------------------------------------------


async def test_a_backup_of_a_running_server_restores_what_was_there(tmp_path: Path) -> None:
    async with open_database(f"sqlite:///{tmp_path}/rlm.db") as database:
        anna = await a_tenant(database)
        root = await stored_run(database, anna)
        store = SqlRunStore(database, anna, root)
        await store.append(root, 0, [a_turn(root, 0)])

        def back_up() -> None:
            # What the command line's `.backup` does.
            with (
                closing(sqlite3.connect(tmp_path / "rlm.db")) as source,
                closing(sqlite3.connect(tmp_path / "backup.db")) as target,
            ):
                source.backup(target)

        await asyncio.to_thread(back_up)
        await store.append(root, 1, [a_turn(root, 1)])
    async with open_database(f"sqlite:///{tmp_path}/backup.db") as restored:
        assert await stored_seqs(restored, anna, root, root) == [0]
        await SqlRunStore(restored, anna, root).append(root, 1, [a_turn(root, 1)])


@pytest.mark.docker
async def test_a_dump_of_a_running_server_restores_what_was_there(postgres: PostgresServer) -> None:
    url = await asyncio.to_thread(postgres.new_database)
    name = url.split("/")[3].split("?")[0]
    async with open_database(url) as database:
        anna = await a_tenant(database)
        root = await stored_run(database, anna)
        store = SqlRunStore(database, anna, root)
        await store.append(root, 0, [a_turn(root, 0)])
        restore = await asyncio.to_thread(postgres.new_database)
        into = restore.split("/")[3].split("?")[0]
        file = f"/tmp/{name}.sql"
        dump = f"pg_dump {name} > {file} && psql --quiet -v ON_ERROR_STOP=1 {into} < {file}"
        await asyncio.to_thread(postgres.run, "bash", "-c", dump)
    async with open_database(restore) as restored:
        assert await stored_seqs(restored, anna, root, root) == [0]
        # Triggers and numbers have come with it.
        entry = LedgerEntry(
            tenant_id=anna, run_id=root, call="c", attempt=1, confirmed=ZERO, unconfirmed=ZERO
        )
        await SqlRunStore(restored, anna, root).append(root, 1, [a_turn(root, 1)], ledger_entries=[entry])
