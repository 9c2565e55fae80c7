"""What was begun with a key ends with it, over real gRPC, real HTTP and a real database."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc.aio
import httpx2
import pytest
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.errors import StoreError, UnauthenticatedError
from orchestrator.server.http.app import make_app
from orchestrator.server.http.listening import listening
from orchestrator.service import standing
from orchestrator.service.port import Question
from orchestrator.store.books import Role, RunFilter
from tests.fakes.model import FakeModel, runs, when
from tests.fakes.service import Account, Server, open_server, short_directory
from tests.fakes.tree import CARD

SOON_S = 20.0


@dataclass(frozen=True, slots=True)
class House:
    """A server whose runs never end, with both ports."""

    server: Server
    url: str

    @asynccontextmanager
    async def http(self, key: str) -> AsyncIterator[httpx2.AsyncClient]:
        headers = {"authorization": f"Bearer {key}"}
        async with httpx2.AsyncClient(base_url=self.url, headers=headers, timeout=30) as client:
            yield client

    async def new_key(self, account: Account, role: Role = Role.RUN) -> tuple[str, str]:
        row, key = await self.server.books.tenants.add_key(account.tenant_id, role)
        return row.key_id, key

    async def run_of(self, account: Account) -> str:
        caller = await self.server.office.authenticate(account.run)
        question = Question(idempotency_key="k", question="How many?", text=b"some text")
        return (await self.server.office.create_run(caller, question)).run.run_id


@pytest.fixture
async def house(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[House]:
    monkeypatch.setattr(standing, "LOOK_EVERY_S", 0.05)
    never = FakeModel(otherwise=when(asyncio.Event(), runs("FINAL('x')")))
    with short_directory() as directory:
        async with open_server(directory, never) as server:
            app = make_app(server.office, lambda: True)
            async with listening(app, host="127.0.0.1", port=0) as (host, port):
                yield House(server, f"http://{host}:{port}")


Listen = Callable[[House, Account, str, asyncio.Event], Coroutine[Any, Any, str]]
"""Opens a stream with a key, says so once it flows, and returns how it was told to end."""


async def over_grpc(house: House, account: Account, key: str, flows: asyncio.Event) -> str:
    run_id = await house.run_of(account)
    async with house.server.stub() as stub:
        watching: Any = stub.WatchRun(
            pb.WatchRunRequest(run_id=run_id), metadata=(("authorization", f"Bearer {key}"),), timeout=SOON_S
        )
        try:
            async for _ in watching:
                flows.set()
        except grpc.aio.AioRpcError as error:
            return error.code().name
    return "ended"


async def over_events(house: House, account: Account, key: str, flows: asyncio.Event) -> str:
    run_id = await house.run_of(account)
    async with house.http(key) as client, client.stream("GET", f"/v1/runs/{run_id}/events") as stream:
        async for line in stream.aiter_lines():
            flows.set()
            if line == "event: error":
                return "UNAUTHENTICATED"
    return "ended"


async def over_messages(house: House, account: Account, key: str, flows: asyncio.Event) -> str:
    return await _message(house, key, flows, streams=True)


async def over_messages_in_one_piece(house: House, account: Account, key: str, flows: asyncio.Event) -> str:
    return await _message(house, key, flows, streams=False)


async def _message(house: House, key: str, flows: asyncio.Event, *, streams: bool) -> str:
    asked = {
        "model": CARD.name,
        "max_tokens": 9,
        "messages": [{"role": "user", "content": "What?"}],
        "stream": streams,
    }

    async def ask() -> str:
        async with house.http(key) as client:
            reply = await client.post("/v1/messages", json=asked)
        told = {"authentication_error": "UNAUTHENTICATED", "not_found_error": "NOT_FOUND"}
        return next((code for kind, code in told.items() if kind in reply.text), reply.text)

    asking = asyncio.create_task(ask())
    while not house.server.office.watchers:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    flows.set()
    return await asking


@pytest.mark.parametrize(
    "listen",
    [over_grpc, over_events, over_messages, over_messages_in_one_piece],
    ids=lambda one: one.__name__,
)
@pytest.mark.parametrize("goes", ["key", "tenant"])
async def test_a_stream_ends_when_its_key_is_revoked_or_its_tenant_removed(
    house: House, listen: Listen, goes: str
) -> None:
    account = await house.server.account("acme")
    key_id, key = await house.new_key(account)
    flows = asyncio.Event()
    listening_to = asyncio.create_task(listen(house, account, key, flows))
    await asyncio.wait_for(flows.wait(), SOON_S)
    if goes == "key":
        await house.server.books.tenants.revoke_key(account.tenant_id, key_id)
    else:
        await house.server.books.tenants.remove_tenant(account.tenant_id)
    told = await asyncio.wait_for(listening_to, SOON_S)
    # The run of a tenant that is removed goes with it, mostly before anybody looks for the key.
    assert told == "UNAUTHENTICATED" or goes == "tenant"
    async with asyncio.timeout(SOON_S):
        while house.server.office.watchers:  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.01)


async def test_a_message_whose_key_is_revoked_is_paid_no_further(house: House) -> None:
    account = await house.server.account("acme")
    key_id, key = await house.new_key(account)
    flows = asyncio.Event()
    asking = asyncio.create_task(over_messages(house, account, key, flows))
    await asyncio.wait_for(flows.wait(), SOON_S)
    await house.server.books.tenants.revoke_key(account.tenant_id, key_id)
    await asking
    async with asyncio.timeout(SOON_S):
        while True:
            (row,) = await house.server.books.runs.runs(account.tenant_id, RunFilter(), limit=2)
            if row.outcome == "cancelled":
                break
            await asyncio.sleep(0.02)


async def test_streams_of_other_keys_go_on_and_all_of_one_key_are_looked_up_in_one_query(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await house.server.account("acme")
    run_id = await house.run_of(account)
    (gone_id, gone), (_, stays) = [await house.new_key(account) for _ in range(2)]
    asked: list[list[str]] = []
    opening = house.server.books.tenants.opening

    async def counted(key_ids: Any) -> frozenset[str]:
        asked.append(sorted(key_ids))
        return await opening(key_ids)

    monkeypatch.setattr(house.server.books.tenants, "opening", counted)
    async with house.server.stub() as stub:

        def watch(key: str) -> Any:
            metadata = (("authorization", f"Bearer {key}"),)
            return stub.WatchRun(pb.WatchRunRequest(run_id=run_id), metadata=metadata, timeout=SOON_S)

        streams = [watch(key) for key in (gone, stays) for _ in range(30)]
        for stream in streams:
            assert (await stream.read()).position == 0
        begun = len(asked)
        while len(asked) < begun + 3:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.01)
        assert all(len(one) == 2 for one in asked[begun:])
        await house.server.books.tenants.revoke_key(account.tenant_id, gone_id)
        async with asyncio.timeout(SOON_S):
            while house.server.office.watchers > 30:  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.01)
        assert house.server.office.watchers == 30
        assert not any(stream.done() for stream in streams[30:])


async def test_an_upload_goes_no_further_than_its_key(house: House) -> None:
    data = b"0123456789" * 100
    account = await house.server.account("acme")
    key_id, key = await house.new_key(account)
    office = house.server.office
    caller = await office.authenticate(key)
    sha256 = hashlib.sha256(data).hexdigest()
    upload = await office.start_upload(caller, sha256=sha256, length_bytes=len(data), name="a.txt")
    upload_id = upload.context.context_id
    await office.write_upload(caller, upload_id, 0, data[:10])
    await house.server.books.tenants.revoke_key(account.tenant_id, key_id)

    async def on() -> None:
        async with asyncio.timeout(SOON_S):
            for at in range(10, len(data), 10):
                await office.write_upload(caller, upload_id, at, data[at : at + 10])
                await asyncio.sleep(0.02)

    with pytest.raises(UnauthenticatedError):
        await on()
    # Also one who lets so much time pass that nothing is known of him any more.
    await asyncio.sleep(0.3)
    with pytest.raises(UnauthenticatedError):
        await on()


async def test_streams_outlive_a_database_that_is_away_for_a_moment_and_no_longer(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    account = await house.server.account("acme")
    flows = asyncio.Event()
    watching = asyncio.create_task(over_grpc(house, account, account.read, flows))
    await asyncio.wait_for(flows.wait(), SOON_S)

    async def away(_key_ids: Any) -> frozenset[str]:
        raise StoreError("the database is away")

    monkeypatch.setattr(house.server.books.tenants, "opening", away)
    await asyncio.sleep(0.3)
    assert not watching.done()
    monkeypatch.setattr(standing, "UNKNOWN_S", 0.1)
    assert await asyncio.wait_for(watching, SOON_S) == "UNAVAILABLE"
