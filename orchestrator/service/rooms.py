"""This server's room for the sandboxes of tenants that may have so many over all servers. See `fair_rooms`.

Rules:

1. A run is begun when its chain fits into the room that the server has of its tenant. Where nobody else is
   short of room the server decides that by itself; otherwise, and where it does not fit, it claims.
2. Before a claim is answered no more is handed out than before it. What is given back is first not handed out
   any more, and claimed less afterwards.
3. While other servers are heard of, or what a server has is not enough, it looks every `POLL_S` how the
   others stand, in one statement for all tenants. It claims again where anybody is short. A server that is
   alone claims all at a tenant's first run, and asks nothing more.
4. A database that does not answer leaves rooms as they are.
5. Of a tenant without a limit the database is asked nothing.
"""

import asyncio
import logging
from dataclasses import dataclass, field

from orchestrator.errors import NotFoundError
from orchestrator.fair_rooms import Answer, Claim, Room, answer
from orchestrator.ids import RunId, TenantId
from orchestrator.runs.admission import SandboxSlots
from orchestrator.service.presence import Presence
from orchestrator.service.upkeep import again_and_again
from orchestrator.store.books import RoomBook, TenantRooms

_log = logging.getLogger(__name__)

POLL_S = 1.0
"""So much later, at most, another server's need is heard of."""


