"""`rlm keys add|list|revoke`."""

from collections.abc import Sequence
from datetime import UTC, datetime

from orchestrator.cli import exits
from orchestrator.cli.books.session import Books, carry_out
from orchestrator.cli.json_line import json_line
from orchestrator.errors import NotFoundError
from orchestrator.store.books import KeyRow, Role


def add(url: str, name_or_id: str, role: str, *, as_json: bool) -> None:
    """Make a key, and print it."""

    async def work(books: Books) -> tuple[KeyRow, str]:
        tenant = await books.tenant(name_or_id)
        row, key = await books.tenants.add_key(tenant.tenant_id, Role(role))
        await books.note(tenant, "AddKey", row.key_id, role)
        return row, key

    row, key = carry_out(url, work)
    if as_json:
        exits.put(json_line({"key_id": row.key_id, "tenant_id": row.tenant_id, "role": role, "api_key": key}))
        return
    exits.put(f"key_id   {row.key_id}\napi_key  {key}")
    exits.tell("rlm: keep the key: it is stored as a hash, and not shown again")


def show_list(url: str, name_or_id: str, *, as_json: bool) -> None:
    """A tenant's keys, by what tells them apart."""

    async def work(books: Books) -> Sequence[KeyRow]:
        return await books.tenants.keys((await books.tenant(name_or_id)).tenant_id)

    found = carry_out(url, work)
    if as_json:
        exits.put(json_line({"keys": [_object(row) for row in found]}))
        return
    for row in found:
        revoked = f"  revoked {_moment(row.revoked_at)}" if row.revoked_at is not None else ""
        exits.put(f"{row.key_id}  {row.role.value:<5}  …{row.hint}  {_moment(row.created_at)}{revoked}")


def revoke(url: str, name_or_id: str, key_id: str, *, as_json: bool) -> None:
    """Make a key unknown.

    Raises:
        NotFoundError: The tenant has no such key.
    """

    async def work(books: Books) -> None:
        tenant = await books.tenant(name_or_id)
        if not await books.tenants.revoke_key(tenant.tenant_id, key_id):
            raise NotFoundError(f"{tenant.name} has no key {key_id!r}; `rlm keys list` shows those it has")
        await books.note(tenant, "RevokeKey", key_id)

    carry_out(url, work)
    if as_json:
        exits.put(json_line({"key_id": key_id, "revoked": True}))


def _object(row: KeyRow) -> dict[str, object]:
    return {
        "key_id": row.key_id,
        "role": row.role.value,
        "hint": row.hint,
        "created_at": _moment(row.created_at),
        "revoked_at": _moment(row.revoked_at) if row.revoked_at is not None else None,
    }


def _moment(at_s: float) -> str:
    return datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
