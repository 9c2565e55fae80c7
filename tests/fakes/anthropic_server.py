"""A fake Anthropic Messages server over real HTTP: short, strict, and it remembers everything.

    python -m tests.fakes.anthropic_server --script FILE [--port 0] [--log FILE.jsonl]

The script defines `respond(request)`, plain or async, which is given each request's JSON body and returns
what to play: `Say`, `Call`, `Blocks`, or one of the faults below. The server refuses with 400 whatever the
API would refuse, counts tokens the same way every time, and simulates prompt caching. Its log is an
independent witness: what it received, what it served, and what it would have billed, broken and cancelled
calls included.

Simplifications: a token is four bytes of a block's JSON; any prefix is long enough to be cached and is kept
for good; a broken or cancelled call is billed in full, since a real provider may do so.
"""

import argparse
import asyncio
import hashlib
import inspect
import json
import runpy
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from aiohttp import web

Json: TypeAlias = dict[str, Any]

# --- What a script can play ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Blocks:
    """A reply, block by block."""

    content: list[Json]
    stop_reason: str = "end_turn"


def Say(text: str, stop_reason: str = "end_turn") -> Blocks:  # noqa: N802 - reads like the classes beside it
    """A reply of text."""
    return Blocks([{"type": "text", "text": text}], stop_reason)


def Call(code: str, text: str = "") -> Blocks:  # noqa: N802
    """A call of the tool `python`."""
    digest = hashlib.sha256(code.encode()).hexdigest()[:16]
    call = {"type": "tool_use", "id": f"toolu_{digest}", "name": "python", "input": {"code": code}}
    return Blocks([{"type": "text", "text": text}, call] if text else [call], "tool_use")


def thinking(text: str) -> Json:
    """A thinking block. The server refuses it when it comes back altered."""
    return {"type": "thinking", "thinking": text, "signature": _signature(text)}


@dataclass(frozen=True)
class Refuse:
    """An error response; nothing is billed."""

    status: int
    type: str = "api_error"
    code: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "refused by the script"


@dataclass(frozen=True)
class Drop:
    """The connection is cut before or in the middle of the response."""

    in_the_middle: bool = False


@dataclass(frozen=True)
class Slow:
    """The reply comes after a while. A long while is a call that hangs."""

    seconds: float
    reply: Blocks = field(default_factory=lambda: Say("late"))


@dataclass(frozen=True)
class StreamError:
    """An error event inside a stream with status 200."""

    type: str = "overloaded_error"
    after_start: bool = True


@dataclass(frozen=True)
class StreamEnd:
    """The stream ends politely, but without message_stop."""


Play: TypeAlias = Blocks | Refuse | Drop | Slow | StreamError | StreamEnd
Respond: TypeAlias = Callable[[Json], Play | Awaitable[Play]]


@dataclass
class Served:
    """One request, and what became of it."""

    path: str
    headers: dict[str, str]
    body: Any
    outcome: str = "unfinished"
    """`served`, a status, or what broke: `dropped`, `stream_error`, `stream_end`, `client_gone`."""
    billed: dict[str, int] | None = None
    """The usage billed, in the API's words."""


# --- What the API would refuse -------------------------------------------------------------------------

_REQUIRED = {"model", "max_tokens", "messages"}
_OPTIONAL = {"system", "tools", "tool_choice", "stream", "stop_sequences", "metadata", "thinking"}
_OPTIONAL |= {"output_config", "service_tier"}
_VERSIONS = {"2023-06-01", "2026-10-21"}


class BadRequestError(Exception):
    """A 400 of the API."""


def check(body: Any) -> None:
    """Raise what the API would refuse."""
    try:
        _check(body)
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRequestError(f"malformed: {error!r}") from error


