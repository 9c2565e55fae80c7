"""The host's end of one sandbox's stream: sends cells, collects results, enforces the cell clock."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import grpc.aio
from rlm_proto.v1 import sandbox_pb2 as pb
from rlm_proto.v1 import sandbox_pb2_grpc

from orchestrator.cells import CellClock, CellResult
from orchestrator.errors import (
    EngineError,
    GuestProtocolError,
    SandboxError,
    SandboxLostError,
    SandboxStartError,
)
from orchestrator.ids import SandboxId
from orchestrator.limits import (
    INTERRUPT_GRACE_S,
    KILL_GRACE_S,
    MAX_ANSWER_BYTES,
    MAX_PROMPT_BYTES,
    OUTPUT_HEAD_BYTES,
    OUTPUT_TAIL_BYTES,
)
from orchestrator.sandbox.endings import StreamEnd
from orchestrator.sandbox.port import SandboxDriver
from orchestrator.sandbox.protocol import AttachProtocol

_LOOK_WHILE_WAITING_S = 0.25
"""How often the clock is read while a sub-call is in flight: guest time may resume at any moment."""
WRITE_S = 10.0
"""To hand one message to a worker that always reads."""
_CPU_LOOK_S = 2.0
"""How often CPU time is looked at; also how much of it a cell gets uncounted."""

_Stream = grpc.aio.ServicerContext[pb.AttachRequest, pb.AttachResponse]


class CpuMeter:
    """CPU time of one cell, read on the host.

    Where the kernel's own counter cannot be read the engine is asked, and seldom: that costs milliseconds.
    """

    def __init__(self, driver: SandboxDriver, sandbox_id: SandboxId) -> None:
        self._driver = driver
        self._sandbox_id = sandbox_id
        self._asked_at_s = time.monotonic()
        self._first_s: float | None = None
        self._spent_s = 0.0

    async def spent_s(self) -> float:
        """CPU seconds since the first look, up to `_CPU_LOOK_S` into the cell."""
        now_s = time.monotonic()
        if now_s - self._asked_at_s >= _CPU_LOOK_S:
            self._asked_at_s = now_s
            total_s = self._driver.counters(self._sandbox_id).cpu_s
            if total_s is None:
                try:
                    total_s = await self._driver.cpu_s(self._sandbox_id)
                except EngineError:
                    # The cell did nothing wrong, and its wall-clock limits still hold.
                    return self._spent_s
            self._first_s = total_s if self._first_s is None else self._first_s
            self._spent_s = total_s - self._first_s
        return self._spent_s


class SandboxSession(sandbox_pb2_grpc.SandboxServiceServicer):
    """One sandbox's stream. There is one instance, on one server, for each sandbox.

    Used by one task at a time: `ready_within`, then `lease`, then `run_cell` again and again.
    """

    def __init__(self) -> None:
        self._protocol = AttachProtocol()
        self._stream: _Stream | None = None
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._over: asyncio.Future[SandboxError] = asyncio.get_running_loop().create_future()
        self._result: asyncio.Future[CellResult] | None = None
        self._wakes: asyncio.Future[None] | None = None
        self._is_silent = False

    @property
    def hash_seed(self) -> int:
        """The seed the interpreter started with; known once the sandbox is ready."""
        return self._protocol.hash_seed

    @property
    def over(self) -> asyncio.Future[SandboxError]:
        """Done when the stream is, with why. Only to be waited for."""
        return self._over

    @property
    def stream_end(self) -> StreamEnd:
        """How the stream ended, once `run_cell` has said that the sandbox is lost."""
        if self._over.done() and isinstance(self._over.result(), GuestProtocolError):
            return StreamEnd.UNRULY
        return StreamEnd.SILENT if self._is_silent else StreamEnd.CLOSED

    async def ready_within(self, timeout_s: float) -> bool:
        """Whether the worker's Hello came in time.

        Raises:
            SandboxStartError: What came was no Hello of ours.
        """
        await asyncio.wait((self._ready, self._over), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._over.done():
            raise SandboxStartError(str(self._over.result()))
        return self._ready.done()

    async def lease(self, *, max_concurrent_calls: int, max_str_bytes: int, hash_seed: int = 0) -> None:
        """Hand the sandbox to one run. Its context must be in place.

        Args:
            max_concurrent_calls: Sub-calls in flight at once.
            max_str_bytes: Up to this size a context text is a real str.
            hash_seed: Of a run that is resumed: its interpreter starts again, with this seed. 0 for none.

        Raises:
            SandboxLostError: It went away while it waited.
        """
        lease = pb.Lease(
            output_head_bytes=OUTPUT_HEAD_BYTES,
            output_tail_bytes=OUTPUT_TAIL_BYTES,
            max_answer_bytes=MAX_ANSWER_BYTES,
            max_concurrent_calls=max_concurrent_calls,
            max_prompt_bytes=MAX_PROMPT_BYTES,
            max_str_bytes=max_str_bytes,
            hash_seed=hash_seed,
        )
        await self._send(pb.AttachResponse(lease=lease))

    async def run_cell(self, code: str, clock: CellClock, cpu: CpuMeter) -> CellResult:
        """Run one cell and enforce its clock; never raises for what the cell or the sandbox does.

        A cell past its time is interrupted, then its interpreter is killed, then the sandbox is given up.
        """
        cell_id = self._protocol.cell_started()
        self._result = asyncio.get_running_loop().create_future()
        data = code.encode("utf-8", "replace")
        try:
            await self._send(pb.AttachResponse(run_cell=pb.RunCell(cell_id=cell_id, code=data)))
            result = await self._result_within_limits(cell_id, self._result, clock, cpu)
        except SandboxLostError:
            result = self._protocol.sandbox_lost()
        finally:
            self._result = None
        now_s = time.monotonic()
        return replace(result, duration_s=now_s - clock.started_s, guest_s=clock.guest_s(now_s))

    async def _result_within_limits(
        self, cell_id: int, result: asyncio.Future[CellResult], clock: CellClock, cpu: CpuMeter
    ) -> CellResult:
        while not await self._came(result, self._until_next_look_s(clock)):
            passed = clock.passed(time.monotonic(), await cpu.spent_s())
            if passed is not None:
                return replace(await self._stopped(cell_id, result), passed=passed)
        return result.result()

    async def _stopped(self, cell_id: int, result: asyncio.Future[CellResult]) -> CellResult:
        """The result of a cell that has had its time."""
        await self._send(pb.AttachResponse(interrupt_cell=pb.InterruptCell(cell_id=cell_id)))
        if await self._came(result, INTERRUPT_GRACE_S):
            return result.result()
        await self._send(pb.AttachResponse(kill_interpreter=pb.KillInterpreter(cell_id=cell_id)))
        if await self._came(result, KILL_GRACE_S):
            return result.result()
        self._is_silent = True
        raise SandboxLostError("the sandbox's worker does not answer")

    @staticmethod
    def _until_next_look_s(clock: CellClock) -> float:
        most_s = _LOOK_WHILE_WAITING_S if clock.waiting else _CPU_LOOK_S
        return min(most_s, clock.next_look_s(time.monotonic()))

    async def _came(self, result: asyncio.Future[CellResult], timeout_s: float) -> bool:
        """Whether the result came in time.

        Raises:
            SandboxLostError: The stream is over.
        """
        if not result.done() and not self._over.done():
            # Not `asyncio.wait` on both: that takes one more turn of the loop, and this is every cell's way.
            loop = asyncio.get_running_loop()
            self._wakes = loop.create_future()
            timer = loop.call_later(timeout_s, self._wake)
            try:
                await self._wakes
            finally:
                timer.cancel()
                self._wakes = None
        if result.done():
            return True
        if self._over.done():
            raise SandboxLostError(str(self._over.result()))
        return False

    async def _send(self, message: pb.AttachResponse) -> None:
        if self._stream is None or self._over.done():
            raise SandboxLostError("the sandbox's stream is over")
        try:
            # A guest that does not read stops the stream's flow, and would stop us.
            async with asyncio.timeout(WRITE_S):
                await self._stream.write(message)
        except (grpc.aio.AioRpcError, grpc.aio.BaseError, asyncio.InvalidStateError) as error:
            raise SandboxLostError("the sandbox's stream broke") from error
        except TimeoutError as error:
            self._is_silent = True
            lost = SandboxLostError("the sandbox's worker does not read")
            if not self._over.done():
                # The write is still under way, and there can't be a second one.
                self._over.set_result(lost)
            raise lost from error

    async def Attach(  # type: ignore[override]  # noqa: N802 - grpc.aio also takes a coroutine; the rpc's name
        self, request_iterator: AsyncIterator[pb.AttachRequest], context: _Stream
    ) -> None:
        """Serve the sandbox's only stream; see sandbox.proto. What we send goes out through `_send`."""
        if self._stream is not None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "this sandbox is attached already")
        self._stream = context
        over: SandboxError = SandboxLostError("the sandbox's worker hung up")
        try:
            async for message in request_iterator:
                self._take(message)
        except GuestProtocolError as error:
            over = error
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        finally:
            if not self._over.done():
                self._over.set_result(over)
                self._wake()

    def _wake(self) -> None:
        """Let `_came` look at what has come."""
        if self._wakes is not None and not self._wakes.done():
            self._wakes.set_result(None)

    def _take(self, message: pb.AttachRequest) -> None:
        result = self._protocol.received(message)
        if not self._ready.done() and self._protocol.hash_seed:
            self._ready.set_result(None)
        if result is not None and self._result is not None and not self._result.done():
            self._result.set_result(result)
            self._wake()
