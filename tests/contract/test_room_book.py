"""What every RoomBook must do. What a claim comes to is `fair_rooms`, and is tested there."""

import asyncio

import pytest

from orchestrator.errors import NotFoundError, TakenOverError
from orchestrator.fair_rooms import Claim, Room
from orchestrator.ids import TenantId
from orchestrator.store.books import AuditRow, TenantRules
from orchestrator.store.database import Database, open_database
from orchestrator.store.sql_homes import SqlHomeBook
from orchestrator.store.sql_rooms import SqlRoomBook
from orchestrator.store.sql_tenants import SqlTenantBook
from tests.fakes.tenancy import a_tenant

HERE, THERE = "home-1", "home-2"
LONG_S, OVER_S = 60.0, -1.0
"""Leases that last for the whole test, and none of it."""
ONE_RUN = Claim(chains=0, wants=2, asks=2, keeps=0)
ITS_ROOM = Room(units=5, chains=2, wants=2)
"""What that comes to where nobody else has anything."""


@pytest.fixture
def rooms(database: Database) -> SqlRoomBook:
    return SqlRoomBook(database)


@pytest.fixture
def homes(database: Database) -> SqlHomeBook:
    return SqlHomeBook(database)


@pytest.fixture
def tenants(database: Database) -> SqlTenantBook:
    return SqlTenantBook(database)


@pytest.fixture
async def here(homes: SqlHomeBook) -> int:
    return await homes.enter(HERE, lease_s=LONG_S)


@pytest.fixture
async def there(homes: SqlHomeBook) -> int:
    return await homes.enter(THERE, lease_s=LONG_S)


@pytest.fixture
async def anna(database: Database, tenants: SqlTenantBook) -> TenantId:
    tenant_id = await a_tenant(database)
    await tenants.set_rules(tenant_id, TenantRules(max_concurrent_sandboxes=5))
    return tenant_id


async def room_of(rooms: SqlRoomBook, tenant_id: TenantId, home: str) -> Room:
    its = (await rooms.around(home)).get(tenant_id)
    return Room() if its is None else its.rooms[home]


async def test_what_was_claimed_is_there_for_all_servers(
    rooms: SqlRoomBook, anna: TenantId, here: int, there: int
) -> None:
    told = await rooms.claim(anna, HERE, here, ONE_RUN)
    assert told is not None
    assert (told.most, told.room, told.is_granted) == (5, ITS_ROOM, True)
    assert await rooms.around(THERE) == {}, "nothing of it is theirs"
    second = await rooms.claim(anna, THERE, there, ONE_RUN)
    assert second is not None
    assert (second.is_granted, second.room) == (False, Room(wants=2, turn=1))
    for home in (HERE, THERE):
        its = (await rooms.around(home))[anna]
        assert (its.most, its.rooms) == (5, {HERE: ITS_ROOM, THERE: second.room})


async def test_servers_that_claim_at_once_never_have_more_than_there_is_together(
    rooms: SqlRoomBook, anna: TenantId, here: int, there: int, store_url: str
) -> None:
    async with open_database(store_url) as second:
        books = {HERE: (rooms, here), THERE: (SqlRoomBook(second), there)}
        units = dict.fromkeys(books, 0)
        for number in range(6):
            wants = {HERE: 2 + number, THERE: 8 - number}
            claims = [
                book.claim(anna, home, epoch, Claim(chains=2, wants=wants[home], keeps=units[home] // 2))
                for home, (book, epoch) in books.items()
            ]
            for home, told in zip(books, await asyncio.gather(*claims), strict=True):
                assert told is not None
                units[home] = told.room.units
            assert sum(units.values()) <= 5


async def test_a_tenant_is_asked_for_by_the_rules_that_it_has_now(
    rooms: SqlRoomBook, tenants: SqlTenantBook, anna: TenantId, here: int
) -> None:
    await rooms.claim(anna, HERE, here, ONE_RUN)
    await tenants.set_rules(anna, TenantRules(max_concurrent_sandboxes=3))
    assert (await rooms.around(HERE))[anna].most == 3
    told = await rooms.claim(anna, HERE, here, Claim(chains=2, wants=9, keeps=4))
    assert told is not None
    assert (told.most, told.may_have, told.room.units) == (3, 3, 4)
    await tenants.set_rules(anna, TenantRules())
    assert await rooms.claim(anna, HERE, here, Claim(chains=2, wants=9, keeps=4)) is None
    assert (await rooms.around(HERE))[anna].most is None


async def test_tenants_have_rooms_of_their_own(
    database: Database, rooms: SqlRoomBook, tenants: SqlTenantBook, anna: TenantId, here: int
) -> None:
    bert = await a_tenant(database)
    await tenants.set_rules(bert, TenantRules(max_concurrent_sandboxes=9))
    await rooms.claim(anna, HERE, here, ONE_RUN)
    assert await room_of(rooms, bert, HERE) == Room()
    await rooms.claim(bert, HERE, here, ONE_RUN)
    assert await room_of(rooms, anna, HERE) == ITS_ROOM
    assert (await room_of(rooms, bert, HERE)).units == 9


async def test_a_server_that_starts_again_has_no_room(
    rooms: SqlRoomBook, homes: SqlHomeBook, anna: TenantId, here: int, there: int
) -> None:
    await rooms.claim(anna, HERE, here, ONE_RUN)
    assert await homes.enter(HERE, lease_s=LONG_S) == here + 1
    with pytest.raises(TakenOverError):
        await rooms.claim(anna, HERE, here, ONE_RUN)
    told = await rooms.claim(anna, THERE, there, ONE_RUN)
    assert told is not None
    assert told.is_granted


async def test_the_room_of_a_server_that_was_taken_over_is_others(
    rooms: SqlRoomBook, homes: SqlHomeBook, anna: TenantId, there: int
) -> None:
    epoch = await homes.enter(HERE, lease_s=OVER_S)
    await rooms.claim(anna, HERE, epoch, ONE_RUN)
    told = await rooms.claim(anna, THERE, there, ONE_RUN)
    assert told is not None
    assert not told.is_granted, "it may only be late"
    entry = AuditRow(at=1.0, tenant_id=None, actor="server:home-2", action="TakeOver", target=HERE)
    assert await homes.take_over(HERE, by=THERE, audit=entry) is not None
    told = await rooms.claim(anna, THERE, there, ONE_RUN)
    assert told is not None
    assert told.is_granted
    with pytest.raises(TakenOverError):
        await rooms.claim(anna, HERE, epoch, Claim(chains=2, wants=2, keeps=5))


async def test_a_server_gives_up_all_its_rooms_and_nobody_elses(
    rooms: SqlRoomBook, anna: TenantId, here: int, there: int
) -> None:
    await rooms.claim(anna, HERE, here, Claim(chains=2, wants=2, keeps=2))
    await rooms.claim(anna, THERE, there, ONE_RUN)
    await rooms.give_up(HERE, here - 1)
    assert await room_of(rooms, anna, HERE) != Room(), "whose epoch is over gives nothing up"
    await rooms.give_up(HERE, here)
    assert await room_of(rooms, anna, HERE) == Room()
    assert (await room_of(rooms, anna, THERE)).turn == 1


async def test_of_a_removed_tenant_nobody_has_room(
    rooms: SqlRoomBook, tenants: SqlTenantBook, anna: TenantId, here: int
) -> None:
    await rooms.claim(anna, HERE, here, ONE_RUN)
    await tenants.remove_tenant(anna)
    assert await rooms.around(HERE) == {}
    with pytest.raises(NotFoundError):
        await rooms.claim(anna, HERE, here, ONE_RUN)
