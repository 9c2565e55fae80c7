"""Who did what, in the database. It only ever grows: triggers of the database refuse anything else."""

from collections.abc import Sequence

from sqlalchemy import select

from orchestrator.ids import TenantId
from orchestrator.store.backend import Transaction
from orchestrator.store.books import AuditRow
from orchestrator.store.database import Database
from orchestrator.store.tables import audit

_FIELDS = ("at", "tenant_id", "actor", "action", "target", "detail")


async def add_audit(database: Database, connection: Transaction, row: AuditRow) -> None:
    """Write an entry in the transaction of what it tells of: both are stored, or neither.

    The last thing that a transaction does: entries are written one after the other, so that who reads on from
    a number misses none that was given earlier and committed later.
    """
    await database.lock(connection, audit)
    await connection.execute(database.insert(audit), {name: getattr(row, name) for name in _FIELDS})


class SqlAuditBook:
    """`AuditBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def write(self, row: AuditRow) -> None:
        """See `AuditBook.write`."""

        async def work(connection: Transaction) -> None:
            await add_audit(self._database, connection, row)

        await self._database.write(work, lane="audit")

    async def read(
        self, *, tenant_id: TenantId | None = None, after: int = 0, limit: int = 1_000
    ) -> Sequence[tuple[int, AuditRow]]:
        """See `AuditBook.read`."""
        found = select(audit).where(audit.c.number > after).order_by(audit.c.number).limit(limit)
        if tenant_id is not None:
            found = found.where(audit.c.tenant_id == tenant_id)

        async def work(connection: Transaction) -> Sequence[tuple[int, AuditRow]]:
            return [
                (row.number, AuditRow(**{name: getattr(row, name) for name in _FIELDS}))
                for row in await connection.execute(found)
            ]

        return await self._database.read(work)