def _check(body: Any) -> None:
    _need(isinstance(body, dict), "body: not an object")
    unknown = set(body) - _REQUIRED - _OPTIONAL
    _need(not unknown, f"{sorted(unknown)}: Extra inputs are not permitted")
    _need(isinstance(body.get("model"), str) and body["model"] != "", "model: required")
    limit = body.get("max_tokens")
    _need(isinstance(limit, int) and not isinstance(limit, bool) and limit >= 1, "max_tokens: at least 1")
    stops = body.get("stop_sequences", [])
    _need(all(isinstance(s, str) and s.strip() for s in stops), "stop_sequences: not only whitespace")
    tools = {tool.get("name") for tool in body.get("tools", [])}
    for tool in body.get("tools", []):
        _need({"name", "input_schema"} <= set(tool), "tools: name and input_schema are required")
    _need("tool_choice" not in body or tools != set(), "tool_choice: only allowed with tools")
    for block in _blocks(body.get("system", [])):
        _need(block.get("type") == "text" and block.get("text", "").strip() != "", "system: text, not empty")
    _check_messages(body.get("messages"))
    marked = sum("cache_control" in block for block in _all_blocks(body))
    _need(marked <= 4, f"cache_control: at most 4 blocks, found {marked}")


def _check_messages(messages: Any) -> None:
    _need(isinstance(messages, list) and messages != [], "messages: at least one")
    asked: list[str] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}"
        _need(set(message) == {"role", "content"}, f"{where}: role and content")
        role = "assistant" if number % 2 else "user"
        _need(message["role"] == role, f"{where}: roles must alternate, beginning with user")
        blocks = _blocks(message["content"])
        _need(blocks != [], f"{where}: content must not be empty")
        answered = [block["tool_use_id"] for block in blocks if block["type"] == "tool_result"]
        _need(sorted(answered) == sorted(asked), f"{where}: tool_use without tool_result, or the reverse")
        _need(
            all(block["type"] == "tool_result" for block in blocks[: len(answered)]),
            f"{where}: tool_result blocks come first",
        )
        for block in blocks:
            _check_block(block, role, where)
        asked = [block["id"] for block in blocks if block["type"] == "tool_use"]
    _need(messages[-1]["role"] == "user", "messages: the model does not support prefill")


_FIELDS = {
    ("user", "text"): {"text"},
    ("user", "tool_result"): {"tool_use_id", "content", "is_error"},
    ("assistant", "text"): {"text", "citations"},
    ("assistant", "tool_use"): {"id", "name", "input", "caller"},
    ("assistant", "thinking"): {"thinking", "signature"},
    ("assistant", "redacted_thinking"): {"data"},
}


def _check_block(block: Json, role: str, where: str) -> None:
    fields = _FIELDS.get((role, block["type"]))
    _need(fields is not None, f"{where}: no {block['type']} block here")
    unknown = set(block) - (fields or set()) - {"type", "cache_control"}
    _need(not unknown, f"{where}: {sorted(unknown)}: Extra inputs are not permitted")
    if block["type"] == "text":
        _need(block["text"].strip() != "", f"{where}: text content blocks must be non-empty")
    if block["type"] == "tool_use":
        _need(isinstance(block["input"], dict), f"{where}: input must be an object")
    if block["type"] == "thinking":
        unchanged = block["signature"] == _signature(block["thinking"])
        _need(unchanged, f"{where}: thinking blocks cannot be modified")
    if "thinking" in block["type"]:
        _need("cache_control" not in block, f"{where}: thinking blocks cannot be cached")


def _need(holds: bool, message: str) -> None:
    if not holds:
        raise BadRequestError(message)


def _blocks(content: Any) -> list[Json]:
    return [{"type": "text", "text": content}] if isinstance(content, str) else list(content)


def _all_blocks(body: Json) -> list[Json]:
    """In the order in which the API caches them."""
    told = [block for message in body["messages"] for block in _blocks(message["content"])]
    return [*body.get("tools", []), *_blocks(body.get("system", [])), *told]


def _signature(text: str) -> str:
    return hashlib.sha256(f"signed {text}".encode()).hexdigest()


# --- Counting ------------------------------------------------------------------------------------------

_LOOKBACK_BLOCKS = 20


