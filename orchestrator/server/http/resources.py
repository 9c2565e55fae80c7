"""The JSON resources: what each route asks the office, and how that is told."""

import json
import secrets
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

from pydantic import BaseModel
from starlette.responses import Response

from orchestrator import errors
from orchestrator.ids import RunId
from orchestrator.limits import HTTP_HEARTBEAT_S, MAX_UPLOAD_PART_BYTES
from orchestrator.server.http import pages
from orchestrator.server.http.forms import (
    ContextReply,
    ContextsReply,
    ContinueRunForm,
    CreatedReply,
    CreateRunForm,
    ListRunsQuery,
    PageQuery,
    RunReply,
    RunsReply,
    StartUploadForm,
    UploadQuery,
    UploadReply,
    UsageReply,
    WatchQuery,
)
from orchestrator.server.http.refusals import body_of, told
from orchestrator.server.http.requests import parts_of
from orchestrator.server.http.routes import Call, Route
from orchestrator.server.http.streams import Stream, closed_after, in_batches
from orchestrator.service.port import Created, Question
from orchestrator.store.books import RunFilter

_MAX_KEY_CHARS = 100
_MAX_POSITION_DIGITS = 18


def idempotency_key(call: Call, in_body: str | None = None) -> str | None:
    """What the client calls this request, in its body or its header; None when it does not say.

    Raises:
        InvalidRequestError: It says two things, or too much.
    """
    in_header = call.request.headers.get("idempotency-key")
    if in_header is not None and not 1 <= len(in_header) <= _MAX_KEY_CHARS:
        raise errors.InvalidRequestError(f"an idempotency key has 1 to {_MAX_KEY_CHARS} characters")
    if in_header is not None and in_body is not None and in_header != in_body:
        raise errors.InvalidRequestError("body and header have different idempotency keys")
    return in_body or in_header


def new_idempotency_key() -> str:
    """For a request that is a new one each time it comes."""
    return f"http-{secrets.token_hex(16)}"


def _json(reply: BaseModel, status: int = 200) -> Response:
    return Response(reply.model_dump_json(), status, media_type="application/json")


def _created(created: Created) -> Response:
    return _json(CreatedReply.of(created), 200 if created.existed else 201)


async def _create_run(call: Call) -> Response:
    form = call.take_body(CreateRunForm)
    question = Question(
        idempotency_key=idempotency_key(call, form.idempotency_key) or new_idempotency_key(),
        question=form.question,
        context_id=form.context_id or "",
        text=None if form.text is None else form.text.encode(),
        options=form.options.chosen(),
    )
    return _created(await call.office.create_run(call.caller, question))


async def _continue_run(call: Call) -> Response:
    form = call.take_body(ContinueRunForm)
    question = Question(
        idempotency_key=idempotency_key(call, form.idempotency_key) or new_idempotency_key(),
        question=form.question,
        options=form.options.chosen(),
    )
    return _created(
        await call.office.continue_run(
            call.caller, call.named("run_id"), question, keep_namespace=form.keep_namespace
        )
    )


async def _list_runs(call: Call) -> Response:
    query = call.query_as(ListRunsQuery)
    before = pages.read(query.page_token)
    rows = await call.office.list_runs(
        call.caller,
        RunFilter(
            states=frozenset(query.state),
            outcomes=frozenset(query.outcome),
            created_from=query.created_from.timestamp() if query.created_from else None,
            created_before=query.created_before.timestamp() if query.created_before else None,
        ),
        limit=query.page_size,
        before=None if before is None else (before[0], RunId(before[1])),
    )
    is_full = len(rows) == query.page_size
    return _json(
        RunsReply(
            runs=[RunReply.of(row, listed=True) for row in rows],
            next_page_token=pages.token(rows[-1].created_at, rows[-1].run_id) if is_full else "",
        )
    )


async def _get_run(call: Call) -> Response:
    return _json(RunReply.of(await call.office.get_run(call.caller, call.named("run_id"))))


async def _cancel_run(call: Call) -> Response:
    return _json(RunReply.of(await call.office.cancel_run(call.caller, call.named("run_id"))))


async def _resume_run(call: Call) -> Response:
    return _json(RunReply.of(await call.office.resume_run(call.caller, call.named("run_id"))))


