import json
from dataclasses import replace
from typing import Any

import pytest

from orchestrator.conversation import CellReport, Conversation, Entry, Reply, StopReason, Told, ToolReport
from orchestrator.errors import Billing, ModelError
from orchestrator.estimate import TOOL_OVERHEAD_TOKENS
from orchestrator.models.messages_api import MessageAssembler, completion, parse_json, request_params
from orchestrator.models.port import ModelRequest
from orchestrator.pricing import Usage

USAGE = {"input_tokens": 5, "output_tokens": 2}


def _request(*entries: Entry, system: str = "You write Python.") -> ModelRequest:
    return ModelRequest(
        model="m",
        system=system,
        conversation=entries,
        python_tool=bool(system),
        max_tokens=100,
        timeout_s=5,
    )


def _cell(call_id: str, *before: dict[str, Any]) -> Reply:
    call = {"type": "tool_use", "id": call_id, "name": "python", "input": {"code": "1"}}
    return Reply((*before, call), StopReason.TOOL_USE)


def _turns(*entries: Entry) -> list[tuple[str, list[str]]]:
    return [
        (message["role"], [block["type"] for block in message["content"]])
        for message in request_params(_request(*entries))["messages"]
    ]


def test_what_we_say_between_two_replies_is_one_user_turn_with_the_results_first() -> None:
    assert _turns(
        Told("task"),
        Told("note"),
        _cell("a"),
        Told("early note"),
        ToolReport("a", "out"),
        ToolReport("b", "not run", is_error=True),
        Told("late note"),
    ) == [
        ("user", ["text", "text"]),
        ("assistant", ["tool_use"]),
        ("user", ["tool_result", "tool_result", "text", "text"]),
    ]


def test_a_report_without_a_call_is_text() -> None:
    said = Reply(({"type": "text", "text": "```repl\n1\n```"},), StopReason.END_TURN)
    assert _turns(Told("task"), said, CellReport("out"), Told("note")) == [
        ("user", ["text"]),
        ("assistant", ["text"]),
        ("user", ["text", "text"]),
    ]


def test_stop_sequences_are_sent_when_there_are_some() -> None:
    assert "stop_sequences" not in request_params(_request(Told("t")))
    stopping = replace(_request(Told("t")), stop_sequences=("\n[output",))
    assert request_params(stopping)["stop_sequences"] == ["\n[output"]


def test_a_report_names_its_call_and_says_when_it_is_an_error() -> None:
    params = request_params(_request(Told("t"), _cell("a"), ToolReport("a", "boom", is_error=True)))
    result = {k: v for k, v in params["messages"][-1]["content"][0].items() if k != "cache_control"}
    assert result == {"type": "tool_result", "tool_use_id": "a", "content": "boom", "is_error": True}


def test_replies_are_sent_back_verbatim_but_for_empty_text() -> None:
    thinking = {"type": "thinking", "thinking": "", "signature": "s"}
    unheard_of = {"type": "novelty", "payload": [1, {"deep": None}]}
    params = request_params(
        _request(
            Told("t"),
            _cell("a", thinking, {"type": "text", "text": ""}, unheard_of),
            ToolReport("a", ""),
        )
    )
    sent = params["messages"][1]["content"]
    assert sent[:2] == [thinking, unheard_of]
    assert sent[2]["id"] == "a"


def test_a_reply_of_nothing_leaves_no_empty_turn() -> None:
    empty = Reply(({"type": "text", "text": ""},), StopReason.END_TURN)
    assert _turns(Told("t"), empty, Told("again")) == [("user", ["text", "text"])]


def _marks(conversation: Conversation, system: str = "sys") -> list[str]:
    params = request_params(_request(*conversation, system=system))
    blocks = [*params.get("system", []), *(b for m in params["messages"] for b in m["content"])]
    return [str(b.get("text") or b.get("content")) for b in blocks if "cache_control" in b]


