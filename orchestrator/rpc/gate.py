"""The gate of one run's socket: every call passes it before a service sees it, and no service sees junk.

On the wire a unary call is a stream of one message. Taken as a stream, its message can be waited for with a
deadline, looked at before it is parsed, and left in the guest while the guest holds too much already. gRPC
offers none of that for unary calls, so every method is served as a stream here.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeAlias, cast

import grpc
import grpc.aio
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

from orchestrator.abuse import Conduct, Offence, Pace
from orchestrator.errors import GuestProtocolError
from orchestrator.limits import (
    INLINE_WORK_BYTES,
    MAX_ANSWER_BYTES_UNREAD,
    MAX_ATTACH_MESSAGE_BYTES,
    MAX_CALLS_ON_SOCKET,
    MAX_MESSAGE_BYTES,
    MAX_REQUEST_BYTES_HELD,
    MAX_UPLOAD_PART_BYTES,
    REQUEST_ARRIVES_S,
    REQUESTS_RECEIVED_AT_ONCE,
    RESPONSE_TAKEN_S,
)
from orchestrator.rpc import status
from orchestrator.rpc.shape import check_shape

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
_Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"
_FoundHandler: TypeAlias = "grpc.RpcMethodHandler[Any, Any] | None"

_TOO_LONG = "a message is longer than its method allows"
_FRAMING_BYTES = 4_096
"""Of a message around the bytes that its own limit is about."""
_MAX_BYTES = {
    "Attach": MAX_ATTACH_MESSAGE_BYTES,
    "UploadContext": MAX_UPLOAD_PART_BYTES + _FRAMING_BYTES,
    "GetBudget": _FRAMING_BYTES,
}
"""Requests of these methods are shorter than a message may be."""


class Gate(grpc.aio.ServerInterceptor):
    """Bounds what one run's guest can make this process hold and do, and counts what it does wrong.

    One for a run, whatever sandboxes it has one after the other. Everything happens on the event loop.
    """

    def __init__(self) -> None:
        self.conduct = Conduct()
        self.shut = asyncio.Event()
        """Set when the guest went too far: its servers stop at once."""
        self.on_shut: Callable[[], None] = lambda: None
        """Called once, then."""
        self._shut_with: list[asyncio.Event] = []
        self._pace = Pace()
        self._calls = 0
        self._held_bytes = 0
        self._less_held = asyncio.Event()
        self._unread_bytes = 0
        self._less_unread = asyncio.Event()
        self._receiving = asyncio.Semaphore(REQUESTS_RECEIVED_AT_ONCE)
        self._guarded: dict[str, tuple[_Handler, _Handler]] = {}
        self._full: _Handler = grpc.stream_stream_rpc_method_handler(_turn_away)

    def blame(self, offence: Offence) -> None:
        """Count an offence; the one too many shuts the gate."""
        if self.conduct.blame(offence):
            self.shut.set()
            for also in self._shut_with:
                also.set()
            self.on_shut()

    def shut_with(self, also: asyncio.Event) -> None:
        """Set this too when the gate is shut: the server of a sandbox was there before its run."""
        self._shut_with.append(also)
        if self.shut.is_set():
            also.set()

    async def pace(self) -> None:
        """Wait for as long as a call that costs its guest nothing has to."""
        delay_s = self._pace.delay_s(time.monotonic())
        if delay_s:
            await asyncio.sleep(delay_s)

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[_FoundHandler]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> _FoundHandler:
        """See `grpc.aio.ServerInterceptor`. Called for every call, also of methods that do not exist."""
        handler = await continuation(handler_call_details)
        if handler is None:
            self.blame(Offence.UNKNOWN_METHOD)
            return None
        if self._calls >= MAX_CALLS_ON_SOCKET:
            self.blame(Offence.TURNED_AWAY)
            return self._full
        method = handler_call_details.method
        known = self._guarded.get(method)
        if known is None or known[0] is not handler:
            # Another sandbox of the run has handlers of its own.
            known = self._guarded[method] = handler, self._guard(method.rpartition("/")[2], handler)
        return known[1]

    def _guard(self, method: str, handler: _Handler) -> _Handler:
        intake = _Intake(self, handler.request_deserializer, _MAX_BYTES.get(method, MAX_MESSAGE_BYTES))
        inner: Any
        match handler.request_streaming, handler.response_streaming:
            case False, False:
                inner = handler.unary_unary

                async def unary(_: object, context: _Context) -> Any:
                    async with self._call(context), intake.one(context) as request:
                        return await inner(request, context)

                return _stream_unary(unary, handler)
            case False, True:
                inner = handler.unary_stream

                async def answers(_: object, context: _Context) -> None:
                    async with (
                        self._call(context),
                        intake.one(context) as request,
                        aclosing(inner(request, context)) as parts,
                    ):
                        async for part in parts:
                            await self._write(context, part)

                return _stream_stream(answers, handler)
            case True, False:
                inner = handler.stream_unary

                async def parts(_: object, context: _Context) -> Any:
                    async with self._call(context), aclosing(intake.all(context)) as requests:
                        return await inner(requests, context)

                return _stream_unary(parts, handler)
            case _:
                inner = handler.stream_stream

                async def stream(_: object, context: _Context) -> None:
                    async with self._call(context), aclosing(intake.endless(context)) as requests:
                        try:
                            await inner(requests, context)
                        except grpc.aio.AbortError:
                            self.blame(Offence.REFUSED)
                            raise

                return _stream_stream(stream, handler)

    @asynccontextmanager
    async def _call(self, context: _Context) -> AsyncIterator[None]:
        """One of the calls served at once. What no service catches becomes a status here."""
        self._calls += 1
        try:
            yield
        except GuestProtocolError as error:
            code, detail = status.to_wire(error)
            await context.abort(code, detail.message, ((status.DETAIL_KEY, detail.SerializeToString()),))
        finally:
            self._calls -= 1

    async def receive(self, context: _Context, max_bytes: int) -> bytes | None:
        """The next message, which counts as held until `release`; None at the end of the stream.

        Raises:
            GuestProtocolError: It is too long, or did not arrive in time.
        """
        async with self._room(max_bytes):
            try:
                async with asyncio.timeout(REQUEST_ARRIVES_S):
                    data: Any = await context.read()
            except TimeoutError:
                raise self.malformed(f"no message within {REQUEST_ARRIVES_S:g} s") from None
            if data is grpc.aio.EOF:
                return None
            if len(data) > max_bytes:
                raise self.malformed(_TOO_LONG)
            self._held_bytes += len(data)
            return bytes(data)

    def malformed(self, why: str) -> GuestProtocolError:
        """The error to raise for junk, which is counted here: a service may turn it into a status itself."""
        self.blame(Offence.MALFORMED)
        return GuestProtocolError(why)

    async def _write(self, context: _Context, part: Any) -> None:
        try:
            async with asyncio.timeout(RESPONSE_TAKEN_S):
                await context.write(part)
        except TimeoutError:
            raise self.malformed(f"an answer was not taken within {RESPONSE_TAKEN_S:g} s") from None

    @asynccontextmanager
    async def _room(self, max_bytes: int) -> AsyncIterator[None]:
        """Room for one more message. Short ones find it always: asking for the budget must not wait."""
        if max_bytes <= INLINE_WORK_BYTES:
            yield
            return
        async with self._receiving:
            while self._held_bytes >= MAX_REQUEST_BYTES_HELD:
                self._less_held.clear()
                await self._less_held.wait()
            yield

    async def room_for_answer(self, context: _Context, length_bytes: int) -> None:
        """Wait until what the guest has not read of its long answers leaves room for one more.

        To be called before the answer is encoded. The room is given back when the call is over, which is when
        the last byte of it has gone to the guest, or the guest has.
        """
        if length_bytes <= INLINE_WORK_BYTES:
            return
        while self._unread_bytes and self._unread_bytes + length_bytes > MAX_ANSWER_BYTES_UNREAD:
            self._less_unread.clear()
            await self._less_unread.wait()
        self._unread_bytes += length_bytes

        def taken(_: _Context) -> None:
            self._unread_bytes -= length_bytes
            self._less_unread.set()

        context.add_done_callback(cast(Any, taken))  # its type in the stubs is a class of their own

    def release(self, held_bytes: int) -> None:
        """A message and what was made of it are gone."""
        self._held_bytes -= held_bytes
        self._less_held.set()


class _Intake:
    """Receives the messages of one method."""

    def __init__(self, gate: Gate, parse: Callable[[bytes], Any] | None, max_bytes: int) -> None:
        self._gate = gate
        self._parse = parse
        self._max_bytes = max_bytes
        # The generated code hands over `SomeMessage.FromString`.
        descriptor = getattr(getattr(parse, "__self__", None), "DESCRIPTOR", None)
        self._shape = descriptor if isinstance(descriptor, Descriptor) else None

    @asynccontextmanager
    async def one(self, context: _Context) -> AsyncIterator[Any]:
        """The only message of a unary call."""
        try:
            data = await self._gate.receive(context, self._max_bytes)
        except asyncio.CancelledError:
            self._gate.blame(Offence.RESET)
            raise
        if data is None:
            # What a call looks like that was given up at once.
            self._gate.blame(Offence.RESET)
            await context.abort(grpc.StatusCode.CANCELLED, "a call without a request")
        held_bytes = len(data)
        try:
            request = self.read(data)
            del data
            yield request
        finally:
            self._gate.release(held_bytes)

    async def all(self, context: _Context) -> AsyncGenerator[Any, None]:
        """The messages of a stream that has to go on until it ends."""
        while (data := await self._gate.receive(context, self._max_bytes)) is not None:
            held_bytes = len(data)
            try:
                yield self.read(data)
            finally:
                self._gate.release(held_bytes)

    async def endless(self, context: _Context) -> AsyncGenerator[Any, None]:
        """The messages of a stream that lives as long as the run, and is silent for most of it."""
        while (data := await context.read()) is not grpc.aio.EOF:
            if len(data) > self._max_bytes:
                raise self._gate.malformed(_TOO_LONG)
            yield self.read(data)

    def read(self, data: bytes) -> Any:
        """The message in the bytes.

        Raises:
            GuestProtocolError: There is none.
        """
        if self._parse is None:
            return data
        try:
            if self._shape is not None:
                check_shape(data, self._shape)
            return self._parse(data)
        except GuestProtocolError as error:
            raise self._gate.malformed(str(error)) from None
        except DecodeError:
            raise self._gate.malformed("a message that is none of its method's") from None


async def _turn_away(_: object, context: _Context) -> None:
    # Without a detail of ours: back-pressure of the transport, not a refusal (design, "Transport").
    await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls at once")


def _stream_unary(behavior: Any, like: _Handler) -> _Handler:
    return grpc.stream_unary_rpc_method_handler(behavior, response_serializer=like.response_serializer)


def _stream_stream(behavior: Any, like: _Handler) -> _Handler:
    return grpc.stream_stream_rpc_method_handler(behavior, response_serializer=like.response_serializer)
