"""What every AuditBook must do; and what no program can do to what only ever grows."""

import asyncio

import pytest
from sqlalchemy import text

from orchestrator.budget import ZERO
from orchestrator.errors import StoreError
from orchestrator.ids import TenantId
from orchestrator.store.backend import Transaction
from orchestrator.store.books import AuditRow
from orchestrator.store.database import Database, open_database
from orchestrator.store.port import LedgerEntry
from orchestrator.store.sql_audit import SqlAuditBook
from orchestrator.store.sql_events import SqlRunStore
from orchestrator.trajectory import Event, TurnStarted
from tests.fakes.tenancy import a_tenant, stored_run

ANNA, BEN = TenantId("tanna"), TenantId("tben")


def row(tenant_id: TenantId | None = ANNA, target: str = "r1") -> AuditRow:
    return AuditRow(
        at=1.5, tenant_id=tenant_id, actor="key:k1", action="CreateRun", target=target, detail="\0"
    )


@pytest.fixture
def book(database: Database) -> SqlAuditBook:
    return SqlAuditBook(database)


async def test_entries_are_read_in_order_from_any_number_on(book: SqlAuditBook) -> None:
    rows = [row(target=f"r{number}") for number in range(5)]
    for one in rows:
        await book.write(one)
    read = await book.read()
    assert [one for _, one in read] == rows
    numbers = [number for number, _ in read]
    assert numbers == sorted(set(numbers))
    assert await book.read(after=numbers[1], limit=2) == list(read[2:4])
    assert await book.read(after=numbers[-1]) == []


async def test_one_tenants_entries_are_its_own(book: SqlAuditBook) -> None:
    for tenant_id in (ANNA, None, BEN, ANNA):
        await book.write(row(tenant_id))
    assert [one.tenant_id for _, one in await book.read(tenant_id=ANNA)] == [ANNA, ANNA]
    assert [one.tenant_id for _, one in await book.read(tenant_id=BEN)] == [BEN]
    assert len(await book.read()) == 4


async def test_whoever_reads_on_while_two_servers_write_misses_nothing(
    store_url: str, database: Database
) -> None:
    async with open_database(store_url) as other:
        books = [SqlAuditBook(database), SqlAuditBook(other)]
        writing = asyncio.gather(*(books[number % 2].write(row(target=str(number))) for number in range(40)))
        seen: list[tuple[int, AuditRow]] = []
        while not writing.done():
            seen += await books[0].read(after=seen[-1][0] if seen else 0)
        await writing
        seen += await books[0].read(after=seen[-1][0] if seen else 0)
        assert sorted(int(one.target) for _, one in seen) == list(range(40))


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE audit SET at = 0",
        "DELETE FROM audit",
        "UPDATE ledger SET confirmed_tokens = 0",
        "DELETE FROM ledger",
        "UPDATE events SET event = ''",
        "UPDATE blobs SET data = data",
    ],
)
async def test_the_database_itself_refuses_to_change_what_only_grows(
    database: Database, statement: str
) -> None:
    await SqlAuditBook(database).write(row())
    anna = await a_tenant(database)
    tree = await stored_run(database, anna)
    entry = LedgerEntry(tenant_id=anna, run_id=tree, call="c", attempt=1, confirmed=ZERO, unconfirmed=ZERO)
    event = Event(tree, 0, 1.0, TurnStarted(turn=1, request_bytes=1))
    await SqlRunStore(database, anna, tree).append(
        tree, 0, [event], blobs={"0" * 64: b"text"}, ledger_entries=[entry]
    )

    async def work(connection: Transaction) -> None:
        await connection.execute(text(statement))

    with pytest.raises(StoreError):
        await database.write(work)
