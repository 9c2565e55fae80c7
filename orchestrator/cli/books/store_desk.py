"""Tenants and keys of a database on this machine, by the rules and in the values of a server's."""

from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime

from orchestrator.client import AddedKey, AddedTenant, Key, Role, RuleChanges, Tenant
from orchestrator.service import admin_port
from orchestrator.service.admin import MAX_PAGE, OPERATOR_HERE
from orchestrator.store.books import KeyRow, TenantRow


class StoreDesk:
    """See `desk.Desk`. Whoever may open the database is an operator."""

    def __init__(self, admin: admin_port.Admin) -> None:
        self._admin = admin

    async def add_tenant(self, name: str, rules: RuleChanges) -> AddedTenant:
        """See `Desk.add_tenant`."""
        added = await self._admin.add_tenant(OPERATOR_HERE, name, rules)
        return AddedTenant(tenant=_tenant(added.tenant), first=_added(added.first))

    async def list_tenants(self) -> AsyncGenerator[Tenant, None]:
        """See `Desk.list_tenants`."""
        after = ""
        while page := await self._admin.list_tenants(OPERATOR_HERE, after=after, limit=MAX_PAGE):
            for row in page:
                yield _tenant(row)
            after = page[-1].name

    async def set_rules(self, tenant: str, changes: RuleChanges) -> Tenant:
        """See `Desk.set_rules`."""
        return _tenant(await self._admin.set_rules(OPERATOR_HERE, tenant, changes))

    async def remove_tenant(self, tenant: str) -> Tenant:
        """See `Desk.remove_tenant`."""
        return _tenant(await self._admin.remove_tenant(OPERATOR_HERE, tenant))

    async def add_key(self, tenant: str, *, role: Role) -> AddedKey:
        """See `Desk.add_key`."""
        return _added(await self._admin.add_key(OPERATOR_HERE, tenant, role))

    async def list_keys(self, tenant: str) -> Sequence[Key]:
        """See `Desk.list_keys`."""
        return [_key(row) for row in await self._admin.list_keys(OPERATOR_HERE, tenant)]

    async def revoke_key(self, key_id: str, *, tenant: str) -> None:
        """See `Desk.revoke_key`."""
        await self._admin.revoke_key(OPERATOR_HERE, tenant, key_id)


def _tenant(row: TenantRow) -> Tenant:
    return Tenant(
        tenant_id=row.tenant_id, name=row.name, rules=row.rules, created_at=moment_of(row.created_at)
    )


def _added(added: admin_port.AddedKey) -> AddedKey:
    return AddedKey(key=_key(added.key), api_key=added.api_key)


def _key(row: KeyRow) -> Key:
    return Key(
        key_id=row.key_id,
        tenant_id=row.tenant_id,
        role=row.role,
        hint=row.hint,
        created_at=moment_of(row.created_at),
        revoked_at=None if row.revoked_at is None else moment_of(row.revoked_at),
    )


def moment_of(unix_s: float) -> datetime:
    """The same in UTC."""
    return datetime.fromtimestamp(unix_s, UTC)