@dataclass(slots=True, eq=False)
class TenantRoom:
    """How one tenant's sandboxes stand at this server. Pure but for its lock."""

    most: int | None = None
    """Over all servers, as the last answer said; None before, and where there is no limit."""
    room: Room = field(default_factory=Room)
    """As the database has it."""
    may_have: int = 0
    chains: dict[RunId, int] = field(default_factory=dict)
    """Of what was begun."""
    lacks: tuple[RunId, int] | None = None
    """The run, and its chain, that could not be begun for want of room."""
    is_contended: bool = False
    """Whether other servers were short of room when that was last looked at."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """One claim at a time."""

    def fits(self, chain: int) -> bool:
        """Whether a chain can be had without a claim."""
        return (
            not self.is_contended
            and self.lacks is None
            and sum(self.chains.values()) + chain <= self.may_have
        )

    def claim(self, has: int, awaits: int, capacity: int, asks: int = 0) -> Claim:
        """What to claim.

        Args:
            has: Sandboxes that are in use or reserved.
            awaits: That are waited for by what was begun.
            capacity: Of this server.
            asks: The chain of a run to be begun.
        """
        chains = sum(self.chains.values())
        lacks = asks or (self.lacks[1] if self.lacks is not None else 0)
        wants = lacks
        if chains:
            most = capacity if self.most is None else min(capacity, self.most)
            wants = max(chains, min(most, max(chains, has + awaits) + lacks))
        return Claim(chains=chains, wants=wants, keeps=max(has, self.may_have), asks=asks)

    def heard(self, told: Answer) -> None:
        """A claim was answered."""
        self.most, self.room, self.may_have = told.most, told.room, told.may_have
        self.is_contended = told.is_contended

    def has_too_much(self, has: int) -> bool:
        """Whether more is claimed than will be used."""
        return self.room.units > max(has, self.may_have)

    def is_stale(self, around: TenantRooms, home: str, claim: Claim) -> bool:
        """Whether a claim would change anything that anybody waits for."""
        if around.most is None or around.most != self.most or self.room.units > claim.keeps:
            return True
        is_short = self.is_contended or claim.wants > self.may_have or around.rooms[home].is_short
        if not is_short:
            return False
        told = answer(around.most, around.rooms, home, claim)
        return told.may_have != self.may_have or told.room != around.rooms[home]


class Rooms:
    """Of one server."""

    def __init__(self, book: RoomBook, presence: Presence, slots: SandboxSlots, *, capacity: int) -> None:
        """Nothing is claimed.

        Args:
            book: The database.
            presence: Under whose epoch it claims.
            slots: Told what a tenant may have here.
            capacity: Sandboxes of this server, of all tenants.
        """
        self._book = book
        self._presence = presence
        self._slots = slots
        self._capacity = capacity
        self._tenants: dict[TenantId, TenantRoom] = {}
        self._is_wanted = asyncio.Event()
        """Something came free that others are short of."""

    def must_claim(self, tenant_id: TenantId, chain: int, most: int | None) -> bool:
        """Whether a run could be begun only with a claim."""
        mine = self._tenants.get(tenant_id)
        if mine is None or mine.most is None:
            return most is not None
        return mine.most != most or not mine.fits(chain)

    async def begin(self, run_id: RunId, tenant_id: TenantId, chain: int, *, most: int | None) -> bool:
        """Whether a run may be begun; if so its chain is its, until it is `over` or `not_begun`.

        If not it counts as waiting for its room, ahead of its tenant's other runs here, until it is asked
        for again, is over, or gives way.

        Args:
            run_id: Of a root run.
            tenant_id: Whose it is.
            chain: Sandboxes that it needs at once.
            most: Sandboxes that the tenant may have over all servers, as far as the caller knows.

        Raises:
            StoreError: The database does not answer.
        """
        while True:
            mine = self._tenants.setdefault(tenant_id, TenantRoom())
            if most is None and mine.most is None:
                mine.chains[run_id] = chain
                return True
            async with mine.lock:
                if self._tenants.get(tenant_id) is mine:
                    return await self._begin(run_id, tenant_id, mine, chain, most)

    async def _begin(
        self, run_id: RunId, tenant_id: TenantId, mine: TenantRoom, chain: int, most: int | None
    ) -> bool:
        if mine.lacks is not None and mine.lacks[0] != run_id:
            return False
        may_begin = mine.most == most and mine.fits(chain)
        if not may_begin:
            may_begin = await self._claim(tenant_id, mine, asks=chain)
        if may_begin:
            mine.lacks = None
            mine.chains[run_id] = chain
        else:
            mine.lacks = (run_id, chain)
            await self._give_back(tenant_id, mine)
        return may_begin

    def not_begun(self, run_id: RunId, tenant_id: TenantId) -> None:
        """It might have been begun, and was not."""
        mine = self._tenants.get(tenant_id)
        if mine is not None and mine.chains.pop(run_id, None) is not None:
            self._may_forget(tenant_id, mine)
            if mine.is_contended:
                self._is_wanted.set()

    def over(self, run_id: RunId, tenant_id: TenantId) -> None:
        """It is not here any more, and has no sandbox."""
        mine = self._tenants.get(tenant_id)
        if mine is not None and mine.lacks is not None and mine.lacks[0] == run_id:
            mine.lacks = None
        self.not_begun(run_id, tenant_id)

    def give_way(self, tenant_id: TenantId) -> None:
        """Its runs wait for something else now: others need not leave them room."""
        mine = self._tenants.get(tenant_id)
        if mine is not None:
            mine.lacks = None

    def forget(self) -> None:
        """Nothing runs here, and what was claimed is others' now."""
        for tenant_id in self._tenants:
            self._slots.set_room(tenant_id, None)
        self._tenants.clear()

    async def give_up(self) -> None:
        """Nothing will run here any more: what was claimed is others'.

        Raises:
            StoreError: The database does not answer.
        """
        is_limited = any(mine.most is not None for mine in self._tenants.values())
        self.forget()
        if is_limited:
            await self._book.give_up(self._presence.home, self._presence.epoch)

    # --- Always ---------------------------------------------------------------------------------------

    async def look_on(self) -> None:
        """Look for what others need, and for what has come free, for ever."""
        await again_and_again(
            self.look,
            every_s=POLL_S,
            log=_log,
            failure="what room other servers need is not known now",
            sooner=self._is_wanted,
        )

    async def look(self) -> None:
        """Look once.

        Raises:
            StoreError: The database does not answer.
        """
        limited = {tenant_id: mine for tenant_id, mine in self._tenants.items() if mine.most is not None}
        if self._presence.is_alone and not any(self._is_short(*one) for one in limited.items()):
            for mine in limited.values():
                mine.is_contended = False
            return
        if not limited:
            return
        home = self._presence.home
        around = await self._book.around(home)
        for tenant_id, mine in limited.items():
            its = around.get(tenant_id)
            if its is None or home not in its.rooms:
                continue
            async with mine.lock:
                if self._tenants.get(tenant_id) is not mine:
                    continue
                others = (room for other, room in its.rooms.items() if other != home)
                mine.is_contended = any(room.is_short for room in others)
                if mine.is_stale(its, home, self._to_claim(tenant_id, mine)):
                    await self._claim(tenant_id, mine)
                    await self._give_back(tenant_id, mine)
            if not (mine.room.units or mine.room.wants):
                self._may_forget(tenant_id, mine)

    def _is_short(self, tenant_id: TenantId, mine: TenantRoom) -> bool:
        return self._to_claim(tenant_id, mine).wants > mine.may_have

    def _to_claim(self, tenant_id: TenantId, mine: TenantRoom, asks: int = 0) -> Claim:
        slots = self._slots
        return mine.claim(slots.held_by(tenant_id), slots.awaited_by(tenant_id), self._capacity, asks)

    async def _claim(self, tenant_id: TenantId, mine: TenantRoom, asks: int = 0) -> bool:
        """Claim; whether what it asks for is its."""
        if mine.most is None:
            # Nothing bounds what it has here. From now on this does.
            self._allow(tenant_id, mine, self._slots.held_by(tenant_id))
        claim = self._to_claim(tenant_id, mine, asks)
        try:
            told = await self._book.claim(tenant_id, self._presence.home, self._presence.epoch, claim)
        except NotFoundError:
            return True  # nobody is left whose limit it could be, and the books will say so
        if told is None:
            mine.most = mine.lacks = None
            mine.is_contended = False
            if self._tenants.get(tenant_id) is mine:
                self._slots.set_room(tenant_id, None)
            return True
        mine.heard(told)
        self._allow(tenant_id, mine, told.may_have)
        return told.is_granted

    async def _give_back(self, tenant_id: TenantId, mine: TenantRoom) -> None:
        """Claim no more than what is handed out."""
        if mine.most is not None and mine.has_too_much(self._slots.held_by(tenant_id)):
            await self._claim(tenant_id, mine)

    def _allow(self, tenant_id: TenantId, mine: TenantRoom, units: int) -> None:
        mine.may_have = units
        if self._tenants.get(tenant_id) is mine:
            self._slots.set_room(tenant_id, units)

    def _may_forget(self, tenant_id: TenantId, mine: TenantRoom) -> None:
        """Else tenants that came once would be looked at for ever."""
        if mine.chains or mine.lacks is not None or mine.room.units or mine.lock.locked():
            return
        if self._tenants.get(tenant_id) is mine:
            del self._tenants[tenant_id]
            self._slots.set_room(tenant_id, None)
