import asyncio
import json
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from orchestrator import prompts, turn
from orchestrator.cells import CellOutcome, CellResult
from orchestrator.conversation import Conversation, Dialect, Reply, StopReason, Told, ToolReport
from orchestrator.errors import Billing, InvalidRequestError, ModelError
from orchestrator.models.port import ModelRequest
from orchestrator.models.scripted import (
    Cell,
    CutOff,
    Fail,
    Raw,
    Refuse,
    Say,
    ScriptedClient,
    Step,
    TwoCells,
    Wait,
    load_script,
    task_of,
)

Player = Generator[Step, str, str]


@dataclass
class Played:
    """A script made of functions, and what its generator was sent."""

    run: Any = None
    complete: Any = None
    sent: list[str] = field(default_factory=list)


def _task(question: str = "how many?", depth: int = 0) -> Told:
    return Told(f"You have a context.\n<question>\n{question}\n</question>\nDepth: {depth}\nBegin.")


def _request(
    *entries: Any, python_tool: bool = True, max_tokens: int = 1_000, timeout_s: float = 30
) -> ModelRequest:
    return ModelRequest(
        model="scripted:test",
        system="You write Python." if python_tool else "",
        conversation=tuple(entries),
        python_tool=python_tool,
        max_tokens=max_tokens,
        timeout_s=timeout_s,
    )


async def _play(client: ScriptedClient, reports: list[str]) -> tuple[Conversation, Reply]:
    """Drive a run to its last reply, answering each tool call with the next report."""
    entries: list[Any] = [_task()]
    while True:
        reply = (await client.complete(_request(*entries))).reply
        calls = [block for block in reply.content if block["type"] == "tool_use"]
        if not calls:
            return tuple(entries), reply
        text = reports.pop(0)
        entries += [reply, *(ToolReport(str(call["id"]), text) for call in calls)]


async def test_a_run_yields_cells_and_is_sent_their_reports_until_it_answers() -> None:
    def run(question: str, depth: int) -> Player:
        assert (question, depth) == ("how many?", 0)
        first = yield "print(len(context))"
        second = yield Cell("print(2)", text="Let me see.")
        return f"{first} then {second}"

    entries, answer = await _play(ScriptedClient(Played(run)), ["9", "2"])

    assert answer.text == "9 then 2"
    assert answer.stop is StopReason.END_TURN
    first, second = (entry for entry in entries if isinstance(entry, Reply))
    assert first.content[0]["input"] == {"code": "print(len(context))"}
    assert (second.text, second.stop) == ("Let me see.", StopReason.TOOL_USE)


async def test_a_resumed_run_goes_on_in_a_client_that_never_saw_it_begin() -> None:
    def run(question: str, depth: int) -> Player:
        report = yield "1"
        report = yield f"{report} + 1"
        return report

    entries, _ = await _play(ScriptedClient(Played(run)), ["a", "b"])
    stored = [
        Reply(tuple(json.loads(json.dumps(e.content))), e.stop) if isinstance(e, Reply) else e
        for e in entries
    ]

    resumed = await ScriptedClient(Played(run)).complete(_request(*stored))

    assert resumed.reply.text == "b"


async def test_a_script_that_is_not_deterministic_is_told_so() -> None:
    count = iter(range(100))

    def run(question: str, depth: int) -> Player:
        yield f"print({next(count)})"
        return "never"

    with pytest.raises(
        ModelError, match="turn 1 the script does not do what it did the first time"
    ) as caught:
        await _play(ScriptedClient(Played(run)), ["x"])
    assert (caught.value.billing, caught.value.retryable) == (Billing.NOTHING, False)


@pytest.mark.parametrize(
    ("step", "stop", "kinds"),
    [
        (Say(""), StopReason.END_TURN, []),
        (Say("just talk"), StopReason.END_TURN, ["text"]),
        (Refuse(), StopReason.REFUSAL, []),
        (CutOff(), StopReason.MAX_TOKENS, ["tool_use"]),
        (CutOff("half a"), StopReason.MAX_TOKENS, ["text"]),
        (TwoCells("1", "2"), StopReason.TOOL_USE, ["tool_use", "tool_use"]),
    ],
)
async def test_odd_replies_are_played_and_the_script_goes_on_after_them(
    step: Step, stop: StopReason, kinds: list[str]
) -> None:
    def run(question: str, depth: int) -> Player:
        note = yield step
        return f"told: {note}"

    client = ScriptedClient(Played(run))
    odd = (await client.complete(_request(_task()))).reply
    assert odd.stop is stop
    assert [block["type"] for block in odd.content] == kinds

    after = await client.complete(_request(_task(), odd, Told("Please use the tool.")))
    assert after.reply.text == "told: Please use the tool."


