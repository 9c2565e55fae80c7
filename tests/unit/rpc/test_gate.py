"""The gate on a real socket, in front of services that only note what reaches them."""

import asyncio
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf import descriptor_pool
from rlm_proto.v1 import broker_pb2 as pb
from rlm_proto.v1 import broker_pb2_grpc, sandbox_pb2, sandbox_pb2_grpc

from orchestrator.abuse import Offence
from orchestrator.limits import (
    MAX_CALLS_ON_SOCKET,
    MAX_MALFORMED,
    MAX_UPLOAD_PART_BYTES,
    REQUESTS_RECEIVED_AT_ONCE,
)
from orchestrator.rpc import gate as gate_module
from orchestrator.rpc.gate import Gate
from orchestrator.rpc.guest_server import GatedServices, guest_server

Code = grpc.StatusCode
SOON_S = 20.0


class Service(broker_pb2_grpc.BrokerServiceServicer):
    """Answers at once, or once `go_on` is set."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.in_flight = 0
        self.in_flight_at_most = 0

    async def Complete(self, request: pb.CompleteRequest, context: object) -> pb.CompleteResponse:  # noqa: N802
        self.seen.append(request.call_id)
        self.in_flight += 1
        self.in_flight_at_most = max(self.in_flight, self.in_flight_at_most)
        try:
            await self.go_on.wait()
        finally:
            self.in_flight -= 1
        return pb.CompleteResponse(text=request.prompt)

    async def StartChildRun(  # noqa: N802
        self, request: pb.StartChildRunRequest, context: object
    ) -> AsyncIterator[pb.StartChildRunResponse]:
        for _ in range(400):
            self.seen.append(len(request.question))
            yield pb.StartChildRunResponse(data=b"x" * 200_000)

    async def UploadContext(  # noqa: N802
        self, request_iterator: AsyncIterator[pb.UploadContextRequest], context: object
    ) -> pb.UploadContextResponse:
        async for part in request_iterator:
            self.seen.append(len(part.data))
        return pb.UploadContextResponse(upload_id="u1")

    async def GetBudget(self, request: pb.GetBudgetRequest, context: object) -> pb.GetBudgetResponse:  # noqa: N802
        return pb.GetBudgetResponse(levels_below=1)


class Attached(sandbox_pb2_grpc.SandboxServiceServicer):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    async def Attach(self, request_iterator: AsyncIterator[Any], context: Any) -> None:  # type: ignore[override]  # noqa: N802
        async for message in request_iterator:
            self.seen.append(message)
            await context.write(sandbox_pb2.AttachResponse())


class Served:
    """One server, and a channel to it."""

    def __init__(self, gate: Gate, service: Service, attached: Attached, path: Path) -> None:
        self.gate, self.service, self.attached, self.path = gate, service, attached, path
        options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
        self.channel = grpc.aio.insecure_channel(f"unix:{path}", options=options)
        self.broker = broker_pb2_grpc.BrokerServiceStub(self.channel)

    async def raw(self, method: str, data: bytes = b"", service: str = "BrokerService") -> bytes:
        call: Any = self.channel.unary_unary(f"/rlm_proto.v1.{service}/{method}")
        return bytes(await call(data))

    def counts(self) -> dict[Offence, int]:
        return dict(self.gate.conduct.counts)


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serving() as one:
        yield one


@asynccontextmanager
async def serving() -> AsyncIterator[Served]:
    gate, service, attached = Gate(), Service(), Attached()
    services = (
        lambda server: sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(attached, server),
        GatedServices(
            lambda server: broker_pb2_grpc.add_BrokerServiceServicer_to_server(service, server), gate
        ),
    )
    with tempfile.TemporaryDirectory(prefix="rlm") as directory:
        async with guest_server(Path(directory), services, group_id=None) as path:
            one = Served(gate, service, attached, path)
            try:
                yield one
            finally:
                await one.channel.close()


async def failure(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async with asyncio.timeout(SOON_S):
            await call
    return caught.value


async def test_honest_calls_of_every_kind_pass_uncounted(served: Served) -> None:
    answer = await served.broker.Complete(pb.CompleteRequest(call_id="c1", prompt=b"hello"))
    assert answer.text == b"hello"
    parts = [pb.UploadContextRequest(data=b"x" * MAX_UPLOAD_PART_BYTES)] * 3
    assert (await served.broker.UploadContext(iter(parts))).upload_id == "u1"
    child = served.broker.StartChildRun(pb.StartChildRunRequest(question=b"q" * 2_000_000))
    assert len([part async for part in child]) == 400
    stream = sandbox_pb2_grpc.SandboxServiceStub(served.channel).Attach()
    for _ in range(3):
        await stream.write(sandbox_pb2.AttachRequest(hello=sandbox_pb2.Hello(protocol_version=1)))
        assert await stream.read() == sandbox_pb2.AttachResponse()
    stream.cancel()
    assert (await served.broker.GetBudget(pb.GetBudgetRequest())).levels_below == 1
    assert served.counts() == {}


@pytest.mark.case("G10", "G11")
async def test_only_the_guests_own_methods_are_there() -> None:
    """The golden list. Whoever adds a method adds it here too, and has thought of who may call it."""
    registered: list[str] = []

    class Watching:
        def add_generic_rpc_handlers(self, _handlers: object) -> None: ...

        def add_registered_method_handlers(self, service: str, handlers: dict[str, object]) -> None:
            registered.extend(f"{service}/{name}" for name in handlers)

    watching: Any = Watching()
    broker_pb2_grpc.add_BrokerServiceServicer_to_server(Service(), watching)
    sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(Attached(), watching)
    assert sorted(registered) == [
        "rlm_proto.v1.BrokerService/Complete",
        "rlm_proto.v1.BrokerService/GetBudget",
        "rlm_proto.v1.BrokerService/StartChildRun",
        "rlm_proto.v1.BrokerService/UploadContext",
        "rlm_proto.v1.SandboxService/Attach",
    ]
    pool = descriptor_pool.Default()
    described = [
        f"{service}/{method.name}"
        for service in ("rlm_proto.v1.BrokerService", "rlm_proto.v1.SandboxService")
        for method in pool.FindServiceByName(service).methods
    ]
    assert sorted(described) == sorted(registered)


@pytest.mark.case("G10", "G11")
@pytest.mark.parametrize(
    "method",
    [
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        "/grpc.health.v1.Health/Check",
        "/grpc.channelz.v1.Channelz/GetServers",
        "/rlm_proto.v1.ProviderService/Complete",
        "/rlm_proto.v1.RunService/StartRun",
        "/rlm_proto.v1.BrokerService/complete",
        "/rlm_proto.v1.BrokerService/",
        "/BrokerService/Complete",
        "/",
    ],
)
async def test_what_is_not_there_is_unimplemented_and_counted(served: Served, method: str) -> None:
    call: Any = served.channel.unary_unary(method)
    assert (await failure(call(b""))).code() is Code.UNIMPLEMENTED
    assert served.counts() == {Offence.UNKNOWN_METHOD: 1}


@pytest.mark.case("G09", "G16")
@pytest.mark.parametrize("method", ["Complete", "StartChildRun", "UploadContext", "GetBudget"])
@pytest.mark.parametrize(
    "data",
    [
        b"\xff" * 20,
        b"\x0a\x05abc",
        b"\x0b" * 10_000,
        b"\x0a\x00" * 3_000_000,
        b"\x12\x80",
    ],
    ids=["junk", "cut", "groups", "fields", "no end"],
)
async def test_junk_reaches_no_service_and_is_told_nothing_of_us(
    served: Served, method: str, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    error = await failure(served.raw(method, data))
    assert error.code() is Code.INVALID_ARGUMENT
    details = str(error.details())
    assert len(details) < 100
    assert not any(word in details.lower() for word in ("traceback", "/", "exception", "error parsing"))
    assert served.counts() == {Offence.MALFORMED: 1}
    assert served.service.seen == []
    assert caplog.records == []
    assert (await served.broker.GetBudget(pb.GetBudgetRequest())).levels_below == 1


@pytest.mark.case("G09", "G14")
@pytest.mark.parametrize("data", [b"\xff" * 20, b"\x12\x80", b"x" * 600_000])
async def test_junk_on_the_stream_of_cells_ends_it(served: Served, data: bytes) -> None:
    call: Any = served.channel.stream_stream("/rlm_proto.v1.SandboxService/Attach")
    stream = call()
    await stream.write(data)
    assert await stream.code() is Code.INVALID_ARGUMENT
    assert served.attached.seen == []
    assert served.counts() == {Offence.MALFORMED: 1}


async def test_a_part_of_an_upload_that_is_too_long_is_refused(served: Served) -> None:
    part = pb.UploadContextRequest(data=b"x" * (MAX_UPLOAD_PART_BYTES + 10_000))
    assert (await failure(served.broker.UploadContext(iter([part])))).code() is Code.INVALID_ARGUMENT
    assert served.service.seen == []


@pytest.mark.case("G03")
async def test_past_the_window_calls_are_turned_away_as_back_pressure_and_counted(served: Served) -> None:
    served.service.go_on.clear()
    channels = [Served(served.gate, served.service, served.attached, served.path) for _ in range(3)]
    calls = [
        asyncio.ensure_future(one.broker.Complete(pb.CompleteRequest(call_id=f"{place}-{number}")))
        for place, one in enumerate(channels)
        for number in range(MAX_CALLS_ON_SOCKET // 2)
    ]
    async with asyncio.timeout(SOON_S):
        while sum(call.done() for call in calls) + served.service.in_flight < len(calls):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert served.service.in_flight_at_most == MAX_CALLS_ON_SOCKET
    served.service.go_on.set()
    ends = await asyncio.gather(*calls, return_exceptions=True)
    refused = [end for end in ends if isinstance(end, grpc.aio.AioRpcError)]
    assert {end.code() for end in refused} == {Code.RESOURCE_EXHAUSTED}
    # Without a detail of ours the guest library waits and repeats.
    assert not any(dict(end.trailing_metadata() or ()) for end in refused)
    assert len(refused) == len(calls) - MAX_CALLS_ON_SOCKET == served.counts()[Offence.TURNED_AWAY]
    for one in channels:
        await one.channel.close()


@pytest.mark.case("G02", "G12")
@pytest.mark.parametrize("method", ["Complete", "StartChildRun", "UploadContext", "GetBudget"])
async def test_a_message_that_does_not_come_is_not_waited_for(
    served: Served, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "REQUEST_ARRIVES_S", 0.2)
    call: Any = served.channel.stream_unary(f"/rlm_proto.v1.BrokerService/{method}")
    # The guest's own deadline is far away: ours counts.
    stream = call(timeout=600)
    async with asyncio.timeout(SOON_S):
        assert await stream.code() is Code.INVALID_ARGUMENT
    assert served.counts() == {Offence.MALFORMED: 1}
    assert served.service.seen == []


@pytest.mark.case("G12")
async def test_an_upload_whose_parts_stop_coming_is_ended(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "REQUEST_ARRIVES_S", 0.2)
    stream = served.broker.UploadContext()
    await stream.write(pb.UploadContextRequest(data=b"text"))
    async with asyncio.timeout(SOON_S):
        assert await stream.code() is Code.INVALID_ARGUMENT
    assert served.service.seen == [4]


async def test_the_stream_of_cells_may_be_silent(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate_module, "REQUEST_ARRIVES_S", 0.05)
    stream = sandbox_pb2_grpc.SandboxServiceStub(served.channel).Attach()
    await asyncio.sleep(0.3)
    await stream.write(sandbox_pb2.AttachRequest())
    assert await stream.read() == sandbox_pb2.AttachResponse()
    stream.cancel()


@pytest.mark.case("G13")
async def test_an_answer_that_is_not_taken_is_given_up(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "RESPONSE_TAKEN_S", 0.2)
    stream = served.broker.StartChildRun(pb.StartChildRunRequest(question=b"who?"))
    assert (await stream.read()) is not grpc.aio.EOF
    async with asyncio.timeout(SOON_S):
        while not served.counts():  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert served.counts() == {Offence.MALFORMED: 1}
    assert len(served.service.seen) < 400
    stream.cancel()


async def test_more_than_a_guest_may_hold_stays_in_the_guest(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate_module, "MAX_REQUEST_BYTES_HELD", 3_000_000)
    served.service.go_on.clear()
    calls = [
        asyncio.ensure_future(
            served.broker.Complete(pb.CompleteRequest(call_id=f"c{number}", prompt=b"x" * 1_000_000))
        )
        for number in range(10)
    ]
    await asyncio.sleep(0.5)
    # Those that were being received already may come on top.
    assert 3 <= len(served.service.seen) < 3 + REQUESTS_RECEIVED_AT_ONCE
    # What is short is served nevertheless.
    assert (await served.broker.GetBudget(pb.GetBudgetRequest())).levels_below == 1
    served.service.go_on.set()
    async with asyncio.timeout(SOON_S):
        assert len(await asyncio.gather(*calls)) == 10
    assert served.counts() == {}


async def test_one_offence_too_many_stops_the_server_at_once_and_tells_whoever_asked_once(
    served: Served,
) -> None:
    told = []
    served.gate.on_shut = lambda: told.append(served.gate.conduct.verdict)
    waiting = asyncio.ensure_future(served.broker.UploadContext(asyncio_never()))
    for _ in range(MAX_MALFORMED + 1):
        await failure(served.raw("Complete", b"\xff"))
    async with asyncio.timeout(SOON_S):
        with pytest.raises((grpc.aio.AioRpcError, asyncio.CancelledError)):
            await waiting
    assert (await failure(served.raw("GetBudget"))).code() in {Code.UNAVAILABLE, Code.CANCELLED}
    assert told == [served.gate.conduct.verdict]
    assert "malformed" in told[0]


async def test_a_server_without_a_run_has_a_gate_too() -> None:
    attached = Attached()
    services = (lambda server: sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(attached, server),)
    with tempfile.TemporaryDirectory(prefix="rlm") as directory:
        async with (
            guest_server(Path(directory), services, group_id=None) as path,
            grpc.aio.insecure_channel(f"unix:{path}") as channel,
        ):
            call: Any = channel.stream_stream("/rlm_proto.v1.SandboxService/Attach")
            stream = call()
            await stream.write(b"\xff")
            assert await stream.code() is Code.INVALID_ARGUMENT


async def asyncio_never() -> AsyncIterator[pb.UploadContextRequest]:
    yield pb.UploadContextRequest(data=b"text")
    await asyncio.Event().wait()
