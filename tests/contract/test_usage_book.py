"""What every UsageBook must do."""

import asyncio

import pytest

from orchestrator.budget import Amounts
from orchestrator.errors import InvariantError
from orchestrator.ids import RunId, TenantId
from orchestrator.store.books import Quota, Used
from orchestrator.store.database import Database, open_database
from orchestrator.store.port import LedgerEntry
from orchestrator.store.sql_events import SqlRunStore
from orchestrator.store.sql_runs import SqlRunBook
from orchestrator.store.sql_usage import SqlUsageBook
from tests.fakes.tenancy import a_tenant, stored_run

MONDAY, TUESDAY, NOVEMBER = "day:2026-11-23", "day:2026-11-24", "month:2026-11"
FREE = Quota()


@pytest.fixture
def book(database: Database) -> SqlUsageBook:
    return SqlUsageBook(database)


@pytest.fixture
async def anna(database: Database) -> TenantId:
    return await a_tenant(database)


@pytest.fixture
async def tree(database: Database, anna: TenantId) -> RunId:
    return await stored_run(database, anna)


async def pay(
    database: Database, tenant_id: TenantId, tree: RunId, *, confirmed: Amounts, unconfirmed: Amounts
) -> None:
    """As a settled call does."""
    entry = LedgerEntry(
        tenant_id=tenant_id,
        run_id=tree,
        call="turn-1",
        attempt=1,
        confirmed=confirmed,
        unconfirmed=unconfirmed,
    )
    await SqlRunStore(database, tenant_id, tree).append(tree, 0, [], ledger_entries=[entry])


async def test_nothing_was_used_before_the_first_draw(book: SqlUsageBook, anna: TenantId) -> None:
    assert await book.used(anna, MONDAY) == Used()


async def test_the_tightest_window_decides_unit_by_unit(
    book: SqlUsageBook, anna: TenantId, tree: RunId
) -> None:
    windows = {MONDAY: Quota(max_tokens=50), NOVEMBER: Quota(max_tokens=80, max_cost_microusd=7)}
    assert await book.grant(anna, windows, Amounts(60, 60, 6, 6), tree=tree) == Amounts(50, 7, 6, 6)
    assert await book.used(anna, MONDAY) == await book.used(anna, NOVEMBER)
    windows = {TUESDAY: Quota(max_tokens=50), NOVEMBER: Quota(max_tokens=80, max_cost_microusd=7)}
    assert await book.grant(anna, windows, Amounts(60, 60), tree=tree) == Amounts(30, 0)
    assert (await book.used(anna, TUESDAY)).amounts == Amounts(30)
    assert (await book.used(anna, NOVEMBER)).amounts == Amounts(80, 7, 6, 6)


async def test_a_lowered_quota_grants_nothing_and_takes_nothing_back(
    book: SqlUsageBook, anna: TenantId, tree: RunId
) -> None:
    await book.grant(anna, {MONDAY: FREE}, Amounts(100), tree=tree)
    assert await book.grant(anna, {MONDAY: Quota(max_tokens=10)}, Amounts(5), tree=tree) == Amounts()
    assert (await book.used(anna, MONDAY)).amounts == Amounts(100)


async def test_tenants_do_not_draw_from_each_other(
    book: SqlUsageBook, database: Database, anna: TenantId, tree: RunId
) -> None:
    ben = await a_tenant(database)
    windows = {MONDAY: Quota(max_tokens=10)}
    assert await book.grant(anna, windows, Amounts(10), tree=tree) == Amounts(10)
    assert await book.grant(ben, windows, Amounts(10), tree=await stored_run(database, ben)) == Amounts(10)
    with pytest.raises(InvariantError):
        await book.give_back(ben, Amounts(1), tree=tree)
    assert (await book.used(anna, MONDAY)).amounts == Amounts(10)


async def test_fifty_draws_at_once_from_two_servers_never_exceed_what_there_is(
    store_url: str, database: Database, anna: TenantId
) -> None:
    windows = {NOVEMBER: Quota(max_tokens=1_000), MONDAY: Quota(max_tokens=500, max_cost_microusd=99)}
    trees = [await stored_run(database, anna) for _ in range(5)]
    async with open_database(store_url) as other:
        books = [SqlUsageBook(database), SqlUsageBook(other)]
        granted = await asyncio.gather(
            *(
                books[number % 2].grant(anna, windows, Amounts(17, 3, 1), tree=trees[number % 5])
                for number in range(50)
            )
        )
    assert sum(one.tokens for one in granted) == 500
    assert sum(one.cost_microusd for one in granted) == 99
    used = await books[0].used(anna, MONDAY)
    assert used.amounts == Amounts(500, 99, 50)


