"""Who is served next, of tenants that share what there is not enough of: provider calls, sandboxes, starts.

Rules:

1. Whoever asks waits in the line of its run tree. Of a run tree who asked first is served first.
2. When there is room, the tenant that has the fewest units is served; among equals the one that came to that
   many, or began to wait with that many, longest ago. Among the run trees of the tenant it is the same.
3. The one whose turn it is waits for its room, and nobody slips past: what wants many units at once is not
   starved by what wants one. Only a tenant that would then have more than it may (`most`) is passed over, all
   of it, until it has given something back. One that has nothing never is: it asked when it might have more.
   But where a tenant was given a room (`set_room`), that counts, and what would not fit into it waits.
4. What is had at once is never more than there is, unless there has become less.

What follows from them. Let T tenants wait, one of them B, which has nothing, and let all there is be taken.
Before B are only tenants that had nothing either when B began to wait, and waited before it. Once one of them
is served it has something; when it has nothing again it is behind B. So each is served once at most before B,
whatever it has asked for: where everybody wants one unit, **B is served after at most T units given back**,
and where nobody wants more than n at once, after at most T * n. One that has k units already waits for
tenants that have fewer: it is served after at most k * T units given back by tenants that have more than k.
Between the trees of one tenant the same holds of what the tenant is served.

Pure: no clock, no I/O. A step's time grows neither with those who wait nor with tenants and run trees, only
with how many different numbers of units they have: at most the square root of twice what there is.
"""

from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from orchestrator.errors import InvariantError
from orchestrator.ids import TenantId

K = TypeVar("K", bound=Hashable)
W = TypeVar("W", bound=Hashable)


class _FewestFirst(Generic[K]):
    """Keys, each with a number; in the order of the numbers, among equals in the order of coming to them."""

    __slots__ = ("_by_number", "_number_of")

    def __init__(self) -> None:
        self._number_of: dict[K, int] = {}
        self._by_number: dict[int, dict[K, None]] = {}

    def put(self, key: K, number: int) -> None:
        """Add it, or change its number. With the number it has, it keeps its place."""
        before = self._number_of.get(key)
        if before != number:
            self.drop(key)
            self._number_of[key] = number
            self._by_number.setdefault(number, {})[key] = None

    def drop(self, key: K) -> None:
        """Forget it, if it is there."""
        number = self._number_of.pop(key, None)
        if number is not None:
            equals = self._by_number[number]
            del equals[key]
            if not equals:
                del self._by_number[number]

    def __bool__(self) -> bool:
        return bool(self._number_of)

    def first(self) -> K:
        return next(iter(self._by_number[min(self._by_number)]))


@dataclass(slots=True)
class _Tree(Generic[W]):
    has: int = 0
    waiting: dict[W, int] = field(default_factory=dict)
    """What each wants, in the order of asking."""


@dataclass(slots=True)
class _Tenant(Generic[W]):
    room: int | None
    most: int | None = None
    has: int = 0
    waits_for: int = 0
    """Units, of all that wait."""
    trees: dict[Hashable, _Tree[W]] = field(default_factory=dict)
    ready: _FewestFirst[Hashable] = field(default_factory=_FewestFirst)
    """Trees of which somebody waits."""

    def may_have(self, count: int) -> bool:
        if self.room is not None:
            return self.has + count <= self.room
        return self.most is None or self.has + count <= self.most or not self.has


