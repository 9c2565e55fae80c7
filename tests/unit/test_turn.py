from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator import prompts, turn
from orchestrator.cells import CellOutcome, CellResult
from orchestrator.conversation import (
    Block,
    CellReport,
    Conversation,
    Dialect,
    Reply,
    StopReason,
    Told,
    ToolReport,
)
from orchestrator.errors import InvariantError
from orchestrator.estimate import input_bound_tokens
from orchestrator.reply import CALL_CUT_OFF
from orchestrator.turn import (
    Action,
    AskModel,
    BudgetShort,
    CellEnded,
    Compacted,
    End,
    Event,
    ModelReplied,
    Outcome,
    ReplaceSandbox,
    RunCell,
    SandboxReplaced,
    State,
    Stopped,
)

TASK = "the task"
BIG = "x" * 5_000
WINDOW = 1_000_000


def text(words: str) -> Block:
    return {"type": "text", "text": words}


def call(code: object = "1 + 1", *, call_id: str = "a", name: str = "python") -> Block:
    return {"type": "tool_use", "id": call_id, "name": name, "input": {"code": code}}


def said(*content: Block, stop: StopReason = StopReason.TOOL_USE, tokens: int = 10) -> ModelReplied:
    return ModelReplied(Reply(content, stop), tokens)


def ended(output: str = "2", outcome: CellOutcome = CellOutcome.OK, **more: object) -> CellEnded:
    return CellEnded(CellResult(outcome=outcome, output_head=output, **more))  # type: ignore[arg-type]


ANSWER = said(text("42"), stop=StopReason.END_TURN)
EMPTY = said(stop=StopReason.END_TURN)
CELL = said(call())
SHORT = BudgetShort("the budget of the run tree is too low")


def play(
    *events: Event, max_turns: int = 10, window_tokens: int = WINDOW
) -> tuple[State, tuple[Action, ...]]:
    state, actions = turn.start(TASK, max_turns=max_turns, window_tokens=window_tokens)
    for event in events:
        assert not isinstance(actions[-1], End), "the run is over already"
        state, actions = turn.step(state, event)
    return state, actions


def asked(*events: Event, max_turns: int = 10, window_tokens: int = WINDOW) -> AskModel:
    """What the model is asked after these events."""
    _, actions = play(*events, max_turns=max_turns, window_tokens=window_tokens)
    assert isinstance(actions[-1], AskModel)
    return actions[-1]


def end(*events: Event, max_turns: int = 10) -> End:
    _, actions = play(*events, max_turns=max_turns)
    assert isinstance(actions[-1], End)
    return actions[-1]


def cells(count: int, output: str = BIG, tokens: int = 10) -> list[Event]:
    """So many turns with a cell, each with an output."""
    events: list[Event] = []
    for number in range(count):
        events += [said(call(call_id=f"c{number}"), tokens=tokens), ended(f"{number} {output}")]
    return events


def outputs(conversation: Conversation) -> list[str]:
    return [entry.text for entry in conversation if isinstance(entry, ToolReport)]


# --- The ordinary way ------------------------------------------------------------------------------------


def test_a_run_starts_by_asking_the_model_with_the_task() -> None:
    assert asked() == AskModel(1, (Told(TASK),), last_answer=False)


def test_a_tool_call_runs_its_cell() -> None:
    _, actions = play(said(text("let me look"), call("print(1)")))
    assert actions == (RunCell("print(1)"),)


def test_the_model_is_told_what_its_cell_printed() -> None:
    conversation = asked(CELL, ended("2")).conversation
    assert conversation == (Told(TASK), CELL.reply, ToolReport("a", "2", is_error=False))


@pytest.mark.parametrize("outcome", [outcome for outcome in CellOutcome if outcome is not CellOutcome.OK])
def test_a_cell_that_did_not_end_well_is_reported_as_an_error(outcome: CellOutcome) -> None:
    events: list[Event] = [CELL, ended(outcome=outcome)]
    if outcome is CellOutcome.SANDBOX_LOST:
        events.append(SandboxReplaced())
    report = asked(*events).conversation[-1]
    assert isinstance(report, ToolReport)
    assert report.is_error


