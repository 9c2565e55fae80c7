"""Tenants and keys over HTTP: what each route asks the administration, and how that is told.

Nothing is logged here: a reply may hold a fresh key.
"""

from pydantic import BaseModel
from starlette.responses import Response

from orchestrator.server import admin_messages
from orchestrator.server.http.admin_forms import (
    AddedKeyReply,
    AddedTenantReply,
    AddKeyForm,
    AddTenantForm,
    KeyReply,
    KeysReply,
    RulesForm,
    TenantReply,
    TenantsQuery,
    TenantsReply,
)
from orchestrator.server.http.routes import AdminCall, Route

_NONE = "there is no such tenant or key"


def _json(reply: BaseModel, status: int = 200) -> Response:
    return Response(reply.model_dump_json(), status, media_type="application/json")


async def _add_tenant(call: AdminCall) -> Response:
    form = call.take_body(AddTenantForm)
    added = await call.admin.add_tenant(call.who, form.name, form.rules.changes())
    return _json(AddedTenantReply.of(added), 201)


async def _list_tenants(call: AdminCall) -> Response:
    query = call.query_as(TenantsQuery)
    after = admin_messages.page_of(query.page_token or "")
    rows = await call.admin.list_tenants(call.who, after=after, limit=query.page_size)
    is_full = len(rows) == query.page_size
    return _json(
        TenantsReply(
            tenants=[TenantReply.of(row) for row in rows],
            next_page_token=admin_messages.page_token(rows[-1].name) if is_full else "",
        )
    )


async def _get_tenant(call: AdminCall) -> Response:
    return _json(TenantReply.of(await call.admin.get_tenant(call.who, call.named("tenant"))))


async def _set_rules(call: AdminCall) -> Response:
    changes = call.take_body(RulesForm).changes()
    return _json(TenantReply.of(await call.admin.set_rules(call.who, call.named("tenant"), changes)))


async def _remove_tenant(call: AdminCall) -> Response:
    await call.admin.remove_tenant(call.who, call.named("tenant"))
    return Response(status_code=204)


async def _add_key(call: AdminCall) -> Response:
    role = call.take_body(AddKeyForm).role
    return _json(AddedKeyReply.of(await call.admin.add_key(call.who, call.named("tenant"), role)), 201)


async def _list_keys(call: AdminCall) -> Response:
    rows = await call.admin.list_keys(call.who, call.named("tenant"))
    return _json(KeysReply(keys=[KeyReply.of(row) for row in rows]))


async def _revoke_key(call: AdminCall) -> Response:
    await call.admin.revoke_key(call.who, call.named("tenant"), call.named("key_id"))
    return Response(status_code=204)


ROUTES: tuple[Route, ...] = (
    Route(
        name="AddTenant",
        method="POST",
        path="/v1/admin/tenants",
        summary="Make a tenant and its first key, of the role admin, which this reply alone tells.",
        administer=_add_tenant,
        body=AddTenantForm,
        reply=AddedTenantReply,
        status=201,
        absent=_NONE,
    ),
    Route(
        name="ListTenants",
        method="GET",
        path="/v1/admin/tenants",
        summary="All tenants, by name, a page at a time.",
        administer=_list_tenants,
        query=TenantsQuery,
        reply=TenantsReply,
        absent=_NONE,
    ),
    Route(
        name="GetTenant",
        method="GET",
        path="/v1/admin/tenants/{tenant}",
        summary="One tenant, by its id, or by a name of letters, digits, `-` and `_`.",
        administer=_get_tenant,
        reply=TenantReply,
        absent=_NONE,
    ),
    Route(
        name="SetRules",
        method="PATCH",
        path="/v1/admin/tenants/{tenant}",
        summary="Change what a tenant may do; what is not given stays. It counts from the next request on.",
        administer=_set_rules,
        body=RulesForm,
        reply=TenantReply,
        absent=_NONE,
    ),
    Route(
        name="RemoveTenant",
        method="DELETE",
        path="/v1/admin/tenants/{tenant}",
        summary="Remove a tenant with its keys, runs and contexts, for good. Its bills stay in the books.",
        administer=_remove_tenant,
        status=204,
        absent=_NONE,
    ),
    Route(
        name="AddKey",
        method="POST",
        path="/v1/admin/tenants/{tenant}/keys",
        summary="Make a key, which this reply alone tells.",
        administer=_add_key,
        body=AddKeyForm,
        reply=AddedKeyReply,
        status=201,
        absent=_NONE,
    ),
    Route(
        name="ListKeys",
        method="GET",
        path="/v1/admin/tenants/{tenant}/keys",
        summary="A tenant's keys, without the keys.",
        administer=_list_keys,
        reply=KeysReply,
        absent=_NONE,
    ),
    Route(
        name="RevokeKey",
        method="DELETE",
        path="/v1/admin/tenants/{tenant}/keys/{key_id}",
        summary="Make a key unknown from the next request on.",
        administer=_revoke_key,
        status=204,
        absent=_NONE,
    ),
)
