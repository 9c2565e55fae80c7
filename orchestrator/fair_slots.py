"""Waiting for one's turn: the asynchronous side of `fair_line`, for what everybody wants one of."""

import asyncio
from collections.abc import Hashable
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from orchestrator.fair_line import FairLine
from orchestrator.ids import TenantId


class FairSlots:
    """So many at once; whoever finds none waits for his tenant's turn."""

    def __init__(self, at_once: int) -> None:
        """All free.

        Args:
            at_once: How many there are.
        """
        self._line: FairLine[FairSlot] = FairLine(at_once)

    @property
    def free(self) -> int:
        """Slots that nobody has."""
        return self._line.free

    @property
    def waiting(self) -> int:
        """Who waits for one."""
        return self._line.waiting

    def slot(self, tenant_id: TenantId, tree: Hashable = None) -> "FairSlot":
        """One for the length of a block.

        Args:
            tenant_id: Whose turn it takes.
            tree: Of the tenant's run trees, which take turns among themselves; None where they don't.
        """
        return FairSlot(self._line, tenant_id, tree)


class FairSlot(AbstractAsyncContextManager["FairSlot"]):
    """One slot. Made by `FairSlots`, entered once."""

    __slots__ = ("_has_it", "_line", "_served", "_tenant_id", "_tree")

    def __init__(self, line: "FairLine[FairSlot]", tenant_id: TenantId, tree: Hashable) -> None:
        self._line = line
        self._tenant_id = tenant_id
        self._tree = tree
        self._served: asyncio.Future[None] | None = None
        self._has_it = False

    async def __aenter__(self) -> "FairSlot":
        self._has_it = self._line.take_at_once(self._tenant_id, self._tree)
        if not self._has_it:
            await self.take()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_up()

    def give_up(self) -> None:
        """Let another have it, before the block is over. Without it this does nothing."""
        if self._has_it:
            self._has_it = False
            self._line.give_back(self._tenant_id, self._tree)
            self._serve()

    async def take(self) -> None:
        """Wait for it, where it was given up."""
        if self._has_it:
            return
        served = self._served = asyncio.get_running_loop().create_future()
        self._line.ask(self, self._tenant_id, self._tree)
        self._serve()
        try:
            await served
        except asyncio.CancelledError:
            if not self._line.withdraw(self):
                # It was served in the breath in which it was cancelled.
                self.give_up()
            raise

    def _serve(self) -> None:
        """Serve all who can be, in their order."""
        while (slot := self._line.next()) is not None:
            slot._has_it = True
            if slot._served is not None and not slot._served.done():
                slot._served.set_result(None)
