"""`POST /v1/messages`: the Messages API of Anthropic, answered by a run. `messages_mapping` has the mapping.

A stream follows the order that the API documents: message_start, content_block_start, content_block_delta...,
content_block_stop, message_delta with the usage, message_stop; `ping` while the run works. A client that
hangs up cancels its run, and so does a server that drains under it, unless it gave an `Idempotency-Key`: that
says that it will come again for it.

Source: the pages "Messages" and "Streaming messages" of Anthropic's API reference; field names as in the
`anthropic` SDK 2.12.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict
from starlette.responses import Response

from orchestrator import errors
from orchestrator.limits import HTTP_ANSWER_S, HTTP_HEARTBEAT_S, INLINE_WORK_BYTES, MAX_MESSAGES_BODY_BYTES
from orchestrator.pricing import Usage
from orchestrator.server.http.messages_mapping import (
    AnswerText,
    MessagesForm,
    mapped,
    message_json,
    usage_json,
)
from orchestrator.server.http.refusals import OVERLOADED, RequestRefusedError, body_of, told
from orchestrator.server.http.resources import idempotency_key, new_idempotency_key
from orchestrator.server.http.routes import Call, Route
from orchestrator.server.http.streams import OnHangUp, Stream, closed_after, in_batches, while_connected
from orchestrator.service.port import Question
from orchestrator.store.books import RunRow, RunState

_log = logging.getLogger(__name__)

_SETTLED = b'"call_settled"'
_DELTA_CHARS = 8 * 1024
_ENDS = {"budget_exhausted": (429, "rate_limit_error"), "deadline": (504, "timeout_error")}
"""How the ends of runs without an answer are told, where it is not as our own failure."""


class UsageReply(BaseModel):
    """Tokens of all calls of the run tree."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class TextReply(BaseModel):
    """The answer."""

    type: str
    text: str


class MessageReply(BaseModel):
    """A message of the assistant."""

    model_config = ConfigDict(frozen=True)
    id: str
    type: str
    role: str
    model: str
    content: Sequence[TextReply]
    stop_reason: str
    stop_sequence: None
    usage: UsageReply


@dataclass(slots=True)
class _Watched:
    """What a run tree was billed, as far as its events have told."""

    usage: Usage = field(default_factory=Usage)

    def see(self, event_json: bytes) -> None:
        if _SETTLED not in event_json:
            return
        event = json.loads(event_json)
        # The word may also stand in a text of a guest's.
        if event["kind"] == "call_settled":
            self.usage = self.usage.plus(Usage(**event["usage"]))


async def _messages(call: Call) -> Response:
    key = idempotency_key(call)
    form = call.take_body(MessagesForm)
    model, max_tokens, wants_stream = form.model, form.max_tokens, form.stream
    run = await _run_for(call, form, key)
    # The prompt is stored, and the run may take an hour: nothing of it may stay here.
    del form
    call.room.release()
    headers = {"request-id": run.run_id}

    async def give_up() -> None:
        """Nobody will come for the answer any more."""
        if key is None:
            await _cancel(call, run)

    if wants_stream:
        return Stream(
            _events(call, run, model, max_tokens, give_up),
            media_type="text/event-stream",
            headers={**headers, "x-accel-buffering": "no"},
            on_hang_up=give_up,
        )
    try:
        whole = await while_connected(_whole(call, run, model, max_tokens), call.request, give_up)
    except errors.UnavailableError:
        await give_up()
        raise
    if whole is None:
        raise RequestRefusedError(499, "api_error", "the client hung up")
    return Response(whole, media_type="application/json", headers=headers)


async def _run_for(call: Call, form: MessagesForm, key: str | None) -> RunRow:
    # Joining and encoding a long prompt takes a while, in which other requests must not stand still.
    asked = await asyncio.to_thread(mapped, form)
    text = await asyncio.to_thread(asked.context.encode, "utf-8", "replace")
    question = Question(
        idempotency_key=key or new_idempotency_key(),
        question=asked.question,
        text=text,
        options={**form.rlm.chosen(), "model": form.model},
    )
    async with asyncio.timeout(HTTP_ANSWER_S):
        return (await call.office.create_run(call.caller, question)).run


async def _cancel(call: Call, run: RunRow) -> None:
    try:
        async with asyncio.timeout(HTTP_ANSWER_S):
            await call.office.cancel_run(call.caller, run.run_id)
    except (errors.OrchestratorError, TimeoutError) as error:
        # Nobody is left to tell. The run's own limits still end it.
        _log.warning("run %s goes on although its client hung up: %s", run.run_id, type(error).__name__)


