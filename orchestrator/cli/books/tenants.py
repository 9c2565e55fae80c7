"""`rlm tenants add|list|set|remove`."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from orchestrator.cli import exits, words
from orchestrator.cli.books.rules import RuleChanges
from orchestrator.cli.books.session import Books, carry_out
from orchestrator.cli.json_line import json_line
from orchestrator.store.books import Quota, Role, TenantRow, TenantRules


def add(url: str, name: str, rules: RuleChanges, *, as_json: bool) -> None:
    """Add a tenant and its first key; both go to stdout."""

    async def work(books: Books) -> tuple[TenantRow, str]:
        tenant = await books.tenants.add_tenant(name, rules.applied_to(TenantRules()))
        await books.note(tenant, "AddTenant", tenant.tenant_id)
        row, key = await books.tenants.add_key(tenant.tenant_id, Role.ADMIN)
        await books.note(tenant, "AddKey", row.key_id, Role.ADMIN.value)
        return tenant, key

    tenant, key = carry_out(url, work)
    if as_json:
        exits.put(json_line({"tenant_id": tenant.tenant_id, "api_key": key}))
        return
    exits.put(f"tenant_id  {tenant.tenant_id}\napi_key    {key}")
    exits.tell("rlm: keep the key: it is stored as a hash, and not shown again")


def show_list(url: str, *, as_json: bool) -> None:
    """All tenants on stdout."""

    async def work(books: Books) -> Sequence[TenantRow]:
        return await books.tenants.tenants()

    found = carry_out(url, work)
    if as_json:
        exits.put(json_line({"tenants": [_object(tenant) for tenant in found]}))
        return
    for tenant in found:
        exits.put(_line(tenant))


def change(url: str, name_or_id: str, rules: RuleChanges, *, as_json: bool) -> None:
    """Give a tenant other rules."""

    async def work(books: Books) -> TenantRow:
        tenant = await books.tenant(name_or_id)
        await books.tenants.set_rules(tenant.tenant_id, rules.applied_to(tenant.rules))
        await books.note(tenant, "SetRules", tenant.tenant_id)
        return await books.tenant(tenant.tenant_id)

    tenant = carry_out(url, work)
    exits.put(json_line(_object(tenant)) if as_json else _line(tenant))


def remove(url: str, name_or_id: str, *, as_json: bool) -> None:
    """Remove a tenant with all that it has."""

    async def work(books: Books) -> TenantRow:
        tenant = await books.tenant(name_or_id)
        await books.tenants.remove_tenant(tenant.tenant_id)
        await books.note(tenant, "RemoveTenant", tenant.tenant_id)
        return tenant

    tenant = carry_out(url, work)
    if as_json:
        exits.put(json_line({"tenant_id": tenant.tenant_id, "removed": True}))
    else:
        exits.tell(f"rlm: {tenant.name} ({tenant.tenant_id}) is removed, with its keys, runs and contexts")


def _object(tenant: TenantRow) -> dict[str, object]:
    rules = asdict(tenant.rules)
    rules["models"], rules["runtimes"] = list(tenant.rules.models), list(tenant.rules.runtimes)
    created_at = datetime.fromtimestamp(tenant.created_at, UTC).isoformat(timespec="milliseconds")
    return {
        "tenant_id": tenant.tenant_id,
        "name": tenant.name,
        "created_at": created_at.replace("+00:00", "Z"),
        "rules": rules,
    }


def _line(tenant: TenantRow) -> str:
    rules = tenant.rules
    parts = [
        f"{words.many(rules.max_concurrent_runs, 'run')} at once",
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
    return f"{tenant.tenant_id}  {tenant.name}  {'; '.join(parts)}"


def _quota(window: str, quota: Quota) -> list[str]:
    parts = []
    if quota.max_tokens is not None:
        parts.append(f"{words.many(quota.max_tokens, 'token')} {window}")
    if quota.max_cost_microusd is not None:
        parts.append(f"{words.dollars(quota.max_cost_microusd)} {window}")
    if quota.max_runs is not None:
        parts.append(f"{words.many(quota.max_runs, 'run')} {window}")
    return parts
