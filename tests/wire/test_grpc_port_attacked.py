"""The clients' gRPC port under strangers and a hostile tenant, on real sockets."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.server import grpc_gate, messages
from orchestrator.server.grpc_shell import SERVICE
from orchestrator.service.port import Question
from tests.fakes.model import FakeModel, runs, when
from tests.fakes.service import Account, Server, open_server, short_directory
from tests.wire.raw_guest import HEADERS, PING, PREFACE, RST_STREAM, SETTINGS, frame, request

SOON_S = 20.0


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    """Its runs never end."""
    never = FakeModel(otherwise=when(asyncio.Event(), runs("FINAL('x')")))
    with short_directory() as directory:
        async with open_server(directory, never) as one:
            yield one


@pytest.fixture
async def stub(server: Server) -> AsyncIterator[Any]:
    async with server.stub() as one:
        yield one


def with_key(key: str) -> dict[str, Any]:
    return {"metadata": (("authorization", f"Bearer {key}"),), "timeout": SOON_S}


async def new_run(server: Server, account: Account) -> str:
    caller = await server.office.authenticate(account.run)
    asked = Question(idempotency_key="k", question="How many?", text=b"some text")
    return (await server.office.create_run(caller, asked)).run.run_id


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - of state that nobody tells of
            await asyncio.sleep(0.01)


async def code_of(call: Any) -> grpc.StatusCode:
    try:
        if hasattr(call, "__aiter__"):
            async for _ in call:
                pass
        else:
            await call
    except grpc.aio.AioRpcError as error:
        code: grpc.StatusCode = error.code()
        return code
    return grpc.StatusCode.OK


def headers_only(channel: grpc.aio.Channel, **given: Any) -> Any:
    """A call whose message does not come."""

    async def nothing() -> AsyncIterator[bytes]:
        await asyncio.Event().wait()
        yield b""

    call: Any = channel.stream_unary(f"/{SERVICE}/CreateRun")
    return call(nothing(), **{"timeout": SOON_S, **given})


async def checked(server: Server) -> int:
    async with grpc.aio.insecure_channel(server.port.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        answer = await health.Check(health_pb2.HealthCheckRequest(), timeout=SOON_S)
        return int(answer.status)


# --- Strangers -----------------------------------------------------------------------------------------


async def test_headers_without_a_key_hold_no_place_however_long_their_message_does_not_come(
    server: Server,
) -> None:
    async with grpc.aio.insecure_channel(server.port.address) as channel:
        codes = await asyncio.gather(*(code_of(headers_only(channel)) for _ in range(100)))
    assert set(codes) == {grpc.StatusCode.UNAUTHENTICATED}


async def test_of_calls_that_need_no_key_the_newest_has_a_place(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_gate, "MAX_CALLS_WITHOUT_KEY", 3)
    async with grpc.aio.insecure_channel(server.port.address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watches = []
        for _ in range(6):
            watch = health.Watch(health_pb2.HealthCheckRequest(), timeout=SOON_S)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            watches.append(watch)
        assert await checked(server) == health_pb2.HealthCheckResponse.SERVING
        for watch in watches[:3]:
            assert await asyncio.wait_for(watch.code(), SOON_S) is grpc.StatusCode.UNAVAILABLE
        assert not watches[-1].done()


async def test_a_compressed_message_is_refused_unread(server: Server, stub: Any) -> None:
    account = await server.account("acme")
    asked = pb.CreateRunRequest(idempotency_key="k", question=b"What?", text=b"\0" * 4_000_000)
    call = stub.CreateRun(asked, compression=grpc.Compression.Gzip, **with_key(account.run))
    assert await code_of(call) is grpc.StatusCode.UNIMPLEMENTED
    assert not server.office.running


class Raw:
    """HTTP/2 by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def to(cls, server: Server) -> "Raw":
        host, _, port = server.port.address.rpartition(":")
        return cls(*await asyncio.open_connection(host, int(port)))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def all(self) -> bytes:
        """Everything until the server hangs up."""
        came = b""
        with suppress(ConnectionError):
            async with asyncio.timeout(SOON_S):
                while part := await self.reader.read(65_536):
                    came += part
        return came


async def test_a_flood_of_pings_ends_its_connection_and_nobody_elses(server: Server) -> None:
    raw = await Raw.to(server)
    await raw.send(PREFACE + frame(SETTINGS))
    with suppress(ConnectionError):
        for _ in range(200):
            await raw.send(frame(PING, 0, 0, b"12345678") * 50)
            await asyncio.sleep(0)
    await raw.all()
    # Hung up on: said in a GOAWAY, or felt as a broken pipe by who still writes.
    assert raw.reader.at_eof() or raw.reader.exception() is not None
    assert await checked(server) == health_pb2.HealthCheckResponse.SERVING
    raw.writer.close()


