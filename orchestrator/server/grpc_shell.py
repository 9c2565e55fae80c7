"""RunService over gRPC: a thin shell around the service.

It translates messages and errors, finds the key in the metadata, and bounds what a call may take; nothing is
decided here. The client port has health and reflection besides, and nothing else has them.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from rlm_proto.v1 import run_pb2 as pb
from rlm_proto.v1 import run_pb2_grpc, types_pb2

from orchestrator.errors import (
    InvalidRequestError,
    MachineError,
    OrchestratorError,
    StoreError,
    UnavailableError,
)
from orchestrator.ids import RunId
from orchestrator.limits import MAX_INLINE_TEXT_BYTES
from orchestrator.rpc import status
from orchestrator.server import messages
from orchestrator.server.grpc_gate import MAX_CALLS_OF_TENANT, Admit, ClientGate, Context
from orchestrator.service.port import Caller, Office, Question

_log = logging.getLogger(__name__)

SERVICE = pb.DESCRIPTOR.services_by_name["RunService"].full_name
MAX_MESSAGE_BYTES = 8 * 1024 * 1024
"""A text of 4 MB and a question of one."""
MAX_CALLS = 4_096
"""Calls under way, watchers among them; further ones are refused at once, and may come again."""
MAX_CONNECTIONS = 4_000
"""As of the HTTP port."""
CALL_S = 60.0
"""For a call that is no stream."""

_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_metadata_size", 8_192),
    ("grpc.absolute_max_metadata_size", 16_384),
    # Else whoever opens connections and says nothing takes the open files that sandboxes need.
    ("grpc.max_allowed_incoming_connections", MAX_CONNECTIONS),
    ("grpc.server_handshake_timeout_ms", 10_000),
    # One without a call; its client makes another without being told to.
    ("grpc.max_connection_idle_ms", 120_000),
    ("grpc.max_concurrent_streams", MAX_CALLS_OF_TENANT),
    # A stream that nobody reads yet may send this much ahead and no more: no guessing of larger windows.
    ("grpc.http2.bdp_probe", 0),
    ("grpc.http2.lookahead_bytes", 65_536),
    # No compression: a bomb needs it, and a key must not be compressed together with a stranger's text.
    ("grpc.compression_enabled_algorithms_bitset", 1),
    # In a burst a call waits its turn: after 30 s, the default, it would be told CANCELLED instead of what
    # says "try again".
    ("grpc.server_max_unrequested_time_in_server", 120),
    # A client whose machine is gone is found within a minute and a half, also by a stream without news.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # Who asks more often than that is cut off at the third time.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 10_000),
    ("grpc.http2.max_ping_strikes", 2),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_channelz", 0),
)  # fmt: skip

AddService = Callable[[grpc.aio.Server], tuple[str, Admit]]
"""Adds one more service to a server that is not started yet; its full name, and whom it lets in."""
_caller: ContextVar[Caller] = ContextVar("caller")
"""Of this call: set where it is let in."""
T = TypeVar("T")


def to_client(error: Exception) -> tuple[grpc.StatusCode, types_pb2.ErrorDetail]:
    """The status and detail a client of the service gets for an error.

    As in `rpc.status`, but that a client may wait for what only takes time.
    """
    if isinstance(error, UnavailableError):
        return grpc.StatusCode.UNAVAILABLE, _ours(str(error))
    if isinstance(error, StoreError):
        return grpc.StatusCode.UNAVAILABLE, _ours("the server cannot store or read that now; try again")
    if isinstance(error, TimeoutError):
        return grpc.StatusCode.UNAVAILABLE, _ours("the server took too long; try again")
    if isinstance(error, MachineError) or not isinstance(error, OrchestratorError):
        return grpc.StatusCode.INTERNAL, _ours("the server failed; its log has the details")
    return status.to_wire(error)


def _ours(message: str) -> types_pb2.ErrorDetail:
    return types_pb2.ErrorDetail(reason=types_pb2.ERROR_REASON_INTERNAL, message=message)


@asynccontextmanager
async def telling(context: Context) -> AsyncIterator[None]:
    """Whatever goes wrong within the block ends the call with our status and detail."""
    try:
        yield
    except grpc.aio.AbortError:
        raise
    except Exception as error:
        code, detail = to_client(error)
        if code is grpc.StatusCode.INTERNAL:
            _log.exception("a call failed")
        metadata = ((status.DETAIL_KEY, detail.SerializeToString()),)
        await context.abort(code, detail.message, metadata)


def key_of(context: Context) -> str | None:
    """The API key of a call; None when it has none, or two."""
    given = [value for name, value in context.invocation_metadata() or () if name == "authorization"]
    scheme, _, key = str(given[0]).partition(" ") if len(given) == 1 else ("", "", "")
    return key.strip() if scheme.lower() == "bearer" else None


class RunService(run_pb2_grpc.RunServiceServicer):
    """See run.proto."""

    def __init__(self, office: Office) -> None:
        self._office = office

    # --- Runs -----------------------------------------------------------------------------------------

    async def CreateRun(  # noqa: N802 - the rpc's name
        self, request: pb.CreateRunRequest, context: Context
    ) -> pb.CreateRunResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.CreateRunResponse:
            if len(request.text) > MAX_INLINE_TEXT_BYTES:
                raise InvalidRequestError(
                    f"text has more than {MAX_INLINE_TEXT_BYTES:,} bytes: upload it as a context"
                )
            question = Question(
                idempotency_key=request.idempotency_key,
                question=messages.text_of(request.question, "question"),
                context_id=request.context_id,
                text=request.text if request.HasField("text") else None,
                options=messages.options_of(request.options),
            )
            created = await self._office.create_run(caller, question)
            return pb.CreateRunResponse(run=messages.run(created.run), existed=created.existed)

        return await self._answered(context, answer)

    async def ContinueRun(  # noqa: N802 - the rpc's name
        self, request: pb.ContinueRunRequest, context: Context
    ) -> pb.ContinueRunResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.ContinueRunResponse:
            question = Question(
                idempotency_key=request.idempotency_key,
                question=messages.text_of(request.question, "question"),
                options=messages.options_of(request.options),
            )
            created = await self._office.continue_run(
                caller, request.run_id, question, keep_namespace=request.keep_namespace
            )
            return pb.ContinueRunResponse(run=messages.run(created.run), existed=created.existed)

        return await self._answered(context, answer)

    async def GetRun(  # noqa: N802 - the rpc's name
        self, request: pb.GetRunRequest, context: Context
    ) -> pb.GetRunResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.GetRunResponse:
            return pb.GetRunResponse(run=messages.run(await self._office.get_run(caller, request.run_id)))

        return await self._answered(context, answer)

    async def ListRuns(  # noqa: N802 - the rpc's name
        self, request: pb.ListRunsRequest, context: Context
    ) -> pb.ListRunsResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.ListRunsResponse:
            limit, before = messages.page_of(request.page_size, request.page_token)
            rows = await self._office.list_runs(
                caller,
                messages.filter_of(request),
                limit=limit,
                before=None if before is None else (before[0], RunId(before[1])),
            )
            return pb.ListRunsResponse(
                runs=[messages.run(row, is_listed=True) for row in rows],
                next_page_token=messages.last_of(rows, limit),
            )

        return await self._answered(context, answer)

    async def WatchRun(  # noqa: N802 - the rpc's name
        self, request: pb.WatchRunRequest, context: Context
    ) -> AsyncIterator[pb.WatchRunResponse]:
        """See run.proto."""
        async with telling(context):
            caller = _caller.get()
            watched = self._office.watch_run(caller, request.run_id, request.from_position)
            async for position, event_json in watched:
                yield pb.WatchRunResponse(position=position, event_json=event_json)

    async def ReadText(  # noqa: N802 - the rpc's name
        self, request: pb.ReadTextRequest, context: Context
    ) -> AsyncIterator[pb.ReadTextResponse]:
        """See run.proto."""
        async with telling(context):
            caller = _caller.get()
            if not (request.answer or request.sha256):
                raise InvalidRequestError("say which text: the answer, or one by its hash")
            async for data in self._office.read_text(caller, request.run_id, request.sha256):
                yield pb.ReadTextResponse(data=data)

    async def CancelRun(  # noqa: N802 - the rpc's name
        self, request: pb.CancelRunRequest, context: Context
    ) -> pb.CancelRunResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.CancelRunResponse:
            row = await self._office.cancel_run(caller, request.run_id)
            return pb.CancelRunResponse(run=messages.run(row))

        return await self._answered(context, answer)

    async def DeleteRun(  # noqa: N802 - the rpc's name
        self, request: pb.DeleteRunRequest, context: Context
    ) -> pb.DeleteRunResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.DeleteRunResponse:
            await self._office.delete_run(caller, request.run_id)
            return pb.DeleteRunResponse()

        return await self._answered(context, answer)

    async def ResumeRun(  # noqa: N802 - the rpc's name
        self, request: pb.ResumeRunRequest, context: Context
    ) -> pb.ResumeRunResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.ResumeRunResponse:
            row = await self._office.resume_run(caller, request.run_id)
            return pb.ResumeRunResponse(run=messages.run(row))

        return await self._answered(context, answer)

    # --- Contexts -------------------------------------------------------------------------------------

    async def StartUpload(  # noqa: N802 - the rpc's name
        self, request: pb.StartUploadRequest, context: Context
    ) -> pb.StartUploadResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.StartUploadResponse:
            upload = await self._office.start_upload(
                caller, sha256=request.sha256, length_bytes=request.length_bytes, name=request.name
            )
            return messages.started(upload)

        return await self._answered(context, answer)

    async def Upload(  # noqa: N802 - the rpc's name
        self, requests: AsyncIterator[pb.UploadRequest], context: Context
    ) -> pb.UploadResponse:
        """See run.proto."""
        async with telling(context):
            caller = _caller.get()
            upload_id, upload = "", None
            async for part in requests:
                if upload is None:
                    upload_id = part.upload_id
                elif part.upload_id not in {"", upload_id}:
                    raise InvalidRequestError("the parts of a stream are of one upload")
                upload = await self._office.write_upload(caller, upload_id, part.offset, part.data)
            if upload is None:
                raise InvalidRequestError("the stream has no part")
            return messages.uploaded(upload)
        raise AssertionError("a call that failed was aborted")

    async def ListContexts(  # noqa: N802 - the rpc's name
        self, request: pb.ListContextsRequest, context: Context
    ) -> pb.ListContextsResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.ListContextsResponse:
            limit, before = messages.page_of(request.page_size, request.page_token)
            rows = await self._office.list_contexts(caller, limit=limit, before=before)
            return pb.ListContextsResponse(
                contexts=map(messages.context, rows), next_page_token=messages.last_of(rows, limit)
            )

        return await self._answered(context, answer)

    async def DeleteContext(  # noqa: N802 - the rpc's name
        self, request: pb.DeleteContextRequest, context: Context
    ) -> pb.DeleteContextResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.DeleteContextResponse:
            await self._office.delete_context(caller, request.context_id)
            return pb.DeleteContextResponse()

        return await self._answered(context, answer)

    # --- Usage ----------------------------------------------------------------------------------------

    async def GetUsage(  # noqa: N802 - the rpc's name
        self, request: pb.GetUsageRequest, context: Context
    ) -> pb.GetUsageResponse:
        """See run.proto."""

        async def answer(caller: Caller) -> pb.GetUsageResponse:
            return messages.usage(await self._office.get_usage(caller), caller.tenant.rules)

        return await self._answered(context, answer)

    # --- Inside ---------------------------------------------------------------------------------------

    async def _answered(self, context: Context, answer: Callable[[Caller], Awaitable[T]]) -> T:
        async with telling(context), asyncio.timeout(CALL_S):
            return await answer(_caller.get())
        raise AssertionError("a call that failed was aborted")


@dataclass(frozen=True, kw_only=True, slots=True)
class Tls:
    """Who the server says it is, and whom it believes."""

    certificate_file: Path
    key_file: Path
    client_ca_file: Path | None = None
    """Set: every client needs a certificate of this authority, besides its API key."""

    def credentials(self) -> grpc.ServerCredentials:
        """Read now.

        Raises:
            MachineError: A file cannot be read.
        """
        try:
            pair = (self.key_file.read_bytes(), self.certificate_file.read_bytes())
            authority = self.client_ca_file.read_bytes() if self.client_ca_file is not None else None
        except OSError as error:
            raise MachineError(
                f"{error.filename}: {error.strerror}; look at the RLM_TLS_ settings"
            ) from error
        return grpc.ssl_server_credentials(
            [pair], root_certificates=authority, require_client_auth=authority is not None
        )


class Port:
    """The client port while it is open."""

    def __init__(self, address: str, health_servicer: health.aio.HealthServicer) -> None:
        self.address = address
        """With the port that was chosen, where 0 was asked for."""
        self._health = health_servicer

    async def say_ready(self, is_ready: bool) -> None:
        """Health says whether new runs are taken."""
        said = health_pb2.HealthCheckResponse
        for service in ("", SERVICE):
            await self._health.set(service, said.SERVING if is_ready else said.NOT_SERVING)

    async def shut(self) -> None:
        """Health says from now on, whatever `say_ready` is told, that no new runs are taken."""
        await self._health.enter_graceful_shutdown()


@asynccontextmanager
async def open_port(
    office: Office,
    address: str,
    *,
    tls: Tls | None = None,
    is_ready: bool = True,
    also: Sequence[AddService] = (),
) -> AsyncIterator[Port]:
    """Serve clients for the length of the block.

    Args:
        office: What they ask.
        address: `HOST:PORT`.
        tls: None for none: then only for this machine, or behind what ends TLS before it.
        is_ready: What health says until `say_ready` is called.
        also: Services besides, each behind the same limits.

    Raises:
        MachineError: Nothing can listen there, or a TLS file cannot be used.
    """

    async def admit(context: Context) -> str:
        async with asyncio.timeout(CALL_S):
            caller = await office.authenticate(key_of(context))
        _caller.set(caller)
        return caller.tenant.tenant_id

    admitting: dict[str, Admit] = {SERVICE: admit}
    gate = ClientGate(admitting, telling)
    server = grpc.aio.server(interceptors=(gate,), options=_OPTIONS, maximum_concurrent_rpcs=MAX_CALLS)
    run_pb2_grpc.add_RunServiceServicer_to_server(RunService(office), server)
    health_servicer = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health_servicer, server)
    others = dict(add(server) for add in also)
    admitting |= others
    reflection.enable_server_reflection(
        (SERVICE, *others, health.SERVICE_NAME, reflection.SERVICE_NAME), server
    )
    try:
        port = (
            server.add_insecure_port(address)
            if tls is None
            else server.add_secure_port(address, tls.credentials())
        )
        await server.start()
    except RuntimeError as error:
        raise MachineError(f"nothing can listen on {address!r}; is a server there already?") from error
    try:
        opened = Port(f"{address.rpartition(':')[0]}:{port}", health_servicer)
        await opened.say_ready(is_ready)
        yield opened
    finally:
        # Watches have been ended by the service; what is left has seconds.
        await server.stop(grace=2.0)