def test_an_answer_out_of_a_cell_ends_the_run() -> None:
    assert end(CELL, ended("printed", answer="42")) == End(Outcome.ANSWERED, "42", "")


def test_an_empty_answer_out_of_a_cell_is_an_answer() -> None:
    assert end(CELL, ended(answer="")) == End(Outcome.ANSWERED, "", "")


def test_an_answer_out_of_a_cell_counts_even_if_the_namespace_was_lost_with_it() -> None:
    assert end(CELL, ended(outcome=CellOutcome.EXITED, answer="42")).answer == "42"


def test_a_reply_without_a_tool_call_is_the_answer() -> None:
    assert end(said(text("the "), text("answer\n"), stop=StopReason.END_TURN)) == End(
        Outcome.ANSWERED, "the answer", ""
    )


def test_what_stops_a_run_from_outside_is_its_outcome() -> None:
    assert end(Stopped(Outcome.DEADLINE, "too late")) == End(Outcome.DEADLINE, None, "too late")


# --- Odd replies ------------------------------------------------------------------------------------------

THINKING: Block = {"type": "thinking", "thinking": "hm", "signature": "s"}
CUT_OFF = said(text("half of an ans"), stop=StopReason.MAX_TOKENS)
CUT_CALL = said(call(), stop=StopReason.MAX_TOKENS)
UNKNOWN_TOOL = said(call(name="bash"))
BAD_INPUT = said(call(code=7))
REFUSED = said(text("I can't"), stop=StopReason.REFUSAL)


@pytest.mark.parametrize(
    "useless",
    [EMPTY, REFUSED, CUT_OFF, CUT_CALL, UNKNOWN_TOOL, BAD_INPUT],
    ids=lambda event: event.reply.stop.name,
)
def test_the_third_useless_reply_in_a_row_ends_the_run_as_model_failed(useless: ModelReplied) -> None:
    assert isinstance(play(useless, useless)[1][-1], AskModel)
    over = end(useless, useless, useless)
    assert (over.outcome, over.answer) == (Outcome.MODEL_FAILED, None)
    assert "3 useless replies in a row" in over.why


def test_useless_replies_of_different_kinds_add_up() -> None:
    assert end(EMPTY, CUT_OFF, UNKNOWN_TOOL).outcome is Outcome.MODEL_FAILED


def test_a_cell_makes_useless_replies_forgotten() -> None:
    assert asked(EMPTY, EMPTY, CELL, ended(), EMPTY, EMPTY).turn == 6


@pytest.mark.parametrize(
    ("reply", "note"),
    [
        (EMPTY, prompts.REPLY_EMPTY),
        (said(text(" \n"), stop=StopReason.END_TURN), prompts.REPLY_EMPTY),
        (said(THINKING, stop=StopReason.END_TURN), prompts.REPLY_EMPTY),
        (REFUSED, prompts.REPLY_REFUSED),
        (said(text("well"), call(), stop=StopReason.REFUSAL), prompts.REPLY_REFUSED),
        (said(THINKING, stop=StopReason.MAX_TOKENS), prompts.REPLY_CUT_OFF),
    ],
)
def test_a_reply_that_cannot_be_sent_back_is_removed_and_its_model_told(
    reply: ModelReplied, note: str
) -> None:
    assert asked(reply).conversation == (Told(TASK), Told(note))


def test_a_text_that_was_cut_off_stays_and_is_not_taken_as_the_answer() -> None:
    assert asked(CUT_OFF).conversation == (Told(TASK), CUT_OFF.reply, Told(prompts.REPLY_CUT_OFF))


@pytest.mark.parametrize("stop", [StopReason.MAX_TOKENS, StopReason.WINDOW_FULL])
def test_a_call_that_was_cut_off_is_answered_with_why_it_was_not_run(stop: StopReason) -> None:
    cut = said(text("first"), call("import o"), stop=stop)
    assert asked(cut).conversation == (Told(TASK), cut.reply, ToolReport("a", CALL_CUT_OFF, is_error=True))


