"""What is kept only so long: ended runs, contexts that nobody needs."""

import logging
import time

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

    async def delete_run(self, tenant_id: TenantId, run_id: RunId) -> bool:
        """Delete an ended run, and the text that came with it when no other run is about that.

        Raises:
            StoreError: The database does not answer.
        """
        row = await self._books.runs.run(tenant_id, run_id)
        if row is None:
            return False
        context = await self._books.contexts.context(tenant_id, row.context_id)
        if not await self._books.runs.delete(tenant_id, run_id):
            return False
        if context is not None and await self._books.contexts.context(tenant_id, context.context_id) is None:
            await self._desk.drop_file(context)
            self._execution.forget_context(tenant_id, context.context_id)
        return True

    async def _sweep(self, tenant: TenantRow, now: float) -> int:
        deleted = 0
        days = tenant.rules.retention_days
        before = None if days is None else now - days * _DAY_S
        if before is not None:
            for run_id in await self._books.runs.expired(tenant.tenant_id, before=before, limit=_AT_ONCE):
                await self._audit(tenant, "DeleteRun", run_id)
                deleted += await self.delete_run(tenant.tenant_id, run_id)
        unused = await self._books.contexts.unused(
            tenant.tenant_id, inline_before=now - _INLINE_S, others_before=before, limit=_AT_ONCE
        )
        for context in unused:
            await self._audit(tenant, "DeleteContext", context.context_id)
            deleted += await self._remove(context)
        return deleted

    async def _remove(self, context: ContextRow) -> bool:
        try:
            removed = await self._desk.remove(context)
        except ConflictError:
            return False  # a run about it was created since
        self._execution.forget_context(context.tenant_id, context.context_id)
        return removed

    async def _audit(self, tenant: TenantRow, action: str, target: str) -> None:
        row = AuditRow(at=time.time(), tenant_id=tenant.tenant_id, actor=ACTOR, action=action, target=target)
        await self._books.audit.write(row)
