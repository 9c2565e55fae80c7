"""Provider calls in flight at once: of one run tree, and of all run trees of a process together.

A run tree's own limit is the first in a call's way, so that no more of one tree than that wait beside the
others; then it waits for one of the slots that all share, and who is next there, `fair_line` says. Turns and
sub-calls of a tree wait alike: a turn is asked for when its run's last cell has ended, and what that cell's
sub-calls waited for ended with it.

The bound: let T tenants have calls that wait. A call of a tenant that has none in flight goes out after at
most T calls have come back, of whatever tenants; with one other tenant, after the next that does. Behind
other calls of its own tenant it waits for those of its own tree, and takes turns with those of other trees.

A slot comes before the hold, so that only what is in flight holds anything, with one exception: a call that
has to wait for budget, which its own tree's calls hold, gives up its shared slot meanwhile. So it is never in
another tenant's way, and who has a slot never waits for who has none.
"""

import asyncio
from contextlib import AbstractAsyncContextManager
from types import TracebackType

from orchestrator.fair_line import FairLine
from orchestrator.ids import TenantId


class CallSlots:
    """What all run trees of a process share."""

    def __init__(self, at_once: int) -> None:
        """All free.

        Args:
            at_once: Calls in flight.
        """
        self._line: FairLine[CallSlot] = FairLine(at_once)

    @property
    def free(self) -> int:
        """Slots that no call has."""
        return self._line.free

    @property
    def waiting(self) -> int:
        """Calls that wait for one."""
        return self._line.waiting

    def of_tree(self, tenant_id: TenantId, *, at_once: int) -> "TreeCallSlots":
        """For one run tree of a tenant, which has no more than so many calls in flight."""
        return TreeCallSlots(self._line, tenant_id, at_once)


class TreeCallSlots:
    """One run tree's."""

    def __init__(self, line: "FairLine[CallSlot]", tenant_id: TenantId, at_once: int) -> None:
        self._line = line
        self._tenant_id = tenant_id
        self._own = asyncio.Semaphore(at_once)

    def slot(self) -> "CallSlot":
        """For one attempt, for the length of a block."""
        return CallSlot(self._line, self._tenant_id, self, self._own)


class CallSlot(AbstractAsyncContextManager["CallSlot"]):
    """One attempt's slot. Made by `TreeCallSlots`, entered once."""

    __slots__ = ("_has_it", "_line", "_own", "_served", "_tenant_id", "_tree")

    def __init__(
        self,
        line: "FairLine[CallSlot]",
        tenant_id: TenantId,
        tree: TreeCallSlots,
        own: asyncio.Semaphore,
    ) -> None:
        self._line = line
        self._tenant_id = tenant_id
        self._tree = tree
        self._own = own
        self._served: asyncio.Future[None] | None = None
        self._has_it = False

    async def __aenter__(self) -> "CallSlot":
        await self._own.acquire()
        try:
            await self.take()
        except BaseException:
            self._own.release()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.give_up()
        self._own.release()

    def give_up(self) -> None:
        """Let another call have the shared slot, if this one has it. The tree's own stays."""
        if self._has_it:
            self._has_it = False
            self._line.give_back(self._tenant_id, self._tree)
            self._serve()

    async def take(self) -> None:
        """Wait for the shared slot, unless this call has it."""
        if self._has_it:
            return
        served = self._served = asyncio.get_running_loop().create_future()
        self._line.ask(self, self._tenant_id, self._tree)
        self._serve()
        try:
            # Where there is room it is done already, and nothing waits here.
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
