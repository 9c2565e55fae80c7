"""What every HomeBook must do, and what the other books do under its epochs."""

import asyncio

import pytest

from orchestrator.budget import ZERO, Amounts
from orchestrator.errors import InvariantError, NotFoundError, TakenOverError
from orchestrator.ids import RunId, TenantId
from orchestrator.store.books import AuditRow, Quota, RunHead, RunState, TakenOver, Wish
from orchestrator.store.database import Database, open_database
from orchestrator.store.port import LedgerEntry
from orchestrator.store.sql_audit import SqlAuditBook
from orchestrator.store.sql_contexts import SqlContextBook
from orchestrator.store.sql_events import SqlTreeBook
from orchestrator.store.sql_homes import SqlHomeBook
from orchestrator.store.sql_runs import SqlRunBook
from orchestrator.store.sql_tenants import SqlTenantBook
from orchestrator.trajectory import Event, TurnStarted
from tests.fakes.tenancy import HOME, a_context, a_run, a_tenant, stored_run

LONG_S, OVER_S = 60.0, -1.0
"""Leases that last for the whole test, and none of it."""
OTHER, THIRD = "home-2", "home-3"


@pytest.fixture
def homes(database: Database) -> SqlHomeBook:
    return SqlHomeBook(database)


@pytest.fixture
def book(database: Database) -> SqlRunBook:
    return SqlRunBook(database)


@pytest.fixture
async def anna(database: Database) -> TenantId:
    return await a_tenant(database)


def entry(action: str = "Try", target: str = "r") -> AuditRow:
    return AuditRow(at=1.0, tenant_id=None, actor="key:k", action=action, target=target)


async def actions(database: Database) -> list[str]:
    return [row.action for _, row in await SqlAuditBook(database).read()]


async def started(book: SqlRunBook, run_id: RunId, epoch: int) -> bool:
    return await book.started(run_id, at=1.0, resumed=False, max_concurrent=9, epoch=epoch)


async def ended(book: SqlRunBook, run_id: RunId, epoch: int) -> None:
    await book.ended(
        run_id,
        at=9.0,
        outcome="answered",
        error="",
        answer=b"",
        confirmed=ZERO,
        unconfirmed=ZERO,
        epoch=epoch,
    )


async def state_of(book: SqlRunBook, tenant_id: TenantId, run_id: RunId) -> tuple[RunState, Wish]:
    row = await book.head(tenant_id, run_id)
    assert row is not None
    return row.state, row.wish


async def taken_over(homes: SqlHomeBook, home: str = HOME, by: str = OTHER) -> TakenOver:
    taken = await homes.take_over(home, by=by, audit=entry("TakeOver"))
    assert taken is not None
    return taken


# --- Who is there --------------------------------------------------------------------------------------


async def test_each_enter_begins_an_epoch_and_ends_the_one_before(homes: SqlHomeBook) -> None:
    first = await homes.enter(HOME, lease_s=LONG_S)
    second = await homes.enter(HOME, lease_s=LONG_S)
    assert second > first > 0
    with pytest.raises(TakenOverError):
        await homes.beat(HOME, first, lease_s=LONG_S)
    assert not await homes.beat(HOME, second, lease_s=LONG_S), "no other server is there"


async def test_servers_hear_of_each_other_for_as_long_as_their_leases(homes: SqlHomeBook) -> None:
    mine, _ = await homes.enter(HOME, lease_s=LONG_S), await homes.enter(OTHER, lease_s=LONG_S)
    assert await homes.beat(HOME, mine, lease_s=LONG_S)
    assert await homes.is_there(OTHER)
    await homes.enter(OTHER, lease_s=OVER_S)
    assert not await homes.beat(HOME, mine, lease_s=LONG_S)
    assert not await homes.is_there(OTHER)
    assert not await homes.is_there("nobody")


async def test_a_lease_that_ran_out_is_extended_as_if_nothing_had_been(homes: SqlHomeBook) -> None:
    epoch = await homes.enter(HOME, lease_s=OVER_S)
    await homes.beat(HOME, epoch, lease_s=LONG_S)
    assert await homes.is_there(HOME)


# --- Lost servers --------------------------------------------------------------------------------------


