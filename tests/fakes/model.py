"""A model that does what it was told, in order, and remembers what it was asked."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from orchestrator.conversation import Reply, StopReason
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.pricing import Usage

USAGE = Usage(input=100, output=10)
"""What every reply costs."""

Step: TypeAlias = Reply | BaseException | Callable[[ModelRequest], Awaitable[Reply]]


class FakeModel:
    """A `ModelClient`. `served` is its own book: what it worked for, whether or not anybody got the reply."""

    def __init__(self, *steps: Step, otherwise: Step | None = None) -> None:
        """Args:
        steps: What to do with each request, in order.
        otherwise: What to do with all further ones; without it they are a failure of the test.
        """
        self._steps = list(steps)
        self._otherwise = otherwise
        self.asked: list[ModelRequest] = []
        self.served: list[Usage] = []
        self.in_flight = 0
        self.in_flight_at_most = 0

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient`."""
        self.asked.append(request)
        step = self._steps.pop(0) if self._steps else self._otherwise
        if step is None:
            raise AssertionError(f"unscripted model call #{len(self.asked)}")
        self.in_flight += 1
        self.in_flight_at_most = max(self.in_flight_at_most, self.in_flight)
        try:
            if isinstance(step, BaseException):
                raise step
            self.served.append(USAGE)
            return Completion(step if isinstance(step, Reply) else await step(request), USAGE)
        finally:
            self.in_flight -= 1

    async def aclose(self) -> None:
        """See `ModelClient`."""


def says(text: str, stop: StopReason = StopReason.END_TURN) -> Reply:
    """A reply of text."""
    return Reply(({"type": "text", "text": text},) if text else (), stop)


def runs(code: str) -> Reply:
    """A reply with a cell."""
    call = {"type": "tool_use", "id": f"toolu_{abs(hash(code))}", "name": "python", "input": {"code": code}}
    return Reply((call,), StopReason.TOOL_USE)


def after(steps: int, reply: Reply) -> Callable[[ModelRequest], Awaitable[Reply]]:
    """A reply that takes so many turns of the event loop."""

    async def reply_later(_request: ModelRequest) -> Reply:
        for _ in range(steps):
            await asyncio.sleep(0)
        return reply

    return reply_later


def when(event: asyncio.Event, reply: Reply) -> Callable[[ModelRequest], Awaitable[Reply]]:
    """A reply that comes once the event is set."""

    async def reply_then(_request: ModelRequest) -> Reply:
        await event.wait()
        return reply

    return reply_then
