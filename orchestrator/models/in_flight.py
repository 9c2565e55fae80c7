"""Attempts under way, and how all of them end when their client is closed."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from orchestrator.errors import Billing, ModelError

_ENDS_S = 5.0
"""An attempt that was ended and lets go of its connection takes one turn of the event loop or a few."""


class InFlight:
    """The attempts a client has under way: each has its time, and closing fails them all."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self._closed = False
        self._idle = asyncio.Event()

    @asynccontextmanager
    async def attempt(self, timeout_s: float) -> AsyncIterator[None]:
        """The block is one attempt.

        Raises:
            ModelError: Its time was up, or the client was closed.
        """
        if self._closed:
            raise ModelError("the model client is closed", billing=Billing.NOTHING, retryable=False)
        limit = asyncio.timeout(timeout_s)
        try:
            async with limit:
                self._limits.add(limit)
                self._idle.clear()
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            slow = f"no reply from the model in {timeout_s:g} s"
            why = "the model client was closed" if self._closed else slow
            raise ModelError(why, billing=Billing.UNKNOWN, retryable=not self._closed) from None
        finally:
            self._limits.discard(limit)
            if not self._limits:
                self._idle.set()

    async def close(self) -> None:
        """Let no other attempt begin, and end every one under way: when this returns, each knows why."""
        self._closed = True
        for limit in self._limits:
            # One that has run out is ending already, and may not be changed.
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())
        if self._limits:
            with suppress(TimeoutError):
                async with asyncio.timeout(_ENDS_S):
                    await self._idle.wait()
