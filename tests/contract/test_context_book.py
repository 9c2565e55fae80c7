"""What every ContextBook must do."""

import asyncio
from dataclasses import replace

import pytest

from orchestrator.budget import ZERO
from orchestrator.errors import BudgetExceededError, ConflictError
from orchestrator.ids import RunId, TenantId
from orchestrator.store import sql_contexts
from orchestrator.store.books import ContextRow
from orchestrator.store.database import Database, open_database
from orchestrator.store.sql_contexts import SqlContextBook
from orchestrator.store.sql_runs import SqlRunBook
from tests.fakes.tenancy import HOME, a_context, a_tenant, stored_run

PLENTY = 10**12


@pytest.fixture
def book(database: Database) -> SqlContextBook:
    return SqlContextBook(database)


@pytest.fixture
async def anna(database: Database) -> TenantId:
    return await a_tenant(database)


async def end(database: Database, run_id: RunId) -> None:
    await SqlRunBook(database).ended(
        run_id, at=9.0, outcome="answered", error="", answer=b"", confirmed=ZERO, unconfirmed=ZERO
    )


async def complete(book: SqlContextBook, row: ContextRow) -> ContextRow:
    await book.begin(row, max_bytes=PLENTY)
    await book.complete(row.tenant_id, row.context_id)
    return replace(row, is_complete=True)


async def test_a_context_is_there_from_its_beginning_and_complete_in_the_end(
    book: SqlContextBook, anna: TenantId
) -> None:
    row = a_context(anna, name="Brief\0\ud800.txt")
    assert await book.begin(row, max_bytes=PLENTY) == row
    assert await book.context(anna, row.context_id) == row
    await book.complete(anna, row.context_id)
    assert await book.context(anna, row.context_id) == replace(row, is_complete=True)


async def test_another_tenants_context_is_not_there(
    book: SqlContextBook, database: Database, anna: TenantId
) -> None:
    ben = await a_tenant(database)
    row = await complete(book, a_context(anna))
    await book.complete(ben, row.context_id)
    assert await book.context(ben, row.context_id) is None
    assert await book.contexts(ben, limit=9) == []
    long_ago = {"inline_before": 1e12, "unfinished_before": 1e12, "others_before": 1e12}
    assert await book.unused(ben, **long_ago, limit=9) == []
    assert not await book.delete(ben, row.context_id)
    assert await book.context(anna, row.context_id) == row


async def test_the_same_upload_is_taken_up_and_another_is_another(
    book: SqlContextBook, database: Database, anna: TenantId
) -> None:
    row = a_context(anna)
    await book.begin(row, max_bytes=PLENTY)
    again = replace(row, context_id="c-again", created_at=5.0)
    assert await book.begin(again, max_bytes=0) == row
    for other in (
        replace(again, name="other"),
        replace(again, context_id="c-2", sha256="f" * 64),
        replace(again, context_id="c-3", length_bytes=1_001),
        replace(again, context_id="c-4", home="elsewhere"),
        replace(again, context_id="c-5", tenant_id=await a_tenant(database)),
    ):
        assert await book.begin(other, max_bytes=PLENTY) == other


async def test_one_that_came_with_a_question_and_is_uploaded_too_stays_by_itself(
    book: SqlContextBook, anna: TenantId
) -> None:
    row = a_context(anna, is_inline=True)
    await book.begin(row, max_bytes=PLENTY)
    uploaded = await book.begin(replace(row, context_id="c-2", is_inline=False), max_bytes=PLENTY)
    assert uploaded == replace(row, is_inline=False)
    assert await book.begin(row, max_bytes=PLENTY) == uploaded


async def test_a_tenant_keeps_no_more_bytes_than_it_may_on_two_servers(
    store_url: str, database: Database, anna: TenantId
) -> None:
    async with open_database(store_url) as other:
        begun = await asyncio.gather(
            *(
                SqlContextBook(one).begin(a_context(anna, length_bytes=300), max_bytes=1_000)
                for _ in range(5)
                for one in (database, other)
            ),
            return_exceptions=True,
        )
    refused = [one for one in begun if isinstance(one, BaseException)]
    assert all(isinstance(one, BudgetExceededError) for one in refused)
    assert len(begun) - len(refused) == 3


