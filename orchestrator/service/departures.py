"""Tenants that were removed, by this server, another one, or a command beside the database: their runs end.

A run whose tenant is gone has no row, and so nothing of it is stored any more; but what it is billed for
calls that were in flight goes into the ledger, which outlives everything (`store.sql_events`).
"""

import logging

from orchestrator.ids import TenantId
from orchestrator.service.execution import Execution
from orchestrator.service.upkeep import again_and_again
from orchestrator.store.books import TenantBook

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""So long a run goes on at most after its tenant was removed elsewhere."""


class Departures:
    """Of one server's runs."""

    def __init__(self, tenants: TenantBook, execution: Execution) -> None:
        self._tenants = tenants
        self._execution = execution

    async def removed(self, tenant_id: TenantId) -> None:
        """This server has just removed it."""
        self._execution.remove_tenant(tenant_id)

    async def look_on(self) -> None:
        """Look now and then, for ever."""
        await again_and_again(
            self.look, every_s=LOOK_EVERY_S, log=_log, failure="runs of removed tenants may go on"
        )

    async def look(self) -> None:
        """Ask about all tenants that have runs here, once.

        Raises:
            StoreError: The database does not answer.
        """
        present = self._execution.tenants
        if present:
            for tenant_id in await self._tenants.removed(present):
                _log.warning("tenant %s was removed: its runs here end", tenant_id)
                self._execution.remove_tenant(tenant_id)