async def _delete_run(call: Call) -> Response:
    await call.office.delete_run(call.caller, call.named("run_id"))
    return Response(status_code=204)


# --- Streams -------------------------------------------------------------------------------------------


async def _watch_run(call: Call) -> Response:
    run_id = call.named("run_id")
    first = call.query_as(WatchQuery).from_ or 0
    last_seen = call.request.headers.get("last-event-id", "").strip()
    if last_seen:
        if not last_seen.isdecimal() or len(last_seen) > _MAX_POSITION_DIGITS:
            raise errors.InvalidRequestError("Last-Event-ID is no position")
        first = int(last_seen) + 1
    # Refused, if so, while there still is a status to refuse with.
    await call.office.get_run(call.caller, run_id)
    events = call.office.watch_run(call.caller, run_id, first)
    return Stream(_server_sent(events), media_type="text/event-stream", headers={"x-accel-buffering": "no"})


async def _server_sent(events: AsyncIterator[tuple[int, bytes]]) -> AsyncGenerator[bytes, None]:
    yield b"retry: 1000\n\n"
    try:
        async with closed_after(events), aclosing(in_batches(events, HTTP_HEARTBEAT_S)) as news:
            async for some in news:
                yield b"".join(b"id: %d\ndata: %s\n\n" % one for one in some) or b": still there\n\n"
    except errors.OrchestratorError as error:
        yield b"event: error\ndata: %s\n\n" % json.dumps(body_of(*told(error))).encode()
    else:
        # Without it a browser would connect again and again to a run that has ended.
        yield b"event: end\ndata: {}\n\n"


async def _read_answer(call: Call) -> Response:
    return await _text(call, "")


async def _read_text(call: Call) -> Response:
    return await _text(call, call.named("sha256"))


async def _text(call: Call, sha256: str) -> Response:
    parts = call.office.read_text(call.caller, call.named("run_id"), sha256)
    first = await anext(parts, b"")
    return Stream(_from(first, parts), media_type="text/plain")