async def test_what_is_given_back_goes_to_the_window_it_was_drawn_from_the_last_draw_first(
    book: SqlUsageBook, anna: TenantId, tree: RunId
) -> None:
    await book.grant(anna, {MONDAY: FREE, NOVEMBER: FREE}, Amounts(10), tree=tree)
    await book.grant(anna, {TUESDAY: FREE, NOVEMBER: FREE}, Amounts(10), tree=tree)
    await book.give_back(anna, Amounts(4), tree=tree)
    assert (await book.used(anna, MONDAY)).amounts == Amounts(10)
    assert (await book.used(anna, TUESDAY)).amounts == Amounts(6)
    await book.give_back(anna, Amounts(9), tree=tree)
    assert (await book.used(anna, MONDAY)).amounts == Amounts(7)
    assert (await book.used(anna, TUESDAY)).amounts == Amounts(0)
    assert (await book.used(anna, NOVEMBER)).amounts == Amounts(7)


async def test_more_than_a_tree_drew_is_not_taken_back_and_nothing_of_it_is(
    book: SqlUsageBook, database: Database, anna: TenantId, tree: RunId
) -> None:
    other = await stored_run(database, anna)
    await book.grant(anna, {MONDAY: FREE}, Amounts(10), tree=tree)
    await book.grant(anna, {MONDAY: FREE}, Amounts(10), tree=other)
    with pytest.raises(InvariantError):
        await book.give_back(anna, Amounts(11), tree=tree)
    assert (await book.used(anna, MONDAY)).amounts == Amounts(20)


async def test_an_overdraft_counts_past_every_quota(book: SqlUsageBook, anna: TenantId, tree: RunId) -> None:
    quota = {MONDAY: Quota(max_tokens=10)}
    await book.grant(anna, quota, Amounts(10), tree=tree)
    await book.charge(anna, list(quota), Amounts(5), tree=tree)
    assert (await book.used(anna, MONDAY)).amounts == Amounts(15)
    assert await book.grant(anna, quota, Amounts(1), tree=tree) == Amounts()


async def test_what_live_trees_drew_and_was_not_billed_yet_is_held(
    book: SqlUsageBook, database: Database, anna: TenantId, tree: RunId
) -> None:
    assert await book.held(anna) == Amounts()
    neighbour = await stored_run(database, anna)
    other = await a_tenant(database)
    await book.grant(anna, {MONDAY: FREE}, Amounts(1_000, 500, 10, 3), tree=tree)
    await book.grant(anna, {TUESDAY: FREE}, Amounts(70, 7, 7), tree=neighbour)
    await book.grant(other, {MONDAY: FREE}, Amounts(9, 9, 9), tree=await stored_run(database, other))
    await pay(database, anna, tree, confirmed=Amounts(300, 20, 2), unconfirmed=Amounts(100, 0, 1))
    assert await book.held(anna) == Amounts(670, 487, 14)
    await book.give_back(anna, Amounts(600, 480, 7), tree=tree)
    assert await book.held(anna) == Amounts(70, 7, 7)
    await SqlRunBook(database).ended(
        neighbour,
        at=1.0,
        outcome="answered",
        error="",
        answer=None,
        confirmed=Amounts(),
        unconfirmed=Amounts(),
    )
    assert await book.held(anna) == Amounts(), "of a tree that has ended nothing is in flight"


async def test_what_a_killed_server_drew_and_no_ledger_entry_explains_is_reclaimed_once(
    book: SqlUsageBook, database: Database, anna: TenantId, tree: RunId
) -> None:
    neighbour = await stored_run(database, anna)
    await book.grant(anna, {MONDAY: FREE, NOVEMBER: FREE}, Amounts(1_000, 500, 10, 3), tree=tree)
    await book.grant(anna, {TUESDAY: FREE, NOVEMBER: FREE}, Amounts(1_000, 500, 10), tree=tree)
    await book.grant(anna, {TUESDAY: FREE, NOVEMBER: FREE}, Amounts(77, 7, 7), tree=neighbour)
    await pay(database, anna, tree, confirmed=Amounts(300, 20, 2), unconfirmed=Amounts(100, 0, 1))
    assert await book.reclaim(anna, tree=tree) == Amounts(1_600, 980, 17)
    assert (await book.used(anna, MONDAY)).amounts == Amounts(400, 20, 3, 3)
    assert (await book.used(anna, TUESDAY)).amounts == Amounts(77, 7, 7)
    assert (await book.used(anna, NOVEMBER)).amounts == Amounts(477, 27, 10, 3)
    assert await book.reclaim(anna, tree=tree) == Amounts()
    # It goes on, and is killed again.
    await book.grant(anna, {TUESDAY: FREE, NOVEMBER: FREE}, Amounts(1_000, 500, 10), tree=tree)
    assert await book.reclaim(anna, tree=tree) == Amounts(1_000, 500, 10)
    assert (await book.used(anna, NOVEMBER)).amounts == Amounts(477, 27, 10, 3)