class FairLine(Generic[W]):
    """Units that tenants share, and who waits for some. One event-loop thread calls it, hence no lock."""

    def __init__(self, units: int) -> None:
        """All free.

        Args:
            units: There are.
        """
        self._free = units
        self._tenants: dict[TenantId, _Tenant[W]] = {}
        self._rooms: dict[TenantId, int] = {}
        self._ready: _FewestFirst[TenantId] = _FewestFirst()
        """Tenants of which somebody waits, and whose next may be served."""
        self._home: dict[W, tuple[TenantId, Hashable]] = {}

    @property
    def free(self) -> int:
        """Units that nobody has; negative when there has become less than is had."""
        return self._free

    @property
    def waiting(self) -> int:
        """Who waits."""
        return len(self._home)

    def ask(
        self, waiter: W, tenant_id: TenantId, tree: Hashable, *, wants: int = 1, most: int | None = None
    ) -> None:
        """Wait. `next` may hand it out at once.

        Args:
            waiter: New to the line.
            tenant_id: Whose it is.
            tree: Its run tree.
            wants: Units, all at once.
            most: What the tenant may have; it counts for all of the tenant's from now on. None for all.
        """
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            tenant = self._tenants[tenant_id] = _Tenant(self._rooms.get(tenant_id))
        tenant.most = most
        its_tree = tenant.trees.get(tree)
        if its_tree is None:
            its_tree = tenant.trees[tree] = _Tree()
        its_tree.waiting[waiter] = wants
        tenant.waits_for += wants
        self._home[waiter] = (tenant_id, tree)
        self._place(tenant_id, tenant, tree, its_tree)

    def take_at_once(self, tenant_id: TenantId, tree: Hashable) -> bool:
        """Have one unit without waiting; False where somebody waits or none is free. It asks for no `most`.

        What `ask` and `next` would come to then, in a third of the time.
        """
        if self._home or self._free < 1:
            return False
        tenant = self._tenants.get(tenant_id)
        if tenant is None:
            tenant = self._tenants[tenant_id] = _Tenant(self._rooms.get(tenant_id))
        its_tree = tenant.trees.get(tree)
        if its_tree is None:
            its_tree = tenant.trees[tree] = _Tree()
        its_tree.has += 1
        tenant.has += 1
        self._free -= 1
        return True

    def withdraw(self, waiter: W) -> bool:
        """It waits no longer; False when it did not."""
        home = self._home.pop(waiter, None)
        if home is None:
            return False
        tenant_id, tree = home
        tenant = self._tenants[tenant_id]
        its_tree = tenant.trees[tree]
        tenant.waits_for -= its_tree.waiting.pop(waiter)
        self._place(tenant_id, tenant, tree, its_tree)
        return True

    def next(self) -> W | None:
        """Whose turn it is, who has what it wanted from here on; None when nobody waits or it lacks room."""
        if not self._ready:
            return None
        tenant_id = self._ready.first()
        tenant = self._tenants[tenant_id]
        tree, its_tree, waiter, wants = self._next_of(tenant)
        if wants > self._free:
            return None
        del its_tree.waiting[waiter], self._home[waiter]
        tenant.waits_for -= wants
        self._move(tenant_id, tenant, tree, its_tree, wants)
        return waiter

    def give_back(self, tenant_id: TenantId, tree: Hashable, count: int = 1) -> None:
        """Units that a tree had are free again.

        Raises:
            InvariantError: It did not have so many.
        """
        tenant = self._tenants.get(tenant_id)
        its_tree = tenant.trees.get(tree) if tenant is not None else None
        if tenant is None or its_tree is None or its_tree.has < count:
            raise InvariantError("a run tree gave back what it did not have")
        self._move(tenant_id, tenant, tree, its_tree, -count)

    def add_units(self, count: int) -> None:
        """There are so many more; fewer when negative. What is had stays so."""
        self._free += count

    def held_by(self, tenant_id: TenantId) -> int:
        """Units that a tenant has."""
        tenant = self._tenants.get(tenant_id)
        return tenant.has if tenant is not None else 0

    def awaited_by(self, tenant_id: TenantId) -> int:
        """Units that all who wait of a tenant want."""
        tenant = self._tenants.get(tenant_id)
        return tenant.waits_for if tenant is not None else 0

    def set_room(self, tenant_id: TenantId, room: int | None) -> None:
        """What a tenant may have from now on, until this says otherwise; whatever is asked with. What it has
        stays so.

        Args:
            tenant_id: Whose it is.
            room: Units; None where nothing but what is asked with (`most`) limits it.
        """
        if room is None:
            self._rooms.pop(tenant_id, None)
        else:
            self._rooms[tenant_id] = room
        tenant = self._tenants.get(tenant_id)
        if tenant is not None:
            tenant.room = room
            self._place_tenant(tenant_id, tenant)

    def _move(
        self, tenant_id: TenantId, tenant: _Tenant[W], tree: Hashable, its_tree: _Tree[W], count: int
    ) -> None:
        self._free -= count
        tenant.has += count
        its_tree.has += count
        self._place(tenant_id, tenant, tree, its_tree)

    def _next_of(self, tenant: _Tenant[W]) -> tuple[Hashable, _Tree[W], W, int]:
        tree = tenant.ready.first()
        its_tree = tenant.trees[tree]
        waiter, wants = next(iter(its_tree.waiting.items()))
        return tree, its_tree, waiter, wants

    def _place(self, tenant_id: TenantId, tenant: _Tenant[W], tree: Hashable, its_tree: _Tree[W]) -> None:
        """Put a tree and its tenant where they belong, and forget them when they want and have nothing."""
        if not its_tree.waiting and not tenant.ready:
            # Nobody of the tenant waits, so neither has a place. So it is while there is enough for all.
            if not its_tree.has:
                del tenant.trees[tree]
                if not tenant.trees:
                    del self._tenants[tenant_id]
            return
        if its_tree.waiting:
            tenant.ready.put(tree, its_tree.has)
        else:
            tenant.ready.drop(tree)
            if not its_tree.has:
                del tenant.trees[tree]
        self._place_tenant(tenant_id, tenant)

    def _place_tenant(self, tenant_id: TenantId, tenant: _Tenant[W]) -> None:
        if tenant.ready and tenant.may_have(self._next_of(tenant)[3]):
            self._ready.put(tenant_id, tenant.has)
        else:
            self._ready.drop(tenant_id)
            if not tenant.trees:
                del self._tenants[tenant_id]