async def _from(first: bytes, others: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    async with closed_after(others):
        yield first
        async for part in others:
            yield part


# --- Contexts and usage --------------------------------------------------------------------------------


async def _start_upload(call: Call) -> Response:
    form = call.take_body(StartUploadForm)
    upload = await call.office.start_upload(
        call.caller, sha256=form.sha256, length_bytes=form.length_bytes, name=form.name
    )
    return _json(UploadReply.of(upload))


async def _upload(call: Call) -> Response:
    """Each part is kept when it is written, so that an upload which breaks goes on from there."""
    upload_id, offset = call.named("upload_id"), call.query_as(UploadQuery).offset
    upload = None
    async with aclosing(_in_parts(parts_of(call.request), MAX_UPLOAD_PART_BYTES)) as parts:
        async for part in parts:
            upload = await call.office.write_upload(call.caller, upload_id, offset, part)
            offset += len(part)
    if upload is None:
        upload = await call.office.write_upload(call.caller, upload_id, offset, b"")
    return _json(UploadReply.of(upload))


async def _in_parts(source: AsyncGenerator[bytes, None], size_bytes: int) -> AsyncGenerator[bytes, None]:
    """The same bytes in parts of this size, the last one shorter."""
    waiting = bytearray()
    async with aclosing(source):
        async for part in source:
            waiting += part
            while len(waiting) >= size_bytes:
                yield bytes(waiting[:size_bytes])
                del waiting[:size_bytes]
        if waiting:
            yield bytes(waiting)


async def _list_contexts(call: Call) -> Response:
    query = call.query_as(PageQuery)
    rows = await call.office.list_contexts(
        call.caller, limit=query.page_size, before=pages.read(query.page_token)
    )
    is_full = len(rows) == query.page_size
    return _json(
        ContextsReply(
            contexts=[ContextReply.of(row) for row in rows],
            next_page_token=pages.token(rows[-1].created_at, rows[-1].context_id) if is_full else "",
        )
    )


async def _delete_context(call: Call) -> Response:
    await call.office.delete_context(call.caller, call.named("context_id"))
    return Response(status_code=204)


async def _get_usage(call: Call) -> Response:
    return _json(UsageReply.of(call.caller, await call.office.get_usage(call.caller)))


_MAKES_A_RUN = (errors.ConflictError, errors.CallIdReusedError, errors.BudgetExceededError)

ROUTES: tuple[Route, ...] = (
    Route(
        name="CreateRun",
        method="POST",
        path="/v1/runs",
        summary="Queue a question. It is stored when this returns.",
        answer=_create_run,
        body=CreateRunForm,
        reply=CreatedReply,
        status=201,
        refusals=_MAKES_A_RUN,
    ),
    Route(
        name="ListRuns",
        method="GET",
        path="/v1/runs",
        summary="The tenant's runs, newest first, a page at a time.",
        answer=_list_runs,
        query=ListRunsQuery,
        reply=RunsReply,
    ),
    Route(
        name="GetRun",
        method="GET",
        path="/v1/runs/{run_id}",
        summary="What became of a run so far.",
        answer=_get_run,
        reply=RunReply,
    ),
    Route(
        name="WatchRun",
        method="GET",
        path="/v1/runs/{run_id}/events",
        summary="The events of the run tree (docs/events.md) from a position on, then an event `end`.",
        answer=_watch_run,
        query=WatchQuery,
        media_type="text/event-stream",
    ),
    Route(
        name="ReadAnswer",
        rpc="ReadText",
        method="GET",
        path="/v1/runs/{run_id}/answer",
        summary="The whole answer.",
        answer=_read_answer,
        media_type="text/plain",
    ),
    Route(
        name="ReadText",
        method="GET",
        path="/v1/runs/{run_id}/texts/{sha256}",
        summary="A long text that an event of the run tree refers to.",
        answer=_read_text,
        media_type="text/plain",
    ),
    Route(
        name="CancelRun",
        method="POST",
        path="/v1/runs/{run_id}/cancel",
        summary="End a run as cancelled. One that has ended stays as it is.",
        answer=_cancel_run,
        reply=RunReply,
    ),
    Route(
        name="ResumeRun",
        method="POST",
        path="/v1/runs/{run_id}/resume",
        summary="Go on with an interrupted run.",
        answer=_resume_run,
        reply=RunReply,
        refusals=(errors.ConflictError,),
    ),
    Route(
        name="ContinueRun",
        method="POST",
        path="/v1/runs/{run_id}/continue",
        summary="Ask a further question on the context of an answered run.",
        answer=_continue_run,
        body=ContinueRunForm,
        reply=CreatedReply,
        status=201,
        refusals=_MAKES_A_RUN,
    ),
    Route(
        name="DeleteRun",
        method="DELETE",
        path="/v1/runs/{run_id}",
        summary="Remove an ended run's events, texts and answer for good.",
        answer=_delete_run,
        status=204,
        refusals=(errors.ConflictError,),
    ),
    Route(
        name="StartUpload",
        method="POST",
        path="/v1/uploads",
        summary="Begin the upload of a context, or take it up.",
        answer=_start_upload,
        body=StartUploadForm,
        reply=UploadReply,
        refusals=(errors.BudgetExceededError,),
    ),
    Route(
        name="Upload",
        method="PUT",
        path="/v1/uploads/{upload_id}",
        summary="Add bytes from where the upload stands. What has arrived is kept.",
        answer=_upload,
        takes_bytes=True,
        query=UploadQuery,
        reply=UploadReply,
        refusals=(errors.ConflictError, errors.HashMismatchError),
        answer_s=None,
    ),
    Route(
        name="ListContexts",
        method="GET",
        path="/v1/contexts",
        summary="The tenant's contexts, newest first, a page at a time.",
        answer=_list_contexts,
        query=PageQuery,
        reply=ContextsReply,
    ),
    Route(
        name="DeleteContext",
        method="DELETE",
        path="/v1/contexts/{context_id}",
        summary="Remove a context for good.",
        answer=_delete_context,
        status=204,
        refusals=(errors.ConflictError,),
    ),
    Route(
        name="GetUsage",
        method="GET",
        path="/v1/usage",
        summary="What the tenant has used in this day and month (UTC), and what it may.",
        answer=_get_usage,
        reply=UsageReply,
    ),
)
