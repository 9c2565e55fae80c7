"""One server, asked with patience: every call has a deadline, and what may pass is tried again."""

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import Any, Protocol, TypeVar

import grpc.aio
from rlm_proto.v1 import run_pb2_grpc

from orchestrator.client.failures import failure_of
from orchestrator.client.patience import Patience, Row
from orchestrator.errors import OrchestratorError

CALL_S = 30.0
"""For one attempt at a call that sends and gets little."""

Response = TypeVar("Response")
Response_co = TypeVar("Response_co", covariant=True)


class Method(Protocol[Response_co]):
    """A unary method of the generated stub."""

    def __call__(self, request: Any, /, *, timeout: float, metadata: Any) -> Awaitable[Response_co]:
        """Send a request."""
        ...


class Wire:
    """The stub, and what every call on it needs."""

    def __init__(
        self,
        channel: grpc.aio.Channel,
        *,
        address: str,
        metadata: tuple[tuple[str, str], ...],
        patience: Patience,
        say: Callable[[str], None],
    ) -> None:
        """Wrap a channel, which stays its owner's.

        Args:
            channel: To the server.
            address: Its address, for sentences.
            metadata: Goes with every call.
            patience: How long it may be away.
            say: Told in one line when it is away, and when it is back.
        """
        self.channel = channel
        self.stub: run_pb2_grpc.RunServiceAsyncStub = run_pb2_grpc.RunServiceStub(channel)
        self.address = address
        self.metadata = metadata
        self.patience = patience
        self.say = say

    def row(self, most_s: float) -> Row:
        """To count failures in a row."""
        return Row(most_s, random.random)

    async def call(self, method: Method[Response], request: object, *, timeout_s: float = CALL_S) -> Response:
        """The response to a request that does the same whether it is carried out once or twice.

        Raises:
            UnavailableError: The server was away for longer than there is patience.
            OrchestratorError: See `failures`.
        """
        row = self.row(self.patience.call_s)
        while True:
            try:
                response = await method(request, timeout=timeout_s, metadata=self.metadata)
            except grpc.aio.AioRpcError as error:
                failure = failure_of(error, self.address)
                if not failure.passes:
                    raise failure.error from error
                await self.pause(row, failure.error)
            else:
                if row.is_open:
                    self.say(f"{self.address} is back")
                return response

    async def once(self, method: Method[Response], request: object) -> Response:
        """The response to a request that is not to be carried out twice.

        Raises:
            OrchestratorError: See `failures`. Of what passes it is not known whether it was carried out.
        """
        try:
            return await method(request, timeout=CALL_S, metadata=self.metadata)
        except grpc.aio.AioRpcError as error:
            raise failure_of(error, self.address).error from error

    async def change(
        self, method: Method[Response], request: object, *, already: type[OrchestratorError]
    ) -> Response | None:
        """Likewise for a request whose repeat is refused when the first one was carried out.

        Args:
            method: What to call.
            request: What to send.
            already: The refusal of such a repeat. To a first attempt it is a refusal like any other.

        Returns:
            None when an earlier attempt was carried out and its response was lost.
        """
        attempts = 0

        async def counted(request: Any, /, *, timeout: float, metadata: Any) -> Response:
            nonlocal attempts
            attempts += 1
            return await method(request, timeout=timeout, metadata=metadata)

        try:
            return await self.call(counted, request)
        except already:
            if attempts == 1:
                raise
            return None

    async def pause(self, row: Row, error: OrchestratorError, what_then: str = "") -> None:
        """Wait before the next attempt, and say so once in a row.

        Raises:
            OrchestratorError: The error itself: the time is up.
        """
        is_first = not row.is_open
        pause_s = row.failed(time.monotonic())
        if pause_s is None:
            raise error
        if is_first:
            self.say(f"{error}{what_then or '; trying again'}")
        await asyncio.sleep(pause_s)
