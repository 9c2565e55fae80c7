"""`rlm keys add|list|revoke`."""

from datetime import UTC, datetime

from orchestrator.cli import exits
from orchestrator.cli.books.desk import carry_out
from orchestrator.cli.books.place import Place
from orchestrator.cli.json_line import json_line
from orchestrator.client import Key, Role
from orchestrator.visible import visible_line

_WIDEST = 40


def add(place: Place, tenant: str, role: str, *, as_json: bool) -> None:
    """Make a key, and print it."""
    added = carry_out(place, lambda desk: desk.add_key(tenant, role=Role(role)))
    put_fresh(added.key.key_id, added.key.tenant_id, role, added.api_key, as_json=as_json)


def show_list(place: Place, tenant: str, *, as_json: bool) -> None:
    """A tenant's keys, by what tells them apart."""
    found = carry_out(place, lambda desk: desk.list_keys(tenant))
    if as_json:
        exits.put(json_line({"keys": [_object(key) for key in found]}))
        return
    for key in found:
        exits.put(key_line(key.key_id, key.role.value, key.hint, key.created_at, key.revoked_at))


def revoke(place: Place, tenant: str, key_id: str, *, as_json: bool) -> None:
    """Make a key unknown.

    Raises:
        NotFoundError: The tenant has no such key.
    """
    carry_out(place, lambda desk: desk.revoke_key(key_id, tenant=tenant))
    if as_json:
        exits.put(json_line({"key_id": key_id, "revoked": True}))


def put_fresh(key_id: str, tenant_id: str | None, role: str, api_key: str, *, as_json: bool) -> None:
    """A key that was just made, on stdout."""
    if as_json:
        fresh = {"key_id": key_id, "tenant_id": tenant_id, "role": role, "api_key": api_key}
        exits.put(json_line(fresh))
        return
    exits.put(
        f"key_id   {visible_line(key_id, _WIDEST)}\napi_key  {visible_line(api_key, exits.MAX_LINE_CHARS)}"
    )
    exits.tell("rlm: keep the key: it is stored as a hash, and not shown again")


def key_line(key_id: str, role: str, hint: str, created_at: datetime, revoked_at: datetime | None) -> str:
    """A key in a list for people."""
    revoked = f"  revoked {moment(revoked_at)}" if revoked_at is not None else ""
    shown_id, shown_hint = visible_line(key_id, _WIDEST), visible_line(hint, _WIDEST)
    return f"{shown_id}  {role:<5}  …{shown_hint}  {moment(created_at)}{revoked}"


def moment(at: datetime) -> str:
    """To the second, in UTC."""
    return at.astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _object(key: Key) -> dict[str, object]:
    return {
        "key_id": key.key_id,
        "role": key.role.value,
        "hint": key.hint,
        "created_at": moment(key.created_at),
        "revoked_at": None if key.revoked_at is None else moment(key.revoked_at),
    }