@pytest.mark.parametrize("bad", [UNKNOWN_TOOL, BAD_INPUT, said(call(code=None), call(call_id="b"))])
def test_every_call_of_a_reply_with_a_bad_call_is_answered(bad: ModelReplied) -> None:
    reports = asked(bad).conversation[2:]
    ids = [block["id"] for block in bad.reply.content]
    assert [entry.call_id for entry in reports if isinstance(entry, ToolReport) and entry.is_error] == ids


def test_of_several_tool_calls_the_first_runs_and_the_others_are_told_that_they_did_not() -> None:
    three = said(call("1", call_id="a"), call("2", call_id="b"), call("3", call_id="c"))
    assert play(three)[1] == (RunCell("1"),)
    assert asked(three, ended("one")).conversation[2:] == (
        ToolReport("a", "one"),
        ToolReport("b", prompts.NOT_RUN, is_error=True),
        ToolReport("c", prompts.NOT_RUN, is_error=True),
    )


def test_the_first_of_two_calls_runs_although_the_second_was_cut_off() -> None:
    cut = said(call("1"), call("2", call_id="b"), stop=StopReason.MAX_TOKENS)
    assert play(cut)[1] == (RunCell("1"),)


# --- Turn limit -------------------------------------------------------------------------------------------


def test_the_last_turn_is_announced_once() -> None:
    assert asked(CELL, ended(), max_turns=3).conversation[-1] != Told(prompts.LAST_TURN)
    last = asked(CELL, ended(), CELL, ended(), max_turns=3)
    assert last.turn == 3
    assert last.conversation.count(Told(prompts.LAST_TURN)) == 1


def test_a_run_of_one_turn_is_told_at_once_that_it_is_the_last() -> None:
    assert asked(max_turns=1).conversation == (Told(TASK), Told(prompts.LAST_TURN))


@pytest.mark.parametrize("events", [(CELL, ended()), (EMPTY,), (UNKNOWN_TOOL,)])
def test_no_answer_in_the_last_turn_is_turn_limit(events: tuple[Event, ...]) -> None:
    assert end(*events, max_turns=1) == End(Outcome.TURN_LIMIT, None, "no answer within 1 turns")


@pytest.mark.parametrize("events", [(CELL, ended(answer="42")), (ANSWER,)])
def test_an_answer_in_the_last_turn_counts(events: tuple[Event, ...]) -> None:
    assert end(*events, max_turns=1).outcome is Outcome.ANSWERED


# --- The last answer --------------------------------------------------------------------------------------


def test_a_turn_that_cannot_be_paid_becomes_the_last_answer() -> None:
    last = asked(CELL, ended(), SHORT)
    assert (last.turn, last.last_answer) == (2, True)
    assert last.conversation[-1] == Told(prompts.BUDGET_USED_UP)


def test_the_very_first_turn_may_become_the_last_answer() -> None:
    assert asked(SHORT) == AskModel(1, (Told(TASK), Told(prompts.BUDGET_USED_UP)), last_answer=True)


def test_a_last_answer_in_the_place_of_the_last_turn_is_still_asked_for() -> None:
    assert asked(CELL, ended(), SHORT, max_turns=2).last_answer


@pytest.mark.parametrize("events", [(ANSWER,), (CELL, ended(answer="42"))])
def test_the_last_answer_may_be_a_text_or_a_cell(events: tuple[Event, ...]) -> None:
    assert end(SHORT, *events) == End(Outcome.ANSWERED, "42", "")


@pytest.mark.parametrize("events", [(CELL, ended()), (EMPTY,), (CUT_OFF,), (UNKNOWN_TOOL,), (REFUSED,)])
def test_a_last_answer_that_is_none_ends_the_run(events: tuple[Event, ...]) -> None:
    over = end(SHORT, *events)
    assert (over.outcome, over.answer) == (Outcome.BUDGET_EXHAUSTED, None)


def test_a_last_answer_that_cannot_be_paid_is_tried_again_without_any_output() -> None:
    history = cells(3)
    last = asked(*history, SHORT, SHORT)
    assert (last.turn, last.last_answer) == (4, True)
    assert outputs(last.conversation) == [prompts.OUTPUT_ELIDED] * 3
    assert last.conversation[-1] == Told(prompts.BUDGET_USED_UP)