async def _check_answered(call: Call, run: RunRow) -> None:
    """Raise what its client is told when there is no answer.

    Raises:
        RequestRefusedError: It ended without one.
        UnavailableError: It was left to another server.
    """
    row = await call.office.get_run(call.caller, run.run_id)
    if row.state is not RunState.ENDED:
        raise errors.UnavailableError("the run goes on elsewhere")
    if row.outcome != "answered":
        status, kind = _ENDS.get(row.outcome, (500, "api_error"))
        sentence = f"the run {row.run_id} ended without an answer ({row.outcome}): {row.error}"
        # It was paid for; whether to pay for another is not a library's decision.
        raise RequestRefusedError(status, kind, sentence, may_retry=False)


async def _answer_parts(call: Call, run: RunRow, answer: AnswerText) -> AsyncGenerator[str, None]:
    async with closed_after(call.office.read_text(call.caller, run.run_id, "")) as parts:
        async for part in parts:
            if text := answer.feed(part):
                yield text
            if answer.is_cut:
                return
        if text := answer.feed(b"", is_last=True):
            yield text


async def _whole(call: Call, run: RunRow, model: str, max_tokens: int) -> bytes:
    """The reply in one piece."""
    watched = _Watched()
    async with closed_after(call.office.watch_run(call.caller, run.run_id, 0)) as events:
        async for _, event in events:
            watched.see(event)
    await _check_answered(call, run)
    answer = AnswerText(max_tokens)
    async with aclosing(_answer_parts(call, run, answer)) as parts:
        text = "".join([part async for part in parts])
    message = message_json(
        run.run_id, model, content=[text], stop_reason=answer.stop_reason, usage=watched.usage
    )
    if len(text) <= INLINE_WORK_BYTES:
        return _dumped(message)
    return await asyncio.to_thread(_dumped, message)


def _dumped(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")


def _sse(kind: str, **body: object) -> bytes:
    # ASCII: many a client takes U+2028 and its like for the end of a line.
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **body})}\n\n".encode("ascii")


async def _events(
    call: Call, run: RunRow, model: str, max_tokens: int, give_up: OnHangUp
) -> AsyncGenerator[bytes, None]:
    """The reply as a stream. An error in it is an event: its status was sent long ago."""
    watched = _Watched()
    start = message_json(run.run_id, model, content=[], stop_reason=None, usage=watched.usage)
    yield _sse("message_start", message=start)
    yield _sse("ping")
    try:
        news = call.office.watch_run(call.caller, run.run_id, 0)
        async with closed_after(news), aclosing(in_batches(news, HTTP_HEARTBEAT_S)) as events:
            last_sent_at_s = asyncio.get_running_loop().time()
            async for some in events:
                for _, event in some:
                    watched.see(event)
                # A busy run has no pauses; its client still hears nothing of what it does.
                now_s = asyncio.get_running_loop().time()
                if not some or now_s - last_sent_at_s >= HTTP_HEARTBEAT_S:
                    last_sent_at_s = now_s
                    yield _sse("ping")
        await _check_answered(call, run)
        answer = AnswerText(max_tokens)
        yield _sse("content_block_start", index=0, content_block={"type": "text", "text": ""})
        async with aclosing(_answer_parts(call, run, answer)) as parts:
            async for part in parts:
                for at in range(0, len(part), _DELTA_CHARS):
                    delta = {"type": "text_delta", "text": part[at : at + _DELTA_CHARS]}
                    yield _sse("content_block_delta", index=0, delta=delta)
    except (errors.OrchestratorError, RequestRefusedError) as error:
        if isinstance(error, errors.UnavailableError):
            await give_up()
        refusal, message = told(error)
        yield _sse("error", error=body_of(refusal, message)["error"])
        return
    yield _sse("content_block_stop", index=0)
    yield _sse(
        "message_delta",
        delta={"stop_reason": answer.stop_reason, "stop_sequence": None},
        usage=usage_json(watched.usage),
    )
    yield _sse("message_stop")


ROUTES: tuple[Route, ...] = (
    Route(
        name="Messages",
        rpc="CreateRun",
        method="POST",
        path="/v1/messages",
        summary="The Messages API of Anthropic, answered by a run over a prompt of any length.",
        answer=_messages,
        body=MessagesForm,
        max_body_bytes=MAX_MESSAGES_BODY_BYTES,
        reply=MessageReply,
        refusals=(errors.BudgetExceededError, errors.CallIdReusedError),
        answer_s=None,
        unavailable=OVERLOADED,
    ),
)
