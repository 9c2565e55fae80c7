"""`rlm tenants add|list|set|remove`."""

from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC

from orchestrator.cli import exits, words
from orchestrator.cli.books.desk import Desk, carry_out
from orchestrator.cli.books.place import Place
from orchestrator.cli.json_line import json_line
from orchestrator.client import Quota, RuleChanges, Tenant
from orchestrator.visible import visible_line

_WIDEST = 100


def add(place: Place, name: str, rules: RuleChanges, *, as_json: bool) -> None:
    """Add a tenant and its first key; both go to stdout."""
    added = carry_out(place, lambda desk: desk.add_tenant(name, rules))
    tenant_id, key = added.tenant.tenant_id, added.first.api_key
    if as_json:
        exits.put(json_line({"tenant_id": tenant_id, "api_key": key}))
        return
    shown = visible_line(tenant_id, _WIDEST), visible_line(key, _WIDEST)
    exits.put("tenant_id  {}\napi_key    {}".format(*shown))
    exits.tell("rlm: keep the key: it is stored as a hash, and not shown again")


def show_list(place: Place, *, as_json: bool) -> None:
    """All tenants on stdout."""

    async def work(desk: Desk) -> list[Tenant]:
        async with aclosing(desk.list_tenants()) as listed:
            return [tenant async for tenant in listed]

    found = carry_out(place, work)
    if as_json:
        exits.put(json_line({"tenants": [_object(tenant) for tenant in found]}))
        return
    for tenant in found:
        exits.put(_line(tenant))


def change(place: Place, name_or_id: str, rules: RuleChanges, *, as_json: bool) -> None:
    """Give a tenant other rules."""
    tenant = carry_out(place, lambda desk: desk.set_rules(name_or_id, rules))
    exits.put(json_line(_object(tenant)) if as_json else _line(tenant))


def remove(place: Place, name_or_id: str, *, as_json: bool) -> None:
    """Remove a tenant with all that it has."""
    tenant = carry_out(place, lambda desk: desk.remove_tenant(name_or_id))
    if as_json:
        exits.put(json_line({"tenant_id": tenant.tenant_id if tenant else None, "removed": True}))
        return
    # Without it: the reply to the request that removed it was lost.
    who = f"{tenant.name} ({tenant.tenant_id})" if tenant else name_or_id
    exits.tell(f"rlm: {who} is removed, with its keys, runs and contexts")


def _object(tenant: Tenant) -> dict[str, object]:
    rules = asdict(tenant.rules)
    rules["models"], rules["runtimes"] = list(tenant.rules.models), list(tenant.rules.runtimes)
    created_at = tenant.created_at.astimezone(UTC).isoformat(timespec="milliseconds")
    return {
        "tenant_id": tenant.tenant_id,
        "name": tenant.name,
        "created_at": created_at.replace("+00:00", "Z"),
        "rules": rules,
    }


def _line(tenant: Tenant) -> str:
    rules = tenant.rules
    parts = [
        f"{words.many(rules.max_concurrent_runs, 'run')} at once",
        *_sandboxes(rules.max_concurrent_sandboxes),
        *_quota("a day", rules.per_day),
        *_quota("a month", rules.per_month),
        *(f"{name} {most:g}" for name, most in rules.max_limits.items()),
    ]
    if rules.models:
        parts.append(f"models {', '.join(rules.models)}")
    if rules.runtimes:
        parts.append(f"runtimes {', '.join(rules.runtimes)}")
    if rules.retention_days is not None:
        parts.append(f"kept for {words.many(rules.retention_days, 'day')}")
    return visible_line(f"{tenant.tenant_id}  {tenant.name}  {'; '.join(parts)}", exits.MAX_LINE_CHARS)


def _sandboxes(most: int | None) -> list[str]:
    return [] if most is None else [f"{most:,} sandbox{'' if most == 1 else 'es'} at once"]


def _quota(window: str, quota: Quota) -> list[str]:
    parts = []
    if quota.max_tokens is not None:
        parts.append(f"{words.many(quota.max_tokens, 'token')} {window}")
    if quota.max_cost_microusd is not None:
        parts.append(f"{words.dollars(quota.max_cost_microusd)} {window}")
    if quota.max_runs is not None:
        parts.append(f"{words.many(quota.max_runs, 'run')} {window}")
    return parts