async def test_calls_that_are_opened_and_reset_by_thousands_cost_their_connection_alone(
    server: Server,
) -> None:
    account = await server.account("acme")
    run_id = await new_run(server, account)
    raw = await Raw.to(server)
    await raw.send(PREFACE + frame(SETTINGS))
    path = f"/{SERVICE}/GetUsage".encode()
    opened = request(path, (b"authorization", b"Bearer rlm_" + b"0" * 40))
    with suppress(ConnectionError):
        for number in range(0, 10_000):
            stream = 2 * number + 1
            await raw.send(frame(HEADERS, 4, stream, opened) + frame(RST_STREAM, 0, stream, b"\0\0\0\x08"))
    async with server.stub() as stub:
        asked = pb.GetRunRequest(run_id=run_id)
        assert (await stub.GetRun(asked, **with_key(account.read))).run.run_id == run_id
    raw.writer.close()


# --- A hostile tenant ----------------------------------------------------------------------------------


async def test_a_tenant_with_too_many_streams_is_refused_more_and_another_is_not(
    server: Server, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_gate, "MAX_CALLS_OF_TENANT", 5)
    greedy, other = await server.account("greedy"), await server.account("other")
    run_id = await new_run(server, greedy)
    watches = [stub.WatchRun(pb.WatchRunRequest(run_id=run_id), **with_key(greedy.read)) for _ in range(5)]
    for watch in watches:
        await watch.read()
    refused = stub.GetUsage(pb.GetUsageRequest(), **with_key(greedy.read))
    assert await code_of(refused) is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert await code_of(stub.GetUsage(pb.GetUsageRequest(), **with_key(other.read))) is grpc.StatusCode.OK
    watches[0].cancel()

    async def may_again() -> bool:
        asked = stub.GetUsage(pb.GetUsageRequest(), **with_key(greedy.read))
        return await code_of(asked) is grpc.StatusCode.OK

    async with asyncio.timeout(SOON_S):
        while not await may_again():
            pass


async def test_a_message_that_does_not_come_ends_its_call_and_holds_up_no_other_tenant(
    server: Server, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_gate, "MESSAGE_ARRIVES_S", 0.5)
    slow, other = await server.account("slow"), await server.account("other")
    async with grpc.aio.insecure_channel(server.port.address) as channel:
        calls = [headers_only(channel, **with_key(slow.run)) for _ in range(40)]
        waiting = asyncio.gather(*map(code_of, calls))
        mine = stub.GetUsage(pb.GetUsageRequest(), **with_key(other.read))
        assert await code_of(mine) is grpc.StatusCode.OK
        assert set(await waiting) == {grpc.StatusCode.UNAVAILABLE}


@pytest.mark.parametrize("outcomes", [["no\0such"], ["x" * 41], ["Answered; --"], ["\u202e"]])
async def test_a_filter_that_nothing_can_match_is_refused_and_not_asked_of_the_database(
    server: Server, stub: Any, outcomes: list[str]
) -> None:
    account = await server.account("acme")
    listed = stub.ListRuns(pb.ListRunsRequest(outcomes=outcomes), **with_key(account.read))
    assert await code_of(listed) is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_page_token_of_anothers_run_opens_nothing(server: Server, stub: Any) -> None:
    mine, theirs = await server.account("mine"), await server.account("theirs")
    run_id = await new_run(server, theirs)
    page = await stub.ListRuns(pb.ListRunsRequest(page_size=1), **with_key(theirs.read))
    assert page.runs[0].run_id == run_id
    for made_up in (page.next_page_token, messages.page_token((1e12, run_id))):
        asked = pb.ListRunsRequest(page_token=made_up)
        assert not (await stub.ListRuns(asked, **with_key(mine.read))).runs


async def test_uploads_that_are_begun_and_not_ended_are_no_more_than_a_few(
    server: Server, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_gate, "MAX_UPLOADS_OF_TENANT", 2)
    account = await server.account("acme")

    async def nothing() -> AsyncIterator[pb.UploadRequest]:
        await asyncio.Event().wait()
        yield pb.UploadRequest()

    uploads = [stub.Upload(nothing(), **with_key(account.run)) for _ in range(3)]
    done, _ = await asyncio.wait(
        [asyncio.ensure_future(code_of(upload)) for upload in uploads],
        timeout=SOON_S,
        return_when=asyncio.FIRST_COMPLETED,
    )
    assert [task.result() for task in done] == [grpc.StatusCode.RESOURCE_EXHAUSTED]
    for upload in uploads:
        upload.cancel()


async def test_who_takes_nothing_of_a_long_answer_is_cut_off(
    server: Server, stub: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(grpc_gate, "PART_TAKEN_S", 0.5)
    account = await server.account("acme")
    run_id = await new_run(server, account)
    length, read = 32 * 1024 * 1024, 0

    async def answer(_tenant: Any, _run: Any, *, start: int, max_bytes: int) -> bytes:
        nonlocal read
        read += max_bytes
        return b"x" * min(max_bytes, length - start)

    monkeypatch.setattr(server.books.runs, "answer", answer)
    asked = pb.ReadTextRequest(run_id=run_id, answer=True)
    reading = aiter(stub.ReadText(asked, **with_key(account.read)))
    await anext(reading)
    await asyncio.sleep(1.5)
    assert read < length, "nothing is read that is not taken"
    assert await code_of(reading) is grpc.StatusCode.UNAVAILABLE
    whole = [len(part.data) async for part in stub.ReadText(asked, **with_key(account.read))]
    assert sum(whole) == length
