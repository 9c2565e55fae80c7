"""An unchanged `anthropic` SDK against our `/v1/messages`, over real HTTP."""

import asyncio
import gc
import json
import time
from typing import Any

import anthropic
import pytest

from orchestrator.errors import BudgetExceededError, NotAllowedError, StoreError, UnavailableError
from orchestrator.pricing import Usage
from orchestrator.server.http import messages
from orchestrator.server.http.messages_mapping import MessagesForm
from orchestrator.trajectory import TurnStarted
from tests.fakes.http_house import ANN, READER, House, http_house
from tests.fakes.office import FakeRun, answers, waits_to_be_cancelled

BILLED = Usage(input=100, cache_read=20, cache_write=30, output=40)
LONG = "One line of a long report, number {}.\n"


def a_long_prompt(size_bytes: int, question: str) -> str:
    lines = "".join(LONG.format(number) for number in range(size_bytes // len(LONG)))
    return f"{lines}\n\n{question}"


def sdk(house: House, key: str = ANN, **kwargs: Any) -> anthropic.AsyncAnthropic:
    return anthropic.AsyncAnthropic(base_url=house.url, api_key=key, max_retries=0, timeout=60, **kwargs)


def asks(text: str = "What is it?") -> dict[str, Any]:
    return {"model": "claude-x", "max_tokens": 1_000, "messages": [{"role": "user", "content": text}]}


def the_run(house: House) -> FakeRun:
    (run,) = house.office.runs.values()
    return run


# --- The SDK, four ways, with 20 MB --------------------------------------------------------------------

TWENTY_MB = 20_000_000


@pytest.fixture(scope="module")
def twenty_mb() -> str:
    return a_long_prompt(TWENTY_MB, "How many lines are there?")


def check_20_mb(house: House, prompt: str, text: str, usage: anthropic.types.Usage) -> None:
    assert text == "the answer"
    assert (usage.input_tokens, usage.output_tokens) == (100, 40)
    assert (usage.cache_read_input_tokens, usage.cache_creation_input_tokens) == (20, 30)
    asked = the_run(house).question
    assert asked.text == prompt.encode()
    assert asked.question.endswith("How many lines are there?")
    assert len(asked.question) < 10_000
    assert asked.options["model"] == "claude-x"


async def test_the_sdk_sends_20_mb_async_and_waits(twenty_mb: str) -> None:
    async with http_house(answers("the answer", BILLED)) as house, sdk(house) as client:
        message = await client.messages.create(**asks(twenty_mb))
        assert (message.stop_reason, message.role, message.type) == ("end_turn", "assistant", "message")
        assert message.id == f"msg_{the_run(house).row.run_id}"
        assert message._request_id == the_run(house).row.run_id
        check_20_mb(
            house, twenty_mb, "".join(b.text for b in message.content if b.type == "text"), message.usage
        )


async def test_the_sdk_sends_20_mb_async_and_streams(twenty_mb: str) -> None:
    async with http_house(answers("the answer", BILLED)) as house, sdk(house) as client:
        async with client.messages.stream(**asks(twenty_mb)) as stream:
            text = "".join([part async for part in stream.text_stream])
            final = await stream.get_final_message()
        assert final.stop_reason == "end_turn"
        check_20_mb(house, twenty_mb, text, final.usage)


@pytest.mark.parametrize("streams", [False, True])
async def test_the_sdk_sends_20_mb_sync(twenty_mb: str, *, streams: bool) -> None:
    def ask(url: str) -> anthropic.types.Message:
        with anthropic.Anthropic(base_url=url, api_key=ANN, max_retries=0, timeout=60) as client:
            if not streams:
                message: anthropic.types.Message = client.messages.create(**asks(twenty_mb))
                return message
            with client.messages.stream(**asks(twenty_mb)) as stream:
                return stream.get_final_message()

    async with http_house(answers("the answer", BILLED)) as house:
        message = await asyncio.to_thread(ask, house.url)
        check_20_mb(
            house, twenty_mb, "".join(b.text for b in message.content if b.type == "text"), message.usage
        )


async def test_other_requests_are_answered_while_a_long_prompt_is_read(twenty_mb: str) -> None:
    """Generous: parsing it in one piece on the loop would take longer than all of these."""
    async with (
        http_house(answers("the answer", BILLED)) as house,
        sdk(house) as client,
        house.client() as other,
    ):
        asking = asyncio.create_task(client.messages.create(**asks(twenty_mb)))
        answered = 0
        while not asking.done():
            assert (await other.get("/v1/usage")).status_code == 200
            answered += 1
        await asking
        assert answered > 5


# --- The stream ----------------------------------------------------------------------------------------


async def raw_stream(house: House, body: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    async with house.client() as client, client.stream("POST", "/v1/messages", json=body) as stream:
        assert stream.status_code == 200
        assert stream.headers["content-type"].startswith("text/event-stream")
        lines = [line async for line in stream.aiter_lines()]
    return [
        (lines[at].removeprefix("event: "), json.loads(lines[at + 1].removeprefix("data: ")))
        for at in range(0, len(lines), 3)
    ]


async def test_a_stream_has_the_documented_events_in_their_order() -> None:
    async with http_house(answers("é" * 20_000, BILLED)) as house:
        events = await raw_stream(house, {**asks(), "max_tokens": 100_000, "stream": True})
    assert all(name == body["type"] for name, body in events)
    names = [name for name, _ in events if name != "ping"]
    deltas = names.count("content_block_delta")
    assert deltas > 1
    assert names == [
        "message_start",
        "content_block_start",
        *["content_block_delta"] * deltas,
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    assert events[0][1]["message"]["content"] == []
    (last,) = [body for name, body in events if name == "message_delta"]
    assert last["delta"] == {"stop_reason": "end_turn", "stop_sequence": None}
    assert last["usage"] == {
        "input_tokens": 100,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 30,
        "output_tokens": 40,
    }
    assert "".join(b["delta"]["text"] for n, b in events if n == "content_block_delta") == "é" * 20_000


async def test_a_stream_keeps_every_character_whatever_its_reader_takes_for_an_end_of_line() -> None:
    text = "a\u2028b\u2029c\x85d\x0be\rf\r\ng\n\nh\x00\U0001f600"
    async with http_house(answers(text)) as house, sdk(house) as client:
        async with client.messages.stream(**asks()) as stream:
            assert await stream.get_final_text() == text
        events = await raw_stream(house, {**asks(), "stream": True})
    assert "".join(b["delta"]["text"] for n, b in events if n == "content_block_delta") == text


@pytest.mark.parametrize("is_busy", [False, True])
async def test_pings_come_while_the_run_works(monkeypatch: pytest.MonkeyPatch, *, is_busy: bool) -> None:
    monkeypatch.setattr(messages, "HTTP_HEARTBEAT_S", 0.03)

    async def play(run: FakeRun) -> None:
        started_at_s = time.monotonic()
        while time.monotonic() - started_at_s < 0.5:
            await asyncio.sleep(0.01)
            if is_busy:
                await run.tell(TurnStarted(turn=1, request_bytes=1))
        await run.end(answer=b"late")

    async with http_house(play) as house:
        events = await raw_stream(house, {**asks(), "stream": True})
    assert [name for name, _ in events].count("ping") >= 4


async def test_an_answer_is_cut_at_max_tokens_and_says_so() -> None:
    async with http_house(answers("ä" * 1_000)) as house, sdk(house) as client:
        message = await client.messages.create(**{**asks(), "max_tokens": 10})
        assert message.stop_reason == "max_tokens"
        assert [block.text for block in message.content if block.type == "text"] == ["ä" * 20]
        async with client.messages.stream(**{**asks(), "max_tokens": 10}) as stream:
            final = await stream.get_final_message()
        assert (final.stop_reason, await stream.get_final_text()) == ("max_tokens", "ä" * 20)


# --- Whoever hangs up ----------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [False, True])
async def test_a_client_that_hangs_up_cancels_its_run(*, streams: bool) -> None:
    async with http_house(waits_to_be_cancelled) as house:
        async with sdk(house) as client:
            asking: asyncio.Task[Any] = asyncio.create_task(client.messages.create(**asks(), stream=streams))
            run = await house.office.new_runs.get()
            if streams:
                await (await asking).close()
            else:
                asking.cancel()
                await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(run.cancelled.wait(), 20)
        await asyncio.wait_for(run.left.wait(), 20)


async def test_with_an_idempotency_key_the_run_goes_on_and_the_next_request_gets_it() -> None:
    go_on = asyncio.Event()

    async def play(run: FakeRun) -> None:
        await run.billed(BILLED)
        await go_on.wait()
        await run.end(answer=b"the answer")

    headers = {"idempotency-key": "once"}
    async with http_house(play) as house, sdk(house) as client:
        asking = asyncio.create_task(client.messages.create(**asks(), extra_headers=headers))
        run = await house.office.new_runs.get()
        await run.watched.wait()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(run.left.wait(), 20)
        assert not run.cancelled.is_set()
        go_on.set()
        message = await client.messages.create(**asks(), extra_headers=headers)
        assert the_run(house) is run
        assert message.usage.input_tokens == 100


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("key", [None, "once"])
async def test_a_run_that_a_draining_server_leaves_is_cancelled_unless_its_client_comes_again(
    key: str | None, *, streams: bool
) -> None:
    """Else the next server would go on with it, and bill an answer that nobody fetches."""
    body, headers = {**asks(), "stream": streams}, {"idempotency-key": key} if key else {}
    async with http_house(waits_to_be_cancelled) as house, house.client() as client:
        asking = asyncio.create_task(client.post("/v1/messages", json=body, headers=headers))
        run = await house.office.new_runs.get()
        await run.watched.wait()
        await run.leave()
        reply = await asking
        assert "overloaded_error" in reply.text
        assert reply.status_code == (200 if streams else 529)
        assert run.cancelled.is_set() == (key is None)


# --- Errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure", "expected", "kind"),
    [
        (
            NotAllowedError("a model that this tenant may not have"),
            anthropic.PermissionDeniedError,
            "permission_error",
        ),
        (
            BudgetExceededError("tenant", {"tokens": 2}, {"tokens": 1}),
            anthropic.RateLimitError,
            "rate_limit_error",
        ),
        (UnavailableError("the server drains"), anthropic.InternalServerError, "overloaded_error"),
        (StoreError("gone"), anthropic.InternalServerError, "overloaded_error"),
        (RuntimeError("a bug"), anthropic.InternalServerError, "api_error"),
    ],
)
async def test_an_error_of_ours_is_one_that_the_sdk_knows(
    failure: Exception, expected: type[anthropic.APIStatusError], kind: str
) -> None:
    async with http_house() as house, sdk(house) as client:
        house.office.failure = failure
        with pytest.raises(expected) as caught:
            await client.messages.create(**asks())
        assert caught.value.type == kind
        assert (caught.value.status_code == 529) == (kind == "overloaded_error")


async def test_keys_that_are_none_or_too_weak_are_told_as_anthropic_tells_them() -> None:
    async with http_house() as house:
        async with sdk(house, "rlm_nobody") as stranger:
            with pytest.raises(anthropic.AuthenticationError):
                await stranger.messages.create(**asks())
        async with sdk(house, READER) as reader:
            with pytest.raises(anthropic.PermissionDeniedError):
                await reader.messages.create(**asks())


async def test_a_prompt_past_the_limit_is_too_large() -> None:
    async with http_house() as house, sdk(house) as client:
        with pytest.raises(anthropic.APIStatusError) as caught:
            await client.messages.create(**asks("x" * (64 * 1024 * 1024)))
        assert (caught.value.status_code, caught.value.type) == (413, "request_too_large")


@pytest.mark.parametrize(
    ("outcome", "status", "kind"),
    [
        ("budget_exhausted", 429, "rate_limit_error"),
        ("deadline", 504, "timeout_error"),
        ("turn_limit", 500, "api_error"),
        ("cancelled", 500, "api_error"),
    ],
)
async def test_a_run_without_an_answer_is_an_error_that_is_not_tried_again(
    outcome: str, status: int, kind: str
) -> None:
    async def play(run: FakeRun) -> None:
        await run.end(outcome, error="why it did not")

    async with http_house(play) as house:
        async with anthropic.AsyncAnthropic(base_url=house.url, api_key=ANN, max_retries=3) as client:
            with pytest.raises(anthropic.APIStatusError) as caught:
                await client.messages.create(**asks())
        assert (caught.value.status_code, caught.value.type) == (status, kind)
        assert "why it did not" in caught.value.message
        assert len(house.office.runs) == 1
        async with sdk(house) as client:
            with pytest.raises(anthropic.APIStatusError) as streamed:
                async with client.messages.stream(**asks()) as stream:
                    await stream.get_final_message()
        assert streamed.value.type == kind


async def test_what_is_not_supported_is_refused_by_name() -> None:
    wanted: list[tuple[dict[str, object], str]] = [
        ({"tools": [{"name": "t", "input_schema": {"type": "object"}}]}, "tools"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2_000}}, "thinking"),
        ({"thinking": {"type": "adaptive"}}, "thinking"),
        ({"temperature": 0.5}, "temperature"),
        ({"stop_sequences": ["x"]}, "stop_sequences"),
        ({"output_config": {"effort": "low"}}, "output_config"),
        ({"invented": 1}, "invented"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        (
            {"messages": [{"role": "user", "content": [{"type": "tool_result", "tool_use_id": "t"}]}]},
            "tool_result",
        ),
        ({"messages": [{"role": "system", "content": "s"}]}, "role"),
        ({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, "prefill"),
        ({"rlm": {"max_depht": 1}}, "max_depht"),
    ]
    async with http_house() as house, house.client() as client:
        for more, named in wanted:
            reply = await client.post("/v1/messages", json={**asks(), **more})
            assert (reply.status_code, reply.json()["error"]["type"]) == (400, "invalid_request_error")
            assert named in reply.json()["error"]["message"]
        assert house.office.runs == {}


async def test_what_switches_a_feature_off_or_is_a_hint_is_taken() -> None:
    more = {
        "tools": [],
        "stop_sequences": [],
        "thinking": {"type": "disabled"},
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "cache_control": {"type": "ephemeral"},
        "system": [{"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}],
        "rlm": {"max_depth": 0, "max_cost_microusd": 10_000},
    }
    async with http_house() as house, house.client() as client:
        reply = await client.post("/v1/messages", json={**asks(), **more})
        assert reply.status_code == 200, reply.text
        asked = the_run(house).question
        assert asked.options == {"max_depth": 0, "max_cost_microusd": 10_000, "model": "claude-x"}
        assert asked.question == "Be brief.\n\nWhat is it?"


async def test_documents_become_the_context_and_the_last_text_the_question() -> None:
    document = {"type": "text", "media_type": "text/plain", "data": "The sky is green."}
    content: list[Any] = [
        {"type": "document", "title": "Sky", "source": document},
        {"type": "text", "text": "Which colour?"},
    ]
    async with http_house() as house, sdk(house) as client:
        await client.messages.create(
            model="claude-x", max_tokens=9, messages=[{"role": "user", "content": content}]
        )
        asked = the_run(house).question
        assert (asked.question, asked.text) == ("Which colour?", b"The sky is green.")


async def test_a_hundred_clients_at_once_get_their_own_answers() -> None:
    async def play(run: FakeRun) -> None:
        await run.billed(BILLED)
        await run.end(answer=b"to " + run.question.question.encode())

    async with http_house(play) as house, sdk(house) as client:
        texts = await asyncio.gather(*(client.messages.create(**asks(f"q{n}")) for n in range(100)))
    assert [block.text for text in texts for block in text.content if block.type == "text"] == [
        f"to q{n}" for n in range(100)
    ]


async def test_the_prompt_is_not_kept_while_its_run_works(twenty_mb: str) -> None:
    """A hundred of them may work for an hour."""
    async with http_house(waits_to_be_cancelled) as house, sdk(house) as client:
        asking = asyncio.create_task(client.messages.create(**{**asks(twenty_mb), "model": "kept"}))
        run = await house.office.new_runs.get()
        await run.watched.wait()
        async with asyncio.timeout(20):
            # The thread that read it lets go of it a moment after it has told.
            while any(type(one) is MessagesForm and one.model == "kept" for one in gc.get_objects()):
                await asyncio.sleep(0.1)
                gc.collect()
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await asyncio.wait_for(run.cancelled.wait(), 20)
