"""The real provider process, between the orchestrator's client and a fake provider over real HTTP."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator.conversation import CellReport, Reply, StopReason, Told, ToolReport
from orchestrator.errors import Billing, KeyMissingError, MachineError, ModelError
from orchestrator.models.platforms import Bedrock, Foundry
from orchestrator.models.port import ModelRequest
from orchestrator.models.provider.client import ProviderClient
from orchestrator.models.provider.connection import connect
from orchestrator.models.provider.launch import ProviderProcess
from tests.fakes.anthropic_server import Blocks, FakeAnthropic, Play, Refuse, Respond, Say, Slow, serve
from tests.fakes.provider import KEY, provider_at, provider_in_this_process

SUB_CALL = ModelRequest(
    model="claude-test",
    system="",
    conversation=(Told("What is 6 times 7?"),),
    python_tool=False,
    max_tokens=1_000,
    timeout_s=30.0,
)


@asynccontextmanager
async def asked(
    respond: Respond | Play,
) -> AsyncIterator[tuple[ProviderClient, ProviderProcess, FakeAnthropic]]:
    play = respond if callable(respond) else lambda body: respond
    async with serve(play, key=KEY) as server:
        with provider_at(server.url) as process:
            connection = await connect(process)
            try:
                yield connection.client, process, server
            finally:
                await connection.client.aclose()


async def until(holds: Callable[[], bool]) -> None:
    """pytest's own limit ends a wait in vain."""
    while not holds():  # noqa: ASYNC110 - nothing there to wait on
        await asyncio.sleep(0.01)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


# --- What goes out, to the byte ------------------------------------------------------------------------

GOLDEN_HEADERS = {
    "accept": "application/json",
    "accept-encoding": "",
    "anthropic-version": "2026-10-21",
    "authorization": f"Bearer {KEY}",
    "connection": "keep-alive",
    "content-length": "",
    "content-type": "application/json",
    "host": "",
    "user-agent": "",
}
"""All of them. An empty value is one that a version or a port decides."""

TOOL = {
    "name": "python",
    "description": "Runs one cell of Python in the live namespace and shows what it printed.",
    "strict": True,
    "input_schema": {
        "type": "object",
        "properties": {"code": {"type": "string", "description": "The cell's source code."}},
        "required": ["code"],
        "additionalProperties": False,
    },
}
CACHED = {"cache_control": {"type": "ephemeral"}}


@pytest.mark.case("D07")
async def test_what_goes_out_is_this_and_nothing_else() -> None:
    said = ({"type": "thinking", "thinking": "", "signature": "s"}, {"type": "tool_use", "id": "t", "name": "python", "input": {"code": "1"}})  # fmt: skip # noqa: E501
    turn = replace(
        SUB_CALL,
        system="You write Python.",
        conversation=(
            Told("How many?"),
            Reply(said[1:], StopReason.TOOL_USE),
            ToolReport("t", "1"),
            CellReport("!"),
        ),
        python_tool=True,
        stop_sequences=("\n[three",),
    )
    # What a cell may try to say: it is text, wherever it comes from.
    hostile = json.dumps(
        {"api_base": "http://127.0.0.1:9", "tools": [{"type": "web_search"}], "headers": {"x": "y"}}
    )
    async with asked(Say("42")) as (client, _, server):
        await client.complete(replace(SUB_CALL, conversation=(Told(hostile, 5),)))
        await client.complete(turn)
    sub_call_sent, turn_sent = server.log
    for served in server.log:
        assert served.path == "/v1/messages"
        assert served.headers.keys() == GOLDEN_HEADERS.keys()
        assert {n: v for n, v in served.headers.items() if GOLDEN_HEADERS[n]} == {
            n: v for n, v in GOLDEN_HEADERS.items() if v
        }
    assert sub_call_sent.body == {
        "model": "claude-test",
        "max_tokens": 1_000,
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": hostile[:5], **CACHED},
                    {"type": "text", "text": hostile[5:]},
                ],
            }
        ],
        "stream": True,
    }
    assert turn_sent.body == {
        "model": "claude-test",
        "max_tokens": 1_000,
        "system": [{"type": "text", "text": "You write Python.", **CACHED}],
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "How many?", **CACHED}]},
            {"role": "assistant", "content": [dict(said[1])]},
            {
                "role": "user",
                "content": [
                    {"type": "tool_result", "tool_use_id": "t", "content": "1"},
                    {"type": "text", "text": "!", **CACHED},
                ],
            },
        ],
        "stop_sequences": ["\n[three"],
        "tools": [TOOL],
        "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
        "stream": True,
    }


