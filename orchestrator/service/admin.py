"""The administration of tenants and keys. See `admin_port` for its rules."""

import re
from collections.abc import Awaitable, Callable, Sequence

from orchestrator.errors import (
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    UnauthenticatedError,
)
from orchestrator.ids import TenantId
from orchestrator.service.admin_port import NEEDED, AddedKey, AddedTenant, Administrator, Need
from orchestrator.store.books import (
    OPERATOR_KEY_PREFIX,
    KeyRow,
    OperatorBook,
    Role,
    TenantBook,
    TenantRow,
    TenantRules,
)
from orchestrator.store.rule_changes import RuleChanges

MAX_PAGE = 200
MAX_NAME_CHARS = 100
_KEY_ID = re.compile(r"[a-z0-9]{1,40}")
_NO_TENANT = "there is no such tenant"
_NO_KEY = "there is no such key"

OPERATOR_HERE = Administrator(actor="operator")
"""Whoever may use the database on its machine."""

OnRemoved = Callable[[TenantId], Awaitable[None]]


async def _nobody_runs(_tenant_id: TenantId) -> None:
    pass


class AdminOffice:
    """`Admin` over the books."""

    def __init__(
        self, tenants: TenantBook, operators: OperatorBook, *, on_removed: OnRemoved = _nobody_runs
    ) -> None:
        """Nothing is done yet.

        Args:
            tenants: Where tenants and their keys are.
            operators: Where operators' keys are.
            on_removed: Told of a tenant that was removed: its runs here have to end.
        """
        self._tenants = tenants
        self._operators = operators
        self._on_removed = on_removed

    async def authenticate(self, key: str | None) -> Administrator:
        """See `Admin.authenticate`."""
        if key and key.startswith(OPERATOR_KEY_PREFIX):
            operator = await self._operators.who_has(key)
            if operator is not None:
                return Administrator(actor=f"key:{operator.key_id}")
        elif key:
            found = await self._tenants.who_has(key)
            if found is not None:
                tenant, row = found
                return Administrator(actor=f"key:{row.key_id}", tenant=tenant, role=row.role)
        raise UnauthenticatedError("an API key is needed, and this is none")

    # --- Tenants --------------------------------------------------------------------------------------

    async def add_tenant(self, who: Administrator, name: str, rules: RuleChanges) -> AddedTenant:
        """See `Admin.add_tenant`."""
        _enter("AddTenant", who)
        rules.check()
        tenant, row, key = await self._tenants.add_tenant_with_key(
            name, rules.applied_to(TenantRules()), Role.ADMIN, by=who.actor
        )
        return AddedTenant(tenant=tenant, first=AddedKey(key=row, api_key=key))

    async def list_tenants(self, who: Administrator, *, after: str, limit: int) -> Sequence[TenantRow]:
        """See `Admin.list_tenants`."""
        _enter("ListTenants", who)
        if not 1 <= limit <= MAX_PAGE:
            raise InvalidRequestError(f"a page has 1 to {MAX_PAGE} entries")
        return await self._tenants.tenants(after=after, limit=limit)

    async def get_tenant(self, who: Administrator, tenant: str) -> TenantRow:
        """See `Admin.get_tenant`."""
        _enter("GetTenant", who)
        return await self._tenant(who, tenant)

    async def set_rules(self, who: Administrator, tenant: str, changes: RuleChanges) -> TenantRow:
        """See `Admin.set_rules`."""
        _enter("SetRules", who)
        if changes.is_empty:
            raise InvalidRequestError("name something to change")
        changes.check()
        row = await self._tenant(who, tenant)
        return await self._tenants.change_rules(row.tenant_id, changes.applied_to, by=who.actor)

    async def remove_tenant(self, who: Administrator, tenant: str) -> TenantRow:
        """See `Admin.remove_tenant`."""
        _enter("RemoveTenant", who)
        row = await self._tenant(who, tenant)
        await self._tenants.remove_tenant(row.tenant_id, by=who.actor)
        await self._on_removed(row.tenant_id)
        return row

    # --- Keys -----------------------------------------------------------------------------------------

    async def add_key(self, who: Administrator, tenant: str, role: Role) -> AddedKey:
        """See `Admin.add_key`."""
        _enter("AddKey", who)
        row = await self._tenant(who, tenant)
        key, secret = await self._tenants.add_key(row.tenant_id, role, by=who.actor)
        return AddedKey(key=key, api_key=secret)

    async def list_keys(self, who: Administrator, tenant: str) -> Sequence[KeyRow]:
        """See `Admin.list_keys`."""
        _enter("ListKeys", who)
        return await self._tenants.keys((await self._tenant(who, tenant)).tenant_id)

    async def revoke_key(self, who: Administrator, tenant: str, key_id: str) -> None:
        """See `Admin.revoke_key`."""
        _enter("RevokeKey", who)
        row = await self._tenant(who, tenant)
        is_id = _KEY_ID.fullmatch(key_id)
        if not (is_id and await self._tenants.revoke_key(row.tenant_id, key_id, by=who.actor)):
            raise NotFoundError(_NO_KEY)

    async def _tenant(self, who: Administrator, named: str) -> TenantRow:
        """The tenant that is meant, if it is this caller's business."""
        if who.tenant is not None:
            # Nothing is looked up: what others have can't show, not even in how long it takes.
            if named in {"", who.tenant.name, who.tenant.tenant_id}:
                return who.tenant
            raise NotFoundError(_NO_TENANT)
        if not named:
            raise InvalidRequestError("say which tenant: this key is none's")
        # What can't be a name does not get as far as the database.
        may_be = len(named) <= MAX_NAME_CHARS and named.isprintable()
        found = await self._tenants.tenant(named) if may_be else None
        if found is None:
            raise NotFoundError(_NO_TENANT)
        return found


def _enter(method: str, who: Administrator) -> None:
    """Raise unless this caller may call the method.

    Raises:
        NotAllowedError: He may not.
    """
    needed = NEEDED[method]
    if who.tenant is None:
        return
    if needed is Need.OPERATOR:
        raise NotAllowedError(f"{method} needs an operator's key; this one is a tenant's")
    if who.role is not Role.ADMIN:
        raise NotAllowedError(f"{method} needs a key with the role admin; this one has {who.role.value}")
