"""What a command about tenants and keys works on, whichever way it goes: a database, or a server.

`orchestrator.client.AdminClient` is one; the other is `store_desk.StoreDesk`.
"""

from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any, Protocol, TypeVar

from orchestrator.cli.books.place import Place
from orchestrator.client import AddedKey, AddedTenant, Key, Role, RuleChanges, Tenant

T = TypeVar("T")


class Desk(Protocol):
    """See `AdminClient` for each."""

    async def add_tenant(self, name: str, rules: RuleChanges) -> AddedTenant:
        """Make a tenant and its first key."""
        ...

    def list_tenants(self) -> AsyncGenerator[Tenant, None]:
        """All tenants, by name."""
        ...

    async def set_rules(self, tenant: str, changes: RuleChanges) -> Tenant:
        """Change what a tenant may do."""
        ...

    async def remove_tenant(self, tenant: str) -> Tenant | None:
        """Remove a tenant."""
        ...

    async def add_key(self, tenant: str, *, role: Role) -> AddedKey:
        """Make a key."""
        ...

    async def list_keys(self, tenant: str) -> Sequence[Key]:
        """A tenant's keys."""
        ...

    async def revoke_key(self, key_id: str, *, tenant: str) -> None:
        """Make a key unknown."""
        ...


def carry_out(place: Place, work: Callable[[Desk], Coroutine[Any, Any, T]]) -> T:
    """What the work returns. A signal ends the command.

    Raises:
        OrchestratorError: See `AdminClient`; beside a database, `StoreError` or `MachineError` where that
            cannot be opened.
    """
    if place.connection is not None:
        from orchestrator.cli.remote import admin  # noqa: PLC0415 - grpc, which no database needs

        return admin.carry_out(place.connection, work)
    from orchestrator.cli.books import session  # noqa: PLC0415 - sqlalchemy, which no server needs

    return session.carry_out(place.store_url, lambda books: work(books.desk))
