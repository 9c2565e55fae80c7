"""The real SDK against the fake server, over real HTTP. What the server logged is the witness."""

import asyncio
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import aiohttp
import anthropic
import httpx2
import pytest

from orchestrator.conversation import Entry, StopReason, Told, ToolReport
from orchestrator.errors import Billing, InvalidRequestError, KeyMissingError, ModelError
from orchestrator.models.anthropic_client import FOREIGN_ERRORS, AnthropicClient
from orchestrator.models.port import ModelRequest
from orchestrator.models.sdk import anthropic_api
from orchestrator.pricing import Usage
from tests.fakes.anthropic_server import (
    Blocks,
    Call,
    Drop,
    FakeAnthropic,
    Play,
    Refuse,
    Respond,
    Say,
    Slow,
    StreamEnd,
    StreamError,
    serve,
    thinking,
)

KEY = "sk-ant-api03-do-not-repeat-me"
NOTHING, UNKNOWN = Billing.NOTHING, Billing.UNKNOWN


def _request(*entries: Entry, system: str = "", timeout_s: float = 30.0) -> ModelRequest:
    return ModelRequest(
        model="claude-test",
        system=system,
        conversation=entries or (Told("What is 6 times 7?"),),
        python_tool=bool(system),
        max_tokens=1_000,
        timeout_s=timeout_s,
    )


@asynccontextmanager
async def _connected(respond: Respond | Play) -> AsyncIterator[tuple[AnthropicClient, FakeAnthropic]]:
    play = respond if callable(respond) else lambda body: respond
    async with serve(play, key=KEY) as fake:
        client = AnthropicClient(anthropic_api(KEY, fake.url))
        try:
            yield client, fake
        finally:
            await client.aclose()


def _confirmed(usage: Usage) -> dict[str, int]:
    return {
        "input_tokens": usage.input,
        "cache_read_input_tokens": usage.cache_read,
        "cache_creation_input_tokens": usage.cache_write,
        "output_tokens": usage.output,
    }


# --- What arrives --------------------------------------------------------------------------------------


async def test_a_sub_call_is_answered_and_its_usage_is_what_the_server_billed() -> None:
    async with _connected(Say("42, été 😀")) as (client, fake):
        completion = await client.complete(_request())
    assert completion.reply.text == "42, été 😀"
    assert completion.reply.stop is StopReason.END_TURN
    assert _confirmed(completion.usage) == fake.billed()


async def test_a_turn_asks_for_a_cell_and_is_sent_back_verbatim_with_its_thinking() -> None:
    thought = thinking("The user wants 6 × 7. " * 40)
    redacted = {"type": "redacted_thinking", "data": "b3BhcXVl"}

    def respond(body: dict[str, Any]) -> Play:
        if len(body["messages"]) == 1:
            return Blocks([thought, redacted, *Call("print(6 * 7)", text="Let me see.").content], "tool_use")
        return Say("42")

    async with _connected(respond) as (client, fake):
        told = Told("What is 6 times 7?")
        turn = (await client.complete(_request(told, system="Write Python."))).reply
        assert turn.stop is StopReason.TOOL_USE
        call_id = str(turn.content[-1]["id"])
        answer = await client.complete(
            _request(told, turn, ToolReport(call_id, "42\n"), system="Write Python.")
        )
    assert answer.reply.text == "42"
    # The server refuses thinking that was altered; here is the whole turn, block by block.
    assert fake.log[1].body["messages"][1]["content"] == [
        thought,
        redacted,
        *Call("print(6 * 7)", "Let me see.").content,
    ]


async def test_the_second_turn_reads_from_cache_what_the_first_one_wrote() -> None:
    def respond(body: dict[str, Any]) -> Play:
        return Call(f"print({len(body['messages'])})")

    system, conversation = "Write Python. " * 50, [Told("A long task. " * 100)]
    usages: list[Usage] = []
    async with _connected(respond) as (client, fake):
        entries: list[Entry] = list(conversation)
        for number in range(4):
            completion = await client.complete(_request(*entries, system=system))
            usages.append(completion.usage)
            call_id = str(completion.reply.content[-1]["id"])
            entries += [completion.reply, ToolReport(call_id, f"report {number} " * 50)]
            if number == 1:
                entries.append(Told("A note."))
    first, *later = usages
    assert (first.cache_read, first.input) == (0, 0)
    written = first.cache_write
    for usage in later:
        # All of what was sent before is read; only the news is written.
        assert usage.cache_read == written
        assert usage.input == 0
        written += usage.cache_write
    for served in fake.log:
        marked = json.dumps(served.body).count("cache_control")
        assert marked <= 4


