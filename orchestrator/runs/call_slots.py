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
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orchestrator.fair_slots import FairSlot, FairSlots
from orchestrator.ids import TenantId


class CallSlots(FairSlots):
    """What all run trees of a process share."""

    def of_tree(self, tenant_id: TenantId, *, at_once: int) -> "TreeCallSlots":
        """For one run tree of a tenant, which has no more than so many calls in flight."""
        return TreeCallSlots(self, tenant_id, at_once)


class TreeCallSlots:
    """One run tree's."""

    def __init__(self, shared: CallSlots, tenant_id: TenantId, at_once: int) -> None:
        self._shared = shared
        self._tenant_id = tenant_id
        self._own = asyncio.Semaphore(at_once)

    @asynccontextmanager
    async def slot(self) -> AsyncIterator[FairSlot]:
        """For one attempt. What it gives up meanwhile is the shared one alone."""
        async with self._own, self._shared.slot(self._tenant_id, self) as shared:
            yield shared
