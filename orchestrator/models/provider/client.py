"""The orchestrator's side: a `ModelClient` that asks the provider process.

Retrying, holds and the circuit breaker stay with the orchestrator, which settles them; the connections, and
what a provider's failure means, are the provider process's. Both give a call up at its time-out: the one that
waits must not depend on the one that is waited for.
"""

import asyncio
import itertools
from contextlib import suppress

from google.protobuf.message import DecodeError
from rlm_proto.v1 import provider_pb2 as pb

from orchestrator.errors import Billing, ModelError
from orchestrator.models.in_flight import InFlight
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.models.provider import frames, wire

_GONE = "the process that holds the provider's credentials has ended; only a new run can hand them over again"


class ProviderClient:
    """A `ModelClient` over a channel to a provider process that has opened.

    If the process ends, calls in flight fail as maybe billed, and all later ones unbilled. It is not started
    again: nobody else has the credentials.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """The channel is this object's from now on."""
        self._reader = reader
        self._writer = writer
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Completion | ModelError]] = {}
        self._in_flight = InFlight()
        self._is_gone = False
        self._replies = asyncio.create_task(self._read_replies())

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient.complete`."""
        async with self._in_flight.attempt(request.timeout_s):
            outcome = await self._ask(request)
        if isinstance(outcome, ModelError):
            raise outcome
        return outcome

    async def aclose(self) -> None:
        """See `ModelClient.aclose`. The provider process ends when it sees the channel's end."""
        # Calls in flight first: they are to hear that they were given up, and not that the process is gone.
        await self._in_flight.close()
        self._replies.cancel()
        self._writer.transport.abort()
        await asyncio.wait((self._replies,))
        with suppress(OSError):
            await self._writer.wait_closed()

    async def _ask(self, request: ModelRequest) -> Completion | ModelError:
        if self._is_gone:
            return ModelError(_GONE, billing=Billing.NOTHING, retryable=False)
        call_id = next(self._ids)
        answer: asyncio.Future[Completion | ModelError] = asyncio.get_running_loop().create_future()
        self._waiting[call_id] = answer
        try:
            await self._send(wire.model_call(call_id, request))
            return await answer
        finally:
            del self._waiting[call_id]
            if (answer.cancelled() or not answer.done()) and not self._writer.transport.is_closing():
                # Given up here, or out of time. Nothing waits for room.
                frames.put(self._writer, wire.cancel(call_id))

    async def _send(self, message: pb.ToProvider) -> None:
        try:
            await frames.send(self._writer, message)
        except OSError:
            # The other side is gone, and the reader is about to say so to all who wait.
            return

    async def _read_replies(self) -> None:
        """Until the channel ends, in whatever way."""
        try:
            while (payload := await frames.receive(self._reader)) is not None:
                self._settle(pb.FromProvider.FromString(payload))
        # What the other side sent makes no sense, or it is gone: either way nobody will be answered.
        except (OSError, ValueError, DecodeError):
            pass
        finally:
            self._is_gone = True
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_result(ModelError(_GONE, billing=Billing.UNKNOWN, retryable=False))
            self._writer.transport.abort()

    def _settle(self, told: pb.FromProvider) -> None:
        call_id = told.completed.id or told.failed.id
        answer = self._waiting.get(call_id)
        if answer is None or answer.done():
            # Of a call that was cancelled while its reply was on the way.
            return
        answer.set_result(_outcome(told))


def _outcome(told: pb.FromProvider) -> Completion | ModelError:
    if told.HasField("failed"):
        return wire.failure_of(told.failed)
    try:
        return wire.completion_of(told.completed)
    except (ValueError, RecursionError):
        return ModelError("the provider's reply cannot be read", billing=Billing.UNKNOWN, retryable=False)
