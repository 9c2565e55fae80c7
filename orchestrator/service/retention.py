"""What is kept only so long: ended runs, contexts that nobody needs."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from orchestrator.errors import ConflictError
from orchestrator.ids import RunId, TenantId
from orchestrator.service.books import Books
from orchestrator.service.clock import ClockJudge
from orchestrator.service.context_desk import ContextDesk
from orchestrator.service.one_run import Runner
from orchestrator.store.books import AuditRow, ContextRow, RunFilter, TenantRow

_log = logging.getLogger(__name__)

SWEEP_EVERY_S = 600.0
_AT_ONCE = 500
"""Runs or contexts of a tenant that one sweep deletes; the next goes on."""
_DAY_S = 86_400.0
_INLINE_S = 3_600.0
"""A text that came with a question which was then refused goes after this long."""
_UNFINISHED_S = 7 * _DAY_S
"""An upload that is not complete goes so long after its beginning, whatever its tenant's retention."""
ACTOR = "retention"


def steady_s() -> float:
    """Seconds of a clock that goes on while the machine sleeps, and that nobody sets."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Retention:
    """Deletes what is too old, with an entry in the audit log for each."""

    def __init__(
        self,
        books: Books,
        desk: ContextDesk,
        runner: Runner,
        *,
        steady_s: Callable[[], float] = steady_s,
    ) -> None:
        """Deletes nothing yet.

        Args:
            books: What is old is in them.
            desk: Where contexts are.
            runner: Forgets contexts that are gone.
            steady_s: See `ClockJudge`.
        """
        self._books = books
        self._desk = desk
        self._runner = runner
        self._steady_s = steady_s
        self._clock = ClockJudge()
        self._doubt = ""

    async def sweep(self) -> int:
        """Look at every tenant once; how much was deleted. Nothing is while the date is not to be believed.

        Raises:
            StoreError: The database does not answer. The next sweep goes on.
        """
        deleted = 0
        tenants = await self._books.tenants.tenants()
        now = await self._believed_time(tenants)
        if now is None:
            return 0
        for tenant in tenants:
            deleted += await self._sweep(tenant, now)
        if deleted:
            _log.info("%d runs and contexts were deleted, as their tenants' retention says", deleted)
        return deleted

    async def _believed_time(self, tenants: Sequence[TenantRow]) -> float | None:
        newest_s = None if self._clock.has_looked else await self._newest_s(tenants)
        # Read once: a clock that is set after this look is not the one that was believed.
        now = time.time()
        doubt = self._clock.look(now, self._steady_s(), newest_s=newest_s)
        if doubt and not self._doubt:
            _log.warning("nothing is deleted for its age: %s; look at the date of this machine", doubt)
        elif self._doubt and not doubt:
            _log.info("what is too old is deleted again")
        self._doubt = doubt
        return None if doubt else now

    async def _newest_s(self, tenants: Sequence[TenantRow]) -> float | None:
        """When the newest run was created."""
        newest = [await self._books.runs.runs(one.tenant_id, RunFilter(), limit=1) for one in tenants]
        return max((row.created_at for rows in newest for row in rows), default=None)

    async def delete_run(self, tenant_id: TenantId, run_id: RunId, *, audit: AuditRow) -> bool:
        """Delete an ended run, and the text that came with it when no other run is about that.

        Raises:
            StoreError: The database does not answer.
        """
        if not await self._books.runs.delete(tenant_id, run_id, audit=audit):
            return False
        await self.bury()
        return True

    async def bury(self) -> None:
        """Remove what is still on this server's disk of contexts that were deleted, by whichever server.

        Raises:
            StoreError: The disk or the database does not answer.
        """
        for context in await self._desk.bury():
            self._runner.forget_context(context.tenant_id, context.context_id)

    async def delete_context(self, context: ContextRow, *, audit: AuditRow) -> bool:
        """Delete a context.

        Raises:
            ConflictError: A run that has not ended needs it.
            StoreError: The database does not answer.
        """
        removed = await self._desk.remove(context, audit=audit)
        self._runner.forget_context(context.tenant_id, context.context_id)
        return removed

    async def _sweep(self, tenant: TenantRow, now: float) -> int:
        deleted = 0
        days = tenant.rules.retention_days
        before = None if days is None else now - days * _DAY_S
        if before is not None:
            for run_id in await self._books.runs.expired(tenant.tenant_id, before=before, limit=_AT_ONCE):
                audit = _entry(tenant, "DeleteRun", run_id)
                deleted += await self.delete_run(tenant.tenant_id, run_id, audit=audit)
        unused = await self._books.contexts.unused(
            tenant.tenant_id,
            inline_before=now - _INLINE_S,
            unfinished_before=now - _UNFINISHED_S,
            others_before=before,
            limit=_AT_ONCE,
        )
        for context in unused:
            # A run about it may have been created since.
            with suppress(ConflictError):
                audit = _entry(tenant, "DeleteContext", context.context_id)
                deleted += await self.delete_context(context, audit=audit)
        return deleted


def _entry(tenant: TenantRow, action: str, target: str) -> AuditRow:
    return AuditRow(at=time.time(), tenant_id=tenant.tenant_id, actor=ACTOR, action=action, target=target)
