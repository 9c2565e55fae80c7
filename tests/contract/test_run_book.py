"""What every RunBook must do."""

import asyncio
from dataclasses import replace

import pytest

from orchestrator.budget import Amounts
from orchestrator.errors import BudgetExceededError, CallIdReusedError, InvariantError, NotFoundError
from orchestrator.ids import RunId, TenantId
from orchestrator.store.books import ANSWER_HEAD_BYTES, LISTED_TEXT_BYTES, Quota, RunFilter, RunRow, RunState
from orchestrator.store.database import Database, open_database
from orchestrator.store.sql_contexts import SqlContextBook
from orchestrator.store.sql_homes import SqlHomeBook
from orchestrator.store.sql_runs import SqlRunBook
from orchestrator.store.sql_usage import SqlUsageBook
from tests.fakes.tenancy import HOME, a_context, a_run, a_tenant, stored_run

DAY, MONTH = "day:2026-11-23", "month:2026-11"
ALL_RUNS = RunFilter()


@pytest.fixture
def book(database: Database) -> SqlRunBook:
    return SqlRunBook(database)


@pytest.fixture
async def anna(database: Database) -> TenantId:
    return await a_tenant(database)


async def create(book: SqlRunBook, row: RunRow, *, max_queued: int = 1_000) -> RunRow:
    return await book.create(row, max_queued=max_queued, quotas=[])


async def end(
    book: SqlRunBook,
    run_id: RunId,
    *,
    at: float = 9.0,
    outcome: str = "answered",
    answer: bytes | None = b"42",
) -> None:
    await book.ended(
        run_id,
        at=at,
        outcome=outcome,
        error="",
        answer=answer,
        confirmed=Amounts(1, 2, 3, 4),
        unconfirmed=Amounts(5, 6, 7, 8),
    )


async def ids(book: SqlRunBook, tenant_id: TenantId, which: RunFilter = ALL_RUNS) -> list[RunId]:
    return [row.run_id for row in await book.runs(tenant_id, which, limit=100)]


async def test_what_was_created_is_read_back_as_it_was(book: SqlRunBook, anna: TenantId) -> None:
    row = a_run(
        anna,
        idempotency_key="ключ\0",
        question="half a character \ud800, a zero \0, and an end",
        options={"a": [1, 2.5, None, "\0\ud800"], "b": {"c": True}},
        continues=RunId("r9"),
        keeps_namespace=True,
    )
    assert await create(book, row) == row
    assert await book.run(anna, row.run_id) == row


async def test_another_tenants_run_is_not_there(book: SqlRunBook, database: Database, anna: TenantId) -> None:
    ben = await a_tenant(database)
    run_id = await stored_run(database, anna)
    await end(book, run_id)
    assert await book.run(ben, run_id) is None
    assert await ids(book, ben) == []
    assert await book.count_live(ben) == {}
    assert await book.expired(ben, before=1e12, limit=9) == []
    assert not await book.delete(ben, run_id)
    assert await book.run(anna, run_id) is not None


