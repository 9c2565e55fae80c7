"""`POST /v1/messages`: the Messages API of Anthropic, answered by a run. `messages_mapping` has the mapping.

A stream follows the order that the API documents: message_start, content_block_start, content_block_delta...,
content_block_stop, message_delta with the usage, message_stop; `ping` while the run works. A client that
hangs up cancels its run, and so does a server that drains under it or a key that is revoked meanwhile, unless
it gave an `Idempotency-Key`: that says that it will come again for it.

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
from orchestrator.server.http.streams import Stream, closed_after, in_batches, while_connected
from orchestrator.service.port import Caller, Question
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


@dataclass(kw_only=True, slots=True)
class _Coming:
    """The reply to one request as it comes about."""

    call: Call
    run: RunRow
    model: str
    """As the request names it."""
    answer: AnswerText
    is_fetched_later: bool
    """Its client said by a key that it will come again."""
    usage: Usage = field(default_factory=Usage)
    """What the run tree was billed, as far as its events have told."""

    async def texts(self) -> AsyncGenerator[str, None]:
        """The text of the answer in parts. While the run works, an empty one now and then.

        Raises:
            RequestRefusedError: It ended without an answer.
            OrchestratorError: The service left the run, or its client.
        """
        try:
            async for _ in self._beats():
                yield ""
            await self._check_answered()
            async with closed_after(self.call.office.read_text(*self._which, "")) as parts:
                async for part in parts:
                    if text := self.answer.feed(part):
                        yield text
                    if self.answer.is_cut:
                        return
                if text := self.answer.feed(b"", is_last=True):
                    yield text
        except (errors.UnavailableError, errors.UnauthenticatedError):
            await self.give_up()
            raise

    async def give_up(self) -> None:
        """Nobody will come for the answer any more."""
        if self.is_fetched_later:
            return
        try:
            async with asyncio.timeout(HTTP_ANSWER_S):
                await self.call.office.cancel_run(*self._which)
        except (errors.OrchestratorError, TimeoutError) as error:
            # Nobody is left to tell. The run's own limits still end it.
            _log.warning("run %s goes on although its client left: %s", self.run.run_id, type(error).__name__)

    def message(self, texts: Sequence[str], stop_reason: str | None) -> Mapping[str, object]:
        """The message with these texts."""
        return message_json(
            self.run.run_id, self.model, content=texts, stop_reason=stop_reason, usage=self.usage
        )

    @property
    def _which(self) -> tuple[Caller, str]:
        return self.call.caller, self.run.run_id

    async def _beats(self) -> AsyncGenerator[None, None]:
        """Until the run has ended; one every `HTTP_HEARTBEAT_S`, however busy it is."""
        news = self.call.office.watch_run(*self._which, 0)
        async with closed_after(news), aclosing(in_batches(news, HTTP_HEARTBEAT_S)) as events:
            clock = asyncio.get_running_loop().time
            last_s = clock()
            async for some in events:
                for _, event in some:
                    self._see(event)
                if not some or clock() - last_s >= HTTP_HEARTBEAT_S:
                    last_s = clock()
                    yield

    def _see(self, event_json: bytes) -> None:
        if _SETTLED not in event_json:
            return
        event = json.loads(event_json)
        # The word may also stand in a text of a guest's.
        if event["kind"] == "call_settled":
            self.usage = self.usage.plus(Usage(**event["usage"]))

    async def _check_answered(self) -> None:
        row = await self.call.office.get_run(*self._which)
        if row.state is not RunState.ENDED:
            raise errors.UnavailableError("the run goes on elsewhere")
        if row.outcome != "answered":
            status, kind = _ENDS.get(row.outcome, (500, "api_error"))
            sentence = f"the run {row.run_id} ended without an answer ({row.outcome}): {row.error}"
            # It was paid for; whether to pay for another is not a library's decision.
            raise RequestRefusedError(status, kind, sentence, may_retry=False)


async def _messages(call: Call) -> Response:
    key = idempotency_key(call)
    form = call.take_body(MessagesForm)
    wants_stream = form.stream
    coming = _Coming(
        call=call,
        run=await _run_for(call, form, key),
        model=form.model,
        answer=AnswerText(form.max_tokens),
        is_fetched_later=key is not None,
    )
    # The prompt is stored, and the run may take an hour: nothing of it may stay here.
    del form
    call.room.release()
    headers = {"request-id": coming.run.run_id}
    if wants_stream:
        return Stream(
            _events(coming),
            media_type="text/event-stream",
            headers={**headers, "x-accel-buffering": "no"},
            on_hang_up=coming.give_up,
        )
    whole = await while_connected(_whole(coming), call.request, coming.give_up)
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


async def _whole(coming: _Coming) -> bytes:
    """The reply in one piece."""
    async with aclosing(coming.texts()) as texts:
        text = "".join([part async for part in texts])
    message = coming.message([text], coming.answer.stop_reason)
    if len(text) <= INLINE_WORK_BYTES:
        return _dumped(message)
    return await asyncio.to_thread(_dumped, message)


def _dumped(message: Mapping[str, object]) -> bytes:
    return json.dumps(message, ensure_ascii=False).encode("utf-8", "replace")


async def _events(coming: _Coming) -> AsyncGenerator[bytes, None]:
    """The reply as a stream. An error in it is an event: its status was sent long ago."""
    yield _sse("message_start", message=coming.message([], None))
    yield _sse("ping")
    block_start = _sse("content_block_start", index=0, content_block={"type": "text", "text": ""})
    try:
        async with aclosing(coming.texts()) as texts:
            async for text in texts:
                if not text:
                    yield _sse("ping")
                    continue
                for at in range(0, len(text), _DELTA_CHARS):
                    delta = {"type": "text_delta", "text": text[at : at + _DELTA_CHARS]}
                    yield block_start + _sse("content_block_delta", index=0, delta=delta)
                    block_start = b""
    except (errors.OrchestratorError, RequestRefusedError) as error:
        yield _sse("error", error=body_of(*told(error))["error"])
        return
    yield block_start + _sse("content_block_stop", index=0)
    yield _sse(
        "message_delta",
        delta={"stop_reason": coming.answer.stop_reason, "stop_sequence": None},
        usage=usage_json(coming.usage),
    )
    yield _sse("message_stop")


def _sse(kind: str, **body: object) -> bytes:
    # ASCII: many a client takes U+2028 and its like for the end of a line.
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **body})}\n\n".encode("ascii")


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
