"""A server's room for sandboxes, with a real database; other servers are rows in it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import pytest

from orchestrator.errors import StoreError
from orchestrator.fair_rooms import Answer, Claim
from orchestrator.ids import RunId, TenantId
from orchestrator.runs.admission import SandboxSlots
from orchestrator.service.books import Books
from orchestrator.service.presence import Presence
from orchestrator.service.rooms import Rooms
from orchestrator.store.books import RoomBook, TenantRooms, TenantRules

MOST = 6
R1, R2, R3 = RunId("r1"), RunId("r2"), RunId("r3")


class Away:
    """A book that answers, or does not."""

    def __init__(self, book: RoomBook) -> None:
        self._book = book
        self.is_away = False
        self.claims = 0

    async def claim(self, tenant_id: TenantId, home: str, epoch: int, claim: Claim) -> Answer | None:
        self._answer()
        self.claims += 1
        return await self._book.claim(tenant_id, home, epoch, claim)

    async def around(self, home: str) -> Mapping[TenantId, TenantRooms]:
        self._answer()
        return await self._book.around(home)

    async def give_up(self, home: str, epoch: int) -> None:
        self._answer()
        await self._book.give_up(home, epoch)

    def _answer(self) -> None:
        if self.is_away:
            raise StoreError("the database does not answer")


class Home:
    """One server, as far as it has room."""

    def __init__(self, books: Books, name: str) -> None:
        self.presence = Presence(books.homes, name)
        self.slots = SandboxSlots(MOST)
        self.book = Away(books.rooms)
        self.rooms = Rooms(self.book, self.presence, self.slots, capacity=MOST)

    async def begin(
        self, run_id: RunId, tenant_id: TenantId, chain: int = 2, most: int | None = MOST
    ) -> bool:
        return await self.rooms.begin(run_id, tenant_id, chain, most=most)

    @asynccontextmanager
    async def tree(self, tenant_id: TenantId, chain: int = 2) -> AsyncIterator[None]:
        """A run tree that was begun."""
        async with asyncio.timeout(5), self.slots.admit(chain - 1, tenant_id=tenant_id, most=MOST):
            yield


@pytest.fixture
async def anna(books: Books) -> TenantId:
    return (await books.tenants.add_tenant("anna", TenantRules(max_concurrent_sandboxes=MOST))).tenant_id


@pytest.fixture
async def here(books: Books) -> Home:
    home = Home(books, "here")
    await home.presence.enter()
    return home


@pytest.fixture
async def there(books: Books, here: Home) -> Home:
    home = Home(books, "there")
    await home.presence.enter()
    await here.presence.beat()
    await home.presence.beat()
    return home


async def test_a_server_alone_claims_once_and_decides_by_itself_from_then_on(
    here: Home, anna: TenantId
) -> None:
    assert [await here.begin(RunId(f"r{number}"), anna) for number in range(4)] == [True] * 3 + [False]
    claims = here.book.claims
    here.rooms.over(RunId("r3"), anna)
    here.rooms.over(R1, anna)
    here.book.is_away = True
    assert await here.begin(RunId("r5"), anna)
    await here.rooms.look()
    assert claims == 2, "one for all there is, and one for what did not fit"


async def test_of_a_tenant_without_a_limit_nothing_is_asked(here: Home, anna: TenantId) -> None:
    here.book.is_away = True
    for number in range(20):
        assert await here.begin(RunId(f"r{number}"), anna, most=None)
    await here.rooms.look()


async def test_what_another_server_needs_is_given_back_as_it_comes_free_and_not_before(
    here: Home, there: Home, anna: TenantId
) -> None:
    assert await here.begin(R1, anna)
    async with here.tree(anna):
        async with here.tree(anna, chain=MOST - 2):  # as wide as may be
            assert not await there.begin(R2, anna)
            for _ in range(3):
                await here.rooms.look()
                assert not await there.begin(R2, anna)
        await here.rooms.look()
        assert await there.begin(R2, anna)
        async with there.tree(anna):
            assert here.slots.held_by(anna) + there.slots.held_by(anna) <= MOST


async def test_no_run_slips_past_one_that_waits_for_its_room(here: Home, there: Home, anna: TenantId) -> None:
    assert await there.begin(R1, anna, chain=4)
    await there.rooms.look()
    assert not await here.begin(R2, anna, chain=3)
    assert not await here.begin(R3, anna, chain=1)
    here.rooms.over(R2, anna)  # it was cancelled
    for home in (there, here):
        await home.rooms.look()
    assert await here.begin(R3, anna, chain=1)


async def test_a_run_that_waits_for_something_else_leaves_its_room_to_others(
    here: Home, there: Home, anna: TenantId
) -> None:
    assert await there.begin(R1, anna, chain=3)
    assert not await here.begin(R2, anna, chain=4)
    await there.rooms.look()
    assert not await there.begin(R3, anna, chain=3)
    here.rooms.give_way(anna)
    await here.rooms.look()
    assert await there.begin(R3, anna, chain=3)


async def test_while_the_database_is_away_rooms_stay_as_they_are(
    here: Home, there: Home, anna: TenantId
) -> None:
    assert await here.begin(R1, anna)
    async with here.tree(anna):
        for home in (here, there):
            home.book.is_away = True
            with contextlib.suppress(StoreError):
                await home.rooms.look()
        with pytest.raises(StoreError):
            await there.begin(R2, anna)
        async with here.tree(anna, chain=MOST - 2):
            pass
        for home in (here, there):
            home.book.is_away = False
        assert not await there.begin(R2, anna)
        await here.rooms.look()
        assert await there.begin(R2, anna)


async def test_a_limit_that_came_and_went_counts_for_what_runs(
    books: Books, here: Home, anna: TenantId
) -> None:
    await books.tenants.set_rules(anna, TenantRules())
    assert await here.begin(R1, anna, chain=4, most=None)
    async with here.tree(anna, chain=4):
        await books.tenants.set_rules(anna, TenantRules(max_concurrent_sandboxes=5))
        assert not await here.begin(R2, anna, chain=2, most=5)
        assert await here.begin(R2, anna, chain=1, most=5)
        await books.tenants.set_rules(anna, TenantRules())
        assert await here.begin(R3, anna, chain=2, most=None)
        async with here.tree(anna):
            assert here.slots.held_by(anna) == MOST


async def test_a_server_that_was_taken_over_begins_with_nothing(here: Home, anna: TenantId) -> None:
    assert await here.begin(R1, anna)
    await here.presence.enter()
    here.rooms.forget()
    assert await here.begin(R2, anna, chain=MOST)


async def test_what_was_given_up_is_others_at_once(here: Home, there: Home, anna: TenantId) -> None:
    assert await here.begin(R1, anna)
    here.rooms.over(R1, anna)
    await here.rooms.give_up()
    assert await there.begin(R2, anna, chain=MOST)


async def test_of_a_tenant_that_was_removed_nothing_is_limited(
    books: Books, here: Home, there: Home, anna: TenantId
) -> None:
    assert await here.begin(R1, anna)
    await books.tenants.remove_tenant(anna)
    assert await there.begin(R2, anna, chain=MOST), "the books say that the run is not there"
    await here.rooms.look()
    here.rooms.over(R1, anna)