async def test_a_tenant_has_no_more_unfinished_uploads_than_a_few_however_short_they_are(
    book: SqlContextBook, anna: TenantId, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sql_contexts, "MAX_UNFINISHED_UPLOADS", 2)
    begun = [await book.begin(a_context(anna), max_bytes=PLENTY) for _ in range(2)]
    with pytest.raises(BudgetExceededError, match="unfinished"):
        await book.begin(a_context(anna), max_bytes=PLENTY)
    assert await book.begin(begun[0], max_bytes=PLENTY) == begun[0]
    await book.complete(anna, begun[0].context_id)
    await book.begin(a_context(anna), max_bytes=PLENTY)


async def test_complete_ones_are_listed_newest_first_a_page_at_a_time(
    book: SqlContextBook, anna: TenantId
) -> None:
    rows = [await complete(book, a_context(anna)) for _ in range(3)]
    await book.begin(a_context(anna), max_bytes=PLENTY)
    await complete(book, a_context(anna, is_inline=True))
    first = await book.contexts(anna, limit=2)
    assert first == [rows[2], rows[1]]
    last = first[-1]
    assert await book.contexts(anna, limit=2, before=(last.created_at, last.context_id)) == [rows[0]]


async def test_one_that_a_run_needs_is_kept_and_ended_runs_are_left_without(
    book: SqlContextBook, database: Database, anna: TenantId
) -> None:
    row = await complete(book, a_context(anna))
    run_id = await stored_run(database, anna, context_id=row.context_id)
    with pytest.raises(ConflictError):
        await book.delete(anna, row.context_id)
    await end(database, run_id)
    assert await book.delete(anna, row.context_id)
    assert not await book.delete(anna, row.context_id)
    assert await book.context(anna, row.context_id) is None
    run = await SqlRunBook(database).run(anna, run_id)
    assert run is not None
    assert run.context_id == ""


async def test_what_no_run_refers_to_is_unused_after_a_time(
    book: SqlContextBook, database: Database, anna: TenantId
) -> None:
    used = await complete(book, a_context(anna, created_at=1.0))
    await end(database, await stored_run(database, anna, context_id=used.context_id))
    uploaded = await complete(book, a_context(anna, created_at=2.0))
    unfinished = await book.begin(a_context(anna, created_at=3.0), max_bytes=PLENTY)
    inline = await complete(book, a_context(anna, created_at=4.0, is_inline=True))
    await complete(book, a_context(anna, created_at=50.0))
    await complete(book, a_context(anna, created_at=50.0, is_inline=True))
    old = await book.unused(anna, inline_before=10.0, unfinished_before=0.0, others_before=None, limit=9)
    assert old == [inline]
    old = await book.unused(anna, inline_before=0.0, unfinished_before=10.0, others_before=None, limit=9)
    assert old == [unfinished]
    assert await book.unused(
        anna, inline_before=10.0, unfinished_before=0.0, others_before=10.0, limit=9
    ) == [
        uploaded,
        unfinished,
        inline,
    ]
    assert await book.unused(
        anna, inline_before=10.0, unfinished_before=0.0, others_before=10.0, limit=1
    ) == [uploaded]


async def test_all_of_a_home_are_found_whoevers_they_are(
    book: SqlContextBook, database: Database, anna: TenantId
) -> None:
    ben = await a_tenant(database)
    rows = [await book.begin(a_context(tenant), max_bytes=PLENTY) for tenant in (anna, ben)]
    await book.begin(a_context(anna, home="elsewhere"), max_bytes=PLENTY)
    assert {row.context_id for row in await book.all_of(HOME)} == {row.context_id for row in rows}