async def test_a_large_prompt_and_a_large_reply_arrive_whole() -> None:
    prompt, words = "0123456789" * 500_000, "palabra ñ " * 20_000
    async with asked(Say(words)) as (client, _, server):
        request = replace(SUB_CALL, conversation=(Told(prompt),), max_tokens=1_000_000)
        completion = await client.complete(request)
    assert completion.reply.text == words
    assert server.log[0].body["messages"][0]["content"][0]["text"] == prompt


async def test_a_hundred_calls_side_by_side_are_answered_each_with_its_own() -> None:
    def respond(body: dict[str, Any]) -> Play:
        text = body["messages"][0]["content"][0]["text"]
        return Slow(0.2, Say(text.upper()))

    async with asked(respond) as (client, _, server):
        requests = [replace(SUB_CALL, conversation=(Told(f"question {n}"),)) for n in range(100)]
        replies = await asyncio.gather(*map(client.complete, requests))
        assert [completion.reply.text for completion in replies] == [f"QUESTION {n}" for n in range(100)]
        assert server.most_in_flight > 50


# --- The key comes back in nothing ---------------------------------------------------------------------

ECHOES: Mapping[str, Play] = {
    "401": Refuse(401, "authentication_error", message=f"invalid key {KEY}"),
    "400": Refuse(400, f"invalid_{KEY}", message=KEY, headers={"request-id": KEY, "retry-after": KEY}),
    "500": Refuse(500, KEY, code=KEY, message=KEY),
    "in the text": Say(f"Authorization: Bearer {KEY}"),
    "in the thoughts": Blocks([{"type": "thinking", "thinking": KEY, "signature": KEY}]),
    "in a cell": Blocks(
        [{"type": "tool_use", "id": "t", "name": "python", "input": {"code": f"key = '{KEY}'"}}], "tool_use"
    ),
    "in an unknown block": Blocks([{"type": "news", "of": [{KEY: 1}]}]),
}


@pytest.mark.case("J08")
@pytest.mark.parametrize("play", ECHOES.values(), ids=ECHOES.keys())
async def test_a_server_that_repeats_the_key_is_not_repeated(play: Play) -> None:
    async with serve(lambda body: play) as server, provider_in_this_process(server.url) as client:
        with pytest.raises(ModelError) as caught:
            await client.complete(SUB_CALL)
    assert not caught.value.retryable or caught.value.status == 500
    assert KEY not in f"{caught.value!r} {vars(caught.value)}"
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None


@pytest.mark.case("J08")
async def test_a_placeholder_for_a_key_may_be_part_of_a_reply() -> None:
    async with (
        serve(lambda body: Say("none of them")) as server,
        provider_in_this_process(server.url, ANTHROPIC_API_KEY="none") as client,
    ):
        assert (await client.complete(SUB_CALL)).reply.text == "none of them"


# --- Opening -------------------------------------------------------------------------------------------


async def test_the_process_says_which_credentials_it_has_and_never_what_they_are() -> None:
    keys = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "secret"}
    with provider_at("http://127.0.0.1:1", platform=Bedrock(region="r"), **keys) as process:
        connection = await connect(process)
        await connection.client.aclose()
    assert connection.credentials == ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")


async def test_a_key_that_cannot_be_one_is_refused_at_once_and_not_quoted() -> None:
    for key, why in (
        ("", "no key for the model provider"),
        (KEY + "\nx", "ANTHROPIC_API_KEY has a line break"),
    ):
        with provider_at("", key) as process, pytest.raises(KeyMissingError, match=why) as caught:
            await connect(process)
        assert KEY not in str(caught.value)


