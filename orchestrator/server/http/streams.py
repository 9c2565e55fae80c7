"""What goes out in parts, as fast as its client takes it and no longer than it is there."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
_BATCH = 64
"""Entries of a stream that wait for a slow client; then their source does."""

OnHangUp = Callable[[], Awaitable[None]]


async def _nothing() -> None:
    return


class Stream(Response):
    """A response whose parts are made while it is sent.

    A client that hangs up ends the making. When the making fails, the connection is cut before its proper
    end, so that nobody takes the part for the whole; makers that can tell an error in their own way do that
    instead.
    """

    def __init__(
        self,
        parts: AsyncGenerator[bytes, None],
        *,
        media_type: str,
        headers: Mapping[str, str] | None = None,
        on_hang_up: OnHangUp = _nothing,
    ) -> None:
        super().__init__(status_code=200, headers=headers, media_type=media_type)
        # Starlette's `Response` knows a length of none.
        del self.headers["content-length"]
        self._parts = parts
        self._on_hang_up = on_hang_up

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it; ASGI's entry."""
        if await _outlived(self._send(send), receive):
            await self._on_hang_up()

    async def _send(self, send: Send) -> None:
        async with aclosing(self._parts) as parts:
            await send(
                {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for part in parts:
                await send({"type": "http.response.body", "body": part, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


async def while_connected(work: Awaitable[T], request: Request, on_hang_up: OnHangUp) -> T | None:
    """The result of `work`, or None when its client hung up first. The body must have been read."""
    result: list[T] = []

    async def kept() -> None:
        result.append(await work)

    if await _outlived(kept(), request.receive):
        await on_hang_up()
        return None
    return result[0]


async def _outlived(work: Awaitable[None], receive: Receive) -> bool:
    """Whether the connection ended before `work`, which is then cancelled.

    A cancellation from outside, the server's end, is no hang-up.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_hung_up(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        is_left = not working.done()
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)
    if is_left:
        return True
    working.result()
    return False


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def in_batches(source: AsyncIterator[T], every_s: float) -> AsyncGenerator[Sequence[T], None]:
    """What `source` gives, as much as there is each time; nothing at all when it has paused for a while.

    A thousand streams of one run tree send each of its events a thousand times: what is there together is
    sent together. A reader who is slower than the source holds it up after `_BATCH`.
    """
    batch: list[T] = []
    news, room = asyncio.Event(), asyncio.Event()

    async def read() -> None:
        try:
            async for one in source:
                batch.append(one)
                news.set()
                if len(batch) >= _BATCH:
                    room.clear()
                    await room.wait()
        finally:
            news.set()

    reading = asyncio.ensure_future(read())
    try:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(every_s):
                    await news.wait()
            news.clear()
            given, batch[:] = tuple(batch), []
            room.set()
            if reading.done():
                if given:
                    yield given
                reading.result()
                return
            yield given
    finally:
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)


@asynccontextmanager
async def closed_after(source: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """The source for the length of the block. A generator that is left in its middle ends now."""
    try:
        yield source
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()
