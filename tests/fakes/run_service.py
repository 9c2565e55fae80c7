"""RunService in memory, on a real port: strict about what it is asked, and as bad a server as a test wants.

What it tells of a run is what the test put there: it plays nothing. Every call must bring the key and a
deadline, else the test sees an assertion fail as UNKNOWN.
"""
# ruff: noqa: N802 - methods are called as the rpcs are

import asyncio
import hashlib
import json
import threading
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import grpc
import grpc.aio
from google.protobuf.message import Message
from rlm_proto.v1 import run_pb2 as pb
from rlm_proto.v1 import run_pb2_grpc

from orchestrator.errors import (
    CallIdReusedError,
    ConflictError,
    ContextInputError,
    HashMismatchError,
    NotFoundError,
    UnauthenticatedError,
)
from orchestrator.rpc.status import DETAIL_KEY
from orchestrator.server.grpc_shell import to_client
from orchestrator.trajectory import Event

KEY = "rlm_fake"
LONGEST_S = 3_600.0
"""A deadline beyond this is none."""

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"
Trouble: TypeAlias = Exception | grpc.StatusCode
"""An error of ours, as the real server sends it; or a bare status, as a transport makes it."""


class FakeRunService(run_pb2_grpc.RunServiceServicer):
    """One tenant's runs and contexts."""

    def __init__(self) -> None:
        self.runs: dict[str, pb.Run] = {}
        self.events: defaultdict[str, list[bytes]] = defaultdict(list)
        self.texts: dict[str, bytes] = {}
        """By hash; the empty one is the answer of every run."""
        self.contexts: dict[str, pb.Context] = {}
        self.uploads: dict[str, bytearray] = {}
        self.received_bytes = 0
        """Of uploads, repeats included."""
        self.usage = pb.GetUsageResponse()
        self.asked: dict[str, Message] = {}
        """What was asked for under an idempotency key."""
        self.calls: Counter[str] = Counter()
        self.keys_seen: list[str] = []
        """Idempotency keys, as they came."""
        self.before: defaultdict[str, list[Trouble]] = defaultdict(list)
        """By method: each befalls one call, which is not carried out."""
        self.after: defaultdict[str, list[Trouble]] = defaultdict(list)
        """Likewise, when it was carried out: its response is lost."""
        self.on_create: Callable[[pb.Run], None] = lambda _run: None
        self.watches: list[Sequence[int]] = []
        """A stream each: the positions it sends, whatever is asked, and then ends."""
        self.news = asyncio.Condition()
        self.upload_parts: list[int] = []
        """A stream each: so many parts are taken, then it breaks."""
        self.page = 2

    def add_run(self, run_id: str, **fields: Any) -> pb.Run:
        """A run as it is to be told of."""
        run = self.runs[run_id] = pb.Run(
            run_id=run_id, **{"state": pb.RUN_STATE_RUNNING, "question": b"why?", **fields}
        )
        run.created_at.FromSeconds(1_800_000_000 + len(self.runs))
        return run

    def tell(self, run_id: str, *events: Event | dict[str, object]) -> None:
        """Events of a run. A watcher hears of them with `stir`."""
        for event in events:
            said = event.to_json() if isinstance(event, Event) else event
            self.events[run_id].append(json.dumps(said).encode())
        self.runs[run_id].next_position = len(self.events[run_id])

    async def stir(self) -> None:
        """Watchers look again."""
        async with self.news:
            self.news.notify_all()

    def end(self, run_id: str, outcome: str = "answered", answer: bytes = b"42", error: str = "") -> None:
        """The run is over."""
        run = self.runs[run_id]
        run.state, run.outcome, run.error = pb.RUN_STATE_ENDED, outcome, error
        run.ended_at.FromSeconds(1_800_000_100)
        if outcome == "answered":
            self.texts[""] = answer
            run.answer, run.answer_length_bytes = answer[:64_000], len(answer)

    # --- What a client may call ------------------------------------------------------------------------

    async def CreateRun(self, request: pb.CreateRunRequest, context: _Context) -> pb.CreateRunResponse:
        await self._enter("CreateRun", context)
        self.keys_seen.append(request.idempotency_key)
        run, existed = await self._create(request, context)
        await self._leave("CreateRun", context)
        return pb.CreateRunResponse(run=run, existed=existed)

    async def ContinueRun(self, request: pb.ContinueRunRequest, context: _Context) -> pb.ContinueRunResponse:
        await self._enter("ContinueRun", context)
        await self._run(request.run_id, context)
        run, existed = await self._create(request, context)
        run.continues = request.run_id
        await self._leave("ContinueRun", context)
        return pb.ContinueRunResponse(run=run, existed=existed)

    async def GetRun(self, request: pb.GetRunRequest, context: _Context) -> pb.GetRunResponse:
        await self._enter("GetRun", context)
        return pb.GetRunResponse(run=await self._run(request.run_id, context))

    async def ListRuns(self, request: pb.ListRunsRequest, context: _Context) -> pb.ListRunsResponse:
        await self._enter("ListRuns", context)
        self.asked["ListRuns"] = request
        found = [
            run for run in reversed(self.runs.values()) if not request.states or run.state in request.states
        ]
        rows, token = self._paged(found, request.page_token)
        return pb.ListRunsResponse(runs=rows, next_page_token=token)

    async def WatchRun(
        self, request: pb.WatchRunRequest, context: _Context
    ) -> AsyncIterator[pb.WatchRunResponse]:
        await self._enter("WatchRun", context)
        run = await self._run(request.run_id, context)
        events = self.events[request.run_id]
        if self.watches:
            for position in self.watches.pop(0):
                yield pb.WatchRunResponse(position=position, event_json=events[position])
            return
        position = request.from_position
        while True:
            while position < len(events):
                yield pb.WatchRunResponse(position=position, event_json=events[position])
                position += 1
            if run.state == pb.RUN_STATE_ENDED:
                return
            async with self.news:
                await self.news.wait_for(self._has_news(run, position))

    async def ReadText(
        self, request: pb.ReadTextRequest, context: _Context
    ) -> AsyncIterator[pb.ReadTextResponse]:
        await self._enter("ReadText", context)
        text = self.texts.get(request.sha256)
        if text is None:
            await _fail(context, NotFoundError("no such text"))
        for start in range(0, len(text or b""), 1_000):
            yield pb.ReadTextResponse(data=(text or b"")[start : start + 1_000])
            await self._leave("ReadText", context)

    async def CancelRun(self, request: pb.CancelRunRequest, context: _Context) -> pb.CancelRunResponse:
        await self._enter("CancelRun", context)
        run = await self._run(request.run_id, context)
        if run.state != pb.RUN_STATE_ENDED:
            self.end(request.run_id, "cancelled", error="cancelled by its client")
        await self.stir()
        return pb.CancelRunResponse(run=run)

    async def DeleteRun(self, request: pb.DeleteRunRequest, context: _Context) -> pb.DeleteRunResponse:
        await self._enter("DeleteRun", context)
        run = await self._run(request.run_id, context)
        if run.state != pb.RUN_STATE_ENDED:
            await _fail(context, ConflictError("it has not ended"))
        del self.runs[request.run_id]
        await self._leave("DeleteRun", context)
        return pb.DeleteRunResponse()

    async def ResumeRun(self, request: pb.ResumeRunRequest, context: _Context) -> pb.ResumeRunResponse:
        await self._enter("ResumeRun", context)
        run = await self._run(request.run_id, context)
        if run.state != pb.RUN_STATE_INTERRUPTED:
            await _fail(context, ConflictError("it is not interrupted"))
        run.state = pb.RUN_STATE_RUNNING
        await self._leave("ResumeRun", context)
        return pb.ResumeRunResponse(run=run)

    async def StartUpload(self, request: pb.StartUploadRequest, context: _Context) -> pb.StartUploadResponse:
        await self._enter("StartUpload", context)
        assert request.name.isprintable()
        assert 1 <= len(request.name.encode()) <= 255
        upload_id = f"c{request.sha256[:20]}"
        done = self.contexts.get(upload_id)
        if done is not None:
            return pb.StartUploadResponse(
                upload_id=upload_id, next_offset=request.length_bytes, context_id=upload_id
            )
        stands = self.uploads.setdefault(upload_id, bytearray())
        self.asked[upload_id] = request
        return pb.StartUploadResponse(upload_id=upload_id, next_offset=len(stands))

    async def Upload(self, requests: AsyncIterator[pb.UploadRequest], context: _Context) -> pb.UploadResponse:
        await self._enter("Upload", context)
        breaks_after = self.upload_parts.pop(0) if self.upload_parts else None
        upload_id, parts = "", 0
        async for part in requests:
            upload_id = upload_id or part.upload_id
            assert part.upload_id in {"", upload_id}
            assert 0 < len(part.data) <= 1024 * 1024
            stands = self.uploads[upload_id]
            self.received_bytes += len(part.data)
            if part.offset != len(stands):
                await _fail(context, ContextInputError(f"the upload stands at {len(stands)}"))
            stands += part.data
            parts += 1
            if parts == breaks_after:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        return await self._uploaded(upload_id, context)

    async def ListContexts(
        self, request: pb.ListContextsRequest, context: _Context
    ) -> pb.ListContextsResponse:
        await self._enter("ListContexts", context)
        rows, token = self._paged(list(reversed(self.contexts.values())), request.page_token)
        return pb.ListContextsResponse(contexts=rows, next_page_token=token)

    async def DeleteContext(
        self, request: pb.DeleteContextRequest, context: _Context
    ) -> pb.DeleteContextResponse:
        await self._enter("DeleteContext", context)
        if self.contexts.pop(request.context_id, None) is None:
            await _fail(context, NotFoundError("no such context"))
        await self._leave("DeleteContext", context)
        return pb.DeleteContextResponse()

    async def GetUsage(self, request: pb.GetUsageRequest, context: _Context) -> pb.GetUsageResponse:
        await self._enter("GetUsage", context)
        return self.usage

    # --- Inside ----------------------------------------------------------------------------------------

    async def _enter(self, method: str, context: _Context) -> None:
        self.calls[method] += 1
        left_s = context.time_remaining()
        assert left_s is not None
        assert left_s < LONGEST_S
        if ("authorization", f"Bearer {KEY}") not in (context.invocation_metadata() or ()):
            await _fail(context, UnauthenticatedError("an unknown key"))
        await _befall(context, self.before[method])

    async def _leave(self, method: str, context: _Context) -> None:
        await _befall(context, self.after[method])

    def _has_news(self, run: pb.Run, position: int) -> Callable[[], bool]:
        return lambda: position < len(self.events[run.run_id]) or run.state == pb.RUN_STATE_ENDED

    async def _run(self, run_id: str, context: _Context) -> pb.Run:
        if run_id not in self.runs:
            await _fail(context, NotFoundError("no such run"))
        return self.runs[run_id]

    async def _create(
        self, request: pb.CreateRunRequest | pb.ContinueRunRequest, context: _Context
    ) -> tuple[pb.Run, bool]:
        key = request.idempotency_key
        assert 1 <= len(key) <= 100
        assert request.question
        before = self.asked.setdefault(key, request)
        if before != request:
            await _fail(context, CallIdReusedError("the key was used for another request"))
        run_id = f"r{key}"
        existed = run_id in self.runs
        if not existed:
            self.add_run(
                run_id,
                idempotency_key=key,
                state=pb.RUN_STATE_QUEUED,
                question=request.question,
                options=request.options,
            )
            self.on_create(self.runs[run_id])
        return self.runs[run_id], existed

    async def _uploaded(self, upload_id: str, context: _Context) -> pb.UploadResponse:
        asked = self.asked[upload_id]
        assert isinstance(asked, pb.StartUploadRequest)
        data = bytes(self.uploads[upload_id])
        if len(data) < asked.length_bytes:
            return pb.UploadResponse(next_offset=len(data))
        if hashlib.sha256(data).hexdigest() != asked.sha256:
            del self.uploads[upload_id]
            await _fail(context, HashMismatchError("it has another hash"))
        done = self.contexts[upload_id] = pb.Context(
            context_id=upload_id, name=asked.name, length_bytes=len(data), sha256=asked.sha256
        )
        done.created_at.FromSeconds(1_800_000_000 + len(self.contexts))
        return pb.UploadResponse(context=done, next_offset=len(data))

    def _paged(self, found: list[Any], token: str) -> tuple[list[Any], str]:
        start = int(token or 0)
        end = start + self.page
        return found[start:end], str(end) if end < len(found) else ""