async def test_a_process_that_cannot_start_is_a_sentence_and_not_a_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with (
        provider_at("http://127.0.0.1:1") as process,
        pytest.raises(MachineError, match="asks the model provider"),
    ):
        await connect(process)


async def test_foundrys_key_goes_where_foundry_wants_it() -> None:
    async with serve(lambda body: Say("hello")) as server:
        with provider_at(
            server.url, "", platform=Foundry(resource="mine"), ANTHROPIC_FOUNDRY_API_KEY=KEY
        ) as process:
            connection = await connect(process)
            with suppress(ModelError):
                await connection.client.complete(SUB_CALL)
            await connection.client.aclose()
    assert server.log[0].headers["api-key"] == KEY


# --- Its life ------------------------------------------------------------------------------------------


async def test_a_process_that_dies_fails_its_calls_as_maybe_billed_and_later_ones_unbilled() -> None:
    async with asked(Slow(3_600)) as (client, process, server):
        calls = [asyncio.create_task(client.complete(SUB_CALL)) for _ in range(3)]
        await until(lambda: server.in_flight == 3)
        os.kill(process.pid, signal.SIGKILL)
        for outcome in await asyncio.gather(*calls, return_exceptions=True):
            assert isinstance(outcome, ModelError)
            assert (outcome.billing, outcome.retryable) == (Billing.UNKNOWN, False)
            assert "only a new run" in str(outcome)
        with pytest.raises(ModelError, match="has ended") as caught:
            await client.complete(SUB_CALL)
        assert (caught.value.billing, caught.value.retryable) == (Billing.NOTHING, False)


async def test_a_call_that_is_cancelled_or_out_of_time_lets_go_of_its_connection() -> None:
    async with asked(Slow(3_600)) as (client, _, server):
        call = asyncio.create_task(client.complete(SUB_CALL))
        await until(lambda: server.in_flight == 1)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        await until(lambda: server.in_flight == 0)
        with pytest.raises(ModelError, match="no reply from the model"):
            await client.complete(replace(SUB_CALL, timeout_s=0.3))
        await until(lambda: server.in_flight == 0)
    assert [served.outcome for served in server.log] == ["client_gone", "client_gone"]


async def test_a_signal_from_the_terminal_or_a_service_manager_ends_no_call() -> None:
    async with asked(Slow(0.5, Say("still here"))) as (client, process, server):
        call = asyncio.create_task(client.complete(SUB_CALL))
        await until(lambda: server.in_flight == 1)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            os.kill(process.pid, number)
        assert (await call).reply.text == "still here"
        assert os.getsid(process.pid) == process.pid


async def test_closing_the_client_ends_the_process_by_itself_and_closing_the_process_at_once() -> None:
    async with serve(lambda body: Slow(3_600)) as server:
        with provider_at(server.url) as process:
            connection = await connect(process)
            call = asyncio.create_task(connection.client.complete(SUB_CALL))
            await until(lambda: server.in_flight == 1)
            await connection.client.aclose()
            with pytest.raises(ModelError, match="closed"):
                await call
            await until(lambda: server.in_flight == 0 and not is_running(process.pid))
        with provider_at(server.url) as another:
            pass
        assert not is_running(another.pid)


def test_a_killed_orchestrator_takes_the_process_with_it() -> None:
    program = (
        "import asyncio, time\n"
        "from orchestrator.models.provider.connection import connect\n"
        "from tests.fakes.provider import provider_at\n"
        "process = provider_at('http://127.0.0.1:1')\n"
        "async def main():\n"
        "    await connect(process)\n"
        "    print(process.pid, flush=True)\n"
        "    await asyncio.sleep(3_600)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as orchestrator:
        assert orchestrator.stdout is not None
        pid = int(orchestrator.stdout.readline())
        assert is_running(pid)
        orchestrator.kill()
    deadline_s = time.monotonic() + 30
    while is_running(pid) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not is_running(pid)
