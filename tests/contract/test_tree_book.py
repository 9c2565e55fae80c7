"""What every TreeBook must do, beside what its stores do as `RunStore`s."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest
from sqlalchemy import select

from orchestrator.budget import ZERO, Amounts
from orchestrator.errors import InvariantError
from orchestrator.ids import RunId, TenantId
from orchestrator.store import tables
from orchestrator.store.backend import Transaction
from orchestrator.store.database import Database
from orchestrator.store.port import LedgerEntry
from orchestrator.store.sql_events import PAGE, SqlTreeBook
from orchestrator.store.sql_runs import SqlRunBook
from orchestrator.store.sql_tenants import SqlTenantBook
from orchestrator.trajectory import Event, TurnStarted
from tests.fakes.tenancy import a_tenant, stored_run

CANARY = "canary-7Q"
HASH = "0" * 64


@pytest.fixture
def book(database: Database) -> SqlTreeBook:
    return SqlTreeBook(database)


@pytest.fixture
async def anna(database: Database) -> TenantId:
    return await a_tenant(database)


@pytest.fixture
async def root(database: Database, anna: TenantId) -> RunId:
    return await stored_run(database, anna)


def turns(run_id: RunId, start: int, count: int) -> list[Event]:
    return [
        Event(run_id, seq, 1_700_000_000.5, TurnStarted(turn=seq, request_bytes=1))
        for seq in range(start, start + count)
    ]


def paid(tenant_id: TenantId, run_id: RunId) -> LedgerEntry:
    return LedgerEntry(
        tenant_id=tenant_id,
        run_id=run_id,
        call="turn-1",
        attempt=1,
        confirmed=Amounts(10, 20, 1),
        unconfirmed=ZERO,
    )


async def everything(database: Database) -> dict[str, str]:
    """All rows, as text, by table."""

    async def work(connection: Transaction) -> dict[str, str]:
        return {
            table.name: "\n".join(str(tuple(row)) for row in await connection.execute(select(table)))
            for table in tables.metadata.sorted_tables
        }

    return await database.read(work)


async def test_positions_are_dense_over_all_runs_of_a_tree_that_write_at_once(
    book: SqlTreeBook, database: Database, anna: TenantId, root: RunId
) -> None:
    told: list[tuple[int, Sequence[Event]]] = []
    store = book.tree(anna, root, on_stored=lambda first, events: told.append((first, events)))
    runs = [RunId(f"r{number}") for number in range(10)]

    async def write(run_id: RunId) -> None:
        for seq in range(0, 10, 2):
            await store.append(run_id, seq, turns(run_id, seq, 2))

    await asyncio.gather(*map(write, runs))
    stored = await book.tree_events(root, 0, limit=1_000)
    assert [position for position, _ in stored] == list(range(100))
    as_told = {first + offset: event for first, events in told for offset, event in enumerate(events)}
    assert as_told == {position: Event.from_json(json.loads(line)) for position, line in stored}
    row = await SqlRunBook(database).run(anna, root)
    assert row is not None
    assert row.last_position == 99
    assert await book.tree_events(root, 40, limit=3) == stored[40:43]
    assert await book.tree_events(root, 100, limit=3) == []


async def test_events_of_many_pages_are_read_in_order(book: SqlTreeBook, anna: TenantId, root: RunId) -> None:
    store = book.tree(anna, root)
    events = turns(root, 0, 2 * PAGE)
    await store.append(root, 0, events)
    assert [event async for event in store.events(root)] == events
    assert [event async for event in store.events(root, PAGE - 1)] == events[PAGE - 1 :]


async def test_a_tree_knows_its_runs_in_the_order_in_which_they_began(
    book: SqlTreeBook, anna: TenantId, root: RunId
) -> None:
    store = book.tree(anna, root)
    for run_id in (root, RunId("rz"), RunId("ra")):
        await store.append(run_id, 0, turns(run_id, 0, 1))
    await store.append(root, 1, turns(root, 1, 1))
    assert await store.runs() == [root, "rz", "ra"]


async def test_another_tenants_tree_takes_nothing_and_shows_nothing(
    book: SqlTreeBook, database: Database, anna: TenantId, root: RunId
) -> None:
    await book.tree(anna, root).append(root, 0, turns(root, 0, 1), blobs={HASH: b"text"})
    ben = await a_tenant(database)
    theirs = book.tree(ben, root)
    with pytest.raises(InvariantError):
        await theirs.append(root, 1, turns(root, 1, 1))
    assert [event async for event in theirs.events(root)] == []
    assert await theirs.blob(HASH) is None
    assert await theirs.runs() == []


async def test_nobody_pays_for_another_tenant(
    book: SqlTreeBook, database: Database, anna: TenantId, root: RunId
) -> None:
    ben = await a_tenant(database)
    with pytest.raises(InvariantError):
        await book.tree(anna, root).append(root, 0, turns(root, 0, 1), ledger_entries=[paid(ben, root)])
    assert await book.tree_events(root, 0, limit=9) == []


async def test_a_text_is_found_in_its_own_tree_only(
    book: SqlTreeBook, database: Database, anna: TenantId, root: RunId
) -> None:
    other = await stored_run(database, anna)
    await book.tree(anna, root).append(root, 0, turns(root, 0, 1), blobs={HASH: b"text"})
    assert await book.tree_blob(root, HASH) == b"text"
    assert await book.tree_blob(other, HASH) is None
    assert await book.tree_blob_part(root, HASH, start=1, max_bytes=2) == b"ex"
    assert await book.tree_blob_part(root, HASH, start=4, max_bytes=2) == b""
    assert await book.tree_blob_part(other, HASH, start=0, max_bytes=2) is None


async def test_a_ledger_entry_and_its_event_are_stored_together_or_not_at_all(
    book: SqlTreeBook, database: Database, anna: TenantId, root: RunId
) -> None:
    store = book.tree(anna, root)
    await store.append(root, 0, turns(root, 0, 1), ledger_entries=[paid(anna, root)])
    with pytest.raises(InvariantError):
        await store.append(
            root, 5, turns(root, 5, 1), blobs={HASH: CANARY.encode()}, ledger_entries=[paid(anna, root)]
        )
    rows = await everything(database)
    assert len(rows["events"].splitlines()) == 1
    assert len(rows["ledger"].splitlines()) == 1
    assert rows["blobs"] == ""


async def test_one_refused_append_harms_none_of_those_that_wait_beside_it(
    book: SqlTreeBook, anna: TenantId, root: RunId
) -> None:
    store = book.tree(anna, root)
    runs = [RunId(f"r{number}") for number in range(20)]
    done = await asyncio.gather(
        *(
            store.append(run_id, 0 if number % 5 else 1, turns(run_id, 0 if number % 5 else 1, 1))
            for number, run_id in enumerate(runs)
        ),
        return_exceptions=True,
    )
    assert [isinstance(one, InvariantError) for one in done] == [number % 5 == 0 for number in range(20)]
    positions = [position for position, _ in await book.tree_events(root, 0, limit=99)]
    assert positions == list(range(16))


async def test_an_append_that_is_cancelled_is_stored_and_told_whole(
    book: SqlTreeBook, anna: TenantId, root: RunId
) -> None:
    told: list[int] = []
    store = book.tree(anna, root, on_stored=lambda first, _: told.append(first))
    appending = asyncio.create_task(store.append(root, 0, turns(root, 0, 3)))
    await asyncio.sleep(0)
    appending.cancel()
    with pytest.raises(asyncio.CancelledError):
        await appending
    assert told == [0]
    assert len(await book.tree_events(root, 0, limit=9)) == 3


async def test_of_a_deleted_run_only_what_it_cost_is_left(
    book: SqlTreeBook, database: Database, anna: TenantId
) -> None:
    runs = SqlRunBook(database)
    kept = await stored_run(database, anna, question="another question")
    gone = await stored_run(database, anna, question=f"{CANARY} question")
    for run_id in (kept, gone):
        store = book.tree(anna, run_id)
        event = Event(run_id, 0, 1.0, TurnStarted(turn=0, request_bytes=1))
        text = f"{CANARY} text".encode() if run_id == gone else b"text"
        await store.append(run_id, 0, [event], blobs={HASH: text}, ledger_entries=[paid(anna, run_id)])
        await runs.ended(
            run_id,
            at=2.0,
            outcome="answered",
            error="",
            answer=f"{CANARY} answer".encode() if run_id == gone else b"answer",
            confirmed=ZERO,
            unconfirmed=ZERO,
        )
    assert await runs.delete(anna, gone)
    rows = await everything(database)
    assert not any(CANARY in text for text in rows.values())
    assert {name for name, text in rows.items() if gone in text} == {"ledger"}
    assert await book.tree_blob(kept, HASH) == b"text"
    with pytest.raises(InvariantError):
        await book.tree(anna, gone).append(RunId("r-child"), 0, turns(RunId("r-child"), 0, 1))


async def test_what_a_removed_tenants_last_call_cost_is_owed_once_however_often_it_is_handed_over(
    database: Database,
) -> None:
    tenant = await a_tenant(database)
    root = await stored_run(database, tenant)
    store = SqlTreeBook(database).tree(tenant, root)
    await SqlTenantBook(database).remove_tenant(tenant)
    entry = LedgerEntry(
        tenant_id=tenant, run_id=root, call="turn-1", attempt=1, confirmed=ZERO, unconfirmed=Amounts(7, 8, 1)
    )
    event = Event(root, 0, 1.5, TurnStarted(turn=1, request_bytes=1))
    for _ in range(2):
        with pytest.raises(InvariantError, match="not there"):
            await store.append(root, 0, [event], ledger_entries=[entry])

    async def owed(connection: Transaction) -> list[Any]:
        return list(
            await connection.execute(select(tables.ledger).where(tables.ledger.c.tenant_id == tenant))
        )

    (line,) = await database.read(owed)
    assert (line.root_run_id, line.unconfirmed_tokens, line.unconfirmed_cost_microusd) == (root, 7, 8)


async def test_another_tenants_tree_takes_nothing_for_the_ledger_either(database: Database) -> None:
    anna, ben = await a_tenant(database), await a_tenant(database)
    root = await stored_run(database, anna)
    entry = LedgerEntry(
        tenant_id=ben, run_id=root, call="turn-1", attempt=1, confirmed=ZERO, unconfirmed=Amounts(7, 8, 1)
    )
    with pytest.raises(InvariantError):
        await SqlTreeBook(database).tree(ben, root).append(root, 0, [], ledger_entries=[entry])

    async def owed(connection: Transaction) -> list[Any]:
        return list(await connection.execute(select(tables.ledger)))

    assert await database.read(owed) == []