async def test_the_runs_of_a_lost_server_run_no_more_and_are_another_epochs(
    homes: SqlHomeBook, book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    epoch = await homes.enter(HOME, lease_s=OVER_S)
    running, waiting, over = [await stored_run(database, anna) for _ in range(3)]
    elsewhere = await stored_run(database, anna, home=OTHER)
    for run_id in (running, over):
        assert await started(book, run_id, epoch)
    assert await started(book, elsewhere, await homes.enter(OTHER, lease_s=LONG_S))
    await ended(book, over, epoch)
    assert await homes.lost(by=OTHER) == [HOME]

    taken = await taken_over(homes)
    assert taken.epoch == epoch + 1
    assert taken.runs == [RunHead(run_id=running, tenant_id=anna, state=RunState.INTERRUPTED, wish=Wish.NONE)]
    assert await book.count_live(anna) == {
        RunState.RUNNING: 1,
        RunState.INTERRUPTED: 1,
        RunState.QUEUED: 1,
    }
    for begin in (started(book, waiting, epoch), started(book, running, epoch), ended(book, running, epoch)):
        with pytest.raises(TakenOverError):
            await begin
    await book.interrupted(waiting, epoch=epoch)
    assert (await state_of(book, anna, waiting))[0] is RunState.QUEUED
    await ended(book, running, taken.epoch)
    assert await actions(database) == ["TakeOver"]


async def test_what_is_taken_over_is_settled_by_one_and_by_another_when_that_one_is_lost_too(
    homes: SqlHomeBook,
) -> None:
    await homes.enter(HOME, lease_s=OVER_S)
    mine = await homes.enter(OTHER, lease_s=LONG_S)
    taken = await taken_over(homes)
    assert await homes.lost(by=THIRD) == []
    assert await homes.take_over(HOME, by=THIRD, audit=entry()) is None
    assert await homes.lost(by=OTHER) == [HOME], "it may go on with what it began"
    await homes.beat(OTHER, mine, lease_s=OVER_S)
    assert await homes.lost(by=THIRD) == [HOME, OTHER]
    again = await taken_over(homes, by=THIRD)
    await homes.settled(HOME, taken.epoch)
    assert HOME in await homes.lost(by=THIRD), "that epoch is over, and its word with it"
    await homes.settled(HOME, again.epoch)
    assert await homes.lost(by=THIRD) == [OTHER]


async def test_of_two_servers_that_see_another_one_lost_one_takes_it_over(
    homes: SqlHomeBook, store_url: str
) -> None:
    await homes.enter(HOME, lease_s=OVER_S)
    await homes.enter(OTHER, lease_s=LONG_S)
    await homes.enter(THIRD, lease_s=LONG_S)
    async with open_database(store_url) as second:
        books = {OTHER: homes, THIRD: SqlHomeBook(second)}
        taken = await asyncio.gather(
            *(book.take_over(HOME, by=by, audit=entry()) for by, book in books.items())
        )
    assert [one is None for one in taken].count(True) == 1


async def test_a_server_that_is_back_has_its_runs_again(
    homes: SqlHomeBook, book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    await homes.enter(HOME, lease_s=OVER_S)
    run_id = await stored_run(database, anna)
    taken = await taken_over(homes)
    back = await homes.enter(HOME, lease_s=LONG_S)
    assert await homes.lost(by=OTHER) == []
    assert [head.run_id for head in await homes.claim(HOME, back)] == [run_id]
    with pytest.raises(TakenOverError):
        await homes.claim(HOME, taken.epoch)
    with pytest.raises(TakenOverError):
        await ended(book, run_id, taken.epoch)
    assert await started(book, run_id, back)


async def test_a_cancel_wished_after_a_lost_server_was_settled_has_it_taken_over_again_for_that_alone(
    homes: SqlHomeBook, book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    epoch = await homes.enter(HOME, lease_s=OVER_S)
    stays, goes = [await stored_run(database, anna) for _ in range(2)]
    for run_id in (stays, goes):
        await started(book, run_id, epoch)
    taken = await taken_over(homes)
    assert {head.run_id for head in taken.runs} == {stays, goes}
    await homes.settled(HOME, taken.epoch)
    assert await homes.lost(by=OTHER) == []
    await book.cancel(anna, goes, at=1.0, error="", audit=entry())
    assert await homes.lost(by=OTHER) == [HOME]
    assert [head.run_id for head in (await taken_over(homes)).runs] == [goes]


# --- Epochs of trees -----------------------------------------------------------------------------------


async def test_a_tree_takes_events_and_what_they_cost_under_its_epoch_only(
    homes: SqlHomeBook, book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    epoch = await homes.enter(HOME, lease_s=OVER_S)
    run_id = await stored_run(database, anna)
    trees = SqlTreeBook(database)
    event = Event(run_id, 0, 1.0, TurnStarted(turn=1, request_bytes=1))
    line = LedgerEntry(
        tenant_id=anna, run_id=run_id, call="t1", attempt=1, confirmed=Amounts(tokens=5), unconfirmed=ZERO
    )
    with pytest.raises(TakenOverError):
        await trees.tree(anna, run_id, epoch=epoch).append(run_id, 0, [event])
    await started(book, run_id, epoch)
    await trees.tree(anna, run_id, epoch=epoch).append(run_id, 0, [event])
    taken = await taken_over(homes)
    late = Event(run_id, 1, 1.0, TurnStarted(turn=2, request_bytes=1))
    with pytest.raises(TakenOverError):
        await trees.tree(anna, run_id, epoch=epoch).append(run_id, 1, [late], ledger_entries=[line])
    await trees.tree(anna, run_id, epoch=taken.epoch).append(run_id, 1, [late])
    assert len(await trees.tree_events(run_id, 0, limit=9)) == 2
    with pytest.raises(InvariantError):
        await trees.tree(TenantId("tother"), run_id, epoch=taken.epoch).append(run_id, 2, [])


# --- Wishes --------------------------------------------------------------------------------------------


async def test_a_run_that_never_began_has_ended_with_the_wish_that_it_ends(
    homes: SqlHomeBook, book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    epoch = await homes.enter(HOME, lease_s=LONG_S)
    run_id = await stored_run(database, anna)
    assert await book.cancel(anna, run_id, at=7.0, error="over", audit=entry("Cancel")) is RunState.QUEUED
    row = await book.run(anna, run_id)
    assert row is not None
    assert (row.state, row.outcome, row.error, row.ended_at) == (RunState.ENDED, "cancelled", "over", 7.0)
    assert not await started(book, run_id, epoch)
    assert [head.wish for head in await book.wished(HOME)] == [Wish.CANCEL], "its server has it in its queue"
    await book.granted(run_id, Wish.CANCEL)
    assert await book.wished(HOME) == []
    assert await book.cancel(anna, run_id, at=8.0, error="again", audit=entry("Cancel")) is RunState.ENDED
    assert await actions(database) == ["Cancel"]


async def test_a_run_that_is_to_be_cancelled_is_neither_started_nor_resumed_nor_cancelled_twice(
    homes: SqlHomeBook, book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    epoch = await homes.enter(HOME, lease_s=LONG_S)
    run_id = await stored_run(database, anna)
    await started(book, run_id, epoch)
    assert not await book.resume(anna, run_id, audit=entry("Resume")), "it runs"
    await book.interrupted(run_id, epoch=epoch)
    assert await book.resume(anna, run_id, audit=entry("Resume"))
    assert await state_of(book, anna, run_id) == (RunState.INTERRUPTED, Wish.RESUME)
    for _ in range(2):
        assert await book.cancel(anna, run_id, at=7.0, error="", audit=entry("Cancel"))
    assert await state_of(book, anna, run_id) == (RunState.INTERRUPTED, Wish.CANCEL)
    assert not await book.resume(anna, run_id, audit=entry("Resume"))
    assert not await started(book, run_id, epoch)
    await book.granted(run_id, Wish.RESUME)
    assert (await state_of(book, anna, run_id))[1] is Wish.CANCEL, "another wish than was granted"
    await ended(book, run_id, epoch)
    assert await state_of(book, anna, run_id) == (RunState.ENDED, Wish.NONE)
    assert await actions(database) == ["Resume", "Cancel"]


async def test_nobody_wishes_anything_about_another_tenants_run(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    ben, run_id = await a_tenant(database), await stored_run(database, anna)
    assert await book.cancel(ben, run_id, at=1.0, error="", audit=entry()) is None
    assert not await book.resume(ben, run_id, audit=entry())
    assert await book.head(ben, run_id) is None
    assert await book.wished(HOME) == []
    assert await actions(database) == []


async def test_wishes_are_found_by_their_home_oldest_first(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    first, second = [await stored_run(database, anna, wish=Wish.START) for _ in range(2)]
    await stored_run(database, anna, wish=Wish.START, home=OTHER)
    await stored_run(database, anna)
    assert [head.run_id for head in await book.wished(HOME)] == [first, second]


# --- What goes together --------------------------------------------------------------------------------


async def test_a_run_and_the_entry_that_tells_of_it_are_stored_together_or_not_at_all(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    row = a_run(anna)
    quotas: list[tuple[str, Quota]] = []
    for _ in range(2):
        await book.create(row, max_queued=9, quotas=quotas, audit=entry("Create"))
    assert await actions(database) == ["Create"]
    other = a_run(anna, context_id="cnone")
    with pytest.raises(NotFoundError):
        await book.create(other, max_queued=9, quotas=quotas, audit=entry("Create"))
    assert await actions(database) == ["Create"]


async def test_a_file_is_doomed_from_the_moment_its_context_is_gone_until_it_is_buried(
    book: SqlRunBook, homes: SqlHomeBook, database: Database, anna: TenantId
) -> None:
    contexts = SqlContextBook(database)
    plain, inline = a_context(anna), a_context(anna, is_inline=True, name="")
    removed = a_context(await a_tenant(database), home=OTHER)
    for one in (plain, inline, removed):
        await contexts.begin(one, max_bytes=10**12)
    assert await contexts.delete(anna, plain.context_id, audit=entry("Delete"))
    assert not await contexts.delete(anna, plain.context_id, audit=entry("Delete"))
    run_id = await stored_run(database, anna, context_id=inline.context_id)
    await ended(book, run_id, 0)
    assert await book.delete(anna, run_id, audit=entry("DeleteRun"))
    assert not await book.delete(anna, run_id, audit=entry("DeleteRun"))
    await SqlTenantBook(database).remove_tenant(removed.tenant_id)

    doomed = await contexts.doomed(HOME)
    assert {one.context_id for one in doomed} == {plain.context_id, inline.context_id}
    assert {one.name for one in doomed} == {plain.name, ""}
    assert [one.context_id for one in await contexts.doomed(OTHER)] == [removed.context_id]
    await contexts.buried([one.context_id for one in doomed])
    assert await contexts.doomed(HOME) == []
    assert (await actions(database))[:2] == ["Delete", "DeleteRun"]