def test_eliding_for_the_last_answer_makes_the_request_smaller_and_is_recorded() -> None:
    before = asked(*cells(3), SHORT)
    _, actions = play(*cells(3), SHORT, SHORT)
    elided, after = actions
    assert isinstance(elided, Compacted)
    assert isinstance(after, AskModel)
    sizes = [input_bound_tokens("", ask.conversation, python_tool=True) for ask in (before, after)]
    assert sizes[0] - sizes[1] == elided.freed_bytes > 0
    assert elided.reports == 3


def test_a_last_answer_that_still_cannot_be_paid_is_asked_for_without_the_newest_exchange() -> None:
    paid = asked(*cells(2, output="short"))
    last = asked(*cells(3, output="short"), SHORT, SHORT)
    assert last.last_answer
    assert last.conversation == (*paid.conversation, Told(prompts.NEWEST_REMOVED))


@pytest.mark.parametrize("history", [[], cells(3), cells(3, output="short")])
def test_the_last_answer_is_not_tried_for_ever(history: list[Event]) -> None:
    state, actions = play(*history, SHORT)
    for _ in range(3):
        if not isinstance(actions[-1], End):
            state, actions = turn.step(state, SHORT)
    assert actions == (End(Outcome.BUDGET_EXHAUSTED, None, SHORT.why),)


# --- A lost sandbox ---------------------------------------------------------------------------------------

LOST = ended("so far", CellOutcome.SANDBOX_LOST)


def test_a_lost_sandbox_is_replaced_and_the_model_told() -> None:
    assert play(CELL, LOST)[1] == (ReplaceSandbox(),)
    report = outputs(asked(CELL, LOST, SandboxReplaced()).conversation)[0]
    assert "so far" in report
    assert "The sandbox was lost and has been replaced" in report


def test_a_sandbox_is_replaced_once_in_a_run() -> None:
    over = end(CELL, LOST, SandboxReplaced(), CELL, ended(), CELL, LOST)
    assert (over.outcome, over.answer) == (Outcome.SANDBOX_LOST, None)


def test_a_sandbox_that_cannot_be_replaced_ends_the_run() -> None:
    assert end(CELL, LOST, Stopped(Outcome.SANDBOX_LOST, "no")).outcome is Outcome.SANDBOX_LOST


@pytest.mark.parametrize(
    ("events", "outcome"), [((SHORT,), Outcome.BUDGET_EXHAUSTED), ((), Outcome.TURN_LIMIT)]
)
def test_a_sandbox_that_no_cell_will_use_is_not_replaced(events: tuple[Event, ...], outcome: Outcome) -> None:
    assert end(*events, CELL, LOST, max_turns=1).outcome is outcome


def test_a_replacement_nobody_asked_for_is_our_bug() -> None:
    state, _ = play()
    with pytest.raises(InvariantError):
        turn.step(state, SandboxReplaced())


# --- Compaction -------------------------------------------------------------------------------------------


def compacted(events: Sequence[Event], window_tokens: int) -> tuple[Compacted, AskModel]:
    _, actions = play(*events, window_tokens=window_tokens)
    first, last = actions
    assert isinstance(first, Compacted)
    assert isinstance(last, AskModel)
    return first, last


def test_a_conversation_within_its_share_of_the_window_is_left_alone() -> None:
    assert len(play(*cells(4), window_tokens=WINDOW)[1]) == 1


def test_the_providers_own_count_decides_with_what_came_since() -> None:
    history = cells(3, tokens=6_000)
    assert len(play(*history, window_tokens=20_000)[1]) == 1
    history[-2] = said(call(call_id="c2"), tokens=10_000)
    assert len(play(*history, window_tokens=20_000)[1]) == 2


def test_old_outputs_are_elided_and_the_two_newest_kept() -> None:
    note, ask = compacted(cells(5, tokens=19_000), 20_000)
    assert note.reports >= 1
    assert outputs(ask.conversation) == [prompts.OUTPUT_ELIDED] * 3 + [f"3 {BIG}", f"4 {BIG}"]


