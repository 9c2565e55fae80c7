"""The asynchronous client of AdminService: tenants and their keys, with plain values and patience.

async with AdminClient("127.0.0.1:7443", api_key=operators_key) as admin:
    added = await admin.add_tenant("acme", RuleChanges(max_concurrent_runs=2))
    print(added.tenant.tenant_id, added.first.api_key)
"""

from collections.abc import AsyncGenerator, Sequence

from rlm_proto.v1 import admin_pb2 as pb
from rlm_proto.v1 import admin_pb2_grpc

from orchestrator.client import admin_messages as messages
from orchestrator.client.connected import Connected
from orchestrator.client.values import AddedKey, AddedTenant, Key, Tenant
from orchestrator.errors import NotFoundError
from orchestrator.store.books import Role
from orchestrator.store.rule_changes import RuleChanges

_PAGE = 100
_DEFAULT_RULES = RuleChanges()


class AdminClient(Connected):
    """A connection to one server, for an operator's key, or for a tenant's with the role admin.

    A tenant is named by its name or its id; empty is the one whose key it is. Methods behave and fail as
    those of `Client` do, but that what makes a key is sent once: a key whose reply was lost is known to
    nobody, and `list_keys` shows it.
    """

    @property
    def _stub(self) -> "admin_pb2_grpc.AdminServiceAsyncStub":
        stub: admin_pb2_grpc.AdminServiceAsyncStub = admin_pb2_grpc.AdminServiceStub(self._wire.channel)
        return stub

    async def add_tenant(self, name: str, rules: RuleChanges = _DEFAULT_RULES) -> AddedTenant:
        """Make a tenant and its first key. Needs an operator's key.

        Args:
            name: 1 to 100 printable characters.
            rules: Changes of what a tenant has by default.

        Raises:
            InvalidRequestError: Also when there is a tenant of that name.
        """
        request = pb.AddTenantRequest(name=name, rules=messages.changes_to_wire(rules))
        response = await self._wire.once(self._stub.AddTenant, request)
        key = AddedKey(key=messages.key_from_wire(response.key), api_key=response.api_key)
        return AddedTenant(tenant=messages.tenant_from_wire(response.tenant), first=key)

    async def list_tenants(self) -> AsyncGenerator[Tenant, None]:
        """All tenants, by name, page by page as they are taken. Needs an operator's key."""
        request = pb.ListTenantsRequest(page_size=_PAGE)
        while True:
            page = await self._wire.call(self._stub.ListTenants, request)
            for tenant in page.tenants:
                yield messages.tenant_from_wire(tenant)
            if not page.next_page_token:
                return
            request.page_token = page.next_page_token

    async def get_tenant(self, tenant: str) -> Tenant:
        """One tenant. Needs an operator's key."""
        response = await self._wire.call(self._stub.GetTenant, pb.GetTenantRequest(tenant=tenant))
        return messages.tenant_from_wire(response.tenant)

    async def set_rules(self, tenant: str, changes: RuleChanges) -> Tenant:
        """Change what a tenant may do; what is not named stays. Needs an operator's key."""
        request = pb.SetRulesRequest(tenant=tenant, changes=messages.changes_to_wire(changes))
        response = await self._wire.call(self._stub.SetRules, request)
        return messages.tenant_from_wire(response.tenant)

    async def remove_tenant(self, tenant: str) -> Tenant | None:
        """Remove a tenant with its keys, runs and contexts, for good. Needs an operator's key.

        Returns:
            It as it was; None when an earlier attempt had removed it and its response was lost.
        """
        response = await self._wire.change(
            self._stub.RemoveTenant, pb.RemoveTenantRequest(tenant=tenant), already=NotFoundError
        )
        return None if response is None else messages.tenant_from_wire(response.tenant)

    async def add_key(self, tenant: str = "", *, role: Role = Role.RUN) -> AddedKey:
        """Make a key."""
        request = pb.AddKeyRequest(tenant=tenant, role=messages.role_to_wire(role))
        response = await self._wire.once(self._stub.AddKey, request)
        return AddedKey(key=messages.key_from_wire(response.key), api_key=response.api_key)

    async def list_keys(self, tenant: str = "") -> Sequence[Key]:
        """A tenant's keys, oldest first, revoked ones too."""
        response = await self._wire.call(self._stub.ListKeys, pb.ListKeysRequest(tenant=tenant))
        return [messages.key_from_wire(key) for key in response.keys]

    async def revoke_key(self, key_id: str, *, tenant: str = "") -> None:
        """Make a key unknown from the next request on."""
        await self._wire.call(self._stub.RevokeKey, pb.RevokeKeyRequest(tenant=tenant, key_id=key_id))
