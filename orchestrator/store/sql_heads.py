"""What tells a run from others, without anything long: to look through many of them."""

from typing import Any

from sqlalchemy import Row

from orchestrator.ids import RunId, TenantId
from orchestrator.store.books import RunHead, RunState, Wish
from orchestrator.store.tables import runs

HEAD = (runs.c.run_id, runs.c.tenant_id, runs.c.state, runs.c.wish)


def head_of(row: Row[Any]) -> RunHead:
    """A row that was selected by `HEAD`."""
    return RunHead(
        run_id=RunId(row.run_id),
        tenant_id=TenantId(row.tenant_id),
        state=RunState(row.state),
        wish=Wish(row.wish),
    )