async def test_a_failure_is_played_as_often_as_it_says_and_then_the_script_goes_on() -> None:
    overloaded = ModelError("overloaded", billing=Billing.NOTHING, retryable=True, status=529)

    def run(question: str, depth: int) -> Player:
        yield Fail(overloaded, times=2)
        report = yield "1"
        return report

    client = ScriptedClient(Played(run))
    for _ in range(2):
        with pytest.raises(ModelError, match="overloaded"):
            await client.complete(_request(_task()))
    _, answer = await _play(client, ["fine"])
    assert answer.text == "fine"


async def test_two_runs_with_their_own_histories_fail_independently() -> None:
    def run(question: str, depth: int) -> Player:
        yield Fail(ModelError("dropped", billing=Billing.UNKNOWN, retryable=True))
        return question

    client = ScriptedClient(Played(run))
    for question in ("one", "two"):
        with pytest.raises(ModelError, match="dropped"):
            await client.complete(_request(_task(question)))
        assert (await client.complete(_request(_task(question)))).reply.text == question


async def test_a_model_that_hangs_is_given_up_after_the_requests_time() -> None:
    def run(question: str, depth: int) -> Player:
        yield Wait(3_600)
        return "late"

    with pytest.raises(ModelError, match=r"no reply from the model in 0\.02 s") as caught:
        await ScriptedClient(Played(run)).complete(_request(_task(), timeout_s=0.02))
    assert (caught.value.billing, caught.value.retryable) == (Billing.UNKNOWN, True)


@pytest.mark.parametrize(
    ("step", "note"), [(Say(""), prompts.REPLY_EMPTY), (Refuse(), prompts.REPLY_REFUSED)]
)
async def test_a_reply_the_loop_removed_is_recognised_by_its_note(step: Step, note: str) -> None:
    def run(question: str, depth: int) -> Player:
        first = yield "1"
        second = yield step
        third = yield "2"
        return f"{first} / {second} / {third}"

    cell = (await ScriptedClient(Played(run)).complete(_request(_task()))).reply
    so_far = [_task(), cell, ToolReport("toolu_scripted_1_1", "one")]
    client = ScriptedClient(Played(run))
    odd = (await client.complete(_request(*so_far))).reply
    assert odd.content == ()

    so_far.append(Told(note))
    after = (await client.complete(_request(*so_far))).reply
    so_far += [after, ToolReport("toolu_scripted_3_1", "two")]
    assert (await ScriptedClient(Played(run)).complete(_request(*so_far))).reply.text == f"one / {note} / two"


async def test_a_full_window_is_played_once() -> None:
    def run(question: str, depth: int) -> Player:
        report = yield Raw((), StopReason.WINDOW_FULL)
        return f"went on{report}"

    client = ScriptedClient(Played(run))
    assert (await client.complete(_request(_task()))).reply.stop is StopReason.WINDOW_FULL
    compacted = _request(_task(), Told(prompts.WINDOW_COMPACTED))
    assert (await client.complete(compacted)).reply.text == "went on"


async def test_a_sub_call_is_one_function_call_that_may_wait() -> None:
    async def complete(prompt: str) -> str:
        await asyncio.sleep(0)
        return prompt.upper()

    completion = await ScriptedClient(Played(complete=complete)).complete(
        _request(Told("hello"), python_tool=False)
    )
    assert completion.reply == Reply(({"type": "text", "text": "HELLO"},), StopReason.END_TURN)
    assert (completion.usage.input, completion.usage.cache_read, completion.usage.cache_write) == (2, 0, 0)


async def test_a_sub_calls_answer_is_cut_at_its_output_limit() -> None:
    client = ScriptedClient(Played(complete=lambda prompt: "é" * 1_000))
    completion = await client.complete(_request(Told("x"), python_tool=False, max_tokens=10))
    assert completion.reply.stop is StopReason.MAX_TOKENS
    assert completion.reply.text == "é" * 20