def test_cache_breakpoints_roll_over_the_last_two_user_turns() -> None:
    conversation: Conversation = (Told("task"),)
    assert _marks(conversation) == ["sys", "task"]
    conversation += (_cell("a"), ToolReport("a", "one"))
    assert _marks(conversation) == ["sys", "task", "one"]
    conversation += (_cell("b"), ToolReport("b", "two"), Told("note"))
    assert _marks(conversation) == ["sys", "one", "note"]


def test_the_recorded_reply_is_not_marked_by_sending_it() -> None:
    reply = _cell("a")
    request_params(_request(Told("t"), reply, ToolReport("a", "x")))
    assert reply == _cell("a")


def test_a_sub_call_has_no_tool_no_system_and_no_breakpoint() -> None:
    params = request_params(_request(Told("prompt"), system=""))
    assert params == {
        "model": "m",
        "max_tokens": 100,
        "messages": [{"role": "user", "content": [{"type": "text", "text": "prompt"}]}],
    }


def test_a_run_has_one_strict_tool_and_may_call_it_once() -> None:
    params = request_params(_request(Told("t")))
    (tool,) = params["tools"]
    assert (tool["name"], tool["strict"]) == ("python", True)
    assert tool["input_schema"]["required"] == ["code"]
    assert params["tool_choice"] == {"type": "auto", "disable_parallel_tool_use": True}


def test_the_tool_fits_in_what_the_estimate_allows_for_it() -> None:
    documented_by_the_provider = 700
    tool = request_params(_request(Told("t")))["tools"][0]
    assert len(json.dumps(tool).encode()) + documented_by_the_provider <= TOOL_OVERHEAD_TOKENS


def test_texts_that_are_no_unicode_can_be_sent() -> None:
    params = request_params(_request(Told("a\ud800b"), system="s\udfff"))
    json.dumps(params, ensure_ascii=False).encode()
    assert params["messages"][0]["content"][0]["text"] == "a?b"


def test_json_that_spells_lone_surrogates_is_read_as_sendable_text() -> None:
    assert parse_json(r'{"code": "\ud83d\ude00 \uD800"}') == {"code": "😀 ?"}
    assert parse_json(rb'["\\ud800", "plain"]') == ["\\ud800", "plain"]


# --- Replies -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "stop"),
    [
        ("end_turn", StopReason.END_TURN),
        ("tool_use", StopReason.TOOL_USE),
        ("max_tokens", StopReason.MAX_TOKENS),
        ("refusal", StopReason.REFUSAL),
        ("model_context_window_exceeded", StopReason.WINDOW_FULL),
        ("pause_turn", StopReason.OTHER),
        ("brand_new", StopReason.OTHER),
        (None, StopReason.OTHER),
    ],
)
def test_stop_reasons_are_mapped_and_new_ones_are_other(said: str | None, stop: StopReason) -> None:
    assert completion({"content": [], "stop_reason": said, "usage": USAGE}).reply.stop is stop


def test_usage_is_mapped_counter_by_counter() -> None:
    usage = {
        "input_tokens": 1,
        "cache_read_input_tokens": 20,
        "cache_creation_input_tokens": 300,
        "output_tokens": 4_000,
        "service_tier": "standard",
    }
    assert completion({"content": [], "usage": usage}).usage == Usage(1, 20, 300, 4_000)


@pytest.mark.parametrize(
    "usage",
    [
        None,
        [],
        {},
        {"input_tokens": 1},
        {"output_tokens": 1},
        {"input_tokens": -1, "output_tokens": 1},
        {"input_tokens": 1, "output_tokens": 10**12},
        {"input_tokens": 1.5, "output_tokens": 1},
        {"input_tokens": True, "output_tokens": 1},
        {"input_tokens": "5", "output_tokens": 1},
        {"input_tokens": 0, "output_tokens": 1},
        {"input_tokens": 1, "output_tokens": 1, "cache_read_input_tokens": -5},
    ],
)
def test_a_reply_that_does_not_say_what_it_cost_may_have_cost_anything(usage: object) -> None:
    with pytest.raises(ModelError, match="no valid usage") as caught:
        completion({"content": [], "stop_reason": "end_turn", "usage": usage})
    assert (caught.value.billing, caught.value.retryable) == (Billing.UNKNOWN, False)