def test_replies_stay_verbatim_and_the_task_too() -> None:
    history = cells(5, tokens=19_000)
    _, ask = compacted(history, 20_000)
    assert ask.conversation[0] == Told(TASK)
    kept = [entry for entry in ask.conversation if isinstance(entry, Reply)]
    assert kept == [event.reply for event in history if isinstance(event, ModelReplied)]


def test_the_model_is_told_once_however_often_outputs_are_elided() -> None:
    _, ask = compacted(cells(9, tokens=19_000), 20_000)
    assert ask.conversation.count(Told(prompts.WINDOW_COMPACTED)) == 1


def test_small_outputs_are_not_worth_eliding() -> None:
    assert len(play(*cells(5, output="small", tokens=19_000), window_tokens=20_000)[1]) == 1


def test_what_is_elided_keeps_its_call_and_whether_it_was_an_error() -> None:
    failed = ended(BIG, CellOutcome.ERROR)
    events = [said(call(call_id="first")), failed, *cells(4, tokens=19_000)]
    _, ask = compacted(events, 20_000)
    assert ask.conversation[2] == ToolReport("first", prompts.OUTPUT_ELIDED, is_error=True)


FULL = said(stop=StopReason.WINDOW_FULL)


def test_a_full_window_makes_room_and_asks_for_the_same_turn_again() -> None:
    _, actions = play(*cells(4), FULL)
    note, ask = actions
    assert isinstance(note, Compacted)
    assert isinstance(ask, AskModel)
    assert (note.reports, ask.turn) == (2, 5)
    assert ask.conversation[-1] == Told(prompts.WINDOW_COMPACTED)


def test_a_window_that_stays_full_gives_up_the_newest_outputs_too_then_the_run() -> None:
    assert outputs(asked(*cells(4), FULL, FULL).conversation) == [prompts.OUTPUT_ELIDED] * 4
    assert end(*cells(4), FULL, FULL, FULL).outcome is Outcome.MODEL_FAILED


def test_a_window_full_in_the_last_turn_is_not_the_turn_limit() -> None:
    last = asked(*cells(2), FULL, max_turns=3)
    assert last.turn == 3
    assert last.conversation.count(Told(prompts.LAST_TURN)) == 1


def test_a_task_that_fills_the_window_is_model_failed() -> None:
    assert end(FULL).outcome is Outcome.MODEL_FAILED


# --- Any sequence of events -------------------------------------------------------------------------------

blocks = st.one_of(
    st.builds(text, st.sampled_from(["", " ", "words"])),
    st.just(THINKING),
    st.builds(
        lambda code, name: call(code, call_id="?", name=name),
        st.sampled_from(["1", "", None, 7]),
        st.sampled_from(["python", "python", "bash"]),
    ),
)
replies = st.builds(
    lambda content, stop, tokens: ModelReplied(Reply(tuple(content), stop), tokens),
    st.lists(blocks, max_size=4),
    st.sampled_from(StopReason),
    st.integers(0, 40_000),
)
results = st.builds(
    ended,
    st.sampled_from(["", "2", BIG]),
    st.sampled_from(CellOutcome),
    answer=st.sampled_from([None] * 9 + ["42"]),
)


def with_own_ids(event: ModelReplied, number: int) -> ModelReplied:
    content = tuple(
        {**block, "id": f"{number}-{place}"} if block["type"] == "tool_use" else block
        for place, block in enumerate(event.reply.content)
    )
    return replace(event, reply=Reply(content, event.reply.stop))


