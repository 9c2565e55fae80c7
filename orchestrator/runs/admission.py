"""Who may have a sandbox, so that recursion can't deadlock.

A parent keeps its sandbox while it waits for its children. If parents could take the last ones, their
children would wait for ever. So a root run is admitted only together with one *chain* of sandboxes, one for
each depth it may reach, which nobody else can take; whatever is free beyond the chains goes to whoever asks
first. A run at depth d waits for the chain's sandbox of depth d or for a free one. The deepest run of a chain
waits for nobody, so it ends; then the one above it, and so on.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from orchestrator.errors import EngineError, InvalidRequestError


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who waits: for a whole chain (`tree` is None), or for one sandbox of a tree at a depth."""

    wanted: int
    tree: "TreeSlots | None"
    depth: int
    served: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    from_chain: bool = False


class SandboxSlots:
    """All sandboxes this process may have at once."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._free = capacity
        self._withheld = 0
        self._waiting: deque[_Waiter] = deque()

    @asynccontextmanager
    async def admit(self, max_depth: int) -> AsyncIterator["TreeSlots"]:
        """Admit a root run for the length of the block, first in, first out.

        Raises:
            InvalidRequestError: Its chain is longer than all there is.
            EngineError: It is longer than what is left beside sandboxes that could not be ended.
        """
        length = max_depth + 1
        if length > self._capacity:
            raise InvalidRequestError(
                f"a depth limit of {max_depth} needs {length} sandboxes at once and only {self._capacity} "
                "are allowed: lower --max-depth or raise RLM_MAX_SANDBOXES"
            )
        if length > self._capacity - self._withheld:
            raise EngineError(
                f"{self._withheld} of {self._capacity} places are taken by sandboxes that the container "
                f"engine did not end, and {length} are needed: look at the engine, or try again in a minute"
            )
        waiter = _Waiter(wanted=length, tree=None, depth=0)
        await self._wait(waiter)
        try:
            yield TreeSlots(self, length)
        finally:
            self._free += length
            self._serve()

    def withhold(self, count: int) -> None:
        """So many places are taken by sandboxes that should be gone and may not be.

        Chains that are reserved already stay so: a run tree that was admitted can always go on.
        """
        self._free -= count - self._withheld
        self._withheld = count
        self._serve()

    async def _wait(self, waiter: _Waiter) -> None:
        self._waiting.append(waiter)
        self._serve()
        try:
            await waiter.served
        except asyncio.CancelledError:
            if waiter.served.done() and not waiter.served.cancelled():
                self._take_back(waiter)
            else:
                self._waiting.remove(waiter)
            self._serve()
            raise

    def _take_back(self, waiter: _Waiter) -> None:
        if waiter.from_chain and waiter.tree is not None:
            waiter.tree.chain_free[waiter.depth] = True
        else:
            self._free += waiter.wanted

    def _serve(self) -> None:
        """Serve all who can be, in order. Once somebody waits for free ones, the others get their chain's."""
        for waiter in tuple(self._waiting):
            if waiter.served.cancelled():
                # Its task has not run since; it leaves the queue by itself and then calls this again.
                continue
            if waiter.tree is not None and waiter.tree.chain_free[waiter.depth]:
                waiter.tree.chain_free[waiter.depth] = False
                waiter.from_chain = True
            elif waiter.wanted <= self._free and waiter is self._waiting[0]:
                self._free -= waiter.wanted
            else:
                continue
            self._waiting.remove(waiter)
            waiter.served.set_result(None)


class TreeSlots:
    """One run tree's chain, and its way to the free ones."""

    def __init__(self, slots: SandboxSlots, length: int) -> None:
        self._slots = slots
        self.chain_free = [True] * length

    @asynccontextmanager
    async def take(self, depth: int) -> AsyncIterator[None]:
        """One sandbox for a run at `depth`, for the length of the block."""
        waiter = _Waiter(wanted=1, tree=self, depth=depth)
        await self._slots._wait(waiter)
        try:
            yield
        finally:
            self._slots._take_back(waiter)
            self._slots._serve()
