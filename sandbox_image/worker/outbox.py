"""Messages on their way to the host, in order."""

import asyncio
from collections.abc import Awaitable, Callable

from rlm_proto.v1.sandbox_pb2 import AttachRequest

# An answer of many megabytes waits in the interpreter, not here.
_FULL = 16


class Outbox:
    """A queue that lets callbacks send without waiting, and one task that writes.

    Output is bounded by the cell's limits and each cell has one end, so only answers can be long. `hold_back`
    is told to stop and resume their source.
    """

    def __init__(
        self, write: Callable[[AttachRequest], Awaitable[None]], hold_back: Callable[[bool], None]
    ) -> None:
        self._write = write
        self._hold_back = hold_back
        self._queue: asyncio.Queue[AttachRequest] = asyncio.Queue()
        self._full = False

    def post(self, message: AttachRequest) -> None:
        """Send after everything posted before."""
        self._queue.put_nowait(message)
        self._balance()

    async def run(self) -> None:
        """Write until the stream breaks.

        Raises:
            grpc.aio.AioRpcError: It broke.
        """
        while True:
            message = await self._queue.get()
            self._balance()
            await self._write(message)

    def _balance(self) -> None:
        full = self._queue.qsize() > _FULL
        if full != self._full:
            self._full = full
            self._hold_back(full)
