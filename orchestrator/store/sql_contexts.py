"""Contexts that were uploaded, as the database knows them."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    and_,
    bindparam,
    delete,
    exists,
    func,
    or_,
    select,
    tuple_,
    update,
)

from orchestrator.errors import BudgetExceededError, ConflictError
from orchestrator.ids import TenantId
from orchestrator.store.backend import Transaction
from orchestrator.store.books import MAX_UNFINISHED_UPLOADS, AuditRow, ContextRow, DoomedContext, RunState
from orchestrator.store.database import Database
from orchestrator.store.doomed import doom
from orchestrator.store.sql_audit import add_audit
from orchestrator.store.sql_tenants import lock_tenant
from orchestrator.store.tables import contexts, doomed_contexts, runs

_FIELDS = (
    "context_id",
    "tenant_id",
    "name",
    "sha256",
    "length_bytes",
    "home",
    "created_at",
    "is_complete",
    "is_inline",
)


# Every question with a text runs these. To put one together takes longer than to run it, and so they are put
# together once.
_SAME = select(contexts).where(
    *(contexts.c[name] == bindparam(name) for name in ("tenant_id", "sha256", "length_bytes", "name", "home"))
)
_UNFINISHED = select(func.count()).where(contexts.c.tenant_id == bindparam("tenant"), ~contexts.c.is_complete)
_KEPT_BYTES = select(func.coalesce(func.sum(contexts.c.length_bytes), 0)).where(
    contexts.c.tenant_id == bindparam("tenant")
)


class SqlContextBook:
    """`ContextBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def begin(self, row: ContextRow, *, max_bytes: int) -> ContextRow:
        """See `ContextBook.begin`. What came with a question and is uploaded besides is an upload then."""
        fields = {name: getattr(row, name) for name in _FIELDS}

        async def work(connection: Transaction) -> ContextRow:
            await lock_tenant(connection, row.tenant_id)
            if (there := (await connection.execute(_SAME, fields)).one_or_none()) is not None:
                if there.is_inline and not row.is_inline:
                    await connection.execute(
                        update(contexts)
                        .where(contexts.c.context_id == there.context_id)
                        .values(is_inline=False)
                    )
                    there = (await connection.execute(_SAME, fields)).one()
                return _row(there)
            kept = await connection.execute(_KEPT_BYTES, {"tenant": row.tenant_id})
            left = max(0, max_bytes - int(kept.scalar_one()))
            if row.length_bytes > left:
                raise BudgetExceededError("tenant", {"bytes": row.length_bytes}, {"bytes": left})
            unfinished = await connection.execute(_UNFINISHED, {"tenant": row.tenant_id})
            if not row.is_complete and unfinished.scalar_one() >= MAX_UNFINISHED_UPLOADS:
                raise BudgetExceededError("tenant", {"unfinished uploads": 1}, {"unfinished uploads": 0})
            await connection.execute(self._database.insert(contexts), fields)
            return row

        return await self._database.write(work)

    async def complete(self, tenant_id: TenantId, context_id: str) -> None:
        """See `ContextBook.complete`."""

        async def work(connection: Transaction) -> None:
            await connection.execute(
                update(contexts).where(_its(tenant_id, context_id)).values(is_complete=True)
            )

        await self._database.write(work)

    async def context(self, tenant_id: TenantId, context_id: str) -> ContextRow | None:
        """See `ContextBook.context`."""
        found = await self._rows(select(contexts).where(_its(tenant_id, context_id)))
        return found[0] if found else None

    async def contexts(
        self, tenant_id: TenantId, *, limit: int, before: tuple[float, str] | None = None
    ) -> Sequence[ContextRow]:
        """See `ContextBook.contexts`."""
        found = (
            select(contexts)
            .where(contexts.c.tenant_id == tenant_id, contexts.c.is_complete, ~contexts.c.is_inline)
            .order_by(contexts.c.created_at.desc(), contexts.c.context_id.desc())
            .limit(limit)
        )
        if before is not None:
            found = found.where(tuple_(contexts.c.created_at, contexts.c.context_id) < tuple_(*before))
        return await self._rows(found)

    async def delete(self, tenant_id: TenantId, context_id: str, *, audit: AuditRow | None = None) -> bool:
        """See `ContextBook.delete`."""
        about_it = and_(runs.c.tenant_id == tenant_id, runs.c.context_id == context_id)

        async def work(connection: Transaction) -> bool:
            await lock_tenant(connection, tenant_id)
            needed = await connection.execute(
                select(runs.c.run_id).where(about_it, runs.c.state != RunState.ENDED).limit(1)
            )
            if needed.one_or_none() is not None:
                raise ConflictError("a run that has not ended needs this context")
            if not await doom(self._database, connection, _its(tenant_id, context_id)):
                return False
            await connection.execute(update(runs).where(about_it).values(context_id=""))
            if audit is not None:
                await add_audit(self._database, connection, audit)
            return True

        return await self._database.write(work)

    async def unused(
        self,
        tenant_id: TenantId,
        *,
        inline_before: float,
        unfinished_before: float,
        others_before: float | None,
        limit: int,
    ) -> Sequence[ContextRow]:
        """See `ContextBook.unused`."""
        is_used = exists().where(
            runs.c.context_id == contexts.c.context_id, runs.c.tenant_id == contexts.c.tenant_id
        )
        old = or_(
            and_(contexts.c.is_inline, contexts.c.created_at < inline_before),
            and_(~contexts.c.is_complete, contexts.c.created_at < unfinished_before),
        )
        if others_before is not None:
            old = or_(old, and_(~contexts.c.is_inline, contexts.c.created_at < others_before))
        return await self._rows(
            select(contexts)
            .where(contexts.c.tenant_id == tenant_id, old, ~is_used)
            .order_by(contexts.c.created_at)
            .limit(limit)
        )

    async def all_of(self, home: str) -> Sequence[ContextRow]:
        """See `ContextBook.all_of`."""
        return await self._rows(select(contexts).where(contexts.c.home == home))

    async def doomed(self, home: str) -> Sequence[DoomedContext]:
        """See `ContextBook.doomed`."""
        found = select(doomed_contexts).where(doomed_contexts.c.home == home)

        async def work(connection: Transaction) -> Sequence[DoomedContext]:
            return [
                DoomedContext(context_id=row.context_id, tenant_id=TenantId(row.tenant_id), name=row.name)
                for row in await connection.execute(found)
            ]

        return await self._database.read(work)

    async def buried(self, context_ids: Sequence[str]) -> None:
        """See `ContextBook.buried`."""
        gone = delete(doomed_contexts).where(doomed_contexts.c.context_id == bindparam("buried"))

        async def work(connection: Transaction) -> None:
            await connection.execute(gone, [{"buried": context_id} for context_id in context_ids])

        if context_ids:
            await self._database.write(work)

    async def _rows(self, found: Select[Any]) -> Sequence[ContextRow]:
        async def work(connection: Transaction) -> Sequence[ContextRow]:
            return [_row(row) for row in await connection.execute(found)]

        return await self._database.read(work)


def _its(tenant_id: TenantId, context_id: str) -> ColumnElement[bool]:
    return and_(contexts.c.tenant_id == tenant_id, contexts.c.context_id == context_id)


def _row(row: Row[Any]) -> ContextRow:
    return ContextRow(**{name: getattr(row, name) for name in _FIELDS})
