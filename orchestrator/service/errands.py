"""What a server does for the others of its database, and they for it: wishes, lost servers, files.

Rules:

1. A context is files of one home, and so the runs about it are that home's. Whatever a server is asked about
   them it stores as a wish on the run's row before it answers; the home's server does it, at the next look or
   when it starts. So what was acknowledged survives the end of either, and to do it twice is to do it once.
2. While other servers are heard of, wishes are looked for every `POLL_S`, in one statement that an index
   answers. A server that is alone asks itself only, and does not look.
3. Whoever has not been heard of for as long as its lease is taken over by one of the others: its open calls
   are settled at their worst case, runs that have ended or are to be cancelled end, all others are
   interrupted and do not count among those that run, nor their sandboxes among those of their tenants. They
   go on when their own server is back.
4. A server that was taken over while it stood still leaves all that it was doing, enters again, and takes up
   its runs as after a restart.
5. A file whose context was deleted, by whichever server, is removed by the server of its home.
"""

import asyncio
import logging
import time
from contextlib import suppress

from orchestrator.errors import OrchestratorError, StoreError, TakenOverError
from orchestrator.ids import RunId, TenantId
from orchestrator.service.books import Books
from orchestrator.service.execution import Execution
from orchestrator.service.presence import Presence
from orchestrator.service.recovery import Recovery
from orchestrator.service.retention import Retention
from orchestrator.service.upkeep import again_and_again
from orchestrator.store.books import AuditRow, TakenOver, Wish

_log = logging.getLogger(__name__)

POLL_S = 1.0
"""What another server was asked is done so much later, at most ..."""
_RETRY_S = 5.0
"""... and so much when the database did not answer."""


class Errands:
    """Of one server. It looks at them from `look_on` and `beat_on` on."""

    def __init__(
        self,
        books: Books,
        presence: Presence,
        execution: Execution,
        recovery: Recovery,
        retention: Retention,
    ) -> None:
        self._books = books
        self._presence = presence
        self._execution = execution
        self._recovery = recovery
        self._retention = retention
        self._is_out = False
        """Taken over, and not yet back."""
        self._taking_up = asyncio.Lock()
        """One at a time settles what a run left open: it is its events' one writer meanwhile."""
        self._is_behind = asyncio.Event()
        """Something that is wished could not be done."""

    # --- About one run of this home -------------------------------------------------------------------

    async def take_up(self, tenant_id: TenantId, run_id: RunId) -> None:
        """Go on with a run that is not here, or end it if that is wished.

        Raises:
            StoreError: The database does not answer.
        """
        async with self._taking_up:
            await self._recovery.take_up(tenant_id, run_id)

    async def grant(self, tenant_id: TenantId, run_id: RunId, wish: Wish) -> None:
        """Do what is wished about a run of this home; later, if the database does not answer now."""
        try:
            async with self._taking_up:
                await self._grant(tenant_id, run_id, wish)
        except StoreError as error:
            _log.warning("what is wished about run %s is not done yet: %s", run_id, error)
            self._is_behind.set()

    async def _grant(self, tenant_id: TenantId, run_id: RunId, wish: Wish) -> None:
        if wish is not Wish.CANCEL:
            await self._recovery.take_up(tenant_id, run_id)
        elif self._execution.cancel(run_id):
            return  # its end forgets the wish
        else:
            with self._execution.withdrawn(run_id) as was_waiting:
                if not await self._recovery.cancel(tenant_id, run_id, was_waiting=was_waiting):
                    return  # it is just being left, and ends then
        await self._books.runs.granted(run_id, wish)

    # --- Always ---------------------------------------------------------------------------------------

    async def look_on(self) -> None:
        """Look for wishes, for ever."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(POLL_S):
                    await self._is_behind.wait()
            if self._presence.is_alone and not self._is_behind.is_set():
                continue
            if self._is_behind.is_set():
                await asyncio.sleep(_RETRY_S)
                self._is_behind.clear()
            try:
                for head in await self._books.runs.wished(self._presence.home):
                    await self.grant(head.tenant_id, head.run_id, head.wish)
            except StoreError as error:
                _log.warning("what other servers were asked is not known now: %s", error)
            except Exception:
                _log.exception("what another server was asked could not be done")

    async def beat_on(self) -> None:
        """Be there for the other servers, and look after those that are not, for ever."""
        every_s = self._presence.beat_every_s
        await again_and_again(
            self._be_there, every_s=every_s, log=_log, failure="this server may not be heard of now"
        )

    async def _be_there(self) -> None:
        await self._beat()
        await self._retention.bury()
        await self._take_over()

    async def _beat(self) -> None:
        if not self._is_out:
            try:
                await self._presence.beat()
            except TakenOverError as error:
                _log.error("%s: it leaves what it was doing, and starts again", error)
                self._is_out = True
        if self._is_out:
            async with self._taking_up:
                await self._execution.leave_all()
                await self._presence.enter()
                taken_up = await self._recovery.take_up_all()
            self._is_out = False
            _log.info("%d runs that had not ended were taken up", taken_up)

    async def _take_over(self) -> None:
        """Settle what servers that are away have left open."""
        if not self._presence.may_judge:
            return
        me = self._presence.home
        for home in await self._books.homes.lost(by=me):
            audit = AuditRow(
                at=time.time(), tenant_id=None, actor=f"server:{me}", action="TakeOver", target=home
            )
            taken = await self._books.homes.take_over(home, by=me, audit=audit)
            if taken is not None:
                _log.warning("server %s is not heard of: %d of its runs are settled", home, len(taken.runs))
                await self._settle(home, taken)

    async def _settle(self, home: str, taken: TakenOver) -> None:
        for head in taken.runs:
            try:
                await self._recovery.settle(head.tenant_id, head.run_id, epoch=taken.epoch)
            except TakenOverError:
                _log.warning("server %s is back", home)
                return
            except StoreError:
                raise
            except OrchestratorError:
                # Its own server will have to say so.
                _log.exception("run %s could not be settled", head.run_id)
        await self._books.homes.settled(home, taken.epoch)
