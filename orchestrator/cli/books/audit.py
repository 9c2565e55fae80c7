"""`rlm audit`: who did what, as the service's database has it."""

from collections.abc import Sequence

from orchestrator.cli import exits
from orchestrator.cli.books.keys import moment
from orchestrator.cli.books.session import Books, carry_out
from orchestrator.cli.books.store_desk import moment_of
from orchestrator.cli.json_line import json_line
from orchestrator.errors import NotFoundError
from orchestrator.ids import TenantId
from orchestrator.store.books import AuditRow
from orchestrator.visible import visible_line

_WIDEST = 80

Entries = Sequence[tuple[int, AuditRow]]


def show(url: str, tenant: str, *, after: int, limit: int, as_json: bool) -> None:
    """Entries in their order, those behind a number.

    Args:
        url: Of the database.
        tenant: Its name or its id, also of one that was removed; empty for all.
        after: The number of the last entry that was seen.
        limit: Entries.
        as_json: One object with all of them.

    Raises:
        NotFoundError: There is no such tenant, and never was.
    """
    entries = carry_out(url, lambda books: _read(books, tenant, after, limit))
    if as_json:
        exits.put(json_line({"entries": [_object(number, row) for number, row in entries]}))
        return
    for number, row in entries:
        exits.put(_line(number, row))


async def _read(books: Books, tenant: str, after: int, limit: int) -> Entries:
    if not tenant:
        return await books.audit.read(after=after, limit=limit)
    known = await books.tenants.tenant(tenant)
    tenant_id = known.tenant_id if known is not None else TenantId(tenant)
    entries = await books.audit.read(tenant_id=tenant_id, after=after, limit=limit)
    if known is None and not entries and not await books.audit.read(tenant_id=tenant_id, limit=1):
        raise NotFoundError("nothing is known of such a tenant; one that was removed is named by its id")
    return entries


def _line(number: int, row: AuditRow) -> str:
    whose = row.tenant_id or "-"
    words = (moment(moment_of(row.at)), whose, row.actor, row.action, row.target, row.detail)
    return "  ".join([f"{number:>8}", *(visible_line(word, _WIDEST) for word in words if word)])


def _object(number: int, row: AuditRow) -> dict[str, object]:
    return {
        "number": number,
        "at": moment(moment_of(row.at)),
        "tenant_id": row.tenant_id,
        "actor": row.actor,
        "action": row.action,
        "target": row.target,
        "detail": row.detail,
    }
