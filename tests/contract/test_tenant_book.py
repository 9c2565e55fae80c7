"""What every TenantBook must do."""

import asyncio
import string
from dataclasses import replace

import pytest
from sqlalchemy import select

from orchestrator.errors import InvalidRequestError, NotFoundError
from orchestrator.ids import TenantId
from orchestrator.store.backend import Transaction
from orchestrator.store.books import Quota, Role, TenantRules
from orchestrator.store.database import Database
from orchestrator.store.sql_runs import SqlRunBook
from orchestrator.store.sql_tenants import SqlTenantBook
from orchestrator.store.tables import metadata
from tests.fakes.tenancy import a_run, a_tenant, stored_run

RULES = TenantRules(
    per_day=Quota(max_tokens=1_000_000, max_runs=5),
    per_month=Quota(max_cost_microusd=50_000_000),
    max_concurrent_runs=3,
    models=("claude-*", "local"),
    runtimes=("runsc",),
    max_limits={"max_tokens": 1_000, "deadline_s": 60.5},
    max_context_bytes=10**12,
    retention_days=30,
)
NOBODY = TenantId("tnobody")


@pytest.fixture
def book(database: Database) -> SqlTenantBook:
    return SqlTenantBook(database)


async def everything(database: Database) -> str:
    """All rows of all tables, as text."""

    async def work(connection: Transaction) -> str:
        rows = [
            str(tuple(row))
            for table in metadata.sorted_tables
            for row in await connection.execute(select(table))
        ]
        return "\n".join(rows)

    return await database.read(work)


async def test_a_tenant_is_found_by_name_and_by_id_with_its_rules(book: SqlTenantBook) -> None:
    added = await book.add_tenant("Anna & Söhne", RULES)
    assert added.rules == RULES
    assert await book.tenant("Anna & Söhne") == added
    assert await book.tenant(added.tenant_id) == added
    assert await book.tenant("anna") is None


async def test_tenants_are_listed_by_name(book: SqlTenantBook) -> None:
    b, a = await book.add_tenant("b", RULES), await book.add_tenant("a", TenantRules())
    assert await book.tenants() == [a, b]


@pytest.mark.parametrize("name", ["", "  ", "a\nb", "a\0b", "x" * 101, "\ud800"])
async def test_what_is_no_name_is_refused(book: SqlTenantBook, name: str) -> None:
    with pytest.raises(InvalidRequestError):
        await book.add_tenant(name, RULES)
    assert await book.tenants() == []


async def test_of_many_who_take_one_name_at_once_one_gets_it(book: SqlTenantBook) -> None:
    added = await asyncio.gather(*(book.add_tenant("anna", RULES) for _ in range(8)), return_exceptions=True)
    assert sum(isinstance(one, InvalidRequestError) for one in added) == 7
    assert len(await book.tenants()) == 1


async def test_rules_are_replaced(book: SqlTenantBook) -> None:
    added = await book.add_tenant("anna", RULES)
    await book.set_rules(added.tenant_id, TenantRules())
    assert await book.tenant("anna") == replace(added, rules=TenantRules())
    with pytest.raises(NotFoundError):
        await book.set_rules(NOBODY, RULES)


async def test_a_key_is_told_once_and_opens_its_tenant(book: SqlTenantBook, database: Database) -> None:
    anna, ben = await book.add_tenant("anna", RULES), await book.add_tenant("ben", RULES)
    row, key = await book.add_key(anna.tenant_id, Role.RUN)
    assert key.startswith("rlm_")
    assert len(key) == 44
    assert set(key[4:]) <= set(string.ascii_letters + string.digits)
    assert row.hint == key[-4:]
    assert await book.who_has(key) == (anna, row)
    assert await book.keys(anna.tenant_id) == [row]
    assert await book.keys(ben.tenant_id) == []
    assert key[4:-4] not in await everything(database)


