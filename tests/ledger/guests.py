"""Guests as an attacker would write them: raw gRPC on the real socket of a run, without our library."""

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

import grpc
import grpc.aio
from google.protobuf.message import Message
from rlm_proto.v1 import broker_pb2 as pb
from rlm_proto.v1 import broker_pb2_grpc

from orchestrator.broker.service import serve_broker
from orchestrator.budget import ZERO
from orchestrator.cells import CellClock
from orchestrator.limits import RunLimits
from orchestrator.models.port import ModelClient
from orchestrator.rpc.guest_server import guest_server
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.run import run_to_end
from orchestrator.runs.sub_calls import SubCalls
from orchestrator.runs.tree import RunResult, RunSpec, RunTree
from orchestrator.sandbox.instance import claim_instance
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.trajectory import SubCallEnded, SubCallStarted
from tests.fakes.in_process_driver import InProcessDriver
from tests.fakes.leases import FakeLeases
from tests.fakes.tree import FakeTree
from tests.ledger.witness import Provider, WatchedLedger

T = TypeVar("T")

PLENTY = RunLimits(max_tokens=10**9, max_cost_microusd=10**9, max_calls=10**6, max_child_runs=10**4)


class Guest:
    """One connection to a run's socket."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.channel = channel
        self.broker = broker_pb2_grpc.BrokerServiceStub(channel)

    async def complete(self, call_id: str, prompt: bytes = b"hello", **more: Any) -> str:
        request = pb.CompleteRequest(call_id=call_id, prompt=prompt, **more)
        return (await self.broker.Complete(request)).text.decode()

    async def child(self, call_id: str, question: bytes = b"who?", **more: Any) -> str:
        context = more or {"inline": b"a text"}
        request = pb.StartChildRunRequest(call_id=call_id, question=question, **context)
        return b"".join([part.data async for part in self.broker.StartChildRun(request)]).decode()

    async def raw(
        self,
        method: str,
        data: bytes,
        *,
        metadata: Mapping[str, str] | None = None,
        service: str = "rlm_proto.v1.BrokerService",
    ) -> bytes:
        """Any bytes to any method."""
        call: Any = self.channel.unary_unary(f"/{service}/{method}")
        return cast(bytes, await call(data, metadata=tuple((metadata or {}).items())))


class Sandbox:
    """One run, played by a test: its sub-calls on a real socket. No cell runs until `cell` says so."""

    def __init__(self, tree: FakeTree, calls: SubCalls, spec: RunSpec, socket: Path) -> None:
        self.tree = tree
        self.calls = calls
        self.spec = spec
        self.socket = socket
        self._connections = AsyncExitStack()

    @property
    def ledger(self) -> WatchedLedger:
        assert isinstance(self.tree.ledger, WatchedLedger)
        return self.tree.ledger

    @contextmanager
    def cell(self, turn: int = 1) -> Iterator[None]:
        clock = CellClock(started_s=time.monotonic(), cell_timeout_s=1e6, cell_cpu_s=1e6, cell_ceiling_s=1e6)
        with self.calls.executing(turn, clock):
            yield

    async def dial(self) -> Guest:
        """A connection of its own."""
        options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_send_message_length", -1)]
        channel = grpc.aio.insecure_channel(f"unix:{self.socket}", options=options)
        await self._connections.enter_async_context(channel)
        return Guest(channel)

    async def over(self, grace_s: float = 5.0) -> None:
        """The run's end: what is at a provider may finish."""
        await self.calls.aclose(grace_s)

    async def hang_up(self) -> None:
        await self._connections.aclose()

    def sub_calls(self) -> tuple[int, int]:
        """How many were begun, and how many are over."""
        return len(self.tree.payloads(SubCallStarted)), len(self.tree.payloads(SubCallEnded))


@asynccontextmanager
async def sandbox(
    client: ModelClient,
    *,
    limits: RunLimits = PLENTY,
    depth: int = 0,
    memoise: bool = False,
    leases: FakeLeases | None = None,
) -> AsyncIterator[Sandbox]:
    """A run of a tree of its own. Child runs are real, in sandboxes that are coroutines, or in `leases`.

    When the block ends the books are closed, and what the provider's log says is no more than was charged.
    """
    async with AsyncExitStack() as stack:
        state_dir = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm")))
        instance = stack.enter_context(claim_instance(state_dir))
        slots = await stack.enter_async_context(SandboxSlots(12).admit(limits.max_depth))
        driver = InProcessDriver()
        stack.push_async_callback(driver.aclose)
        real = cast(FakeLeases, SandboxLeases(instance, driver, memory_bytes=1 << 20))
        tree = FakeTree(state_dir, slots, client, leases=leases or real, limits=limits, memoise=memoise)
        spec = tree.spec(depth=depth)
        directory = state_dir / "guest"
        directory.mkdir()

        async def run_child(tree: RunTree, spec: RunSpec) -> RunResult:
            return await run_to_end(tree, spec, serve_broker)

        calls = SubCalls(tree.tree, spec, tree.recorder, run_child)
        async with guest_server(directory, [serve_broker(calls)], group_id=None) as socket:
            played = Sandbox(tree, calls, spec, socket)
            try:
                yield played
                await played.over()
            finally:
                await played.hang_up()
                await calls.aclose(0)
        await tree.treasury.close()
        tree.contexts.release(spec.context)
        tree.contexts.close()
        assert_paid(tree, client)


def assert_paid(tree: FakeTree, client: ModelClient) -> None:
    """The invariant after every case: at rest nothing is held, and all that was served is charged.

    That no account was ever past its limit, the watched ledger has seen to all along.
    """
    tree.assert_books_are_closed()
    assert isinstance(tree.ledger, WatchedLedger)
    assert all(account.held() == ZERO for account in tree.ledger.accounts)
    if isinstance(client, Provider):
        assert client.billed_tokens() <= tree.account.used().tokens


async def code_of(call: Awaitable[object]) -> grpc.StatusCode:
    """The status with which a call is refused."""
    try:
        await call
    except grpc.aio.AioRpcError as error:
        return error.code()
    return grpc.StatusCode.OK


async def until(happened: Callable[[], bool], most_s: float = 20.0) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(most_s):
        while not happened():  # noqa: ASYNC110 - some of it is the kernel's
            await asyncio.sleep(0.002)


def with_unknown_fields(message: Message, *texts: bytes, number: int = 90) -> bytes:
    """The message, and fields after it that its schema does not have."""
    data = message.SerializeToString()
    for place, text in enumerate(texts):
        data += _varint((number + place) << 3 | 2) + _varint(len(text)) + text
    return data


def with_varint(message: Message, number: int, value: int) -> bytes:
    """The message with a number that its field's type can't hold."""
    return message.SerializeToString() + _varint(number << 3) + _varint(value % (1 << 64))


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes((*out, value))
