"""Watching a run's events over connections that break."""

import json
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from typing import TypeAlias

import grpc.aio
from rlm_proto.v1 import run_pb2

from orchestrator.client.failures import failure_of
from orchestrator.client.wire import Wire
from orchestrator.errors import ServerError

STREAM_S = 600.0
"""One stream's deadline. A run may be silent for longer; then the next stream takes up where this one was."""

Event: TypeAlias = Mapping[str, object]


async def watch(
    wire: Wire, run_id: str, from_position: int, is_over: Callable[[], Awaitable[bool]]
) -> AsyncGenerator[tuple[int, Event], None]:
    """Positions and events from a position on, without gap or repeat, until the run has ended.

    Args:
        wire: The way to the server.
        run_id: The root run.
        from_position: The first event that is wanted.
        is_over: Whether the run has ended: asked when a stream ends, because a server that drains may end one
            too.

    Raises:
        UnavailableError: The server was away for longer than there is patience.
        ServerError: It left out an event, or sent one that is none.
        NotFoundError: No such run of this tenant; it may have been deleted meanwhile.
        OrchestratorError: See `failures`.
    """
    row = wire.row(wire.patience.watch_s)
    position = from_position
    while True:
        opened_s = time.monotonic()
        try:
            async with aclosing(_stream(wire, run_id, position)) as messages:
                async for message in messages:
                    if row.is_open:
                        wire.say(f"{wire.address} is back; going on from event {position}")
                    row.heard()
                    if message.position < position:
                        continue
                    if message.position > position:
                        raise ServerError(
                            f"{wire.address} left out events {position} to {message.position - 1}"
                        )
                    yield position, _event(message.event_json, wire.address)
                    position += 1
            if await is_over():
                return
            cause = ServerError(f"{wire.address} ended the stream, and the run has not ended")
        except grpc.aio.AioRpcError as error:
            failure = failure_of(error, wire.address)
            if not failure.passes:
                raise failure.error from error
            if failure.is_own_deadline and time.monotonic() - opened_s >= STREAM_S / 2:
                # Quiet, and not lost: a connection that broke says so before.
                row.heard()
                continue
            await wire.pause(row, failure.error, f"; taking up at event {position} when it is back")
        else:
            await wire.pause(row, cause, f"; taking up at event {position}")


async def _stream(wire: Wire, run_id: str, position: int) -> AsyncGenerator[run_pb2.WatchRunResponse, None]:
    call = wire.stub.WatchRun(
        run_pb2.WatchRunRequest(run_id=run_id, from_position=position),
        timeout=STREAM_S,
        metadata=wire.metadata,
    )
    try:
        async for message in call:
            yield message
    finally:
        # Nothing when it has ended.
        call.cancel()


def _event(data: bytes, address: str) -> Event:
    try:
        event = json.loads(data)
    except ValueError as error:
        raise ServerError(f"{address} sent an event that is no JSON") from error
    if not isinstance(event, dict):
        raise ServerError(f"{address} sent an event that is no object")
    return event