async def test_a_reply_longer_than_a_call_without_streaming_may_ask_for_arrives() -> None:
    async with _connected(Say("word " * 50_000)) as (client, _):
        completion = await client.complete(replace(_request(), max_tokens=128_000))
    assert completion.reply.text == "word " * 50_000


async def test_a_server_that_ignores_streaming_is_understood() -> None:
    async with _connected(Call("print(1)")) as (client, fake):
        fake.streams = False
        completion = await client.complete(_request(system="s"))
    assert completion.reply.content[0]["input"] == {"code": "print(1)"}
    assert _confirmed(completion.usage) == fake.billed()


async def test_fifty_calls_run_side_by_side_and_every_answer_finds_its_question() -> None:
    everybody_is_here = asyncio.Barrier(50)

    async def respond(body: dict[str, Any]) -> Play:
        await everybody_is_here.wait()
        return Say(body["messages"][0]["content"][0]["text"].upper())

    async with _connected(respond) as (client, fake):
        answers = await asyncio.gather(
            *(client.complete(_request(Told(f"question {number}"))) for number in range(50))
        )
    assert [a.reply.text for a in answers] == [f"QUESTION {number}" for number in range(50)]
    assert fake.most_in_flight == 50
    total = Usage()
    for answer in answers:
        total = total.plus(answer.usage)
    assert _confirmed(total) == fake.billed()


# --- What goes wrong -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("play", "billing", "retryable", "words"),
    [
        (Refuse(400, "invalid_request_error"), NOTHING, False, "(400, invalid_request_error)"),
        (Refuse(404, "not_found_error"), NOTHING, False, "no such model"),
        (Refuse(413, "request_too_large"), NOTHING, False, "too large"),
        (Refuse(429, "rate_limit_error"), NOTHING, True, "(429, rate_limit_error)"),
        (
            Refuse(429, "rate_limit_error", code="enforced_spend_limit_reached"),
            NOTHING,
            False,
            "spend limit is reached",
        ),
        (Refuse(500, "api_error"), UNKNOWN, True, "(500, api_error)"),
        (Refuse(529, "overloaded_error"), NOTHING, True, "(529, overloaded_error)"),
        (Refuse(307, headers={"location": "http://127.0.0.1:1/elsewhere"}), NOTHING, False, "(307"),
        (StreamError("overloaded_error", after_start=False), NOTHING, True, "(stream, overloaded_error)"),
        (StreamError("overloaded_error"), UNKNOWN, True, "(stream, overloaded_error)"),
        (StreamError("api_error"), UNKNOWN, True, "(stream, api_error)"),
        (StreamEnd(), UNKNOWN, True, "ended early"),
        (Drop(), UNKNOWN, True, "connection to the provider broke"),
        (Drop(in_the_middle=True), UNKNOWN, True, "connection to the provider broke"),
    ],
    ids=repr,
)
async def test_every_fault_is_one_attempt_with_its_price_and_its_hope(
    play: Play, billing: Billing, retryable: bool, words: str
) -> None:
    async with _connected(play) as (client, fake):
        with pytest.raises(ModelError) as caught:
            await client.complete(_request())
    failure = caught.value
    assert (failure.billing, failure.retryable) == (billing, retryable)
    assert words in str(failure)
    assert len(fake.log) == 1
    if failure.billing is NOTHING:
        assert fake.billed() == {}


async def test_retry_after_reaches_the_caller() -> None:
    refusal = Refuse(429, "rate_limit_error", headers={"retry-after": "17"})
    async with _connected(refusal) as (client, _):
        with pytest.raises(ModelError) as caught:
            await client.complete(_request())
    assert (caught.value.retry_after_s, caught.value.status) == (17.0, 429)