@pytest.mark.parametrize("content", [None, "text", ["text"], [{}]])
def test_a_reply_without_blocks_is_no_reply(content: object) -> None:
    with pytest.raises(ModelError, match="no valid content"):
        completion({"content": content, "usage": USAGE})


def _assemble(*events: dict[str, Any]) -> Any:
    assembler = MessageAssembler()
    for event in events:
        assembler.feed(event)
    return assembler.completion()


START = {"type": "message_start", "message": {"id": "x", "content": [], "usage": USAGE}}
STOP = {"type": "message_stop"}


def _delta(index: int, **delta: str) -> dict[str, Any]:
    return {"type": "content_block_delta", "index": index, "delta": delta}


def _opened(index: int, **block: Any) -> dict[str, Any]:
    return {"type": "content_block_start", "index": index, "content_block": block}


def test_a_stream_is_put_together_block_by_block() -> None:
    done = _assemble(
        START,
        {"type": "ping"},
        _opened(0, type="thinking", thinking="", signature=""),
        _delta(0, type="thinking_delta", thinking="let "),
        _delta(0, type="thinking_delta", thinking="me"),
        _delta(0, type="signature_delta", signature="signed"),
        _opened(1, type="text", text="Well, ", citations=None),
        _delta(1, type="text_delta", text="yes"),
        _opened(2, type="tool_use", id="a", name="python", input={}),
        _delta(2, type="input_json_delta", partial_json='{"co'),
        _delta(2, type="input_json_delta", partial_json='de": "1"}'),
        _opened(3, type="redacted_thinking", data="xyz"),
        {"type": "content_block_stop", "index": 3},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "tool_use"},
            "usage": {"output_tokens": 77, "input_tokens": None},
        },
        STOP,
    )
    assert done.reply.content == (
        {"type": "thinking", "thinking": "let me", "signature": "signed"},
        {"type": "text", "text": "Well, yes", "citations": None},
        {"type": "tool_use", "id": "a", "name": "python", "input": {"code": "1"}},
        {"type": "redacted_thinking", "data": "xyz"},
    )
    assert done.reply.stop is StopReason.TOOL_USE
    assert done.usage == Usage(input=5, output=77)


def test_a_tool_call_that_was_cut_off_has_an_empty_input() -> None:
    done = _assemble(
        START,
        _opened(0, type="tool_use", id="a", name="python", input={}),
        _delta(0, type="input_json_delta", partial_json='{"code": "pri'),
        {"type": "message_delta", "delta": {"stop_reason": "max_tokens"}, "usage": {"output_tokens": 9}},
        STOP,
    )
    assert done.reply.content[0]["input"] == {}


def test_a_stream_without_its_end_has_failed_and_may_have_been_billed() -> None:
    with pytest.raises(ModelError, match="ended early") as caught:
        _assemble(START, _opened(0, type="text", text="half"))
    assert (caught.value.billing, caught.value.retryable) == (Billing.UNKNOWN, True)


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"type": "message_start"},
        {"type": "content_block_delta", "index": 9, "delta": {"type": "text_delta", "text": "x"}},
        {"type": "content_block_start", "index": 0, "content_block": None},
        {"type": "message_delta", "delta": None},
        [],
    ],
)
def test_events_that_make_no_sense_are_a_failure_of_the_provider(event: Any) -> None:
    assembler = MessageAssembler()
    with pytest.raises(ModelError, match="no valid events"):
        assembler.feed(event)
