"""Who gets how much of the clients' gRPC port: every call passes here before its message is received.

On the wire a unary call is a stream of one message. Taken as a stream it begins with its headers: who asks is
known before a byte of what is asked is received, and the message can be waited for with a deadline. gRPC has
neither for unary calls, so a stranger could hold every place by sending headers and nothing else.

Rules:

1. A call of a service that takes a key begins with the key. Without a good one it ends there.
2. A tenant has so many calls at once, and so many messages being received; one more call is refused, one more
   message is left in its client. What one tenant does costs another nothing.
3. A message arrives in time, and an answer's part is taken in time, or the call ends.
4. Calls that need no key (health, reflection) have few places. The newest gets one: the oldest call makes
   room, so that whoever holds all of them keeps nobody from asking whether the server is well.
"""

import asyncio
import inspect
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from orchestrator.errors import GuestProtocolError, UnavailableError
from orchestrator.limits import INLINE_WORK_BYTES
from orchestrator.rpc.shape import check_shape

MAX_CALLS_OF_TENANT = 2_000
"""Streams included: as over HTTP, and half of all."""
MAX_UPLOADS_OF_TENANT = 32
"""Each holds a part of up to a message's length."""
MAX_CALLS_WITHOUT_KEY = 64
"""Each may hold a message of a stranger's for as long as it may take to arrive."""
MESSAGES_RECEIVED_AT_ONCE = 16
"""Of one tenant; a long one counts until its call is over. A message may have 8 MB."""
MESSAGE_ARRIVES_S = 30.0
"""From a call's start to its message, from one part of an upload to the next."""
STRANGERS_MESSAGE_ARRIVES_S = 5.0
PART_TAKEN_S = 60.0
"""For a client to take a part of an answer, as over HTTP; then it counts as gone."""

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_FoundHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"

Admit = Callable[[Context], Awaitable[str]]
"""Finds out who calls, and returns whose calls are counted together. Raises for a call without a good key."""
Telling = Callable[[Context], AbstractAsyncContextManager[None]]
"""Ends a call with the status of what goes wrong within a block."""


@dataclass(slots=True)
class _Share:
    """What one tenant has of the port now."""

    calls: int = 0
    uploads: int = 0
    receiving: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MESSAGES_RECEIVED_AT_ONCE))


class ClientGate(grpc.aio.ServerInterceptor):
    """Of one port."""

    def __init__(self, admit: Mapping[str, Admit], telling: Telling) -> None:
        """Nobody is let in yet.

        Args:
            admit: By the full name of a service; one that is not here takes no key, or looks for it itself.
            telling: How errors are told.
        """
        self._admit = admit
        self._telling = telling
        self._shares: dict[str, _Share] = {}
        self._open: OrderedDict[asyncio.Timeout, None] = OrderedDict()
        """Calls without a key, oldest first."""
        self._guarded: dict[str, tuple[_Handler, _Handler]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_FoundHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _FoundHandler:
        """See `grpc.aio.ServerInterceptor`."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return None
        method = handler_call_details.method
        known = self._guarded.get(method)
        if known is None or known[0] is not handler:
            admit = self._admit.get(method.split("/")[1])
            known = self._guarded[method] = handler, self._guard(handler, admit)
        return known[1]

    def _guard(self, handler: _Handler, admit: Admit | None) -> _Handler:
        inner: Any = (
            handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        )
        intake = _Intake(handler.request_deserializer)

        @asynccontextmanager
        async def requests_of(context: Context) -> AsyncIterator[Any]:
            async with (
                self._telling(context),
                self._place(context, admit, handler.request_streaming) as share,
            ):
                if handler.request_streaming:
                    async with aclosing(intake.all(context)) as requests:
                        yield requests
                else:
                    async with intake.one(context, share) as request:
                        yield request

        if not handler.response_streaming:

            async def answer(_: object, context: Context) -> Any:
                async with requests_of(context) as request:
                    return await inner(request, context)

            return grpc.stream_unary_rpc_method_handler(
                answer, response_serializer=handler.response_serializer
            )

        async def answers(_: object, context: Context) -> None:
            async with requests_of(context) as request:
                if not inspect.isasyncgenfunction(inner):
                    await inner(request, context)
                    return
                async with aclosing(inner(request, context)) as parts:
                    async for part in parts:
                        await _give(context, part)

        return grpc.stream_stream_rpc_method_handler(answers, response_serializer=handler.response_serializer)

    @asynccontextmanager
    async def _place(
        self, context: Context, admit: Admit | None, is_upload: bool
    ) -> AsyncIterator[_Share | None]:
        """A place among the calls of whoever calls; None is a stranger's."""
        if admit is None:
            async with self._newest():
                yield None
            return
        who = await admit(context)
        share = self._shares.setdefault(who, _Share())
        if share.calls >= MAX_CALLS_OF_TENANT or (is_upload and share.uploads >= MAX_UPLOADS_OF_TENANT):
            # Without a detail of ours: it may come again at once, as with every back-pressure of a transport.
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once")
        share.calls += 1
        share.uploads += is_upload
        try:
            yield share
        finally:
            share.calls -= 1
            share.uploads -= is_upload
            if not share.calls:
                del self._shares[who]

    @asynccontextmanager
    async def _newest(self) -> AsyncIterator[None]:
        async with asyncio.timeout(None) as place:
            while len(self._open) >= MAX_CALLS_WITHOUT_KEY:
                # Its time is over: it ends as one that took too long.
                self._open.popitem(last=False)[0].reschedule(0.0)
            self._open[place] = None
            try:
                yield
            finally:
                self._open.pop(place, None)


class _Intake:
    """Receives the messages of one method."""

    def __init__(self, parse: Callable[[bytes], Any] | None) -> None:
        self._parse = parse
        # The generated code hands over `SomeMessage.FromString`.
        descriptor = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
        self._shape = descriptor if isinstance(descriptor, Descriptor) else None

    @asynccontextmanager
    async def one(self, context: Context, share: _Share | None) -> AsyncIterator[Any]:
        """The only message of a call."""
        if share is None:
            yield self._read(await _received(context, STRANGERS_MESSAGE_ARRIVES_S))
            return
        async with share.receiving:
            data = await _received(context, MESSAGE_ARRIVES_S)
            request = self._read(data)
            if len(data) > INLINE_WORK_BYTES:
                del data
                yield request
                return
        yield request

    async def all(self, context: Context) -> AsyncGenerator[Any, None]:
        """Those of a stream, as they are wanted."""
        while True:
            data = await _received(context, MESSAGE_ARRIVES_S, may_end=True)
            if data is None:
                return
            yield self._read(data)

    def _read(self, data: bytes | None) -> Any:
        if self._parse is None or data is None:
            return data
        try:
            if self._shape is not None:
                check_shape(data, self._shape)
            return self._parse(data)
        except DecodeError:
            raise GuestProtocolError("a message that is none of its method's") from None


async def _received(context: Context, within_s: float, *, may_end: bool = False) -> Any:
    try:
        async with asyncio.timeout(within_s):
            data: Any = await context.read()
    except TimeoutError:
        raise UnavailableError(f"no message came within {within_s:g} seconds") from None
    if data is not grpc.aio.EOF:
        return data
    if not may_end:
        await context.abort(grpc.StatusCode.CANCELLED, "a call without a message")
    return None


async def _give(context: Context, part: Any) -> None:
    try:
        async with asyncio.timeout(PART_TAKEN_S):
            await context.write(part)
    except TimeoutError:
        raise UnavailableError(f"nothing was taken within {PART_TAKEN_S:g} seconds") from None