async def test_a_turn_reads_from_cache_what_the_turn_before_it_sent() -> None:
    def run(question: str, depth: int) -> Player:
        yield "1"
        return "done"

    client = ScriptedClient(Played(run))
    first = await client.complete(_request(_task()))
    second = await client.complete(_request(_task(), first.reply, ToolReport("toolu_scripted_1_1", "1")))
    assert first.usage.cache_read == 0
    assert second.usage.cache_read >= first.usage.cache_write > 0
    assert second.usage.total_input > first.usage.total_input


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (Played(), r"no run\(\)"),
        (Played(run=lambda question, depth: "text"), "not a generator function"),
    ],
)
async def test_a_script_without_what_is_asked_of_it_is_named_so(script: Played, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        await ScriptedClient(script).complete(_request(_task()))


async def test_a_script_that_raises_is_named_with_its_line_but_without_its_words() -> None:
    def run(question: str, depth: int) -> Player:
        yield "1"
        raise ValueError("secret words")

    with pytest.raises(ModelError, match=r"run\(\) raised ValueError at line \d+") as caught:
        await _play(ScriptedClient(Played(run)), ["x"])
    assert "secret" not in str(caught.value)


def _no_step(question: str, depth: int) -> Any:
    yield 7


def _no_answer(question: str, depth: int) -> Any:
    yield from ()


@pytest.mark.parametrize(
    ("run", "message"), [(_no_step, "int, which is no step"), (_no_answer, "without returning an answer")]
)
async def test_what_is_neither_step_nor_answer_is_refused(run: Any, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        await ScriptedClient(Played(run)).complete(_request(_task()))


async def test_a_reply_longer_than_allowed_is_a_mistake_of_the_script() -> None:
    def run(question: str, depth: int) -> Player:
        yield "x" * 1_000
        return ""

    with pytest.raises(ModelError, match="longer than 10 tokens"):
        await ScriptedClient(Played(run)).complete(_request(_task(), max_tokens=10))


def test_the_task_is_found_in_the_first_entry_whatever_the_question_says() -> None:
    question = "Explain </question> and\nDepth: 7\nin this text"
    told = prompts.task(question, depth=2, context_shape="one text, 5 bytes", levels_below=0)
    assert task_of((Told(told),)) == (question, 2)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ((), "begin with a task"),
        ((Told("Depth: 0"),), "no <question>"),
        ((Told("<question>q</question>"),), "no line 'Depth: N'"),
    ],
)
def test_a_conversation_without_a_task_is_refused(entries: Conversation, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        task_of(entries)


def test_a_script_is_loaded_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "echo.py"
    path.write_text("def complete(prompt):\n    return prompt\n")
    assert load_script(path).complete("x") == "x"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "there is no Python script"),
        ("x = 1", "neither run"),
        ("def (", "does not load: SyntaxError"),
    ],
)
def test_a_file_that_is_no_script_is_refused_in_a_sentence(
    tmp_path: Path, source: str | None, message: str
) -> None:
    path = tmp_path / "odd.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(InvalidRequestError, match=message):
        load_script(path)


# --- Both dialects ----------------------------------------------------------------------------------------


async def _run(script: object, dialect: Dialect, outputs: list[str]) -> tuple[list[str], turn.End]:
    """The cells of a whole run, and its end. A new client a turn: it must find its place in what was kept."""
    codes: list[str] = []
    state, actions = turn.start(_task().text, max_turns=10, window_tokens=1_000_000, dialect=dialect)
    while True:
        match actions[-1]:
            case turn.AskModel() as ask:
                request = replace(
                    _request(*ask.conversation, python_tool=dialect is Dialect.TOOLS),
                    system="You write Python.",
                    stop_sequences=() if dialect is Dialect.TOOLS else (prompts.INVENTED_OUTPUT,),
                )
                completion = await ScriptedClient(script).complete(request)
                event: turn.Event = turn.ModelReplied(completion.reply, completion.usage.total)
            case turn.RunCell(code):
                codes.append(code)
                answer = code.removeprefix("FINAL('").removesuffix("')") if "FINAL(" in code else None
                output = "" if answer else outputs.pop(0)
                event = turn.CellEnded(CellResult(outcome=CellOutcome.OK, output_head=output, answer=answer))
            case turn.End() as end:
                return codes, end
            case other:
                raise AssertionError(other)
        state, actions = turn.step(state, event)


@pytest.mark.parametrize("dialect", Dialect)
async def test_a_script_plays_in_either_dialect(dialect: Dialect) -> None:
    def run(question: str, depth: int) -> Player:
        one = yield "print(1)"
        two = yield Cell("print(2)", text="Let me see.")
        yield Say("")
        yield Refuse()
        three = yield TwoCells("print(3)", "print(4)")
        yield CutOff()
        yield CutOff("hm")
        assert (one, two) == ("1", "2")
        assert three.startswith("3")
        return "all seen"

    codes, end = await _run(Played(run), dialect, ["1", "2", "3"])

    assert codes[:3] == ["print(1)", "print(2)", "print(3)"]
    assert (end.outcome, end.answer) == (turn.Outcome.ANSWERED, "all seen")


async def test_a_script_may_say_fences_and_invent_what_follows() -> None:
    def run(question: str, depth: int) -> Player:
        first = yield Say(f"Look.\n```repl\nprint(1)\n```{prompts.INVENTED_OUTPUT} 0]\n42")
        second = yield Say("```python\nprint('invented')\n```\nOutput: 42\nFINAL(42)")
        assert (first, second) == ("one", "two")
        yield Say("I am sure of it.")
        yield Say("FINAL(all seen)")
        return "never"

    codes, end = await _run(Played(run), Dialect.FENCES, ["one", "two"])

    assert codes == ["print(1)", "print('invented')"]
    assert end.answer == "all seen"


async def test_what_a_script_says_ends_before_a_stop_sequence() -> None:
    def run(question: str, depth: int) -> Player:
        yield Say("said, not\nsaid")
        return "never"

    request = replace(_request(_task()), stop_sequences=("zzz", "\nsaid", "not"))
    reply = (await ScriptedClient(Played(run)).complete(request)).reply
    assert (reply.text, reply.stop) == ("said, ", StopReason.STOP_SEQUENCE)
