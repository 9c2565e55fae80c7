"""A command's work on the service's database: opened, signals heard."""

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import typer

from orchestrator.cli import exits, signals
from orchestrator.cli.books.store_desk import StoreDesk
from orchestrator.cli.exits import Exit
from orchestrator.errors import MachineError
from orchestrator.service.admin import AdminOffice
from orchestrator.store.books import AuditBook, OperatorBook, TenantBook
from orchestrator.store.database import open_database
from orchestrator.store.sql_audit import SqlAuditBook
from orchestrator.store.sql_operators import SqlOperatorBook
from orchestrator.store.sql_tenants import SqlTenantBook

T = TypeVar("T")

_SQLITE = "sqlite:///"


@dataclass(frozen=True, slots=True)
class Books:
    """What the commands work on."""

    desk: StoreDesk
    tenants: TenantBook
    operators: OperatorBook
    audit: AuditBook


def carry_out(url: str, work: Callable[[Books], Coroutine[Any, Any, T]]) -> T:
    """What the work returns. A signal ends the command; a transaction that was begun is finished first.

    Raises:
        StoreError: The database cannot be opened.
        MachineError: The directory of its file cannot be made.
        OrchestratorError: See `Admin`.
    """
    if url.startswith(_SQLITE):
        _make_directory(Path(url.removeprefix(_SQLITE)).parent)

    async def opened() -> T:
        async with open_database(url) as database:
            tenants, operators = SqlTenantBook(database), SqlOperatorBook(database)
            desk = StoreDesk(AdminOffice(tenants, operators))
            return await work(Books(desk, tenants, operators, SqlAuditBook(database)))

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
