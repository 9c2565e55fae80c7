"""The whole path with the real SDK: a fake Messages server over HTTP, real containers, the broker between."""

import asyncio
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from orchestrator import app, run_report
from orchestrator.config import Settings
from orchestrator.limits import RunLimits
from orchestrator.trajectory import CellEnded, Event, SubCallEnded, Tally
from orchestrator.turn import Outcome
from tests.fakes import anthropic_server as fake
from tests.fakes.provider import provider_at

pytestmark = [pytest.mark.docker, pytest.mark.timeout(120)]

KEY = "sk-test-0123456789-canary"


@pytest.fixture
def small_text(tmp_path: Path) -> Path:
    path = tmp_path / "small.txt"
    path.write_text("".join(f"line {number}\n" for number in range(1_000)))
    return path


def turns_taken(request: dict[str, Any]) -> int:
    return sum(message["role"] == "assistant" for message in request["messages"])


def depth_of(request: dict[str, Any]) -> int:
    task = json.dumps(request["messages"][0])
    return int(task.partition("Depth: ")[2][0])


class Play:
    """Plays one list of cells for each depth, and answers sub-calls; the last cell's FINAL ends the run."""

    def __init__(self, cells: Sequence[Sequence[str]], faults: dict[str, fake.Play] | None = None) -> None:
        self._cells = cells
        self._faults = dict(faults or {})

    def __call__(self, request: dict[str, Any]) -> fake.Play:
        if "tools" in request:
            return fake.Call(self._cells[depth_of(request)][turns_taken(request)])
        prompt = request["messages"][0]["content"]
        text = prompt if isinstance(prompt, str) else prompt[0]["text"]
        # Slow enough that calls side by side overlap.
        return self._faults.pop(text, fake.Slow(0.1, fake.Say(text.upper())))


async def answer(
    server: fake.FakeAnthropic,
    settings: Settings,
    context: Path,
    events: list[Event],
    limits: RunLimits | None = None,
    *,
    allow_models: Sequence[str] = (),
) -> run_report.RunReport:
    with provider_at(server.url, KEY) as provider:
        return await app.run(
            app.RunOptions(
                question="What is in it?",
                context_paths=[context],
                model="claude-sonnet-5-5",
                sub_model="claude-haiku-5-5",
                allow_models=allow_models,
                limits=limits or RunLimits(),
            ),
            settings,
            provider=provider,
            observers=[events.append],
        )


def billed_tokens(server: fake.FakeAnthropic, outcome: str | None = None) -> int:
    return sum(
        sum((served.billed or {}).values()) for served in server.log if outcome in (None, served.outcome)
    )


def cell_output(events: Sequence[Event], turn: int) -> str:
    outputs = [
        event.payload.output
        for event in events
        if isinstance(event.payload, CellEnded)
        and event.payload.turn == turn
        and event.run_id == events[0].run_id
    ]
    assert isinstance(outputs[0], str)
    return outputs[0]


async def test_turns_sub_calls_and_child_runs_are_paid_to_the_token(
    settings: Settings, small_text: Path
) -> None:
    fan_out = "replies = llm_query_batched([f'piece {n}' for n in range(50)])\nprint(replies[0], replies[49])"
    play = Play(
        cells=[
            [fan_out, "FINAL(rlm_query('And below?', context[:500]))"],
            ["FINAL('depth 1 says ' + rlm_query('And below that?', context[:50]))"],
            [
                "try:\n    rlm_query('One deeper?', 'text')\nexcept DepthExceeded as error:\n    why = error",
                "FINAL(f'depth 2 says {len(context)} and {type(why).__name__}')",
            ],
        ]
    )
    events: list[Event] = []
    async with fake.serve(play, key=KEY) as server:
        report = await answer(server, settings, small_text, events)

    assert report.outcome is Outcome.ANSWERED
    assert report.answer == "depth 1 says depth 2 says 50 and DepthExceeded"
    assert cell_output(events, 1) == "PIECE 0 PIECE 49\n"
    assert report.tally.max_depth_reached == 2
    assert report.tally.child_runs == 2
    assert server.most_in_flight > 4
    assert report.tally.usage.total == billed_tokens(server)
    assert report.tally.unconfirmed.tokens == 0
    assert report.tally.open_calls == 0
    assert report.tally.confirmed.calls == len(server.log) == 50 + 2 + 1 + 2
    assert report.tally.usage.cache_read > 0


FAULTS: dict[str, fake.Play] = {
    "429": fake.Refuse(429, "rate_limit_error", headers={"retry-after": "1"}),
    "500": fake.Refuse(500, "api_error"),
    "529": fake.Refuse(529, "overloaded_error"),
    "dropped before": fake.Drop(),
    "dropped in the middle": fake.Drop(in_the_middle=True),
    "error in the stream": fake.StreamError(),
    "stream without an end": fake.StreamEnd(),
}