class PromptCache:
    """Which prefixes were sent with a breakpoint at their end."""

    def __init__(self) -> None:
        self._written: set[str] = set()

    def input_usage(self, body: Json) -> dict[str, int]:
        """Count the request's input, and remember what it writes."""
        digest, tokens, hashes, sums, marks = hashlib.sha256(body["model"].encode()), 0, [], [], []
        for position, block in enumerate(_all_blocks(body)):
            if "cache_control" in block:
                marks.append(position)
            size, text = _measure({k: v for k, v in block.items() if k != "cache_control"})
            digest.update(text)
            tokens += size
            hashes.append(digest.hexdigest())
            sums.append(tokens)
        reachable = {n for mark in marks for n in range(max(0, mark - _LOOKBACK_BLOCKS + 1), mark + 1)}
        read = max((sums[n] for n in reachable if hashes[n] in self._written), default=0)
        written = max((sums[mark] for mark in marks), default=0)
        self._written |= {hashes[mark] for mark in marks}
        return {
            "input_tokens": tokens - max(read, written),
            "cache_read_input_tokens": read,
            "cache_creation_input_tokens": max(0, written - read),
        }


def _measure(block: Json) -> tuple[int, bytes]:
    text = json.dumps(block, sort_keys=True, ensure_ascii=False).encode("utf-8", "replace")
    return -(-len(text) // 4), text


def _within(max_tokens: int, reply: Blocks) -> Blocks:
    """The reply, its text cut where the limit falls."""
    if output_tokens(reply) <= max_tokens:
        return reply
    *before, last = reply.content
    if last["type"] != "text":
        raise ValueError(f"the script's reply is longer than max_tokens, {max_tokens}")
    for length in range(len(last["text"]), -1, -4):
        cut = Blocks([*before, {**last, "text": last["text"][:length]}], "max_tokens")
        if output_tokens(cut) <= max_tokens:
            return cut
    return Blocks(before, "max_tokens")


def _stopped(stop_sequences: list[str], reply: Blocks) -> Blocks:
    """The reply, ended before the first stop sequence in its text."""
    for position, block in enumerate(reply.content):
        text = block.get("text", "")
        stops = [at for at in map(text.find, stop_sequences) if at >= 0]
        if stops:
            cut = {**block, "text": text[: min(stops)]}
            return Blocks([*reply.content[:position], *([cut] if cut["text"] else [])], "stop_sequence")
    return reply


def output_tokens(reply: Blocks) -> int:
    """Never zero, like the API's."""
    return max(1, sum(_measure(block)[0] for block in reply.content))


# --- The server ----------------------------------------------------------------------------------------


class FakeAnthropic:
    """The server's handlers and its log."""

    def __init__(self, respond: Respond, *, key: str | None = None, log: Path | None = None) -> None:
        self._respond = respond
        self._key = key
        self._log_path = log
        self._cache = PromptCache()
        self.url = ""
        self.log: list[Served] = []
        self.streams = True
        """Off: like a server that ignores `stream`."""
        self.in_flight = 0
        self.most_in_flight = 0

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=64 * 1024 * 1024)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_post("/v1/messages/count_tokens", self._count_tokens)
        return app

    def billed(self) -> dict[str, int]:
        """Everything billed, by counter."""
        total: dict[str, int] = {}
        for served in self.log:
            for counter, amount in (served.billed or {}).items():
                total[counter] = total.get(counter, 0) + amount
        return total

    async def _count_tokens(self, request: web.Request) -> web.StreamResponse:
        async with self._record(request) as served:
            try:
                self._check_headers(request)
                check({"max_tokens": 1, **served.body})
            except BadRequestError as error:
                served.outcome = "400"
                return _error(400, "invalid_request_error", str(error))
            served.outcome = "served"
            return web.json_response({"input_tokens": sum(_measure(b)[0] for b in _all_blocks(served.body))})

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        async with self._record(request) as served:
            if self._key not in (None, request.headers.get("Authorization", "").removeprefix("Bearer ")):
                served.outcome = "401"
                # The real one doesn't quote the key; a careless gateway does, and clients must not repeat it.
                return _error(401, "authentication_error", f"invalid {request.headers['Authorization']}")
            try:
                self._check_headers(request)
                check(served.body)
            except BadRequestError as error:
                served.outcome = "400"
                return _error(400, "invalid_request_error", str(error))
            try:
                play = self._respond(served.body)
                return await self._play(request, served, await play if inspect.isawaitable(play) else play)
            except ConnectionError:
                raise
            except Exception as error:
                served.outcome = f"script raised {type(error).__name__}: {error}"
                raise

    def _check_headers(self, request: web.Request) -> None:
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        _need(scheme == "Bearer" and key != "", "Authorization: Bearer key required")
        _need(request.headers.get("anthropic-version") in _VERSIONS, "anthropic-version: required")
        _need(request.content_type == "application/json", "content-type: application/json")

    async def _play(self, request: web.Request, served: Served, play: Play) -> web.StreamResponse:
        if isinstance(play, Refuse):
            served.outcome = str(play.status)
            return _error(play.status, play.type, play.message, play.code, play.headers)
        meant = play.reply if isinstance(play, Slow) else play
        whole = meant if isinstance(meant, Blocks) else Say("half a reply")
        reply = _within(served.body["max_tokens"], _stopped(served.body.get("stop_sequences", []), whole))
        usage = {**self._cache.input_usage(served.body), "output_tokens": output_tokens(reply)}
        if not (isinstance(play, StreamError) and not play.after_start):
            served.billed = usage
        served.outcome = "client_gone"
        if isinstance(play, Slow):
            await asyncio.sleep(play.seconds)
        if isinstance(play, Drop) and not play.in_the_middle:
            return _cut(request, served, "dropped")
        message = {
            "id": f"msg_{len(self.log)}",
            "type": "message",
            "role": "assistant",
            "model": served.body["model"],
            "content": reply.content,
            "stop_reason": reply.stop_reason,
            "stop_sequence": None,
            "usage": usage,
        }
        if served.body.get("stream") and self.streams:
            return await self._stream(request, served, play, message)
        if isinstance(play, StreamError):
            served.outcome = "stream_error"
            return _error(500, play.type, "the stream broke")
        if not isinstance(play, Blocks | Slow):
            return _cut(request, served, "dropped")
        served.outcome = "served"
        return web.json_response(message, headers={"request-id": message["id"]})

    async def _stream(
        self, request: web.Request, served: Served, play: Play, message: Json
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"content-type": "text/event-stream; charset=utf-8", "request-id": message["id"]}
        )
        await response.prepare(request)
        events = list(_events(message))
        if isinstance(play, Drop | StreamEnd):
            # What was generated is more than what arrives.
            events = events[:4]
        if isinstance(play, StreamError):
            error = {"type": "error", "error": {"type": play.type, "message": "the stream broke"}}
            events = [*(events[:4] if play.after_start else ()), error]
        # Few writes: a thousand calls at once are a test of the client, not of this loop.
        await response.write(b"".join(_sse(event) for event in events))
        if isinstance(play, Drop):
            return _cut(request, served, "dropped")
        served.outcome = {StreamError: "stream_error", StreamEnd: "stream_end"}.get(type(play), "served")
        await response.write_eof()
        return response

    @asynccontextmanager
    async def _record(self, request: web.Request) -> AsyncIterator[Served]:
        body: Any = None
        with suppress(ValueError):
            body = json.loads(await request.read())
        served = Served(request.path, {k.lower(): v for k, v in request.headers.items()}, body)
        self.log.append(served)
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            yield served
        finally:
            self.in_flight -= 1
            if self._log_path is not None:
                shown = {**asdict(served), "headers": {**served.headers, "authorization": "(not logged)"}}
                with self._log_path.open("a", encoding="utf-8") as file:
                    print(json.dumps(shown, ensure_ascii=False), file=file)


