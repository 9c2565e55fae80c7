"""`BrokerService`: what a guest may ask for, as a thin shell over `SubCalls`.

It translates: messages into calls, answers into messages, errors into statuses. It decides nothing, and knows
nothing about the caller but the `SubCalls` it was built with.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias

import grpc
from rlm_proto.v1 import broker_pb2 as pb
from rlm_proto.v1 import broker_pb2_grpc

from orchestrator.budget import UNLIMITED
from orchestrator.conversation import utf8_bytes
from orchestrator.errors import (
    Billing,
    CallerError,
    InvalidRequestError,
    InvariantError,
    ModelError,
    OrchestratorError,
)
from orchestrator.limits import ANSWER_CHUNK_BYTES, INLINE_WORK_BYTES, MAX_PATHS_IN_REQUEST
from orchestrator.rpc import status
from orchestrator.rpc.guest_server import AddServices, GatedServices
from orchestrator.runs.child_context import (
    ContextChoice,
    InlineText,
    OwnFiles,
    OwnPaths,
    OwnRange,
    Uploaded,
)
from orchestrator.runs.sub_calls import SubCalls

_Context: TypeAlias = "grpc.aio.ServicerContext[object, object]"

_log = logging.getLogger(__name__)

_ANSWER_PART_CHARS = ANSWER_CHUNK_BYTES // 4
"""No character takes more than four bytes."""

_NEVER = UNLIMITED // 2
"""An account without a limit has more than this left, whatever was used."""


class BrokerService(broker_pb2_grpc.BrokerServiceServicer):
    """Serves one run's sandboxes. See broker.proto for every rpc."""

    def __init__(self, sub_calls: SubCalls) -> None:
        self._sub_calls = sub_calls

    async def Complete(  # noqa: N802 - the rpc's name
        self, request: pb.CompleteRequest, context: _Context
    ) -> pb.CompleteResponse:
        """See broker.proto."""
        async with self._errors_as_status(context):
            answer = await self._sub_calls.complete(
                request.call_id,
                request.prompt,
                model_name=request.model,
                max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
                shared_prefix_bytes=request.shared_prefix_bytes,
            )
            await self._sub_calls.gate.room_for_answer(context, utf8_bytes(answer.text))
            return pb.CompleteResponse(text=_utf8(answer.text), truncated=answer.truncated)
        raise InvariantError("unreachable: the block returns or aborts")

    async def StartChildRun(  # noqa: N802
        self, request: pb.StartChildRunRequest, context: _Context
    ) -> AsyncIterator[pb.StartChildRunResponse]:
        """See broker.proto."""
        async with self._errors_as_status(context):
            answer = await self._sub_calls.child_run(
                request.call_id,
                request.question,
                _choice(request),
                max_tokens=request.max_tokens if request.HasField("max_tokens") else None,
            )
            # Encoded part by part: who repeats a call and doesn't read must not get a copy each time.
            for start in range(0, len(answer.text), _ANSWER_PART_CHARS):
                part = answer.text[start : start + _ANSWER_PART_CHARS]
                yield pb.StartChildRunResponse(data=_utf8(part))

    async def UploadContext(  # noqa: N802
        self,
        request_iterator: AsyncIterator[pb.UploadContextRequest],
        context: _Context,
    ) -> pb.UploadContextResponse:
        """See broker.proto."""
        async with self._errors_as_status(context):
            self._sub_calls.require_executing()
            async with self._sub_calls.contexts.uploading() as upload:
                async for part in request_iterator:
                    # An upload belongs to the cells: one that trickles on is over when they are.
                    self._sub_calls.require_executing()
                    match part.WhichOneof("part"):
                        case "file_path":
                            upload.start_file(part.file_path)
                        case "data":
                            # Into the page cache, which is not worth a thread, but others get a turn.
                            data = part.data
                            for start in range(0, len(data), INLINE_WORK_BYTES):
                                upload.write(data[start : start + INLINE_WORK_BYTES])
                                await asyncio.sleep(0)
                        case _:
                            raise InvalidRequestError("an empty part")
                return pb.UploadContextResponse(
                    upload_id=await self._sub_calls.contexts.finish_upload(upload)
                )
        raise InvariantError("unreachable: the block returns or aborts")

    async def GetBudget(  # noqa: N802
        self, request: pb.GetBudgetRequest, context: _Context
    ) -> pb.GetBudgetResponse:
        """See broker.proto."""
        await self._sub_calls.pace()
        left = self._sub_calls.left()._asdict()
        return pb.GetBudgetResponse(
            **{unit: amount for unit, amount in left.items() if amount < _NEVER},
            levels_below=self._sub_calls.levels_below(),
            deadline_s=self._sub_calls.left_s(),
        )

    @asynccontextmanager
    async def _errors_as_status(self, context: _Context) -> AsyncIterator[None]:
        """Our errors become a status with its detail; anything else INTERNAL, with the details in our log."""
        try:
            yield
        except OrchestratorError as error:
            code, detail = status.to_wire(error)
            if code is grpc.StatusCode.INTERNAL:
                _log.error("a guest's call failed", exc_info=error)
            if isinstance(error, CallerError):
                await self._sub_calls.refused()
            elif isinstance(error, ModelError) and error.billing is Billing.NOTHING:
                await self._sub_calls.pace()
        except Exception:
            _log.exception("a guest's call failed")
            code, detail = status.to_wire(InvariantError())
        else:
            return
        metadata = ((status.DETAIL_KEY, detail.SerializeToString()),)
        await context.abort(code, detail.message, metadata)


def serve_broker(sub_calls: SubCalls) -> AddServices:
    """Registers the broker of one run on a guest's server."""
    service = BrokerService(sub_calls)
    return GatedServices(
        lambda server: broker_pb2_grpc.add_BrokerServiceServicer_to_server(service, server), sub_calls.gate
    )


def _choice(request: pb.StartChildRunRequest) -> ContextChoice:
    match request.WhichOneof("context"):
        case "inline":
            return InlineText(request.inline)
        case "range":
            part = request.range
            return OwnRange(_path(part.path), part.start_byte, part.end_byte)
        case "paths":
            if len(request.paths.paths) > MAX_PATHS_IN_REQUEST:
                raise InvalidRequestError(
                    f"at most {MAX_PATHS_IN_REQUEST:,} paths can be given to a child run"
                )
            return OwnPaths(tuple(_path(path) for path in request.paths.paths))
        case "files":
            numbers = request.files.runs
            if len(numbers) > 2 * MAX_PATHS_IN_REQUEST or len(numbers) % 2:
                raise InvalidRequestError(
                    f"at most {MAX_PATHS_IN_REQUEST:,} runs of files, each two numbers, make a context"
                )
            return OwnFiles(tuple(zip(numbers[::2], numbers[1::2], strict=True)))
        case "upload_id":
            return Uploaded(request.upload_id)
        case _:
            raise InvalidRequestError("a child run needs a context")


def _path(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise InvalidRequestError("a path is not UTF-8") from None


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "replace")