async def test_every_fault_is_retried_and_no_bill_is_missing(settings: Settings, small_text: Path) -> None:
    prompts = [*FAULTS, "no fault"]
    cell = f"replies = llm_query_batched({prompts!r})\nFINAL(replies)"
    events: list[Event] = []
    async with fake.serve(Play([[cell]], FAULTS), key=KEY) as server:
        report = await answer(server, settings, small_text, events)

    assert json.loads(report.answer or "") == [prompt.upper() for prompt in prompts]
    assert len(server.log) == 1 + len(prompts) + len(FAULTS)
    assert report.tally.usage.total == billed_tokens(server, "served")
    broken = billed_tokens(server) - billed_tokens(server, "served")
    assert report.tally.unconfirmed.tokens >= broken > 0
    assert report.tally.open_calls == 0


async def test_a_call_that_hangs_ends_with_the_deadline_and_is_charged_in_full(
    settings: Settings, small_text: Path
) -> None:
    play = Play([["llm_query('hang')"]], {"hang": fake.Slow(seconds=3_600)})
    async with fake.serve(play, key=KEY) as server:
        report = await answer(server, settings, small_text, [], RunLimits(deadline_s=5))

    assert report.outcome is Outcome.DEADLINE
    assert report.tally.usage.total == billed_tokens(server, "served")
    assert report.tally.unconfirmed.tokens >= billed_tokens(server) - billed_tokens(server, "served") > 0
    assert report.tally.open_calls == 0


async def test_a_refused_request_is_told_in_the_cell_and_costs_nothing(
    settings: Settings, small_text: Path
) -> None:
    cells = ["try:\n    llm_query('no')\nexcept ModelFailed as error:\n    FINAL(str(error))"]
    play = Play([cells], {"no": fake.Refuse(400, "invalid_request_error", message=f"key {KEY} is bad")})
    events: list[Event] = []
    async with fake.serve(play, key=KEY) as server:
        report = await answer(server, settings, small_text, events)

    assert report.outcome is Outcome.ANSWERED
    assert "400" in (report.answer or "")
    assert report.tally.unconfirmed.tokens == 0
    assert len(server.log) == 2
    assert not any(KEY in json.dumps(event.to_json()) for event in events)


async def test_no_limit_is_passed_by_calls_side_by_side(settings: Settings, small_text: Path) -> None:
    cell = (
        "replies = llm_query_batched(['word ' * 400] * 64, max_tokens=400, on_error='return')\n"
        "refused = [reply for reply in replies if isinstance(reply, BudgetExceeded)]\n"
        "FINAL([len(refused), len(replies), refused[0].account])"
    )
    limits = RunLimits(max_tokens=60_000)
    events: list[Event] = []
    async with fake.serve(Play([[cell]]), key=KEY) as server:
        report = await answer(server, settings, small_text, events, limits)

    refused, replies, account = json.loads(report.answer or "")
    assert 0 < refused < replies == 64
    assert account == "run tree"
    assert billed_tokens(server) == report.tally.usage.total <= limits.max_tokens
    kinds = Counter(event.payload.error_kind for event in events if isinstance(event.payload, SubCallEnded))
    assert kinds["BudgetExceededError"] == refused


async def test_cancelling_a_run_settles_what_was_in_flight(settings: Settings, small_text: Path) -> None:
    play = Play([["llm_query_batched(['hang a', 'hang b'])"]], {
        "hang a": fake.Slow(3_600), "hang b": fake.Slow(3_600),
    })  # fmt: skip
    events: list[Event] = []
    async with fake.serve(play, key=KEY) as server:
        running = asyncio.create_task(answer(server, settings, small_text, events))
        async with asyncio.timeout(60):
            while len(server.log) < 3 and not running.done():  # noqa: ASYNC110 - it has no event for that
                await asyncio.sleep(0.05)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    tally = Tally.of(events)
    assert tally.open_calls == 0
    assert tally.usage.total == billed_tokens(server, "served")
    assert tally.unconfirmed.tokens >= billed_tokens(server) - tally.usage.total > 0
    assert events[-1].kind == "run_ended"


async def test_a_cell_can_ask_for_the_models_of_its_run_and_for_no_other(
    settings: Settings, small_text: Path
) -> None:
    cell = (
        "said = [llm_query('one', model='deep'), llm_query('two', model='root')]\n"
        "try:\n    llm_query('three', model='claude-fable-5-1')\n"
        "except ModelNotAllowed as error:\n    FINAL([*said, str(error)])"
    )
    async with fake.serve(Play([[cell]]), key=KEY) as server:
        report = await answer(server, settings, small_text, [], allow_models=["deep=claude-opus-5-5"])

    *said, refusal = json.loads(report.answer or "")
    assert said == ["ONE", "TWO"]
    assert "claude-opus-5-5, claude-sonnet-5-5, deep, root, sub" in refusal
    assert [served.body["model"] for served in server.log] == [
        "claude-sonnet-5-5",
        "claude-opus-5-5",
        "claude-sonnet-5-5",
    ]
    assert report.tally.usage.total == billed_tokens(server)
