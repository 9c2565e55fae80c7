import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orchestrator.errors import Billing, ModelError


class InFlight:
    """The attempts a client has under way: each has its time, and closing fails them all."""

    def __init__(self) -> None:
        self._limits: set[asyncio.Timeout] = set()
        self._closed = False

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
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            slow = f"no reply from the model in {timeout_s:g} s"
            why = "the model client was closed" if self._closed else slow
            raise ModelError(why, billing=Billing.UNKNOWN, retryable=not self._closed) from None
        finally:
            self._limits.discard(limit)

    def close(self) -> None:
        """End every attempt under way and let no other begin."""
        self._closed = True
        for limit in self._limits:
            # One that has run out is ending already, and may not be changed.
            if not limit.expired():
                limit.reschedule(asyncio.get_running_loop().time())