@pytest.mark.parametrize("key", ["", "rlm_", "rlm_" + "0" * 40, "rlm_" + "\0" * 40, "\0", "\ud800", "ключ"])
async def test_nobody_has_an_unknown_key(book: SqlTenantBook, key: str) -> None:
    anna = await book.add_tenant("anna", RULES)
    await book.add_key(anna.tenant_id, Role.RUN)
    assert await book.who_has(key) is None


async def test_a_revoked_key_is_unknown_from_then_on_and_others_are_not(book: SqlTenantBook) -> None:
    anna = await book.add_tenant("anna", RULES)
    old, old_key = await book.add_key(anna.tenant_id, Role.RUN)
    new, new_key = await book.add_key(anna.tenant_id, Role.ADMIN)
    assert await book.revoke_key(anna.tenant_id, old.key_id)
    assert await book.who_has(old_key) is None
    assert await book.who_has(new_key) == (anna, new)
    first, second = await book.keys(anna.tenant_id)
    assert first.revoked_at is not None
    assert second == new
    assert await book.revoke_key(anna.tenant_id, old.key_id)
    assert (await book.keys(anna.tenant_id))[0] == first


async def test_of_keys_those_open_something_that_are_neither_revoked_nor_a_removed_tenants(
    book: SqlTenantBook,
) -> None:
    anna, ben = await book.add_tenant("anna", RULES), await book.add_tenant("ben", RULES)
    good, revoked = [(await book.add_key(anna.tenant_id, Role.RUN))[0].key_id for _ in range(2)]
    gone = (await book.add_key(ben.tenant_id, Role.RUN))[0].key_id
    assert await book.opening([good, revoked, gone, "knone"]) == {good, revoked, gone}
    await book.revoke_key(anna.tenant_id, revoked)
    await book.remove_tenant(ben.tenant_id)
    many = [f"k{number}" for number in range(1_200)]
    assert await book.opening([*many, good, revoked, gone]) == {good}
    assert await book.opening([]) == frozenset()


async def test_a_key_of_another_tenant_cannot_be_revoked(book: SqlTenantBook) -> None:
    anna, ben = await book.add_tenant("anna", RULES), await book.add_tenant("ben", RULES)
    row, key = await book.add_key(anna.tenant_id, Role.RUN)
    assert not await book.revoke_key(ben.tenant_id, row.key_id)
    assert not await book.revoke_key(ben.tenant_id, "knone")
    assert await book.who_has(key) is not None


async def test_there_is_no_key_for_nobody(book: SqlTenantBook) -> None:
    with pytest.raises(NotFoundError):
        await book.add_key(NOBODY, Role.RUN)


async def test_of_a_removed_tenant_nothing_is_left_but_its_row_and_its_name_is_free(
    book: SqlTenantBook, database: Database
) -> None:
    anna = await book.add_tenant("anna", RULES)
    _, key = await book.add_key(anna.tenant_id, Role.RUN)
    neighbour = await a_tenant(database)
    its_run = await stored_run(database, neighbour)
    await stored_run(database, anna.tenant_id, question="the canary question")
    await book.remove_tenant(anna.tenant_id)
    assert await book.who_has(key) is None
    assert await book.tenant("anna") is None
    assert await book.tenant(anna.tenant_id) is None
    assert (await everything(database)).count("canary") == 0
    assert await SqlRunBook(database).run(neighbour, its_run) is not None
    assert (await book.add_tenant("anna", RULES)).tenant_id != anna.tenant_id


async def test_nothing_is_stored_for_a_removed_tenant(book: SqlTenantBook, database: Database) -> None:
    anna = await book.add_tenant("anna", RULES)
    await book.remove_tenant(anna.tenant_id)
    with pytest.raises(NotFoundError):
        await SqlRunBook(database).create(a_run(anna.tenant_id), max_queued=5, quotas=[])
    with pytest.raises(NotFoundError):
        await book.remove_tenant(anna.tenant_id)
