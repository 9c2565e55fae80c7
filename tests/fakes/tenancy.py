"""Tenants and runs for tests of the database: real rows with made-up contents."""

import itertools
from dataclasses import asdict, replace
from typing import Any

from orchestrator.ids import RunId, TenantId, new_run_id
from orchestrator.store.backend import Transaction
from orchestrator.store.books import ContextRow, RunRow, RunState, TenantRules
from orchestrator.store.database import Database
from orchestrator.store.sql_runs import SqlRunBook
from orchestrator.store.sql_tenants import SqlTenantBook
from orchestrator.store.tables import tenants

HOME = "home-1"
_numbers = itertools.count(1)


async def a_tenant(database: Database, *, tenant_id: TenantId | None = None) -> TenantId:
    """A new one that nothing limits; with this id, if one is given."""
    name = f"tenant {next(_numbers)}"
    if tenant_id is None:
        return (await SqlTenantBook(database).add_tenant(name, TenantRules())).tenant_id
    rules = asdict(TenantRules())
    insert = database.insert(tenants).values(tenant_id=tenant_id, name=name, rules=rules, created_at=1.0)

    async def work(connection: Transaction) -> None:
        await connection.execute(insert)

    await database.write(work)
    return tenant_id


def a_run(tenant_id: TenantId, **fields: Any) -> RunRow:
    """A queued run that is in no database yet; each later than the one before."""
    number = next(_numbers)
    row = RunRow(
        run_id=new_run_id(),
        tenant_id=tenant_id,
        idempotency_key=f"key {number}",
        request_hash="hash of what was asked",
        question="Who is mentioned most?",
        context_id="",
        options={"model": "m", "max_tokens": 5, "allow_models": ["a", "b"]},
        state=RunState.QUEUED,
        created_at=1_700_000_000.0 + number,
        home=HOME,
    )
    return replace(row, **fields)


async def stored_run(database: Database, tenant_id: TenantId, **fields: Any) -> RunId:
    """A queued run that is in the database."""
    row = a_run(tenant_id, **fields)
    await SqlRunBook(database).create(row, max_queued=1_000_000, quotas=[])
    return row.run_id


def a_context(tenant_id: TenantId, **fields: Any) -> ContextRow:
    """One that is about to be uploaded."""
    number = next(_numbers)
    row = ContextRow(
        context_id=f"c{number}{new_run_id()}",
        tenant_id=tenant_id,
        name="letters.txt",
        sha256=f"{number:064x}",
        length_bytes=1_000,
        home=HOME,
        created_at=1_700_000_000.0 + number,
        is_complete=False,
    )
    return replace(row, **fields)