async def _fail(context: _Context, error: Exception) -> None:
    code, detail = to_client(error)
    await context.abort(code, detail.message, ((DETAIL_KEY, detail.SerializeToString()),))


async def _befall(context: _Context, troubles: list[Trouble]) -> None:
    if not troubles:
        return
    trouble = troubles.pop(0)
    if isinstance(trouble, Exception):
        await _fail(context, trouble)
    else:
        await context.abort(trouble, "Socket closed")


@asynccontextmanager
async def serve(service: FakeRunService, address: str = "127.0.0.1:0") -> AsyncIterator[str]:
    """The service on a port, and the address, for the length of the block. Its end breaks every call."""
    server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
    run_pb2_grpc.add_RunServiceServicer_to_server(service, server)
    port = server.add_insecure_port(address)
    await server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        await server.stop(grace=None)


@contextmanager
def served_in_a_thread() -> Iterator[tuple[FakeRunService, str]]:
    """Likewise for programs that need this thread for themselves."""
    ready = threading.Event()
    told: list[Any] = []

    async def work() -> None:
        service, stop = FakeRunService(), asyncio.Event()
        async with serve(service) as address:
            told.extend((service, address, asyncio.get_running_loop(), stop))
            ready.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(work()))
    thread.start()
    assert ready.wait(30)
    service, address, loop, stop = told
    try:
        yield service, address
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join()
