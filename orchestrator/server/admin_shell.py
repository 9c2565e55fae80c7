"""AdminService over gRPC: a thin shell around the administration. Nothing is decided or logged here: a reply
may hold a fresh key.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc.aio
from rlm_proto.v1 import admin_pb2 as pb
from rlm_proto.v1 import admin_pb2_grpc

from orchestrator.errors import InvalidRequestError
from orchestrator.server import admin_messages as messages
from orchestrator.server.grpc_gate import Admit, Context
from orchestrator.server.grpc_shell import CALL_S, AddService, key_of, telling
from orchestrator.service.admin_port import Admin, Administrator

SERVICE = pb.DESCRIPTOR.services_by_name["AdminService"].full_name
_OPERATORS = "operators"
"""Whose calls are counted together. No tenant's id looks like that."""
DEFAULT_PAGE = 50
MAX_PAGE = 200

T = TypeVar("T")


class AdminService(admin_pb2_grpc.AdminServiceServicer):
    """See admin.proto."""

    def __init__(self, admin: Admin) -> None:
        self._admin = admin

    # --- Tenants --------------------------------------------------------------------------------------

    async def AddTenant(  # noqa: N802 - the rpc's name
        self, request: pb.AddTenantRequest, context: Context
    ) -> pb.AddTenantResponse:
        """See admin.proto."""

        async def answer(who: Administrator) -> pb.AddTenantResponse:
            added = await self._admin.add_tenant(who, request.name, messages.changes_of(request.rules))
            return pb.AddTenantResponse(
                tenant=messages.tenant(added.tenant),
                key=messages.key(added.first.key),
                api_key=added.first.api_key,
            )

        return await self._answered(context, answer)

    async def ListTenants(  # noqa: N802 - the rpc's name
        self, request: pb.ListTenantsRequest, context: Context
    ) -> pb.ListTenantsResponse:
        """See admin.proto."""

        async def answer(who: Administrator) -> pb.ListTenantsResponse:
            if not 0 <= request.page_size <= MAX_PAGE:
                raise InvalidRequestError(f"page_size must be from 1 to {MAX_PAGE}, or 0 for {DEFAULT_PAGE}")
            limit = request.page_size or DEFAULT_PAGE
            after = messages.page_of(request.page_token)
            rows = await self._admin.list_tenants(who, after=after, limit=limit)
            is_full = len(rows) == limit
            return pb.ListTenantsResponse(
                tenants=map(messages.tenant, rows),
                next_page_token=messages.page_token(rows[-1].name) if is_full else "",
            )

        return await self._answered(context, answer)

    async def GetTenant(  # noqa: N802 - the rpc's name
        self, request: pb.GetTenantRequest, context: Context
    ) -> pb.GetTenantResponse:
        """See admin.proto."""

        async def answer(who: Administrator) -> pb.GetTenantResponse:
            row = await self._admin.get_tenant(who, request.tenant)
            return pb.GetTenantResponse(tenant=messages.tenant(row))

        return await self._answered(context, answer)

    async def SetRules(  # noqa: N802 - the rpc's name
        self, request: pb.SetRulesRequest, context: Context
    ) -> pb.SetRulesResponse:
        """See admin.proto."""

        async def answer(who: Administrator) -> pb.SetRulesResponse:
            changes = messages.changes_of(request.changes)
            row = await self._admin.set_rules(who, request.tenant, changes)
            return pb.SetRulesResponse(tenant=messages.tenant(row))

        return await self._answered(context, answer)

    async def RemoveTenant(  # noqa: N802 - the rpc's name
        self, request: pb.RemoveTenantRequest, context: Context
    ) -> pb.RemoveTenantResponse:
        """See admin.proto."""

        async def answer(who: Administrator) -> pb.RemoveTenantResponse:
            row = await self._admin.remove_tenant(who, request.tenant)
            return pb.RemoveTenantResponse(tenant=messages.tenant(row))

        return await self._answered(context, answer)

    # --- Keys -----------------------------------------------------------------------------------------

    async def AddKey(  # noqa: N802 - the rpc's name
        self, request: pb.AddKeyRequest, context: Context
    ) -> pb.AddKeyResponse:
        """See admin.proto."""

        async def answer(who: Administrator) -> pb.AddKeyResponse:
            added = await self._admin.add_key(who, request.tenant, messages.role_of(request.role))
            return pb.AddKeyResponse(key=messages.key(added.key), api_key=added.api_key)

        return await self._answered(context, answer)

    async def ListKeys(  # noqa: N802 - the rpc's name
        self, request: pb.ListKeysRequest, context: Context
    ) -> pb.ListKeysResponse:
        """See admin.proto."""

        async def answer(who: Administrator) -> pb.ListKeysResponse:
            rows = await self._admin.list_keys(who, request.tenant)
            return pb.ListKeysResponse(keys=map(messages.key, rows))

        return await self._answered(context, answer)

    async def RevokeKey(  # noqa: N802 - the rpc's name
        self, request: pb.RevokeKeyRequest, context: Context
    ) -> pb.RevokeKeyResponse:
        """See admin.proto."""

        async def answer(who: Administrator) -> pb.RevokeKeyResponse:
            await self._admin.revoke_key(who, request.tenant, request.key_id)
            return pb.RevokeKeyResponse()

        return await self._answered(context, answer)

    async def _answered(self, context: Context, answer: Callable[[Administrator], Awaitable[T]]) -> T:
        async with telling(context), asyncio.timeout(CALL_S):
            return await answer(await self._admin.authenticate(key_of(context)))
        raise AssertionError("a call that failed was aborted")


def admin_service(admin: Admin) -> AddService:
    """AdminService, for `open_port`."""

    async def admit(context: Context) -> str:
        async with asyncio.timeout(CALL_S):
            who = await admin.authenticate(key_of(context))
        return who.tenant.tenant_id if who.tenant is not None else _OPERATORS

    def add(server: grpc.aio.Server) -> tuple[str, Admit]:
        admin_pb2_grpc.add_AdminServiceServicer_to_server(AdminService(admin), server)
        return SERVICE, admit

    return add
