"""Performs the sub-calls of one interpreter against the broker."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any, TypeVar

import grpc
from rlm_proto.v1 import broker_pb2, broker_pb2_grpc

from sandbox_image.worker import protocol
from sandbox_image.worker.frames import Frame
from sandbox_image.worker.link import FrameLink
from sandbox_image.worker.refusals import describe, is_back_pressure
from sandbox_image.worker.uploads import Uploads

# Pauses after back-pressure of the transport. There is no last attempt: the cell's clock ends the wait.
_FIRST_PAUSE_S = 0.02
_LONGEST_PAUSE_S = 1.0

_T = TypeVar("_T")

Result = tuple[dict[str, Any], bytes]
"""What the reply's header holds besides the id, and its payload."""


class SubCalls:
    """The sub-calls of one interpreter, of one cell at a time.

    At most `max_concurrent` are in flight. The interpreter's library keeps to the same window, so what waits
    here beyond that was sent by something else, and reading stops until it is served.
    """

    def __init__(
        self,
        broker: "broker_pb2_grpc.BrokerServiceAsyncStub",
        link: FrameLink,
        max_concurrent: int,
        call_ids: Iterator[str],
    ) -> None:
        self.cell_id: int | None = None
        """The running cell. A request of another one came too late."""
        self._broker = broker
        self._call_ids = call_ids
        self._max_concurrent = max_concurrent
        self._slots = asyncio.Semaphore(max_concurrent)
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._windowed = 0
        self._uploads = Uploads(broker, self._slots)
        self._link = link
        self._handlers: dict[str, Callable[[Frame], Coroutine[Any, Any, Result]]] = {
            protocol.COMPLETE: self._complete,
            protocol.CHILD_RUN: self._child_run,
            protocol.BUDGET: self._budget,
            protocol.UPLOAD_PART: self._uploads.part,
            protocol.UPLOAD_END: self._uploads.end,
        }

    def on_request(self, frame: Frame) -> None:
        """Start one request, or cancel one."""
        request_id = int(frame.header["id"])
        kind = frame.header["kind"]
        if kind == protocol.CANCEL:
            if request_id in self._tasks:
                self._tasks[request_id].cancel()
        elif frame.header["cell_id"] != self.cell_id or self.cell_id is None:
            self._reply(request_id, {"error": {"reason": "CANCELLED", "message": "the cell has ended"}})
        else:
            task = asyncio.create_task(self._serve(request_id, self._handlers[kind](frame)))
            # Parts of uploads come on top of the window: holding them up could keep a slot taken for ever.
            share = 0 if kind in (protocol.UPLOAD_PART, protocol.UPLOAD_END) else 1
            self._tasks[request_id] = task
            self._windowed += share
            task.add_done_callback(lambda _: self._forget(request_id, share))
            self._balance()

    def end_cell(self) -> None:
        """Cancel all that is in flight. Nobody is told: the interpreter has forgotten these requests too."""
        self.cell_id = None
        for task in self._tasks.values():
            task.cancel()
        self._uploads.abandon()

    async def _serve(self, request_id: int, call: Coroutine[Any, Any, Result]) -> None:
        try:
            extra, payload = await call
            self._reply(request_id, extra, payload)
        except grpc.aio.AioRpcError as error:
            self._reply(request_id, {"error": describe(error)})

    def _forget(self, request_id: int, share: int) -> None:
        del self._tasks[request_id]
        self._windowed -= share
        self._balance()

    def _reply(self, request_id: int, extra: dict[str, Any], payload: bytes = b"") -> None:
        self._link.send({"id": request_id, **extra}, payload)

    def _balance(self) -> None:
        self._link.pause(self._windowed > self._max_concurrent)

    async def _complete(self, frame: Frame) -> Result:
        request = broker_pb2.CompleteRequest(
            call_id=next(self._call_ids),
            prompt=frame.payload,
            model=frame.header["model"] or "",
            max_tokens=frame.header["max_tokens"],
            shared_prefix_bytes=frame.header["shared_prefix_bytes"],
        )
        # The request has the prompt now.
        del frame

        async def attempt() -> broker_pb2.CompleteResponse:
            return await self._broker.Complete(request)

        async with self._slots:
            response = await _patiently(attempt)
        return {"truncated": response.truncated}, response.text

    async def _child_run(self, frame: Frame) -> Result:
        header = frame.header
        question_bytes = header["question_bytes"]
        request = broker_pb2.StartChildRunRequest(
            call_id=next(self._call_ids),
            question=frame.payload[:question_bytes],
            max_tokens=header["max_tokens"],
        )
        if header["context"] == "inline":
            request.inline = frame.payload[question_bytes:]
        elif header["context"] == "range":
            request.range.path = header["path"].encode()
            request.range.start_byte = header["start_byte"]
            request.range.end_byte = header["end_byte"]
        elif header["context"] == "files":
            request.files.runs.extend(number for run in header["runs"] for number in run)
        else:
            request.upload_id = header["upload_id"]

        async def attempt() -> bytes:
            return b"".join([part.data async for part in self._broker.StartChildRun(request)])

        async with self._slots:
            return {}, await _patiently(attempt)

    async def _budget(self, frame: Frame) -> Result:
        async def attempt() -> broker_pb2.GetBudgetResponse:
            return await self._broker.GetBudget(broker_pb2.GetBudgetRequest())

        left = await _patiently(attempt)
        amounts = {
            name: getattr(left, name) if left.HasField(name) else None
            for name in ("tokens", "cost_microusd", "calls", "child_runs")
        }
        return {"budget": {**amounts, "levels_below": left.levels_below, "deadline_s": left.deadline_s}}, b""


async def _patiently(attempt: Callable[[], Awaitable[_T]]) -> _T:
    """Repeat a call that the transport, not the broker, turned away."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await attempt()
        except grpc.aio.AioRpcError as error:
            if not is_back_pressure(error):
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