def _events(message: Json) -> Iterator[Json]:
    """A message as a stream, in the API's order: deltas of a few characters, a ping, running totals."""
    usage = message["usage"]
    start = {**message, "content": [], "stop_reason": None, "usage": {**usage, "output_tokens": 1}}
    yield {"type": "message_start", "message": start}
    yield {"type": "ping"}
    for index, block in enumerate(message["content"]):
        opened, deltas = _opened(block)
        yield {"type": "content_block_start", "index": index, "content_block": opened}
        for delta in deltas:
            yield {"type": "content_block_delta", "index": index, "delta": delta}
        yield {"type": "content_block_stop", "index": index}
    yield {
        "type": "message_delta",
        "delta": {"stop_reason": message["stop_reason"], "stop_sequence": None},
        "usage": {"output_tokens": usage["output_tokens"]},
    }
    yield {"type": "message_stop"}


def _opened(block: Json) -> tuple[Json, list[Json]]:
    match block["type"]:
        case "text":
            return {**block, "text": ""}, [{"type": "text_delta", "text": t} for t in _pieces(block["text"])]
        case "tool_use":
            pieces = _pieces(json.dumps(block["input"], ensure_ascii=False)) if block["input"] else []
            return {**block, "input": {}}, [{"type": "input_json_delta", "partial_json": p} for p in pieces]
        case "thinking":
            deltas = [{"type": "thinking_delta", "thinking": t} for t in _pieces(block["thinking"])]
            signed = {"type": "signature_delta", "signature": block["signature"]}
            return {**block, "thinking": "", "signature": ""}, [*deltas, signed]
    return block, []


