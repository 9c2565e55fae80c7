"""A command's work on the service's database: opened, written into the audit log, signals heard."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import typer

from orchestrator.cli import exits, signals
from orchestrator.cli.exits import Exit
from orchestrator.errors import MachineError, NotFoundError
from orchestrator.store.books import AuditBook, AuditRow, TenantBook, TenantRow
from orchestrator.store.database import open_database
from orchestrator.store.sql_audit import SqlAuditBook
from orchestrator.store.sql_tenants import SqlTenantBook

T = TypeVar("T")

OPERATOR = "operator"
"""In the audit log: whoever may use the database on its machine."""
_SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True)
class Books:
    """What the commands work on."""

    tenants: TenantBook
    audit: AuditBook

    async def tenant(self, name_or_id: str) -> TenantRow:
        """One tenant.

        Raises:
            NotFoundError: There is none of that name or id.
        """
        found = await self.tenants.tenant(name_or_id)
        if found is None:
            raise NotFoundError(
                f"there is no tenant {name_or_id!r}; `rlm tenants list` shows those there are"
            )
        return found

    async def note(self, tenant: TenantRow, action: str, target: str, detail: str = "") -> None:
        """Write down what was done."""
        await self.audit.write(
            AuditRow(
                at=time.time(),
                tenant_id=tenant.tenant_id,
                actor=OPERATOR,
                action=action,
                target=target,
                detail=detail,
            )
        )


def carry_out(url: str, work: Callable[[Books], Coroutine[Any, Any, T]]) -> T:
    """What the work returns. A signal ends the command; a transaction that was begun is finished first.

    Raises:
        StoreError: The database cannot be opened or does not answer.
        MachineError: The directory of its file cannot be made.
        OrchestratorError: See `TenantBook`.
    """
    if url.startswith(_SQLITE):
        _make_directory(Path(url.removeprefix(_SQLITE)).parent)

    async def opened() -> T:
        async with open_database(url) as database:
            return await work(Books(SqlTenantBook(database), SqlAuditBook(database)))

    try:
        return asyncio.run(signals.until_stopped(opened(), lambda _count: None))
    except signals.StoppedError:
        exits.tell("rlm: stopped")
        raise typer.Exit(Exit.NO_ANSWER) from None


def _make_directory(directory: Path) -> None:
    """As the service makes its state directory: tenants may be added before it was ever started."""
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise MachineError(
            f"the directory {str(directory)!r} cannot be made ({error.strerror}):"
            " name another with RLM_STATE_DIR or --store"
        ) from error
