"""AdminService over real gRPC and HTTP, on the whole service with a real database."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import httpx2
import pytest
from google.protobuf.message import Message
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from rlm_proto.v1 import admin_pb2 as pb
from rlm_proto.v1 import admin_pb2_grpc, run_pb2
from sqlalchemy import select

from orchestrator.conversation import Reply
from orchestrator.models.port import ModelRequest
from orchestrator.server.admin_shell import AdminService
from orchestrator.server.grpc_shell import RunService, open_port
from orchestrator.server.http import admin as admin_resources
from orchestrator.server.http.app import ROUTES, make_app
from orchestrator.server.http.listening import listening
from orchestrator.server.http.routes import Route
from orchestrator.service import departures
from orchestrator.service.admin_port import NEEDED, Need
from orchestrator.service.rules import NEEDED as RUN_NEEDED
from orchestrator.store.backend import Transaction
from orchestrator.store.books import AuditRow, TenantRules
from orchestrator.store.sql_operators import SqlOperatorBook
from orchestrator.store.tables import ledger
from tests.fakes.model import FakeModel, runs, when
from tests.fakes.service import Account, Server, new_database, open_server, short_directory

pytestmark = pytest.mark.timeout(120)

METHODS = {method.name: method for method in pb.DESCRIPTOR.services_by_name["AdminService"].methods}
ANSWERS = "FINAL('forty-two')"
_Code = grpc.StatusCode


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def server(directory: Path) -> AsyncIterator[Server]:
    async with open_server(directory, FakeModel(otherwise=runs(ANSWERS))) as one:
        yield one


@pytest.fixture
async def operator(server: Server) -> str:
    return await server.operator()


@pytest.fixture
async def acme(server: Server) -> Account:
    return await server.account("acme")


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(server.port.address) as channel:
        yield admin_pb2_grpc.AdminServiceStub(channel)


@asynccontextmanager
async def http(server: Server) -> AsyncIterator[str]:
    """Where its HTTP port is."""
    app = make_app(server.office, lambda: True, admin=server.admin)
    async with listening(app, host="127.0.0.1", port=0) as (host, port):
        yield f"http://{host}:{port}"


@asynccontextmanager
async def client(url: str, key: str | None) -> AsyncIterator[httpx2.AsyncClient]:
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    async with httpx2.AsyncClient(base_url=url, headers=headers, timeout=30) as one:
        yield one


def key(secret: str) -> dict[str, Any]:
    """How a call says who makes it, and for how long it waits."""
    return {"metadata": (("authorization", f"Bearer {secret}"),), "timeout": 30.0}


def asked(name: str, *, tenant: str = "acme", key_id: str = "k" + "0" * 12) -> Message:
    """A request of any method, with everything it needs."""
    request: Any = pb.__dict__[METHODS[name].input_type.name]()
    values = {"tenant": tenant, "key_id": key_id, "name": "new", "role": pb.KEY_ROLE_READ}
    for field in METHODS[name].input_type.fields:
        if field.name in values:
            setattr(request, field.name, values[field.name])
    if name == "SetRules":
        request.changes.max_concurrent_runs = 3
    made: Message = request
    return made


async def refusal(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def told(call: Any) -> tuple[Any, ...]:
    """All that a refused client sees."""
    error = await refusal(call)
    return error.code(), error.details(), tuple(error.trailing_metadata() or ())


async def audit(server: Server) -> list[AuditRow]:
    return [row for _, row in await server.books.audit.read()]


# --- What it does --------------------------------------------------------------------------------------


async def test_a_tenant_is_added_changed_listed_and_removed_and_its_key_opens(
    server: Server, stub: Any, operator: str
) -> None:
    changes = pb.RuleChanges(
        max_tokens_per_day=pb.Limit(most=1_000),
        models=pb.Names(names=["claude-*"]),
        max_limits={"max_depth": pb.RunLimit(most=1), "deadline_s": pb.RunLimit(most=60.5)},
        retention_days=pb.Limit(most=30),
        max_concurrent_sandboxes=pb.Limit(most=6),
    )
    added = await stub.AddTenant(pb.AddTenantRequest(name="Anna & Söhne", rules=changes), **key(operator))
    async with server.stub() as run_stub:
        await run_stub.GetUsage(run_pb2.GetUsageRequest(), **key(added.api_key))
    assert added.key.role == pb.KEY_ROLE_ADMIN
    assert added.key.hint == added.api_key[-4:]
    assert added.tenant.rules.per_day.max_tokens == 1_000
    assert not added.tenant.rules.per_day.HasField("max_runs")
    row = await server.books.tenants.tenant("Anna & Söhne")
    assert row is not None
    assert row.rules.max_limits == {"max_depth": 1, "deadline_s": 60.5}
    assert isinstance(row.rules.max_limits["max_depth"], int), "as the command line stores it"
    assert (row.rules.models, row.rules.retention_days) == (("claude-*",), 30)
    assert row.rules.max_concurrent_sandboxes == added.tenant.rules.max_concurrent_sandboxes == 6

    lifted = pb.RuleChanges(
        max_tokens_per_day=pb.Limit(),
        models=pb.Names(),
        max_limits={"max_depth": pb.RunLimit()},
        max_queued_runs=0,
        retention_days=pb.Limit(),
    )
    request = pb.SetRulesRequest(tenant=added.tenant.tenant_id, changes=lifted)
    rules = (await stub.SetRules(request, **key(operator))).tenant.rules
    assert not rules.per_day.HasField("max_tokens")
    assert (list(rules.models), dict(rules.max_limits)) == ([], {"deadline_s": 60.5})
    assert (rules.max_queued_runs, rules.HasField("retention_days")) == (0, False)
    named = pb.GetTenantRequest(tenant="Anna & Söhne")
    assert (await stub.GetTenant(named, **key(operator))).tenant.rules == rules

    gone = await stub.RemoveTenant(pb.RemoveTenantRequest(tenant="Anna & Söhne"), **key(operator))
    assert gone.tenant.tenant_id == added.tenant.tenant_id
    assert (await told(stub.GetTenant(named, **key(operator))))[0] is _Code.NOT_FOUND
    async with server.stub() as run_stub:
        error = await refusal(run_stub.GetUsage(run_pb2.GetUsageRequest(), **key(added.api_key)))
        assert error.code() is _Code.UNAUTHENTICATED


async def test_tenants_are_listed_by_name_in_pages(server: Server, stub: Any, operator: str) -> None:
    for name in ("d", "b", "e", "a", "c"):
        await server.account(name)
    seen, token = [], ""
    for _ in range(4):
        request = pb.ListTenantsRequest(page_size=2, page_token=token)
        page = await stub.ListTenants(request, **key(operator))
        seen += [tenant.name for tenant in page.tenants]
        token = page.next_page_token
        if not token:
            break
    assert seen == ["a", "b", "c", "d", "e"]
    for wrong in (pb.ListTenantsRequest(page_token="\u00fc"), pb.ListTenantsRequest(page_size=201)):  # noqa: S106 - of a page
        assert (await told(stub.ListTenants(wrong, **key(operator))))[0] is _Code.INVALID_ARGUMENT


@pytest.mark.parametrize("who", ["operator", "admin"])
async def test_keys_are_made_listed_and_revoked_by_an_operator_and_by_the_tenants_own_admin(
    server: Server, stub: Any, operator: str, acme: Account, who: str
) -> None:
    mine = key(operator if who == "operator" else acme.admin)
    tenant = "acme" if who == "operator" else ""
    made = await stub.AddKey(pb.AddKeyRequest(tenant=tenant, role=pb.KEY_ROLE_RUN), **mine)
    assert made.key.tenant_id == acme.tenant_id
    async with server.stub() as run_stub:
        await run_stub.GetUsage(run_pb2.GetUsageRequest(), **key(made.api_key))
        listed = await stub.ListKeys(pb.ListKeysRequest(tenant=tenant), **mine)
        assert made.key in listed.keys
        assert made.api_key not in str(listed)
        request = pb.RevokeKeyRequest(tenant=tenant, key_id=made.key.key_id)
        await stub.RevokeKey(request, **mine)
        error = await refusal(run_stub.GetUsage(run_pb2.GetUsageRequest(), **key(made.api_key)))
        assert error.code() is _Code.UNAUTHENTICATED
        await stub.RevokeKey(request, **mine)
    (last,) = [one for one in (await stub.ListKeys(pb.ListKeysRequest(tenant=tenant), **mine)).keys
               if one.key_id == made.key.key_id]  # fmt: skip
    assert last.HasField("revoked_at")


async def test_every_change_is_in_the_audit_log_with_the_key_that_made_it(
    server: Server, stub: Any, operator: str
) -> None:
    (operators_key,) = await SqlOperatorBook(server.database).keys()
    added = await stub.AddTenant(pb.AddTenantRequest(name="acme"), **key(operator))
    changes = pb.RuleChanges(max_concurrent_runs=1)
    await stub.SetRules(pb.SetRulesRequest(tenant="acme", changes=changes), **key(operator))
    made = await stub.AddKey(pb.AddKeyRequest(role=pb.KEY_ROLE_READ), **key(added.api_key))
    await stub.RevokeKey(pb.RevokeKeyRequest(key_id=made.key.key_id), **key(added.api_key))
    for refused in (
        stub.AddTenant(pb.AddTenantRequest(name="acme"), **key(operator)),
        stub.AddTenant(pb.AddTenantRequest(name="other"), **key(added.api_key)),
        stub.RevokeKey(pb.RevokeKeyRequest(key_id="knone"), **key(added.api_key)),
        stub.SetRules(pb.SetRulesRequest(tenant="nobody", changes=changes), **key(operator)),
    ):
        await refusal(refused)
    await stub.RemoveTenant(pb.RemoveTenantRequest(tenant="acme"), **key(operator))
    rows = await audit(server)
    by_operator, by_admin = f"key:{operators_key.key_id}", f"key:{added.key.key_id}"
    assert [(row.action, row.actor, row.target, row.detail) for row in rows] == [
        ("AddTenant", by_operator, added.tenant.tenant_id, ""),
        ("AddKey", by_operator, added.key.key_id, "admin"),
        ("SetRules", by_operator, added.tenant.tenant_id, ""),
        ("AddKey", by_admin, made.key.key_id, "read"),
        ("RevokeKey", by_admin, made.key.key_id, ""),
        ("RemoveTenant", by_operator, added.tenant.tenant_id, ""),
    ]
    assert {row.tenant_id for row in rows} == {added.tenant.tenant_id}
    assert not any(secret in str(rows) for secret in (operator, added.api_key, made.api_key))


async def test_two_changes_at_once_are_both_there_afterwards(stub: Any, operator: str, acme: Account) -> None:
    changes = [pb.RuleChanges(max_limits={"max_depth": pb.RunLimit(most=n)}) for n in range(1, 6)]
    changes += [pb.RuleChanges(max_concurrent_runs=3), pb.RuleChanges(retention_days=pb.Limit(most=9))]
    await asyncio.gather(
        *(stub.SetRules(pb.SetRulesRequest(tenant="acme", changes=one), **key(operator)) for one in changes)
    )
    rules = (await stub.GetTenant(pb.GetTenantRequest(tenant="acme"), **key(operator))).tenant.rules
    assert (rules.max_concurrent_runs, rules.retention_days) == (3, 9)
    assert acme.tenant.rules.max_concurrent_runs != 3


# --- Who may what --------------------------------------------------------------------------------------


def test_every_method_says_which_key_it_needs_and_can_be_asked_over_http() -> None:
    assert set(METHODS) == set(NEEDED) == {route.name for route in admin_resources.ROUTES}


def test_the_services_of_the_client_port_are_those_whose_methods_are_enumerated() -> None:
    """Whoever adds a service to the port adds its table of who may what, and its tests."""
    rpcs = {
        name: set(service.methods_by_name)
        for file in (run_pb2, pb)
        for name, service in file.DESCRIPTOR.services_by_name.items()
    }
    assert rpcs == {"RunService": set(RUN_NEEDED), "AdminService": set(NEEDED)}
    assert {RunService.__name__, AdminService.__name__} == set(rpcs)


@pytest.mark.parametrize("name", METHODS)
async def test_without_a_key_that_is_known_no_method_answers(
    server: Server, stub: Any, acme: Account, name: str
) -> None:
    book = SqlOperatorBook(server.database)
    revoked, revoked_key = await book.add_key()
    await book.revoke_key(revoked.key_id)
    nobodys = ("", "rlm_" + "0" * 40, "rlmop_" + "0" * 40, revoked_key, "x" * 2_000)
    seen = {await told(getattr(stub, name)(asked(name), timeout=30.0))}
    for secret in nobodys:
        seen.add(await told(getattr(stub, name)(asked(name), **key(secret))))
    assert len(seen) == 1
    assert seen.pop()[0] is _Code.UNAUTHENTICATED
    assert await audit(server) == []


@pytest.mark.parametrize("name", METHODS)
async def test_a_tenants_key_may_its_own_keys_with_the_role_admin_and_nothing_else(
    server: Server, stub: Any, acme: Account, name: str
) -> None:
    method = getattr(stub, name)
    for weaker in (acme.read, acme.run):
        assert (await told(method(asked(name), **key(weaker))))[0] is _Code.PERMISSION_DENIED
    if NEEDED[name] is Need.OPERATOR:
        assert (await told(method(asked(name), **key(acme.admin))))[0] is _Code.PERMISSION_DENIED
    elif name == "RevokeKey":
        assert (await told(method(asked(name), **key(acme.admin))))[0] is _Code.NOT_FOUND
    else:
        await method(asked(name), **key(acme.admin))
    assert await server.books.tenants.tenant("acme") == acme.tenant


@pytest.mark.parametrize("name", [name for name in METHODS if NEEDED[name] is Need.ADMIN])
async def test_to_a_tenant_anothers_and_nobodys_are_the_same(
    server: Server, stub: Any, acme: Account, name: str
) -> None:
    them = await server.account("them")
    (first, *_) = await server.books.tenants.keys(them.tenant_id)
    method = getattr(stub, name)
    tenants = (them.tenant_id, "them", "t" + "0" * 12, "nobody", "x" * 1_000, "a\0b", "../..", "'; --")
    seen = {await told(method(asked(name, tenant=one), **key(acme.admin))) for one in tenants}
    assert len(seen) == 1
    assert seen.pop()[0] is _Code.NOT_FOUND
    if name == "RevokeKey":
        keys = (first.key_id, "k" + "0" * 12, "x" * 1_000, "a\0b", "")
        seen = {await told(method(asked(name, key_id=one), **key(acme.admin))) for one in keys}
        assert len(seen) == 1
        assert seen.pop()[0] is _Code.NOT_FOUND
    assert (await server.books.tenants.keys(them.tenant_id))[0].revoked_at is None
    assert len(await server.books.tenants.keys(them.tenant_id)) == 3


@pytest.mark.parametrize(
    "method", [one.name for one in run_pb2.DESCRIPTOR.services_by_name["RunService"].methods]
)
async def test_with_an_operators_key_nothing_of_a_tenants_can_be_seen(
    server: Server, operator: str, acme: Account, method: str
) -> None:
    service = run_pb2.DESCRIPTOR.services_by_name["RunService"].methods_by_name[method]
    request = run_pb2.__dict__[service.input_type.name]()
    async with server.stub() as run_stub:
        asks: Any = getattr(run_stub, method)
        call = asks(iter([request]) if service.client_streaming else request, **key(operator))

        async def made() -> None:
            if service.server_streaming:
                async for _ in call:
                    pass
            else:
                await call

        error = await refusal(made())
    assert error.code() is _Code.UNAUTHENTICATED
    assert error.details() == "an operator's key is no tenant's: runs, contexts and usage need a tenant's key"


async def test_an_operator_has_to_say_which_tenant_is_meant(stub: Any, operator: str, acme: Account) -> None:
    for name in METHODS:
        if name in {"AddTenant", "ListTenants"}:
            continue
        assert (await told(getattr(stub, name)(asked(name, tenant=""), **key(operator))))[
            0
        ] is _Code.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "changes",
    [
        pb.RuleChanges(),
        pb.RuleChanges(max_tokens_per_day=pb.Limit(most=-1)),
        pb.RuleChanges(max_runs_per_month=pb.Limit(most=2**62)),
        pb.RuleChanges(max_concurrent_sandboxes=pb.Limit(most=0)),
        pb.RuleChanges(max_concurrent_runs=0),
        pb.RuleChanges(max_queued_runs=-1),
        pb.RuleChanges(max_context_bytes=0),
        pb.RuleChanges(models=pb.Names(names=["a\nb"])),
        pb.RuleChanges(models=pb.Names(names=["x"] * 101)),
        pb.RuleChanges(runtimes=pb.Names(names=["crun"])),
        pb.RuleChanges(max_limits={"max_fun": pb.RunLimit(most=1)}),
        pb.RuleChanges(max_limits={"max_depth": pb.RunLimit(most=float("nan"))}),
        pb.RuleChanges(max_limits={"max_depth": pb.RunLimit(most=float("inf"))}),
        pb.RuleChanges(retention_days=pb.Limit(most=-3)),
    ],
    ids=str,
)
async def test_rules_that_make_no_sense_change_nothing(
    server: Server, stub: Any, operator: str, acme: Account, changes: pb.RuleChanges
) -> None:
    request = pb.SetRulesRequest(tenant="acme", changes=changes)
    assert (await told(stub.SetRules(request, **key(operator))))[0] is _Code.INVALID_ARGUMENT
    if changes != pb.RuleChanges():
        new = pb.AddTenantRequest(name="new", rules=changes)
        assert (await told(stub.AddTenant(new, **key(operator))))[0] is _Code.INVALID_ARGUMENT
    assert await server.books.tenants.tenants() == [acme.tenant]
    assert await audit(server) == []


async def test_a_role_that_is_none_makes_no_key(server: Server, stub: Any, acme: Account) -> None:
    for role in (pb.KEY_ROLE_UNSPECIFIED, 77):
        request = pb.AddKeyRequest(role=role)  # type: ignore[arg-type] # what a client may send all the same
        assert (await told(stub.AddKey(request, **key(acme.admin))))[0] is _Code.INVALID_ARGUMENT
    assert len(await server.books.tenants.keys(acme.tenant_id)) == 3


async def test_a_port_without_it_knows_nothing_of_it(server: Server, operator: str) -> None:
    async with (
        open_port(server.office, "127.0.0.1:0") as port,
        grpc.aio.insecure_channel(port.address) as channel,
    ):
        stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
        for name in METHODS:
            error = await refusal(getattr(stub, name)(asked(name), **key(operator)))
            assert error.code() is _Code.UNIMPLEMENTED
        assert "rlm_proto.v1.AdminService" not in await services(channel)
    async with grpc.aio.insecure_channel(server.port.address) as channel:
        assert "rlm_proto.v1.AdminService" in await services(channel)
    app = make_app(server.office, lambda: True)
    async with (
        listening(app, host="127.0.0.1", port=0) as (host, number),
        client(f"http://{host}:{number}", operator) as one,
    ):
        assert (await one.get("/v1/admin/tenants")).status_code == 404
        assert "admin" not in "".join((await one.get("/openapi.json")).json()["paths"])


async def services(channel: grpc.aio.Channel) -> set[str]:
    """What reflection tells of."""
    stub: Any = reflection_pb2_grpc.ServerReflectionStub(channel)  # type: ignore[arg-type]
    request: Any = reflection_pb2.ServerReflectionRequest(list_services="")
    async for answer in stub.ServerReflectionInfo(iter([request])):
        return {service.name for service in answer.list_services_response.service}
    return set()


# --- Removing a tenant that has work under way ---------------------------------------------------------


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of state that nobody tells of
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("by", ["service", "store"])
async def test_the_runs_of_a_removed_tenant_end_and_what_their_last_call_cost_is_in_the_ledger(
    directory: Path, by: str
) -> None:
    asked_model = asyncio.Event()

    async def never(request: ModelRequest) -> Reply:
        asked_model.set()
        await asyncio.Event().wait()
        raise AssertionError

    async with open_server(directory, FakeModel(otherwise=never)) as server, server.stub() as run_stub:
        operator, acme = await server.operator(), await server.account("acme")
        other = await server.account("other")
        for name in ("one", "two"):
            request = run_pb2.CreateRunRequest(idempotency_key=name, question=b"How many?", text=b"t" * 5_000)
            await run_stub.CreateRun(request, **key(acme.run))
        left = await run_stub.CreateRun(request, **key(other.run))
        await until(lambda: server.office.running == 3)
        await until(lambda: server.driver.started == 3)
        await asyncio.wait_for(asked_model.wait(), 20)
        await until(lambda: server.driver.started == 3)
        await asyncio.sleep(0.2)  # until all three have asked their model
        if by == "service":
            async with grpc.aio.insecure_channel(server.port.address) as channel:
                stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
                await stub.RemoveTenant(pb.RemoveTenantRequest(tenant="acme"), **key(operator))
        else:
            await server.books.tenants.remove_tenant(acme.tenant_id)
            await server.office._departures.look()
        await until(lambda: server.office.running == 1)
        async with asyncio.timeout(20):
            while len(await server.driver.found()) > 1:  # noqa: ASYNC110 - what is waited for is no event
                await asyncio.sleep(0.01)
        run = (await run_stub.GetRun(run_pb2.GetRunRequest(run_id=left.run.run_id), **key(other.run))).run
        assert run.state == run_pb2.RUN_STATE_RUNNING, "the neighbour's goes on"

        async def lines(connection: Transaction) -> list[Any]:
            found = select(ledger).where(ledger.c.tenant_id == acme.tenant_id)
            return list(await connection.execute(found))

        owed = await server.database.read(lines)
        assert len(owed) == 2
        assert all(line.unconfirmed_tokens > 0 for line in owed)
        assert await server.books.tenants.removed([acme.tenant_id, other.tenant_id]) == {acme.tenant_id}


async def test_a_tenant_that_one_server_removed_ends_on_the_others_by_itself(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(departures, "LOOK_EVERY_S", 0.1)
    url = await new_database(directory / "shared.db")
    never = FakeModel(otherwise=when(asyncio.Event(), runs(ANSWERS)))
    for name in ("a", "b"):
        (directory / name).mkdir()
    async with (
        open_server(directory / "a", FakeModel(), store_url=url, home="home-a") as asked_one,
        open_server(directory / "b", never, store_url=url, home="home-b") as running_one,
        running_one.stub() as run_stub,
        grpc.aio.insecure_channel(asked_one.port.address) as channel,
    ):
        operator = await asked_one.operator()
        acme = await running_one.account("acme", TenantRules(max_concurrent_runs=1))
        for name in ("runs", "waits"):
            request = run_pb2.CreateRunRequest(idempotency_key=name, question=b"How many?", text=b"t" * 5_000)
            await run_stub.CreateRun(request, **key(acme.run))
        await until(lambda: running_one.driver.started == 1 and len(never.asked) == 1)
        stub: Any = admin_pb2_grpc.AdminServiceStub(channel)
        await stub.RemoveTenant(pb.RemoveTenantRequest(tenant="acme"), **key(operator))
        await until(lambda: running_one.office.running == running_one.office.waiting == 0)
        async with asyncio.timeout(20):
            while await running_one.driver.found():  # noqa: ASYNC110 - what is waited for is no event
                await asyncio.sleep(0.01)
        assert len(never.asked) == 1, "what waited never began"


# --- HTTP ----------------------------------------------------------------------------------------------

BODIES: dict[str, dict[str, object]] = {
    "AddTenant": {"name": "new"},
    "SetRules": {"max_concurrent_runs": 3},
    "AddKey": {"role": "read"},
}


def over_http(route: Route, *, tenant: str = "acme", key_id: str = "k" + "0" * 12) -> dict[str, Any]:
    """A well-formed request for a route."""
    request: dict[str, Any] = {
        "method": route.method,
        "url": route.path.format(tenant=tenant, key_id=key_id),
    }
    return request | ({"json": BODIES[route.name]} if route.body is not None else {})


async def test_over_http_the_same_can_be_done(server: Server, operator: str) -> None:
    async with http(server) as url, client(url, operator) as one:
        body = {"name": "acme", "rules": {"max_tokens_per_day": 5, "max_limits": {"max_depth": 1}}}
        made = await one.post("/v1/admin/tenants", json=body)
        assert made.status_code == 201
        added = made.json()
        assert added["tenant"]["rules"]["per_day"] == {
            "max_tokens": 5, "max_cost_microusd": None, "max_runs": None,
        }  # fmt: skip
        path = f"/v1/admin/tenants/{added['tenant']['tenant_id']}"
        changed = await one.patch(path, json={"max_tokens_per_day": None, "max_limits": {"max_depth": None}})
        assert changed.json()["rules"]["per_day"]["max_tokens"] is None
        assert changed.json()["rules"]["max_limits"] == {}
        assert (await one.get("/v1/admin/tenants/acme")).json() == changed.json()
        assert (await one.get("/v1/admin/tenants")).json()["tenants"] == [changed.json()]
        async with client(url, added["api_key"]) as mine:
            assert (await mine.get("/v1/usage")).status_code == 200
            fresh = (await mine.post(f"{path}/keys", json={"role": "read"})).json()
            assert fresh["key"]["role"] == "read"
            keys = (await mine.get("/v1/admin/tenants/acme/keys")).json()["keys"]
            assert [one["key_id"] for one in keys] == [added["key"]["key_id"], fresh["key"]["key_id"]]
            assert (await mine.delete(f"{path}/keys/{fresh['key']['key_id']}")).status_code == 204
        async with client(url, fresh["api_key"]) as revoked:
            assert (await revoked.get("/v1/usage")).status_code == 401
        refused = await one.get("/v1/usage")
        assert (refused.status_code, refused.json()["error"]["message"]) == (
            401, "an operator's key is no tenant's: runs, contexts and usage need a tenant's key",
        )  # fmt: skip
        for wrong in ({}, {"max_concurrent_runs": 0}, {"max_fun": 1}, {"max_tokens_per_day": "5"}):
            assert (await one.patch(path, json=wrong)).status_code == 400
        assert (await one.post(f"{path}/keys", json={"role": "operator"})).status_code == 400
        assert (await one.delete(path)).status_code == 204
        assert (await one.get(path)).status_code == 404


async def test_over_http_no_route_answers_who_may_not(server: Server, acme: Account) -> None:
    async with http(server) as url, client(url, None) as one:
        for route in admin_resources.ROUTES:
            for given in ({}, {"x-api-key": "rlmop_" + "0" * 40}, {"x-api-key": "nobody"}):
                reply = await one.request(**over_http(route), headers=given)
                assert (reply.status_code, reply.headers["www-authenticate"]) == (401, "Bearer"), route.name
            weak = [acme.read, acme.run]
            if NEEDED[route.name] is Need.OPERATOR:
                weak.append(acme.admin)
            for secret in weak:
                reply = await one.request(**over_http(route), headers={"x-api-key": secret})
                assert (reply.status_code, reply.json()["error"]["type"]) == (403, "permission_error")
    assert await audit(server) == []


async def test_over_http_anothers_and_nobodys_are_the_same_bytes(server: Server, acme: Account) -> None:
    them = await server.account("them")
    (first, *_) = await server.books.tenants.keys(them.tenant_id)
    async with http(server) as url, client(url, acme.admin) as one:
        for route in admin_resources.ROUTES:
            if NEEDED[route.name] is not Need.ADMIN:
                continue
            replies = [
                await one.request(**over_http(route, tenant=tenant, key_id=first.key_id))
                for tenant in (them.tenant_id, "them", "t" + "0" * 12, "x" * 70, "a b")
            ]
            if "{key_id}" in route.path:
                replies += [
                    await one.request(**over_http(route, key_id=which))
                    for which in (first.key_id, "k" + "0" * 12, "a b")
                ]
            assert {reply.status_code for reply in replies} == {404}, route.name
            assert len({reply.content for reply in replies}) == 1, route.name
    assert (await server.books.tenants.keys(them.tenant_id))[0].revoked_at is None


def test_no_two_routes_have_one_name_or_one_path() -> None:
    routes = (*ROUTES, *admin_resources.ROUTES)
    assert len({(route.method, route.path) for route in routes}) == len(routes)
    assert all((route.answer is None) is not (route.administer is None) for route in routes)


# --- Keys stay where they belong -----------------------------------------------------------------------


async def test_a_fresh_key_is_in_no_log_whatever_its_level(
    server: Server, stub: Any, operator: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    added = await stub.AddTenant(pb.AddTenantRequest(name="acme"), **key(operator))
    made = await stub.AddKey(pb.AddKeyRequest(tenant="acme", role=pb.KEY_ROLE_RUN), **key(operator))
    async with http(server) as url, client(url, operator) as one:
        other = (await one.post("/v1/admin/tenants", json={"name": "other"})).json()
        fresh = (await one.post("/v1/admin/tenants/acme/keys", json={"role": "run"})).json()
        await one.post("/v1/admin/tenants", json={"name": "other"})
    keys = (added.api_key, made.api_key, other["api_key"], fresh["api_key"], operator)
    assert all(one.startswith(("rlm_", "rlmop_")) for one in keys)
    assert not [one for one in keys if one in caplog.text]


async def test_a_fresh_key_does_not_show_where_its_reply_is_printed(server: Server) -> None:
    from orchestrator.client import AdminClient  # noqa: PLC0415 - of this test alone

    operator = await server.operator()
    async with AdminClient(server.port.address, api_key=operator) as admin:
        added = await admin.add_tenant("acme")
        made = await admin.add_key("acme")
        assert added.first.api_key not in repr(added)
        assert made.api_key not in repr(made)
