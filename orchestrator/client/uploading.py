"""Sending a context over connections that break: what has arrived is not sent again."""

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
from rlm_proto.v1 import run_pb2

from orchestrator.client.failures import failure_of
from orchestrator.client.packing import Packed
from orchestrator.client.values import Uploaded
from orchestrator.client.wire import Wire
from orchestrator.errors import ServerError

PART_BYTES = 512 * 1024
"""Half of what the protocol allows."""
STREAM_S = 600.0
"""One stream's deadline. A longer upload goes on in the next, from where it stands."""
_STANDS_ELSEWHERE = {grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.FAILED_PRECONDITION}
"""Somebody else is sending the same file, and got further, or to its end."""


async def upload(wire: Wire, packed: Packed) -> Uploaded:
    """Send a file, unless the server has it.

    Raises:
        BudgetExceededError: More bytes than the tenant may keep.
        ContextInputError: It changed while it was sent, or is no context.
        UnavailableError: The server was away, or took nothing, for longer than there is patience.
        OrchestratorError: See `failures`.
    """
    row = wire.row(wire.patience.call_s)
    request = run_pb2.StartUploadRequest(
        sha256=packed.sha256, length_bytes=packed.length_bytes, name=packed.name
    )
    stood_at = -1
    was_sent = False
    while True:
        started = await wire.call(wire.stub.StartUpload, request)
        if started.context_id:
            return _uploaded(packed, started.context_id, existed=not was_sent)
        if not 0 <= started.next_offset < packed.length_bytes:
            raise ServerError(
                f"{wire.address} says that byte {started.next_offset:,} comes next, and there is none"
            )
        if started.next_offset > stood_at:
            # Failures with progress in between are no row.
            row.heard()
        stood_at = started.next_offset
        was_sent = True
        try:
            response = await wire.stub.Upload(
                _parts(packed, started.upload_id, started.next_offset),
                timeout=STREAM_S,
                metadata=wire.metadata,
            )
        except grpc.aio.AioRpcError as error:
            failure = failure_of(error, wire.address)
            if not failure.passes and error.code() not in _STANDS_ELSEWHERE:
                raise failure.error from error
            await wire.pause(row, failure.error, "; the upload goes on from where it stands")
            continue
        if response.context.context_id:
            return _uploaded(packed, response.context.context_id, existed=False)
        if response.next_offset <= stood_at:
            await wire.pause(
                row,
                ServerError(f"{wire.address} took nothing of the upload"),
                "; the upload goes on from where it stands",
            )


async def _parts(packed: Packed, upload_id: str, offset: int) -> AsyncIterator[run_pb2.UploadRequest]:
    is_first = True
    while offset < packed.length_bytes:
        most_bytes = min(PART_BYTES, packed.length_bytes - offset)
        data = await asyncio.to_thread(packed.read, offset, most_bytes)
        if not data:
            # Shorter than it was. The server has the last word on what it got.
            return
        yield run_pb2.UploadRequest(upload_id=upload_id if is_first else "", offset=offset, data=data)
        offset += len(data)
        is_first = False


def _uploaded(packed: Packed, context_id: str, *, existed: bool) -> Uploaded:
    return Uploaded(
        context_id=context_id,
        name=packed.name,
        length_bytes=packed.length_bytes,
        sha256=packed.sha256,
        existed=existed,
        notes=tuple(packed.notes),
    )
