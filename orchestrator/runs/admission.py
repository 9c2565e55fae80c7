"""Who may have a sandbox, so that recursion can't deadlock and no tenant has them all.

A parent keeps its sandbox while it waits for its children. If parents could take the last ones, their
children would wait for ever. So a root run is admitted only together with one *chain* of sandboxes, one for
each depth it may reach, which nobody else can take. Who is next, for a chain or for one of those that are
free beyond the chains, `fair_line` says. A run at depth d waits for the chain's sandbox of depth d or for a
free one. The deepest run of a chain waits for nobody, so it ends; then the one above it, and so on.

The bound: let T tenants wait, and no chain be longer than n. A tenant that has no sandbox gets its first
chain after at most T * n sandboxes have come free: with one other tenant, however wide its run trees are,
after n of its child runs have ended.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from orchestrator.errors import EngineError, InvalidRequestError
from orchestrator.fair_line import FairLine
from orchestrator.ids import LOCAL_TENANT, TenantId


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who waits: for a tree's whole chain, or for one sandbox of it."""

    tree: "TreeSlots"
    wanted: int
    depth: int | None = None
    """None for the chain."""
    served: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    from_chain: bool = False


class SandboxSlots:
    """All sandboxes this process may have at once."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._withheld = 0
        self._line: FairLine[_Waiter] = FairLine(capacity)

    @asynccontextmanager
    async def admit(
        self, max_depth: int, *, tenant_id: TenantId = LOCAL_TENANT, most: int | None = None
    ) -> AsyncIterator["TreeSlots"]:
        """Admit a root run for the length of the block, when its tenant's turn has come.

        Args:
            max_depth: Of the run tree.
            tenant_id: Whose it is.
            most: Sandboxes that all its run trees together may have of these, chains included; None for all.

        Raises:
            InvalidRequestError: Its chain is longer than all there is, or than what the tenant may have.
            EngineError: It is longer than what is left beside sandboxes that could not be ended.
        """
        length = max_depth + 1
        if length > self._capacity:
            raise InvalidRequestError(
                f"a depth limit of {max_depth} needs {length} sandboxes at once and only {self._capacity} "
                "are allowed: lower --max-depth or raise RLM_MAX_SANDBOXES"
            )
        if most is not None and length > most:
            raise InvalidRequestError(
                f"a depth limit of {max_depth} needs {length} sandboxes at once, and the tenant may have"
                f" {most}: lower max_depth"
            )
        if length > self._capacity - self._withheld:
            raise EngineError(
                f"{self._withheld} of {self._capacity} places are taken by sandboxes that the container "
                f"engine did not end, and {length} are needed: look at the engine, or try again in a minute"
            )
        tree = TreeSlots(self, length, tenant_id, most)
        await self._wait(_Waiter(tree, wanted=length))
        try:
            yield tree
        finally:
            self._line.give_back(tenant_id, tree, length)
            self._serve()

    def withhold(self, count: int) -> None:
        """So many places are taken by sandboxes that should be gone and may not be.

        Chains that are reserved already stay so: a run tree that was admitted can always go on.
        """
        self._line.add_units(self._withheld - count)
        self._withheld = count
        self._serve()

    def held_by(self, tenant_id: TenantId) -> int:
        """Sandboxes that a tenant's run trees have, with their chains."""
        return self._line.held_by(tenant_id)

    def awaited_by(self, tenant_id: TenantId) -> int:
        """Sandboxes that they wait for."""
        return self._line.awaited_by(tenant_id)

    def set_room(self, tenant_id: TenantId, room: int | None) -> None:
        """A tenant has no more than this from now on, chains of new run trees included, as it may have others
        elsewhere; None for what `admit` says. What it has stays so.
        """
        self._line.set_room(tenant_id, room)
        self._serve()

    async def _wait(self, waiter: _Waiter) -> None:
        tree = waiter.tree
        if not tree._from_chain(waiter):
            self._line.ask(waiter, tree.tenant_id, tree, wants=waiter.wanted, most=tree.most)
            self._serve()
        try:
            await waiter.served
        except asyncio.CancelledError:
            if waiter.served.done() and not waiter.served.cancelled():
                self._take_back(waiter)
            else:
                tree._forget(waiter)
                self._line.withdraw(waiter)
            # One who waited for his room, and for whom nobody slipped past, may be out of the way.
            self._serve()
            raise

    def _take_back(self, waiter: _Waiter) -> None:
        tree = waiter.tree
        if not waiter.from_chain:
            self._line.give_back(tree.tenant_id, tree, waiter.wanted)
            return
        heir = tree._back_to_chain(waiter)
        if heir is not None:
            self._line.withdraw(heir)
            heir.served.set_result(None)

    def _serve(self) -> None:
        """Serve all who can be, in their order."""
        while (waiter := self._line.next()) is not None:
            waiter.tree._forget(waiter)
            if waiter.served.cancelled():
                # Its task has not run since; all that it would do is to leave the line.
                self._line.give_back(waiter.tree.tenant_id, waiter.tree, waiter.wanted)
            else:
                waiter.served.set_result(None)


class TreeSlots:
    """One run tree's chain, and its way to the free ones."""

    def __init__(self, slots: SandboxSlots, length: int, tenant_id: TenantId, most: int | None) -> None:
        self.tenant_id = tenant_id
        self.most = most
        self._slots = slots
        self._chain_free = [True] * length
        self._waiting: list[dict[_Waiter, None]] = [{} for _ in range(length)]
        """By depth, in the order of asking."""

    @asynccontextmanager
    async def take(self, depth: int) -> AsyncIterator[None]:
        """One sandbox for a run at `depth`, for the length of the block."""
        waiter = _Waiter(self, wanted=1, depth=depth)
        await self._slots._wait(waiter)
        try:
            yield
        finally:
            self._slots._take_back(waiter)
            self._slots._serve()

    def _from_chain(self, waiter: _Waiter) -> bool:
        """Serve it from the chain, or remember that it waits."""
        if waiter.depth is None:
            return False
        if not self._chain_free[waiter.depth]:
            self._waiting[waiter.depth][waiter] = None
            return False
        self._chain_free[waiter.depth] = False
        waiter.from_chain = True
        waiter.served.set_result(None)
        return True

    def _back_to_chain(self, waiter: _Waiter) -> _Waiter | None:
        """The chain's sandbox of its depth is free; who has it from now on, if somebody waits for it."""
        assert waiter.depth is not None, "a chain is not had from a chain"  # noqa: S101 - for the types
        waiting = self._waiting[waiter.depth]
        for heir in tuple(waiting):
            del waiting[heir]
            # One that is cancelled leaves the line by itself.
            if not heir.served.cancelled():
                heir.from_chain = True
                return heir
        self._chain_free[waiter.depth] = True
        return None

    def _forget(self, waiter: _Waiter) -> None:
        """It waits for the chain no longer."""
        if waiter.depth is not None:
            self._waiting[waiter.depth].pop(waiter, None)
