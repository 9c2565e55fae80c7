"""Servers' rooms for the sandboxes of tenants, in the database."""

from collections.abc import Mapping
from typing import Any

from sqlalchemy import Row, bindparam, delete, exists, select, update

from orchestrator.fair_rooms import Answer, Claim, Room, answer
from orchestrator.ids import TenantId
from orchestrator.store.backend import Transaction
from orchestrator.store.books import TenantRooms
from orchestrator.store.database import Database
from orchestrator.store.sql_homes import check_is_there
from orchestrator.store.sql_tenants import lock_tenant, rules_from_json
from orchestrator.store.tables import homes, rooms, tenants

_RULES = select(tenants.c.rules).where(tenants.c.tenant_id == bindparam("tenant"))
_OF_TENANT = select(rooms).where(rooms.c.tenant_id == bindparam("tenant"))
_MINE = rooms.alias()
_AROUND = (
    select(rooms, tenants.c.rules)
    .join(tenants, tenants.c.tenant_id == rooms.c.tenant_id)
    .where(exists().where(_MINE.c.home == bindparam("home"), _MINE.c.tenant_id == rooms.c.tenant_id))
)


class SqlRoomBook:
    """`RoomBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def claim(self, tenant_id: TenantId, home: str, epoch: int, claim: Claim) -> Answer | None:
        """See `RoomBook.claim`."""

        async def work(connection: Transaction) -> Answer | None:
            await lock_tenant(connection, tenant_id)
            await check_is_there(connection, home, epoch)
            rules = (await connection.execute(_RULES, {"tenant": tenant_id})).scalar_one()
            most = rules_from_json(rules).max_concurrent_sandboxes
            if most is None:
                return None
            found = await connection.execute(_OF_TENANT, {"tenant": tenant_id})
            there = {row.home: _room(row) for row in found}
            answered = answer(most, there, home, claim)
            if there.get(home) != answered.room:
                await self._put(connection, tenant_id, home, answered.room, is_there=home in there)
            return answered

        return await self._database.write(work)

    async def around(self, home: str) -> Mapping[TenantId, TenantRooms]:
        """See `RoomBook.around`."""

        async def work(connection: Transaction) -> Mapping[TenantId, TenantRooms]:
            found = (await connection.execute(_AROUND, {"home": home})).all()
            by_tenant: dict[TenantId, dict[str, Room]] = {}
            for row in found:
                by_tenant.setdefault(TenantId(row.tenant_id), {})[row.home] = _room(row)
            most = {row.tenant_id: rules_from_json(row.rules).max_concurrent_sandboxes for row in found}
            return {
                tenant_id: TenantRooms(most=most[tenant_id], rooms=its)
                for tenant_id, its in by_tenant.items()
            }

        return await self._database.read(work)

    async def give_up(self, home: str, epoch: int) -> None:
        """See `RoomBook.give_up`."""
        is_its = exists().where(homes.c.home == home, homes.c.epoch == epoch)

        async def work(connection: Transaction) -> None:
            await connection.execute(delete(rooms).where(rooms.c.home == home, is_its))

        await self._database.write(work)

    async def _put(
        self, connection: Transaction, tenant_id: TenantId, home: str, room: Room, *, is_there: bool
    ) -> None:
        values = {"units": room.units, "chains": room.chains, "wants": room.wants, "turn": room.turn}
        if is_there:
            its_own = (rooms.c.tenant_id == tenant_id) & (rooms.c.home == home)
            await connection.execute(update(rooms).where(its_own).values(values))
        else:
            await connection.execute(
                self._database.insert(rooms).values(tenant_id=tenant_id, home=home, **values)
            )


def _room(row: Row[Any]) -> Room:
    return Room(units=row.units, chains=row.chains, wants=row.wants, turn=row.turn)
