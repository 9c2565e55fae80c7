import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from rlm_proto.v1 import sandbox_pb2 as pb
from rlm_proto.v1 import sandbox_pb2_grpc

from orchestrator.cells import CellClock, CellOutcome, CellResult
from orchestrator.errors import EngineError, SandboxStartError
from orchestrator.ids import SandboxId
from orchestrator.limits import MAX_OUTPUT_CHUNK_BYTES, OUTPUT_HEAD_BYTES
from orchestrator.rpc.guest_server import guest_server
from orchestrator.sandbox import session as sessions
from orchestrator.sandbox.cgroups import NOTHING_KNOWN
from orchestrator.sandbox.port import Counters
from orchestrator.sandbox.session import CpuMeter, SandboxSession

SOON_S = 10.0
"""What these tests wait for comes at once; so long only where something is broken."""


@dataclass
class Driver:
    """The engine, as far as a session asks it."""

    cpu: list[float | EngineError] = field(default_factory=list)

    def counters(self, sandbox_id: SandboxId) -> Counters:
        return NOTHING_KNOWN

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        reading = self.cpu.pop(0) if self.cpu else 0.0
        if isinstance(reading, EngineError):
            raise reading
        return reading


class Guest:
    """The other end of the stream, by hand."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream

    async def send(self, **message: Any) -> None:
        await self.stream.write(pb.AttachRequest(**message))

    async def hello(self) -> None:
        await self.send(hello=pb.Hello(protocol_version=1, hash_seed=7))

    async def receive(self) -> Any:
        """The next message from the host, by its kind."""
        async with asyncio.timeout(SOON_S):
            message = await self.stream.read()
        assert message is not grpc.aio.EOF
        return getattr(message, message.WhichOneof("message"))

    async def write(self, data: bytes, cell_id: int = 1) -> None:
        await self.send(output=pb.OutputChunk(cell_id=cell_id, offset=0, data=data))

    async def end(self, cell_id: int = 1, **fields: Any) -> None:
        ok: dict[str, Any] = (
            {} if fields.keys() & {"error", "interrupted", "namespace_lost"} else {"ok": pb.CellOk()}
        )
        await self.send(cell_ended=pb.CellEnded(cell_id=cell_id, **ok, **fields))

    async def code(self) -> grpc.StatusCode:
        """How the stream ended."""
        async with asyncio.timeout(SOON_S):
            with suppress(grpc.aio.AioRpcError):
                while await self.stream.read() is not grpc.aio.EOF:
                    pass
            return grpc.StatusCode(await self.stream.code())


@pytest.fixture
async def session() -> SandboxSession:
    return SandboxSession()


@asynccontextmanager
async def served(session: SandboxSession) -> AsyncIterator[Callable[[], Guest]]:
    """The session on a real socket; each call attaches another guest."""
    with tempfile.TemporaryDirectory(prefix="rlm") as directory:
        services = (lambda server: sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(session, server),)
        async with (
            guest_server(Path(directory), services, group_id=None) as path,
            grpc.aio.insecure_channel(f"unix:{path}") as channel,
        ):
            yield lambda: Guest(sandbox_pb2_grpc.SandboxServiceStub(channel).Attach())


@asynccontextmanager
async def leased(session: SandboxSession) -> AsyncIterator[Guest]:
    """A guest that has said hello and was leased."""
    async with served(session) as attach:
        guest = attach()
        await guest.hello()
        assert await session.ready_within(SOON_S)
        await session.lease(max_concurrent_calls=4, max_str_bytes=1_000)
        assert isinstance(await guest.receive(), pb.Lease)
        yield guest


def clock(timeout_s: float = SOON_S, cpu_s: float = 1_000.0, ceiling_s: float = 1_000.0) -> CellClock:
    return CellClock(
        started_s=time.monotonic(), cell_timeout_s=timeout_s, cell_cpu_s=cpu_s, cell_ceiling_s=ceiling_s
    )


def meter(*readings: float | EngineError) -> CpuMeter:
    return CpuMeter(Driver(list(readings)), SandboxId("s0"))  # type: ignore[arg-type]


async def run(
    session: SandboxSession,
    play: Awaitable[None],
    *,
    code: str = "1",
    cell_clock: CellClock | None = None,
    cpu: CpuMeter | None = None,
) -> CellResult:
    """One cell, while the guest plays its part."""
    async with asyncio.timeout(3 * SOON_S):
        result, _ = await asyncio.gather(session.run_cell(code, cell_clock or clock(), cpu or meter()), play)
    return result


# --- Attaching --------------------------------------------------------------------------------------------


async def test_a_sandbox_is_ready_when_its_worker_has_said_hello(session: SandboxSession) -> None:
    async with served(session) as attach:
        assert not await session.ready_within(0.01)
        await attach().hello()
        assert await session.ready_within(SOON_S)
        assert session.hash_seed == 7


async def test_the_lease_tells_the_guest_its_limits(session: SandboxSession) -> None:
    async with served(session) as attach:
        guest = attach()
        await guest.hello()
        await session.ready_within(SOON_S)
        await session.lease(max_concurrent_calls=4, max_str_bytes=1_000)
        lease = await guest.receive()
    assert (lease.max_concurrent_calls, lease.max_str_bytes) == (4, 1_000)
    assert lease.output_head_bytes == OUTPUT_HEAD_BYTES


async def test_a_worker_of_another_version_does_not_start(session: SandboxSession) -> None:
    async with served(session) as attach:
        guest = attach()
        await guest.send(hello=pb.Hello(protocol_version=2, hash_seed=7))
        with pytest.raises(SandboxStartError, match="rlm image build"):
            await session.ready_within(SOON_S)
        assert await guest.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_worker_that_hangs_up_before_hello_does_not_start(session: SandboxSession) -> None:
    async with served(session) as attach:
        guest = attach()
        await guest.stream.done_writing()
        with pytest.raises(SandboxStartError, match="hung up"):
            await session.ready_within(SOON_S)


async def test_a_second_attach_is_refused_and_the_first_goes_on(session: SandboxSession) -> None:
    async with served(session) as attach:
        first = attach()
        await first.hello()
        await session.ready_within(SOON_S)
        second = attach()
        with suppress(grpc.aio.AioRpcError):  # the refusal may come before it has said anything
            await second.hello()
        assert await second.code() is grpc.StatusCode.FAILED_PRECONDITION
        await session.lease(max_concurrent_calls=4, max_str_bytes=1_000)
        assert isinstance(await first.receive(), pb.Lease)


# --- Cells ------------------------------------------------------------------------------------------------


async def test_a_cell_is_sent_and_its_result_comes_back_with_its_times(session: SandboxSession) -> None:
    async with leased(session) as guest:

        async def play() -> None:
            cell = await guest.receive()
            assert (cell.cell_id, cell.code) == (1, "print('ä?')".encode())
            await guest.write(b"out")
            await guest.end(output_bytes=3)

        result = await run(session, play(), code="print('ä\ud800')")
    assert (result.outcome, result.output) == (CellOutcome.OK, "out")
    assert 0 < result.guest_s <= result.duration_s < SOON_S


async def test_cells_follow_each_other(session: SandboxSession) -> None:
    async with leased(session) as guest:
        for number in (1, 2, 3):

            async def play(number: int = number) -> None:
                assert (await guest.receive()).cell_id == number
                await guest.end(number)

            assert (await run(session, play())).outcome is CellOutcome.OK


# --- The clock --------------------------------------------------------------------------------------------


@pytest.fixture
def ignored_interrupt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "INTERRUPT_GRACE_S", 0.1)


@pytest.fixture
def ignored_kill(ignored_interrupt: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "KILL_GRACE_S", 0.1)


async def test_a_cell_past_its_time_is_interrupted(session: SandboxSession) -> None:
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            assert isinstance(await guest.receive(), pb.InterruptCell)
            await guest.end(interrupted=pb.CellInterrupted(traceback=b"where"))

        result = await run(session, play(), cell_clock=clock(timeout_s=0.05))
    assert (result.outcome, result.traceback) == (CellOutcome.INTERRUPTED, "where")


@pytest.mark.usefixtures("ignored_interrupt")
async def test_a_cell_that_ignores_the_interrupt_is_killed(session: SandboxSession) -> None:
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            assert isinstance(await guest.receive(), pb.InterruptCell)
            assert isinstance(await guest.receive(), pb.KillInterpreter)
            await guest.end(namespace_lost=pb.NamespaceLost(cause=pb.NamespaceLost.CAUSE_KILLED))

        result = await run(session, play(), cell_clock=clock(timeout_s=0.05))
    assert result.outcome is CellOutcome.KILLED


@pytest.mark.usefixtures("ignored_kill")
async def test_a_sandbox_that_ignores_the_kill_is_given_up(session: SandboxSession) -> None:
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            await guest.write(b"so far")

        result = await run(session, play(), cell_clock=clock(timeout_s=1.5))
    assert (result.outcome, result.output) == (CellOutcome.SANDBOX_LOST, "so far")


async def test_a_cell_that_waits_for_a_sub_call_has_time(session: SandboxSession) -> None:
    cell_clock = clock(timeout_s=0.2)
    cell_clock.sub_call_started(time.monotonic())
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            await asyncio.sleep(0.5)
            await guest.end()

        result = await run(session, play(), cell_clock=cell_clock)
    assert result.outcome is CellOutcome.OK


async def test_a_cell_that_waits_for_ever_meets_the_ceiling(session: SandboxSession) -> None:
    cell_clock = clock(ceiling_s=0.2)
    cell_clock.sub_call_started(time.monotonic())
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            assert isinstance(await guest.receive(), pb.InterruptCell)
            await guest.end(interrupted=pb.CellInterrupted())

        result = await run(session, play(), cell_clock=cell_clock)
    assert result.outcome is CellOutcome.INTERRUPTED


async def test_a_cell_that_computes_beside_a_waiting_call_pays_in_cpu_time(
    session: SandboxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_CPU_LOOK_S", 0.02)
    cell_clock = clock(cpu_s=30.0)
    cell_clock.sub_call_started(time.monotonic())
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            assert isinstance(await guest.receive(), pb.InterruptCell)
            await guest.end(interrupted=pb.CellInterrupted())

        result = await run(session, play(), cell_clock=cell_clock, cpu=meter(100.0, 110.0, 131.0))
    assert result.outcome is CellOutcome.INTERRUPTED


async def test_an_engine_that_does_not_tell_the_cpu_time_does_not_end_the_cell(
    session: SandboxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_CPU_LOOK_S", 0.02)
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            await asyncio.sleep(0.2)
            await guest.end()

        result = await run(session, play(), cpu=meter(*[EngineError("no answer")] * 100))
    assert result.outcome is CellOutcome.OK


# --- A hostile or broken guest ----------------------------------------------------------------------------


async def test_a_stream_that_breaks_under_a_cell_is_a_lost_sandbox(session: SandboxSession) -> None:
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            await guest.write(b"so far")
            await guest.stream.done_writing()

        result = await run(session, play())
        assert (result.outcome, result.output) == (CellOutcome.SANDBOX_LOST, "so far")
        again = await session.run_cell("1", clock(), meter())
    assert again.outcome is CellOutcome.SANDBOX_LOST


async def test_a_guest_that_is_killed_under_a_cell_is_a_lost_sandbox(session: SandboxSession) -> None:
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            guest.stream.cancel()

        assert (await run(session, play())).outcome is CellOutcome.SANDBOX_LOST


@pytest.mark.parametrize(
    "garbage",
    [
        {"output": pb.OutputChunk(cell_id=9, data=b"x")},
        {"output": pb.OutputChunk(cell_id=1, data=b"x" * (MAX_OUTPUT_CHUNK_BYTES + 1))},
        {"hello": pb.Hello(protocol_version=1, hash_seed=7)},
        {"cell_ended": pb.CellEnded(cell_id=1)},
        {},
    ],
)
async def test_a_guest_that_breaks_the_protocol_loses_its_sandbox(
    session: SandboxSession, garbage: dict[str, Any]
) -> None:
    async with leased(session) as guest:

        async def play() -> None:
            await guest.receive()
            await guest.send(**garbage)
            assert await guest.code() is grpc.StatusCode.INVALID_ARGUMENT

        assert (await run(session, play())).outcome is CellOutcome.SANDBOX_LOST


async def test_bytes_that_are_no_message_end_the_sandbox(session: SandboxSession) -> None:
    async with leased(session) as guest:
        guest.stream._request_serializer = lambda data: data

        async def play() -> None:
            await guest.receive()
            with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
                await guest.stream.write(b"\xff\xff\xff\xff")
            assert await guest.code() is not grpc.StatusCode.OK

        assert (await run(session, play())).outcome is CellOutcome.SANDBOX_LOST


@pytest.mark.usefixtures("ignored_kill")
async def test_a_guest_that_does_not_read_cannot_hold_its_run_up(
    session: SandboxSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "WRITE_S", 0.2)
    async with leased(session), asyncio.timeout(SOON_S):
        # The first fills what the transport buffers; a later one cannot be handed over at all.
        results = [await session.run_cell("x" * 3_000_000, clock(timeout_s=0.1), meter()) for _ in range(4)]
    assert {result.outcome for result in results} == {CellOutcome.SANDBOX_LOST}


async def test_a_result_that_comes_before_its_cell_was_asked_for_ends_the_sandbox(
    session: SandboxSession,
) -> None:
    async with leased(session) as guest:
        await guest.end()
        assert await guest.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert (await session.run_cell("1", clock(), meter())).outcome is CellOutcome.SANDBOX_LOST
