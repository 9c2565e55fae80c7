"""Messages on their way to the host, in order."""

import asyncio
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from typing import Any, TypeAlias

import grpc.aio
from rlm_proto.v1.sandbox_pb2 import AttachRequest

# An answer of many megabytes waits in the interpreter, not here.
_FULL = 16

_Writing: TypeAlias = Coroutine[Any, None, None]


class Outbox:
    """Lets callbacks send without waiting, one message after the other.

    A message with none before it is handed to gRPC within `post`: to wake a task for it would cost every
    cell a turn of the event loop. Output is bounded by the cell's limits and each cell has one end, so only
    answers can be long. `hold_back` is told to stop and resume their source.
    """

    def __init__(self, write: Callable[[AttachRequest], _Writing], hold_back: Callable[[bool], None]) -> None:
        self._write = write
        self._hold_back = hold_back
        self._queue: deque[AttachRequest] = deque()
        self._full = False
        self._writing: asyncio.Task[None] | None = None
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def post(self, message: AttachRequest) -> None:
        """Send after everything posted before."""
        self._queue.append(message)
        if self._writing is None:
            self._begin()
        self._balance()

    async def broken(self) -> None:
        """Wait until the stream breaks.

        Raises:
            grpc.aio.AioRpcError, asyncio.InvalidStateError: It broke.
        """
        await self._broken

    def _begin(self) -> None:
        if self._broken.done():
            return
        writing = self._write_queue()
        try:
            awaited = writing.send(None)
        except StopIteration:
            return
        self._writing = asyncio.create_task(_go_on(writing, awaited))
        self._writing.add_done_callback(self._ended)

    def _ended(self, _: asyncio.Task[None]) -> None:
        self._writing = None
        if self._queue:
            # Posted after the last look into the queue.
            self._begin()

    async def _write_queue(self) -> None:
        try:
            while self._queue:
                message = self._queue.popleft()
                self._balance()
                await self._write(message)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
            self._broken.set_exception(error)

    def _balance(self) -> None:
        full = len(self._queue) > _FULL
        if full != self._full:
            self._full = full
            self._hold_back(full)


@types.coroutine
def _go_on(begun: _Writing, awaited: object) -> Generator[Any, None, None]:
    """The rest of a coroutine whose first step has been taken and awaits this; 3.12 can begin a task so."""
    yield awaited
    yield from begun
