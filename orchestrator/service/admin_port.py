"""What can be done about tenants and their keys, whatever way the caller came: gRPC, HTTP, or a command
beside the database.

Rules:

1. A key of the installation, an operator's, may do all of it and nothing else: it is no tenant's, and no run,
   context or answer can be asked for with it. It can make a tenant's key, which can; the audit log and the
   tenant's list of keys then show that key.
2. A tenant's key with the role admin manages the keys of its own tenant, and never tenants or rules. To it
   another tenant is like one that is not there.
3. Operators' keys are made, listed and revoked on the server's machine alone: whoever has got hold of one can
   neither make a successor to it nor revoke the others.
4. A change and its row of the audit log are stored together, or neither.
5. A fresh key is in one reply, and nowhere else.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from orchestrator.store.books import KeyRow, Role, TenantRow
from orchestrator.store.rule_changes import RuleChanges


class Need(StrEnum):
    """Which key a method needs."""

    ADMIN = "admin"
    """An operator's, or one of the tenant itself with the role admin."""
    OPERATOR = "operator"
    """An operator's."""


NEEDED: Mapping[str, Need] = {
    "AddTenant": Need.OPERATOR,
    "ListTenants": Need.OPERATOR,
    "GetTenant": Need.OPERATOR,
    "SetRules": Need.OPERATOR,
    "RemoveTenant": Need.OPERATOR,
    "AddKey": Need.ADMIN,
    "ListKeys": Need.ADMIN,
    "RevokeKey": Need.ADMIN,
}
"""By method of admin.proto. One without a row here is refused."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Administrator:
    """Who asks."""

    actor: str
    """As the audit log names him: `key:ID`, or `operator` for a command on the server's machine."""
    tenant: TenantRow | None = None
    """Whose key it is; None for an operator's."""
    role: Role = Role.ADMIN
    """Of a tenant's key."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedKey:
    """A key that was just made."""

    key: KeyRow
    api_key: str = field(repr=False)
    """The key itself, this once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AddedTenant:
    """A tenant that was just made, and its first key, of the role admin."""

    tenant: TenantRow
    first: AddedKey


class Admin(Protocol):
    """The administration. See admin.proto for what each method promises; the names are the same.

    A tenant is named by its name or its id; empty is the tenant of the key that asks.

    Raises, all of them:
        NotAllowedError: The key may not.
        NotFoundError: No such tenant or key, as far as the caller's business goes.
        InvalidRequestError: A value that makes no sense.
        StoreError: The database does not answer.
    """

    async def authenticate(self, key: str | None) -> Administrator:
        """Who has this key, whatever it may do.

        Raises:
            UnauthenticatedError: Nobody.
        """
        ...

    async def add_tenant(self, who: Administrator, name: str, rules: RuleChanges) -> AddedTenant:
        """A new tenant; the rules are changes of the default ones."""
        ...

    async def list_tenants(self, who: Administrator, *, after: str, limit: int) -> Sequence[TenantRow]:
        """By name, those behind a name."""
        ...

    async def get_tenant(self, who: Administrator, tenant: str) -> TenantRow:
        """One of them."""
        ...

    async def set_rules(self, who: Administrator, tenant: str, changes: RuleChanges) -> TenantRow:
        """Change its rules; they count from the next request on."""
        ...

    async def remove_tenant(self, who: Administrator, tenant: str) -> TenantRow:
        """Remove it with its keys, runs and contexts, for good. Runs of it that run begin to end."""
        ...

    async def add_key(self, who: Administrator, tenant: str, role: Role) -> AddedKey:
        """A new key."""
        ...

    async def list_keys(self, who: Administrator, tenant: str) -> Sequence[KeyRow]:
        """Oldest first, revoked ones too."""
        ...

    async def revoke_key(self, who: Administrator, tenant: str, key_id: str) -> None:
        """Make it unknown."""
        ...
