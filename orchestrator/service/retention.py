"""What is kept only so long: ended runs, contexts that nobody needs."""

import logging
import time
from contextlib import suppress

from orchestrator.errors import ConflictError
from orchestrator.ids import RunId, TenantId
from orchestrator.service.books import Books
from orchestrator.service.context_desk import ContextDesk
from orchestrator.service.execution import Execution
from orchestrator.store.books import AuditRow, ContextRow, TenantRow

_log = logging.getLogger(__name__)

SWEEP_EVERY_S = 600.0
_AT_ONCE = 500
"""Runs or contexts of a tenant that one sweep deletes; the next goes on."""
_DAY_S = 86_400.0
_INLINE_S = 3_600.0
"""A text that came with a question which was then refused goes after this long."""
ACTOR = "retention"


class Retention:
    """Deletes what is too old, with an entry in the audit log for each."""

    def __init__(self, books: Books, desk: ContextDesk, execution: Execution) -> None:
        self._books = books
        self._desk = desk
        self._execution = execution

    async def sweep(self) -> int:
        """Look at every tenant once; how much was deleted.

        Raises:
            StoreError: The database does not answer. The next sweep goes on.
        """
        deleted = 0
        for tenant in await self._books.tenants.tenants():
            deleted += await self._sweep(tenant, time.time())
        if deleted:
            _log.info("%d runs and contexts were deleted, as their tenants' retention says", deleted)
        return deleted

    async def delete_run(self, tenant_id: TenantId, run_id: RunId, *, audit: AuditRow) -> bool:
        """Delete an ended run, and the text that came with it when no other run is about that.

        Raises:
            StoreError: The database does not answer.
        """
        if not await self._books.runs.delete(tenant_id, run_id, audit=audit):
            return False
        for context in await self._desk.bury():
            self._execution.forget_context(context.tenant_id, context.context_id)
        return True

    async def delete_context(self, context: ContextRow, *, audit: AuditRow) -> bool:
        """Delete a context.

        Raises:
            ConflictError: A run that has not ended needs it.
            StoreError: The database does not answer.
        """
        removed = await self._desk.remove(context, audit=audit)
        self._execution.forget_context(context.tenant_id, context.context_id)
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
            tenant.tenant_id, inline_before=now - _INLINE_S, others_before=before, limit=_AT_ONCE
        )
        for context in unused:
            # A run about it may have been created since.
            with suppress(ConflictError):
                audit = _entry(tenant, "DeleteContext", context.context_id)
                deleted += await self.delete_context(context, audit=audit)
        return deleted


def _entry(tenant: TenantRow, action: str, target: str) -> AuditRow:
    return AuditRow(at=time.time(), tenant_id=tenant.tenant_id, actor=ACTOR, action=action, target=target)