def assert_sendable(conversation: Conversation) -> None:
    assert isinstance(conversation[0], Told)
    assert not isinstance(conversation[-1], Reply)
    for position, entry in enumerate(conversation):
        if isinstance(entry, Reply):
            assert entry.content
            assert entry.stop is not StopReason.REFUSAL
            ids = [block["id"] for block in entry.content if block["type"] == "tool_use"]
            following = conversation[position + 1 : position + 1 + len(ids)]
            assert [report.call_id for report in following if isinstance(report, ToolReport)] == ids
    assert len(outputs(conversation)) == sum(
        block["type"] == "tool_use"
        for entry in conversation
        if isinstance(entry, Reply)
        for block in entry.content
    )


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_conversation_can_be_sent_whatever_has_happened(data: st.DataObject) -> None:
    max_turns = data.draw(st.integers(1, 12))
    state, actions = turn.start(TASK, max_turns=max_turns, window_tokens=30_000)
    asks, shorts = 0, 0
    for number in range(10 * max_turns):
        assert all(isinstance(action, Compacted) for action in actions[:-1])
        match actions[-1]:
            case AskModel() as ask:
                asks += 1
                assert 1 <= ask.turn <= max_turns
                assert_sendable(ask.conversation)
                short = data.draw(st.integers(0, 9)) == 0
                shorts += short
                event: Event = SHORT if short else with_own_ids(data.draw(replies), number)
            case RunCell():
                event = data.draw(results)
            case ReplaceSandbox():
                event = SandboxReplaced()
            case _:
                break
        state, actions = turn.step(state, event)
    assert isinstance(actions[-1], End), "every run ends"
    for note in (prompts.LAST_TURN, prompts.BUDGET_USED_UP, prompts.WINDOW_COMPACTED):
        assert state.conversation.count(Told(note)) <= 1


# --- Fenced cells -----------------------------------------------------------------------------------------

FENCED = said(text("Look.\n```repl\nprint(1)\n```"), stop=StopReason.END_TURN)
CHAT = said(text("I would look at it."), stop=StopReason.END_TURN)


def fenced(*events: Event, max_turns: int = 10, window_tokens: int = WINDOW) -> tuple[Action, ...]:
    """What is done after these events, with a model that writes fences."""
    state, actions = turn.start(
        TASK, max_turns=max_turns, window_tokens=window_tokens, dialect=Dialect.FENCES
    )
    for event in events:
        assert not isinstance(actions[-1], End), "the run is over already"
        state, actions = turn.step(state, event)
    return actions


def told(*events: Event, max_turns: int = 10) -> Conversation:
    """The conversation that model is asked to continue."""
    ask = fenced(*events, max_turns=max_turns)[-1]
    assert isinstance(ask, AskModel)
    return ask.conversation


def test_a_fenced_cell_runs_and_its_report_is_told_as_text() -> None:
    assert fenced(FENCED) == (RunCell("print(1)"),)
    report = CellReport(prompts.told_report("1"))
    assert told(FENCED, ended("1\n")) == (Told(TASK), FENCED.reply, report)


def test_what_was_invented_behind_a_cell_is_cut_off_counted_and_told_to_nobody() -> None:
    invented = "\n[output of your cell]\né 42\n```repl\nFINAL(42)\n```"
    more = said(THINKING, text(FENCED.reply.text + invented), text("and"), stop=StopReason.END_TURN)
    assert fenced(more) == (RunCell("print(1)", invented_bytes=len(invented.encode()) + len("and")),)
    kept = Reply((THINKING, text(FENCED.reply.text)), StopReason.END_TURN)
    assert told(more, ended("1"))[1:] == (kept, CellReport(prompts.told_report("1")))


def test_a_cell_that_is_whole_runs_although_the_reply_was_cut_off_behind_it() -> None:
    for stop in (StopReason.MAX_TOKENS, StopReason.WINDOW_FULL, StopReason.STOP_SEQUENCE):
        assert fenced(said(text("```repl\n1\n```\nOutput: 4"), stop=stop)) == (RunCell("1", 10),)


def test_a_cell_that_was_cut_off_is_not_run_and_its_model_told() -> None:
    cut = said(text("```repl\nprint("), stop=StopReason.MAX_TOKENS)
    assert told(cut) == (Told(TASK), cut.reply, Told(CALL_CUT_OFF))
    assert fenced(cut, cut, cut)[-1] == End(
        Outcome.MODEL_FAILED,
        None,
        "the model asked for cells that could not be run, 3 useless replies in a row",
    )


def test_final_in_prose_is_the_answer_with_fences_only() -> None:
    final = said(text("I am sure.\nFINAL(forty (two))"), stop=StopReason.END_TURN)
    assert fenced(final) == (End(Outcome.ANSWERED, "forty (two)", ""),)
    assert end(final).answer == final.reply.text