def _pieces(text: str) -> list[str]:
    size = max(20, len(text) // 50)
    return [text[at : at + size] for at in range(0, len(text), size)]


def _sse(event: Json) -> bytes:
    return f"event: {event['type']}\ndata: {json.dumps(event)}\n\n".encode()


def _cut(request: web.Request, served: Served, outcome: str) -> web.StreamResponse:
    served.outcome = outcome
    if request.transport is not None:
        request.transport.abort()
    return web.Response()


def _error(
    status: int, error_type: str, message: str, code: str | None = None, headers: dict[str, str] | None = None
) -> web.Response:
    error: Json = {"type": error_type, "message": message}
    if code is not None:
        error["details"] = {"error_code": code}
    return web.json_response({"type": "error", "error": error}, status=status, headers=headers)


@asynccontextmanager
async def serve(
    respond: Respond, *, port: int = 0, key: str | None = None, log: Path | None = None
) -> AsyncIterator[FakeAnthropic]:
    """A server on loopback for the length of the block."""
    fake = FakeAnthropic(respond, key=key, log=log)
    # A handler is cancelled when its client goes, as the log must say so.
    runner = web.AppRunner(fake.app(), handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", port, backlog=2_048)
        await site.start()
        host, bound_port = runner.addresses[0][:2]
        fake.url = f"http://{host}:{bound_port}"
        yield fake
    finally:
        await runner.cleanup()


def main() -> None:
    """Serve until interrupted."""
    parser = argparse.ArgumentParser(description="A fake Anthropic Messages server.")
    parser.add_argument("--script", type=Path, required=True, help="a Python file with respond(request)")
    parser.add_argument("--port", type=int, default=0, help="0: any free one")
    parser.add_argument("--log", type=Path, help="one JSON object a request is appended to this file")
    arguments = parser.parse_args()
    with suppress(KeyboardInterrupt):
        asyncio.run(_run(arguments.script, arguments.port, arguments.log))


async def _run(script: Path, port: int, log: Path | None) -> None:
    respond = runpy.run_path(str(script))["respond"]
    async with serve(respond, port=port, log=log) as fake:
        print(f"listening on {fake.url}", flush=True)
        await asyncio.Event().wait()


if __name__ == "__main__":
    # Under its own name, so that the classes a script imports are the ones compared with here.
    from tests.fakes.anthropic_server import main as _main

    _main()
