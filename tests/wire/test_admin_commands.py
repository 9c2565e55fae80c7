"""`rlm tenants` and `rlm keys` both ways, beside a database and through a server, and `AdminClient`."""

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from orchestrator.client import (
    AdminClient,
    Limit,
    Patience,
    Role,
    RuleChanges,
    SyncAdminClient,
    SyncClient,
    TenantRules,
)
from orchestrator.errors import (
    InvalidRequestError,
    NotAllowedError,
    NotFoundError,
    ServerError,
    UnauthenticatedError,
    UnavailableError,
)
from orchestrator.server.grpc_shell import open_port
from orchestrator.store.sql_operators import SqlOperatorBook
from tests.fakes.model import FakeModel, runs
from tests.fakes.service import Server, open_server, short_directory

pytestmark = pytest.mark.timeout(180)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture
async def server(directory: Path) -> AsyncIterator[Server]:
    async with open_server(directory, FakeModel(otherwise=runs("FINAL('forty-two')"))) as one:
        yield one


class Done(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


class Shell:
    """Somebody who types commands, one way or the other."""

    def __init__(self, home: Path, at: tuple[str, ...], key: str) -> None:
        self._environment = {"PATH": os.environ["PATH"], "HOME": str(home), "RLM_API_KEY": key}
        self._at = at

    async def types(self, *words: str) -> Done:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "orchestrator", *words, *self._at,
            env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = await process.communicate()
        assert process.returncode is not None
        return Done(process.returncode, out.decode(), err.decode())

    async def does(self, *words: str) -> Any:
        """What the command printed, as an object."""
        done = await self.types(*words, "--json")
        assert done.code == 0, done
        return json.loads(done.out)


def alike(told: Any) -> Any:
    """Without what is new each time: ids, keys and times keep their form alone."""
    if isinstance(told, dict):
        made_up = {"tenant_id", "api_key", "key_id", "hint", "created_at", "revoked_at"}
        return {
            name: value and (type(value).__name__, len(value)) if name in made_up else alike(value)
            for name, value in told.items()
        }
    return [alike(one) for one in told] if isinstance(told, list) else told


async def life(shell: Shell) -> list[Any]:
    """A tenant's whole life, and what was printed of it."""
    said = [
        await shell.does("tenants", "add", "acme", "--max-tokens-per-day", "1000", "--model", "claude-*"),
        await shell.does("tenants", "list"),
        await shell.does(
            "tenants", "set", "acme", "--max-tokens-per-day", "none", "--max-cost-usd-per-month", "0.5",
            "--any-model", "--runtime", "runsc", "--max-limit", "max_depth=1", "--retention-days", "30",
        ),
        await shell.does("keys", "add", "acme", "--role", "read"),
        await shell.does("keys", "add", "acme"),
    ]  # fmt: skip
    said.append(await shell.does("keys", "revoke", "acme", said[-1]["key_id"]))
    said.append(await shell.does("keys", "list", "acme"))
    (tenant,) = (await shell.does("tenants", "list"))["tenants"]
    people = await shell.types("tenants", "list")
    said.append(people.out.replace(tenant["tenant_id"], "ID"))
    taken = await shell.types("tenants", "add", "acme")
    said.append((taken.code, taken.err.splitlines()[-1]))
    absent = await shell.types("keys", "list", "nobody")
    said.append((absent.code, absent.err.splitlines()[-1]))
    said.append(await shell.does("tenants", "remove", tenant["tenant_id"]))
    said.append(await shell.does("tenants", "list"))
    return [alike(one) for one in said]


@pytest.mark.long
async def test_both_ways_say_the_same_of_a_tenants_whole_life(server: Server, tmp_path: Path) -> None:
    beside = Shell(tmp_path, ("--store", f"sqlite:///{tmp_path}/other.db"), "")
    through = Shell(tmp_path, ("--server", server.port.address), await server.operator())
    here, there = await asyncio.gather(life(beside), life(through))
    assert here == there
    actors = {row.actor for _, row in await server.books.audit.read()}
    (operator,) = await SqlOperatorBook(server.database).keys()
    assert actors == {f"key:{operator.key_id}"}


async def test_an_operators_key_is_made_beside_the_database_and_opens_the_server(
    server: Server, tmp_path: Path, directory: Path
) -> None:
    beside = Shell(tmp_path, ("--store", f"sqlite:///{directory}/service.db"), "")
    made = await beside.does("keys", "add", "--operator")
    assert (made["tenant_id"], made["role"]) == (None, "operator")
    through = Shell(tmp_path, ("--server", server.port.address), made["api_key"])
    await through.does("tenants", "add", "acme")
    (listed,) = (await beside.does("keys", "list", "--operator"))["keys"]
    assert (listed["key_id"], listed["hint"]) == (made["key_id"], made["api_key"][-4:])
    for words in (("add",), ("list",), ("revoke", made["key_id"])):
        refused = await through.types("keys", *words, "--operator")
        assert refused.code == 2
        assert "on the server's machine" in " ".join(refused.err.replace("│", " ").split())
    looks = await Shell(tmp_path, ("--server", server.port.address), made["api_key"]).types("runs", "list")
    assert looks.code == 2
    assert "an operator's key is no tenant's" in looks.err
    assert await beside.does("keys", "revoke", made["key_id"], "--operator") == {
        "key_id": made["key_id"], "revoked": True,
    }  # fmt: skip
    assert "is none" in (await through.types("tenants", "list")).err


async def test_a_tenants_admin_manages_the_keys_of_its_own_tenant_without_naming_it(
    server: Server, tmp_path: Path
) -> None:
    account = await server.account("acme")
    shell = Shell(tmp_path, ("--server", server.port.address), account.admin)
    made = await shell.does("keys", "add", "--role", "run")
    assert made["tenant_id"] == account.tenant_id
    assert made["key_id"] in {one["key_id"] for one in (await shell.does("keys", "list"))["keys"]}
    await shell.does("keys", "revoke", made["key_id"])
    refused = await shell.types("tenants", "list")
    assert refused.code == 2
    assert "needs an operator's key" in refused.err


# --- The client ----------------------------------------------------------------------------------------


async def test_the_client_gives_plain_values_and_our_errors(server: Server) -> None:
    address = server.port.address
    async with AdminClient(address, api_key=await server.operator()) as admin:
        changes = RuleChanges(max_runs_per_day=Limit(7), max_limits={"deadline_s": 2.5, "max_depth": 1})
        added = await admin.add_tenant("acme", changes)
        assert added.tenant.rules.per_day.max_runs == 7
        assert added.tenant.rules.max_limits == {"deadline_s": 2.5, "max_depth": 1}
        assert added.first.key.role is Role.ADMIN
        assert await admin.get_tenant("acme") == added.tenant
        assert [one async for one in admin.list_tenants()] == [added.tenant]
        made = await admin.add_key("acme", role=Role.READ)
        assert [one.key_id for one in await admin.list_keys("acme")] == [
            added.first.key.key_id, made.key.key_id,
        ]  # fmt: skip
        await admin.revoke_key(made.key.key_id, tenant="acme")
        for work, kind in (
            (admin.add_tenant("acme"), InvalidRequestError),
            (admin.get_tenant("nobody"), NotFoundError),
            (admin.list_keys(), InvalidRequestError),
        ):
            with pytest.raises(kind):
                await work
        async with AdminClient(address, api_key=added.first.api_key) as mine:
            assert len(await mine.list_keys()) == 2
            with pytest.raises(NotAllowedError):
                await mine.set_rules("acme", changes)
        gone = await admin.remove_tenant("acme")
        assert gone is not None
        assert gone.tenant_id == added.tenant.tenant_id
        async with AdminClient(address, api_key=added.first.api_key) as mine:
            with pytest.raises(UnauthenticatedError):
                await mine.list_keys()


async def test_every_page_of_tenants_is_listed(server: Server) -> None:
    for number in range(103):
        await server.books.tenants.add_tenant(f"tenant {number:03}", TenantRules())
    async with AdminClient(server.port.address, api_key=await server.operator()) as admin:
        assert len({one.tenant_id async for one in admin.list_tenants()}) == 103


async def test_what_makes_a_key_is_sent_once_and_a_server_without_it_is_told(
    server: Server,
) -> None:
    operator = await server.operator()
    patience = Patience(call_s=30.0)
    async with (
        open_port(server.office, "127.0.0.1:0") as port,
        AdminClient(port.address, api_key=operator) as admin,
    ):
        with pytest.raises(ServerError, match="does not offer it"):
            await admin.add_tenant("acme")
    async with AdminClient(port.address, api_key=operator, patience=patience) as admin:
        with pytest.raises(UnavailableError):
            async with asyncio.timeout(20):
                await admin.add_key("acme")


async def test_the_client_without_async_does_the_same(server: Server) -> None:
    operator, address = await server.operator(), server.port.address

    def work() -> None:
        with SyncAdminClient(address, api_key=operator) as admin:
            added = admin.add_tenant("acme", RuleChanges(max_concurrent_runs=2))
            assert admin.set_rules("acme", RuleChanges(retention_days=Limit(3))).rules.retention_days == 3
            assert [one.name for one in admin.list_tenants()] == ["acme"]
            with SyncClient(address, api_key=added.first.api_key) as client:
                assert client.get_usage().max_concurrent_runs == 2
            made = admin.add_key("acme", role=Role.RUN)
            admin.revoke_key(made.key.key_id, tenant="acme")
            assert len(admin.list_keys("acme")) == 2
            assert admin.get_tenant("acme").tenant_id == added.tenant.tenant_id
            assert admin.remove_tenant("acme") is not None

    await asyncio.to_thread(work)