def test_final_var_in_prose_fetches_the_variable_and_may_fail_like_any_cell() -> None:
    final = said(text("FINAL_VAR(rows)\nOutput: 42"), stop=StopReason.END_TURN)
    assert fenced(final) == (RunCell("FINAL_VAR('rows')", invented_bytes=11),)
    conversation = told(final, ended("NameError", CellOutcome.ERROR))
    assert conversation[1:] == (
        Reply((text("FINAL_VAR(rows)"),), StopReason.END_TURN),
        CellReport(prompts.told_report("NameError")),
    )


def test_words_alone_are_no_answer_and_the_model_is_told_how_to_go_on() -> None:
    assert told(CHAT) == (Told(TASK), CHAT.reply, Told(prompts.REPLY_ONLY_WORDS))
    over = fenced(CHAT, CHAT, CHAT)[-1]
    assert isinstance(over, End)
    assert over.outcome is Outcome.MODEL_FAILED
    assert fenced(CHAT, CHAT, FENCED, ended(), CHAT, CHAT)[-1] != over


def test_words_alone_in_the_last_turn_are_the_answer_as_the_model_was_told() -> None:
    answered = (End(Outcome.ANSWERED, CHAT.reply.text, ""),)
    assert fenced(CHAT, max_turns=1) == answered
    assert fenced(FENCED, ended(), SHORT, CHAT) == answered
    assert "reply with the answer as text" in prompts.LAST_TURN
    assert "reply with the answer as text" in prompts.BUDGET_USED_UP


def test_a_tool_call_nobody_offered_is_left_out() -> None:
    with_call = said(*FENCED.reply.content, call("evil()"))
    assert fenced(with_call) == (RunCell("print(1)"),)
    assert told(with_call, ended())[1] == Reply(FENCED.reply.content, StopReason.TOOL_USE)
    assert told(said(call("evil()"))) == (Told(TASK), Told(prompts.REPLY_EMPTY))


def test_told_reports_are_elided_like_others_and_still_marked_as_outputs() -> None:
    events: list[Event] = []
    for number in range(5):
        events += [replace(FENCED, tokens=19_000), ended(f"{number} {BIG}")]
    note, ask = fenced(*events, window_tokens=20_000)
    assert isinstance(note, Compacted)
    assert isinstance(ask, AskModel)
    reports = [entry.text for entry in ask.conversation if isinstance(entry, CellReport)]
    elided = prompts.told_report(prompts.OUTPUT_ELIDED)
    assert reports == [elided] * 3 + [prompts.told_report(f"{number} {BIG}") for number in (3, 4)]
    assert len(elided) < turn.WORTH_ELIDING_BYTES


fenced_texts = st.lists(
    st.sampled_from(["```repl\n", "\n```", "\n", "x", "'''", "FINAL(", "\nFINAL_VAR(x)", ")", " ", "\ud800"]),
    max_size=8,
).map("".join)
fenced_replies = st.builds(
    lambda content, stop, tokens: ModelReplied(Reply(tuple(content), stop), tokens),
    st.lists(st.one_of(st.builds(text, fenced_texts), st.just(THINKING), st.just(call())), max_size=4),
    st.sampled_from(StopReason),
    st.integers(0, 40_000),
)


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_a_conversation_of_fences_can_be_sent_whatever_has_happened(data: st.DataObject) -> None:
    max_turns = data.draw(st.integers(1, 12))
    state, actions = turn.start(TASK, max_turns=max_turns, window_tokens=30_000, dialect=Dialect.FENCES)
    for _ in range(10 * max_turns):
        match actions[-1]:
            case AskModel() as ask:
                assert_sendable(ask.conversation)
                assert not any(isinstance(entry, ToolReport) for entry in ask.conversation)
                said_at = [isinstance(entry, Reply) for entry in ask.conversation]
                assert (True, True) not in pairwise(said_at), "what we say stands between two replies"
                event: Event = SHORT if data.draw(st.integers(0, 9)) == 0 else data.draw(fenced_replies)
            case RunCell() as cell:
                assert cell.invented_bytes >= 0
                event = data.draw(results)
            case ReplaceSandbox():
                event = SandboxReplaced()
            case _:
                break
        state, actions = turn.step(state, event)
    assert isinstance(actions[-1], End), "every run ends"