async def test_a_call_that_hangs_is_given_up_and_the_server_sees_it_go() -> None:
    async with _connected(Slow(3_600)) as (client, fake):
        with pytest.raises(ModelError, match=r"no reply from the model in 1\.5 s") as caught:
            await client.complete(_request(timeout_s=1.5))
        assert (caught.value.billing, caught.value.retryable) == (UNKNOWN, True)
        await _until(lambda: fake.in_flight == 0)
        assert fake.log[0].outcome == "client_gone"
        assert fake.billed()["output_tokens"] > 0


async def test_a_cancelled_call_stays_cancelled_and_lets_go_of_its_connection() -> None:
    async with _connected(Slow(3_600)) as (client, fake):
        call = asyncio.create_task(client.complete(_request()))
        await _until(lambda: fake.in_flight == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await _until(lambda: fake.in_flight == 0)
        assert fake.log[0].outcome == "client_gone"


async def test_one_failed_call_leaves_the_next_one_alone() -> None:
    plays: list[Play] = [Drop(in_the_middle=True), Say("fine")]
    async with _connected(lambda body: plays.pop(0)) as (client, _):
        with pytest.raises(ModelError):
            await client.complete(_request())
        assert (await client.complete(_request())).reply.text == "fine"


async def test_an_address_where_nobody_listens_costs_nothing() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        client = AnthropicClient(anthropic_api(KEY, f"http://127.0.0.1:{taken.getsockname()[1]}"))
        with pytest.raises(ModelError, match="no connection to the provider") as caught:
            await client.complete(_request())
        await client.aclose()
    assert (caught.value.billing, caught.value.retryable) == (NOTHING, True)


async def test_a_server_that_does_not_speak_tls_costs_nothing() -> None:
    async with serve(lambda body: Say("x")) as fake:
        client = AnthropicClient(anthropic_api(KEY, fake.url.replace("http:", "https:")))
        with pytest.raises(ModelError, match="no connection to the provider") as caught:
            await client.complete(_request())
        await client.aclose()
    assert caught.value.billing is NOTHING


@pytest.mark.parametrize("reply", [b"not json", b'{"type": "message"}', b"[]", b"{"])
async def test_a_reply_that_cannot_be_read_may_have_been_billed(reply: bytes) -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        head = f"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: {len(reply)}\r\n\r\n"
        writer.write(head.encode() + reply)
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        client = AnthropicClient(anthropic_api(KEY, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        with pytest.raises(ModelError, match="no valid") as caught:
            await client.complete(_request())
        await client.aclose()
    assert (caught.value.billing, caught.value.retryable) == (UNKNOWN, False)


async def test_a_server_that_closes_behind_each_reply_without_a_word_costs_no_attempt() -> None:
    message = {"content": [], "stop_reason": "end_turn", "usage": {"input_tokens": 5, "output_tokens": 1}}
    events = ({"type": "message_start", "message": message}, {"type": "message_stop"})
    stream = b"".join(f"data: {json.dumps(event)}\n\n".encode() for event in events)
    closed: list[bool] = []
    chunks = f"{len(stream):x}\r\n".encode() + stream + b"\r\n0\r\n\r\n"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.readexactly(int(head.lower().partition(b"content-length: ")[2].split()[0]))
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n")
        writer.write(b"transfer-encoding: chunked\r\n\r\n" + chunks)
        await writer.drain()
        # As llama.cpp's does: soon, but after the client may have sent the next request.
        await asyncio.sleep(0.002)
        writer.close()
        await writer.wait_closed()
        closed.append(True)

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        client = AnthropicClient(anthropic_api(KEY, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"))
        for _ in range(20):
            assert (await client.complete(_request())).usage.total == 6
        await client.aclose()
        await _until(lambda: len(closed) == 20)


@pytest.mark.parametrize("library", [httpx2, aiohttp, aiohttp.http_exceptions, anthropic], ids=str)
def test_every_error_of_the_libraries_below_is_one_we_classify(library: ModuleType) -> None:
    not_ours = {
        httpx2.CookieConflict: "we read no cookies",
        aiohttp.WSMessageTypeError: "we speak no websockets",
        aiohttp.WebSocketError: "we speak no websockets",
        aiohttp.BadContentDispositionHeader: "a warning, never raised at us",
        aiohttp.BadContentDispositionParam: "a warning, never raised at us",
        aiohttp.EofStream: "the stream reader catches it itself",
    }
    errors = {c for c in vars(library).values() if isinstance(c, type) and issubclass(c, Exception)}
    unmapped = {c for c in errors - set(not_ours) if not issubclass(c, FOREIGN_ERRORS)}
    assert unmapped == set()


# --- What is sent, and what never is -------------------------------------------------------------------


async def test_nothing_of_the_environment_goes_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "sk-of-somebody-else")
    monkeypatch.setenv("ANTHROPIC_AUTH_TOKEN", "token-of-somebody-else")
    monkeypatch.setenv("ANTHROPIC_BASE_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("ANTHROPIC_CUSTOM_HEADERS", "X-Leak: 1\nAuthorization: Bearer stolen\nHost: evil.test")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:1")
    async with _connected(Say("hello")) as (client, fake):
        await client.complete(_request())
        host = fake.url.removeprefix("http://")
    (served,) = fake.log
    assert served.headers["authorization"] == f"Bearer {KEY}"
    assert served.headers["host"] == host
    assert set(served.headers) <= {
        "accept", "accept-encoding", "anthropic-version", "authorization", "connection", "content-length",
        "content-type", "host", "user-agent",
    }  # fmt: skip


async def test_the_key_is_in_no_error_even_when_the_server_repeats_it() -> None:
    async with serve(lambda body: Say("never"), key="another key") as fake:
        client = AnthropicClient(anthropic_api(KEY, fake.url))
        with pytest.raises(ModelError, match=r"does not accept the API key \(401") as caught:
            await client.complete(_request())
        await client.aclose()
    assert (caught.value.billing, caught.value.retryable) == (NOTHING, False)
    # Nothing is chained to it either, so no log of a traceback can show the response.
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    assert KEY not in f"{caught.value!r} {client!r} {vars(caught.value)}"


@pytest.mark.parametrize("key", ["", "  \n", "sk\nx", "sk x", "schlüssel"])
def test_what_cannot_be_a_key_is_refused_before_anything_is_sent(key: str) -> None:
    with pytest.raises(KeyMissingError) as caught:
        anthropic_api(key, "http://127.0.0.1:1")
    assert key.strip() == "" or key not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["", "127.0.0.1:80", "ftp://host", "http://", "http://[", "file:///etc/passwd"]
)
def test_what_is_no_address_is_refused_before_anything_is_sent(url: str) -> None:
    with pytest.raises(InvalidRequestError, match="no http or https URL"):
        anthropic_api(KEY, url)


# --- The fake itself -----------------------------------------------------------------------------------


def test_the_fake_server_runs_as_a_program_and_logs_what_it_served(tmp_path: Path) -> None:
    script, log = tmp_path / "script.py", tmp_path / "log.jsonl"
    script.write_text(
        "from tests.fakes.anthropic_server import Say\ndef respond(body):\n    return Say('hello')\n"
    )
    program_name = "tests.fakes.anthropic_server"
    command = [sys.executable, "-m", program_name, "--script", str(script), "--log", str(log)]
    body = {"model": "m", "max_tokens": 10, "messages": [{"role": "user", "content": "hi"}]}
    headers = {"authorization": "Bearer k", "anthropic-version": "2026-10-21"}
    headers["content-type"] = "application/json"
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as program:
        assert program.stdout is not None
        try:
            url = program.stdout.readline().split()[-1]
            answers = []
            for path in ("/v1/messages", "/v1/messages/count_tokens"):
                request = urllib.request.Request(url + path, json.dumps(body).encode(), headers)  # noqa: S310
                with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310
                    answers.append(json.load(response))
        finally:
            program.terminate()
    assert answers[0]["content"] == [{"type": "text", "text": "hello"}]
    assert answers[0]["usage"]["input_tokens"] == answers[1]["input_tokens"]
    first = json.loads(log.read_text().splitlines()[0])
    assert (first["outcome"], first["billed"]) == ("served", answers[0]["usage"])


async def _until(holds: Callable[[], bool]) -> None:
    """Wait for something the server sees; pytest's own limit ends a wait in vain."""
    while not holds():  # noqa: ASYNC110 - nothing there to wait on
        await asyncio.sleep(0.005)
