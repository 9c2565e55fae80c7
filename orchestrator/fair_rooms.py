"""How many sandboxes of a tenant each server may have, where the tenant may have so many over all servers.

A server's *room* is how many it may have at once, as the database keeps it. It claims its room anew, one
server of a tenant at a time: a claim says what the server has and wants, and comes to the room that it has
from then on. Rules:

1. A room grows only into what no other server's room takes. What a server has in use, it keeps. So all rooms
   together are never more than there is, unless there has become less, and no server has more than its room.
2. A server that runs something has the chains of what it runs as its share: each of its run trees can go on.
3. Of what is left, those that run nothing get the chain of the run that they wait for, in the order in which
   they began to. The first one for which it is not enough has the rest reserved: nobody slips past it.
4. What is left then is divided evenly among those that want more; and what nobody wants, among all that want
   anything, so that they need not ask for every sandbox.
5. A server may have its share, as far as others have left it, and hands out no more. What it has beyond its
   share it gives back as its sandboxes end.
6. A run begins only where its whole chain fits into what its server may have.
7. A run that needs more than there is was queued when there was more: it has it where nothing else runs.

What follows from them, when everybody claims again and again. Nothing waits in a circle: what is held while
it waits is chains, and the deepest run of a chain waits for nobody. A server that runs nothing waits for
those that began to wait before it, once each, since whoever has begun something waits with a later turn, and
for the ends of runs that leave it its chain: meanwhile nobody begins one that would take it. A server alone
has all.

The price: room that is wanted elsewhere is given back after the sandboxes in it have ended. And where a share
is no multiple of the chains, the rest of it lies idle on a server whose run trees are narrow.

Pure: no clock, no I/O.
"""

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Room:
    """One server's, of one tenant."""

    units: int = 0
    """Sandboxes that it may have at once."""
    chains: int = 0
    """Those of the run trees that run there."""
    wants: int = 0
    """What it has and waits for. Where it runs nothing: the chain of the run it waits for."""
    turn: int = 0
    """When it began to wait for its first chain, counted in such moments of the tenant's."""

    @property
    def is_first(self) -> bool:
        """Whether it runs nothing, and waits for a chain."""
        return not self.chains and self.wants > 0

    @property
    def is_short(self) -> bool:
        """Whether it wants more than it may have."""
        return self.wants > self.units


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What a server says of itself."""

    chains: int
    """Of its run trees."""
    wants: int
    """See `Room.wants`; what it asks for is part of it."""
    keeps: int
    """More than that it does not have, and hands out no more until it is answered."""
    asks: int = 0
    """The chain of a run that it would begin; all of it or nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """To a claim."""

    most: int
    """Of the tenant's, over all servers."""
    room: Room
    """The server's from now on."""
    may_have: int
    """What it may hand out; its room is larger while it has more in use."""
    is_granted: bool
    """Whether the chain that it asked for is its."""
    is_contended: bool
    """Whether another server wants more than it may have."""


def answer(most: int, rooms: Mapping[str, Room], home: str, claim: Claim) -> Answer:
    """What a claim comes to.

    Args:
        most: Sandboxes of the tenant's at once, over all servers.
        rooms: Of all servers.
        home: Whose claim it is.
        claim: What it says.
    """
    mine = rooms.get(home, Room())
    others = {other: room for other, room in rooms.items() if other != home}
    asking = Room(units=mine.units, chains=claim.chains, wants=claim.wants)
    if asking.is_first:
        turn = mine.turn if mine.is_first else 1 + max((room.turn for room in rooms.values()), default=0)
        asking = Room(units=mine.units, wants=claim.wants, turn=turn)
    together = {**others, home: asking}
    share, total = shares(most, together), _total(most, together)
    left_to_it = total - sum(max(room.units, share[other]) for other, room in others.items())
    may_have = min(share[home], max(mine.units, left_to_it))
    is_granted = 0 < claim.asks <= may_have - claim.chains
    units = max(claim.keeps, may_have)
    if is_granted:
        room = Room(units=units, chains=claim.chains + claim.asks, wants=claim.wants)
    else:
        room = Room(units=units, chains=asking.chains, wants=asking.wants, turn=asking.turn)
    return Answer(
        most=most,
        room=room,
        may_have=may_have,
        is_granted=is_granted,
        is_contended=any(room.is_short for room in others.values()),
    )


def shares(most: int, rooms: Mapping[str, Room]) -> dict[str, int]:
    """What each is to have in the end, if nothing changes any more (rules 2 to 4)."""
    share = {home: room.chains for home, room in rooms.items()}
    left = max(0, _total(most, rooms) - sum(share.values()))
    for home in _in_turn(rooms):
        share[home] = min(rooms[home].wants, left)
        left -= share[home]
    running = {home: room.wants for home, room in rooms.items() if room.chains}
    left = _divide(left, running, share)
    active = {home: share[home] + left for home, room in rooms.items() if room.chains or room.wants}
    _divide(left, active, share)
    return share


def _total(most: int, rooms: Mapping[str, Room]) -> int:
    if any(room.chains for room in rooms.values()):
        return most
    return max([most, *(rooms[home].wants for home in _in_turn(rooms)[:1])])


def _in_turn(rooms: Mapping[str, Room]) -> list[str]:
    """Those that wait for their first chain."""
    waiting = (home for home, room in rooms.items() if room.is_first)
    return sorted(waiting, key=lambda home: (rooms[home].turn, home))


def _divide(units: int, wants: Mapping[str, int], share: dict[str, int]) -> int:
    """Add units to shares, those with the least first, and to none more than makes it what it wants.

    Returns:
        What nobody wants.
    """

    def needed(level: int) -> int:
        return sum(max(0, min(want, level) - share[home]) for home, want in wants.items())

    level = bisect_right(range(max(wants.values(), default=0) + 1), units, key=needed) - 1
    units -= needed(level)
    for home in sorted(wants):
        share[home] = max(share[home], min(wants[home], level))
        if units and share[home] == level < wants[home]:
            share[home] += 1
            units -= 1
    return units