async def test_a_repeat_returns_what_was_stored_and_counts_once(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    first = a_run(anna, idempotency_key="same")
    quotas = [(DAY, Quota(max_runs=1)), (MONTH, Quota())]
    assert await book.create(first, max_queued=1, quotas=quotas) == first
    again = a_run(anna, idempotency_key="same")
    assert await book.create(again, max_queued=1, quotas=quotas) == first
    await book.started(first.run_id, at=5.0, resumed=False, max_concurrent=1)
    assert (await book.create(again, max_queued=1, quotas=quotas)).state is RunState.RUNNING
    assert (await SqlUsageBook(database).used(anna, DAY)).runs == 1
    assert await ids(book, anna) == [first.run_id]


async def test_one_key_for_another_request_is_refused(book: SqlRunBook, anna: TenantId) -> None:
    await create(book, a_run(anna, idempotency_key="same"))
    with pytest.raises(CallIdReusedError):
        await create(book, a_run(anna, idempotency_key="same", request_hash="another"))


async def test_two_tenants_may_choose_the_same_key(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    ben = await a_tenant(database)
    mine, theirs = a_run(anna, idempotency_key="same"), a_run(ben, idempotency_key="same")
    assert await create(book, mine) == mine
    assert await create(book, theirs) == theirs


async def test_of_many_repeats_at_once_from_two_servers_one_run_comes(
    store_url: str, database: Database, anna: TenantId
) -> None:
    async with open_database(store_url) as other:
        created = await asyncio.gather(
            *(
                create(SqlRunBook(one), a_run(anna, idempotency_key="same"))
                for _ in range(10)
                for one in (database, other)
            )
        )
    assert len({row.run_id for row in created}) == 1


async def test_no_more_runs_than_a_quota_allows_are_created_from_two_servers(
    store_url: str, database: Database, anna: TenantId
) -> None:
    quotas = [(MONTH, Quota()), (DAY, Quota(max_runs=7))]
    async with open_database(store_url) as other:
        created = await asyncio.gather(
            *(
                SqlRunBook(one).create(a_run(anna), max_queued=1_000, quotas=quotas)
                for _ in range(10)
                for one in (database, other)
            ),
            return_exceptions=True,
        )
    refused = [one for one in created if isinstance(one, BaseException)]
    assert all(isinstance(one, BudgetExceededError) for one in refused)
    assert len(created) - len(refused) == 7
    assert (await SqlUsageBook(database).used(anna, DAY)).runs == 7
    assert (await SqlUsageBook(database).used(anna, MONTH)).runs == 7
    assert len(await ids(SqlRunBook(database), anna)) == 7


async def test_no_more_runs_wait_than_may(book: SqlRunBook, anna: TenantId) -> None:
    waiting = [await create(book, a_run(anna), max_queued=2) for _ in range(2)]
    with pytest.raises(BudgetExceededError, match="waiting"):
        await create(book, a_run(anna), max_queued=2)
    await book.started(waiting[0].run_id, at=5.0, resumed=False, max_concurrent=9)
    await create(book, a_run(anna), max_queued=2)


async def test_a_run_about_a_context_that_is_not_its_tenants_is_refused(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    ben = await a_tenant(database)
    context = await SqlContextBook(database).begin(a_context(ben), max_bytes=10**9)
    for context_id in (context.context_id, "c-none"):
        with pytest.raises(NotFoundError):
            await create(book, a_run(anna, context_id=context_id))
    await create(book, a_run(ben, context_id=context.context_id))


async def test_lists_are_newest_first_a_page_at_a_time(book: SqlRunBook, anna: TenantId) -> None:
    rows = [await create(book, a_run(anna)) for _ in range(5)]
    # Three of one moment: the id decides.
    rows += [await create(book, a_run(anna, created_at=1_600_000_000.0)) for _ in range(3)]
    expected = sorted(rows, key=lambda row: (row.created_at, row.run_id), reverse=True)
    seen: list[RunRow] = []
    while page := await book.runs(
        anna, ALL_RUNS, limit=2, before=(seen[-1].created_at, seen[-1].run_id) if seen else None
    ):
        assert len(page) <= 2
        seen += page
    assert seen == expected


async def test_lists_are_filtered(book: SqlRunBook, anna: TenantId) -> None:
    a, b, c = [await create(book, a_run(anna, created_at=at)) for at in (10.0, 20.0, 30.0)]
    await end(book, a.run_id)
    await end(book, b.run_id, outcome="cancelled")
    assert await ids(book, anna, RunFilter(states=frozenset({RunState.QUEUED}))) == [c.run_id]
    assert await ids(book, anna, RunFilter(outcomes=frozenset({"cancelled"}))) == [b.run_id]
    assert await ids(book, anna, RunFilter(created_from=20.0)) == [c.run_id, b.run_id]
    assert await ids(book, anna, RunFilter(created_before=20.0)) == [a.run_id]


async def test_lists_hold_the_heads_of_texts_a_run_a_longer_one_of_its_answer_and_parts_give_all_of_it(
    book: SqlRunBook, anna: TenantId
) -> None:
    question, answer = "€" * LISTED_TEXT_BYTES, b"abc" * ANSWER_HEAD_BYTES
    row = await create(book, a_run(anna, question=question))
    await end(book, row.run_id, answer=answer)
    (listed,) = await book.runs(anna, ALL_RUNS, limit=5)
    # A character is never cut.
    assert listed.question == "€" * (LISTED_TEXT_BYTES // 3)
    assert listed.answer == answer[:LISTED_TEXT_BYTES]
    assert listed.answer_length_bytes == len(answer)
    whole = await book.run(anna, row.run_id)
    assert whole is not None
    assert (whole.question, whole.answer_length_bytes) == (question, len(answer))
    assert whole.answer == answer[:ANSWER_HEAD_BYTES]
    middle = await book.answer(anna, row.run_id, start=ANSWER_HEAD_BYTES, max_bytes=len(answer))
    assert middle == answer[ANSWER_HEAD_BYTES:]
    assert await book.answer(anna, row.run_id, start=7, max_bytes=5) == answer[7:12]
    assert await book.answer(anna, row.run_id, start=len(answer), max_bytes=5) == b""
    assert await book.answer(TenantId("tother"), row.run_id, start=0, max_bytes=5) is None
    unanswered = await create(book, a_run(anna))
    assert await book.answer(anna, unanswered.run_id, start=0, max_bytes=5) is None


async def test_the_end_of_a_run_is_stored_once(book: SqlRunBook, anna: TenantId) -> None:
    row = await create(book, a_run(anna))
    assert await book.started(row.run_id, at=5.0, resumed=False, max_concurrent=1)
    await end(book, row.run_id)
    await end(book, row.run_id, at=99.0, outcome="cancelled", answer=None)
    assert await book.run(anna, row.run_id) == replace(
        row,
        state=RunState.ENDED,
        started_at=5.0,
        ended_at=9.0,
        outcome="answered",
        answer=b"42",
        answer_length_bytes=2,
        confirmed=Amounts(1, 2, 3, 4),
        unconfirmed=Amounts(5, 6, 7, 8),
    )


async def test_the_end_of_no_run_is_our_bug(book: SqlRunBook) -> None:
    with pytest.raises(InvariantError):
        await end(book, RunId("rnone"))


async def test_an_ended_run_neither_starts_nor_is_interrupted(book: SqlRunBook, anna: TenantId) -> None:
    row = await create(book, a_run(anna))
    await end(book, row.run_id)
    assert not await book.started(row.run_id, at=5.0, resumed=False, max_concurrent=9)
    await book.interrupted(row.run_id)
    after = await book.run(anna, row.run_id)
    assert after is not None
    assert after.state is RunState.ENDED
    assert not await book.started(RunId("rnone"), at=5.0, resumed=False, max_concurrent=9)


async def test_a_run_that_goes_on_keeps_its_first_start_and_counts(book: SqlRunBook, anna: TenantId) -> None:
    row = await create(book, a_run(anna))
    await book.started(row.run_id, at=5.0, resumed=False, max_concurrent=1)
    await book.interrupted(row.run_id)
    assert await book.count_live(anna) == {RunState.INTERRUPTED: 1}
    assert await book.started(row.run_id, at=8.0, resumed=True, max_concurrent=1)
    # Its server was killed, and had no time to say so.
    assert await book.started(row.run_id, at=9.0, resumed=True, max_concurrent=1)
    after = await book.run(anna, row.run_id)
    assert after is not None
    assert (after.started_at, after.resumed, after.state) == (5.0, 2, RunState.RUNNING)


async def test_no_more_runs_run_at_once_than_may_on_two_servers(
    store_url: str, database: Database, anna: TenantId
) -> None:
    queued = [await stored_run(database, anna) for _ in range(12)]
    async with open_database(store_url) as other:
        books = [SqlRunBook(database), SqlRunBook(other)]
        started = await asyncio.gather(
            *(
                books[number % 2].started(run_id, at=1.0, resumed=False, max_concurrent=4)
                for number, run_id in enumerate(queued)
            )
        )
        assert sum(started) == 4
        assert await books[0].count_live(anna) == {RunState.RUNNING: 4, RunState.QUEUED: 8}


async def test_what_has_not_ended_is_found_by_its_home_oldest_first(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    ben = await a_tenant(database)
    a, b, ended = (
        await stored_run(database, anna),
        await stored_run(database, ben),
        await stored_run(database, anna),
    )
    await stored_run(database, anna, home="elsewhere")
    await end(book, ended)
    homes = SqlHomeBook(database)
    epoch = await homes.enter(HOME, lease_s=60.0)
    assert [head.run_id for head in await homes.claim(HOME, epoch)] == [a, b]


async def test_only_an_ended_run_is_deleted_and_its_key_is_free(book: SqlRunBook, anna: TenantId) -> None:
    row = await create(book, a_run(anna, idempotency_key="same"))
    assert not await book.delete(anna, row.run_id)
    await end(book, row.run_id)
    assert await book.delete(anna, row.run_id)
    assert not await book.delete(anna, row.run_id)
    assert await book.run(anna, row.run_id) is None
    await create(book, a_run(anna, idempotency_key="same", request_hash="another"))


async def test_a_context_that_came_with_questions_goes_with_the_last_of_them(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    contexts = SqlContextBook(database)
    inline = await contexts.begin(a_context(anna, is_inline=True), max_bytes=10**9)
    uploaded = await contexts.begin(a_context(anna), max_bytes=10**9)
    about = [
        await stored_run(database, anna, context_id=context_id)
        for context_id in (inline.context_id, inline.context_id, uploaded.context_id)
    ]
    for run_id in about:
        await end(book, run_id)
    await book.delete(anna, about[0])
    assert await contexts.context(anna, inline.context_id) is not None
    await book.delete(anna, about[1])
    assert await contexts.context(anna, inline.context_id) is None
    await book.delete(anna, about[2])
    assert await contexts.context(anna, uploaded.context_id) is not None


async def test_what_ended_before_a_time_is_expired(
    book: SqlRunBook, database: Database, anna: TenantId
) -> None:
    runs = [await stored_run(database, anna) for _ in range(4)]
    for run_id, at in zip(runs, (30.0, 10.0, 20.0), strict=False):
        await end(book, run_id, at=at)
    assert await book.expired(anna, before=30.0, limit=9) == [runs[1], runs[2]]
    assert await book.expired(anna, before=30.0, limit=1) == [runs[1]]
