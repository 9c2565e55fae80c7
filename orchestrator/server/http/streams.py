"""What goes out in parts, as fast as its client takes it and no longer than it is there."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from orchestrator.limits import HTTP_PART_TAKEN_S

T = TypeVar("T")
OnHangUp = Callable[[], Awaitable[None]]


class _ClientGoneError(Exception):
    """It is connected and takes nothing."""


async def _nothing() -> None:
    return


class Stream(Response):
    """A response whose parts are made while it is sent.

    A client that hangs up, or takes nothing for `HTTP_PART_TAKEN_S`, ends the making. When the making fails,
    the connection is cut before its proper end, so that nobody takes the part for the whole; makers that can
    tell an error in their own way do that instead.
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
            await _taken(
                send, {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
            )
            async for part in parts:
                await _taken(send, {"type": "http.response.body", "body": part, "more_body": True})
            await _taken(send, {"type": "http.response.body", "body": b"", "more_body": False})


async def _taken(send: Send, message: dict[str, object]) -> None:
    try:
        async with asyncio.timeout(HTTP_PART_TAKEN_S):
            await send(message)
    except TimeoutError:
        raise _ClientGoneError from None


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
    try:
        working.result()
    except _ClientGoneError:
        return True
    return False


async def _hung_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def with_pauses(source: AsyncIterator[T], every_s: float) -> AsyncGenerator[T | None, None]:
    """What `source` gives, and None each time it has given nothing for a while."""
    upcoming = asyncio.ensure_future(anext(source, _END))
    try:
        while True:
            done, _ = await asyncio.wait((upcoming,), timeout=every_s)
            if not done:
                yield None
                continue
            given = upcoming.result()
            if isinstance(given, _End):
                return
            yield given
            upcoming = asyncio.ensure_future(anext(source, _END))
    finally:
        upcoming.cancel()
        await asyncio.gather(upcoming, return_exceptions=True)


@asynccontextmanager
async def closed_after(source: AsyncIterator[T]) -> AsyncIterator[AsyncIterator[T]]:
    """The source for the length of the block. A generator that is left in its middle ends now."""
    try:
        yield source
    finally:
        if isinstance(source, AsyncGenerator):
            await source.aclose()


class _End:
    """Behind the last."""


_END = _End()
