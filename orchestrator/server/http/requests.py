"""What comes in: keys, and bodies under their limits."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TypeVar

from pydantic import BaseModel, ValidationError
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request

from orchestrator.errors import InvalidRequestError, UnauthenticatedError, UnavailableError
from orchestrator.limits import (
    HTTP_BODY_PART_S,
    HTTP_BODY_S,
    HTTP_LINGER_S,
    INLINE_WORK_BYTES,
    JSON_STRUCTURE_COST,
    MAX_HTTP_BODIES_BYTES,
    MAX_JSON_STRUCTURE_BYTES,
)
from orchestrator.server.http.refusals import RequestRefusedError, too_large

Model = TypeVar("Model", bound=BaseModel)
T = TypeVar("T")
LET_IN = "let_in"
"""In a request's state: what to call when its key was good, where the server wants to know."""


def key_of(headers: Headers) -> str | None:
    """The API key of a request: `Authorization: Bearer KEY`, or `x-api-key: KEY`.

    Raises:
        UnauthenticatedError: There are two, and they differ: which one counts must not be a guess.
    """
    scheme, _, credentials = headers.get("authorization", "").partition(" ")
    keys = {headers.get("x-api-key", "").strip()}
    if scheme.lower() == "bearer":
        keys.add(credentials.strip())
    keys.discard("")
    if len(keys) > 1:
        raise UnauthenticatedError("there are two different keys in this request")
    return keys.pop() if keys else None


def let_in(request: Request) -> None:
    """Tell the server that this request's key was good, where it wants to know."""
    told = request.scope.get("state", {}).get(LET_IN)
    if told is not None:
        told()


class Room:
    """The memory for bodies that are under way, shared by all requests of one app."""

    def __init__(self, max_bytes: int = MAX_HTTP_BODIES_BYTES) -> None:
        self._left_bytes = max_bytes

    def hold(self) -> "HeldRoom":
        """For one request; a context manager that gives back what was taken."""
        return HeldRoom(self)

    def take(self, size_bytes: int) -> None:
        """Raise UnavailableError when there is too little."""
        if size_bytes > self._left_bytes:
            raise UnavailableError("too many long requests are under way")
        self._left_bytes -= size_bytes

    def give_back(self, size_bytes: int) -> None:
        """It is free again."""
        self._left_bytes += size_bytes


class HeldRoom:
    """What one request has taken of the room."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._held_bytes = 0

    def __enter__(self) -> "HeldRoom":
        return self

    def __exit__(self, *_exc: object) -> None:
        self.release()

    def release(self) -> None:
        """Give all of it back, before the request is over or at its end."""
        self._room.give_back(self._held_bytes)
        self._held_bytes = 0

    def take(self, size_bytes: int) -> None:
        """So much more of it has come."""
        self._room.take(size_bytes)
        self._held_bytes += size_bytes


async def parts_of(request: Request) -> AsyncGenerator[bytes, None]:
    """The body as it comes, never slower than a client that is still there.

    Raises:
        RequestRefusedError: It stopped coming.
        ClientDisconnect: Its client is gone.
    """
    async with aclosing(request.stream()) as stream:
        while True:
            try:
                async with asyncio.timeout(HTTP_BODY_PART_S):
                    part = await anext(stream, None)
            except TimeoutError:
                raise _too_slow(HTTP_BODY_PART_S) from None
            if part is None:
                return
            if part:
                yield part


def _too_slow(within_s: float) -> RequestRefusedError:
    return RequestRefusedError(408, "timeout_error", f"the body did not come within {within_s:.0f} seconds")


async def read_body(request: Request, *, max_bytes: int, room: HeldRoom) -> bytes:
    """The whole body.

    Raises:
        RequestRefusedError: It is too long, of a wrong type, or stopped coming.
        UnavailableError: There is no room for it now.
    """
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > max_bytes:
        raise too_large(max_bytes)
    if request.headers.get("content-encoding", "identity") != "identity":
        raise RequestRefusedError(415, "invalid_request_error", "bodies are taken uncompressed only")
    parts: list[bytes] = []
    length_bytes = 0
    try:
        async with asyncio.timeout(HTTP_BODY_S), aclosing(parts_of(request)) as incoming:
            async for part in incoming:
                length_bytes += len(part)
                if length_bytes > max_bytes:
                    raise too_large(max_bytes)
                room.take(len(part))
                parts.append(part)
    except TimeoutError:
        raise _too_slow(HTTP_BODY_S) from None
    return b"".join(parts)


async def read_json(request: Request, model: type[Model], *, max_bytes: int, room: HeldRoom) -> Model:
    """The body as what it must be.

    Raises:
        RequestRefusedError: As `read_body`.
        InvalidRequestError: It is no JSON, or not of this form. The sentence names the first field.
        UnavailableError: There is no room for it now.
    """
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        # What a browser sends from a foreign page without asking is none.
        raise RequestRefusedError(415, "invalid_request_error", "the content-type must be application/json")
    body = await read_body(request, max_bytes=max_bytes, room=room)
    structure_bytes = await _worked(_structure_bytes, body)
    if structure_bytes > MAX_JSON_STRUCTURE_BYTES:
        raise RequestRefusedError(
            413, "request_too_large", "the body has too many parts; join them, or upload them"
        )
    room.take(structure_bytes * JSON_STRUCTURE_COST)
    try:
        return await _worked(model.model_validate_json, body)
    except ValidationError as error:
        raise InvalidRequestError(first_fault(error)) from None


async def _worked(work: Callable[[bytes], T], body: bytes) -> T:
    return work(body) if len(body) <= INLINE_WORK_BYTES else await asyncio.to_thread(work, body)


def _structure_bytes(body: bytes) -> int:
    """How much of a JSON text is outside of its strings, each of which counts too, up to where a parser gives
    up. Past the limit it is only known to be more.
    """
    unescaped = body.replace(rb"\\", b"").replace(rb"\"", b"")
    parts = unescaped.split(b'"', MAX_JSON_STRUCTURE_BYTES + 1)
    return sum(map(len, parts[::2])) + len(parts) - 1


def first_fault(error: ValidationError) -> str:
    """One sentence about the first field that is wrong, without its value: it may be a prompt."""
    fault = error.errors(include_url=False, include_context=True, include_input=False)[0]
    place = ".".join(str(step) for step in fault["loc"] if not str(step).startswith("function-"))
    if fault["type"] == "union_tag_invalid":
        context = fault.get("ctx", {})
        sentence = f"{context.get('tag')!r} is not supported here; what is: {context.get('expected_tags')}"
    else:
        sentence = fault["msg"]
    return f"{place}: {sentence}" if place else sentence


async def linger(request: Request, *, max_bytes: int) -> None:
    """Read on for a while what a refused request still sends.

    A connection that is closed while bytes of its client are unread is reset, and the refusal lost with it.
    """
    seen_bytes = 0
    try:
        async with asyncio.timeout(HTTP_LINGER_S), aclosing(request.stream()) as stream:
            async for part in stream:
                seen_bytes += len(part)
                if seen_bytes > max_bytes:
                    return
    except (TimeoutError, ClientDisconnect, RuntimeError):
        # RuntimeError: it was read already, Starlette says.
        return
