"""The turn machine: the loop of one run as a pure function.

`step(state, event)` returns the next state and what to do about it. Everything that affects the course of a
run is decided in this file; the driver around it only carries actions out and reports back what came of
them, so a crashed run is recovered by feeding the recorded events into the same function.

What each odd reply means:

  empty                      told, asked again; the third useless reply in a row ends the run, model_failed
  refused                    removed from the conversation, told, asked again; likewise
  cut off, no tool call      told, asked again; likewise (removed when there is no text: thinking may be torn)
  cut off inside a call      the call is answered with why it was not run; likewise
  unknown tool, bad input    likewise
  several tool calls         the first runs, the others are answered with why they did not
  no tool call               its text is the answer
  fences: no cell, no FINAL  in the last turn its text is the answer; else told, asked again; likewise
  fences: more than a cell   what follows the cell is cut off, and counted; nobody is told
  window full                outputs are elided, the newest last, and it is asked again; the turn does not
                             count; when none is left, model_failed

When the next turn can't be paid, the model is asked for a last answer out of what was kept for it. When that
can't be paid either, all outputs are elided and it is tried once more; then the run ends, budget_exhausted.
"""

from dataclasses import dataclass, replace
from enum import Enum
from typing import TypeAlias

from orchestrator import prompts, reply
from orchestrator.cells import CellOutcome, CellResult
from orchestrator.conversation import (
    CellReport,
    Conversation,
    Dialect,
    Entry,
    Reply,
    Told,
    ToolReport,
    utf8_bytes,
)
from orchestrator.errors import InvariantError
from orchestrator.estimate import input_bound_tokens

USELESS_REPLIES_IN_A_ROW = 3
WINDOW_SHARE = 0.7
"""A conversation above this share of the model's window is compacted: the rest is for reply and report."""
REPORTS_KEPT = 2
"""The newest reports are spared while that is possible: the model is working on them."""
WORTH_ELIDING_BYTES = 256
SANDBOX_REPLACEMENTS = 1


class Outcome(Enum):
    """How a run ended."""

    ANSWERED = "answered"
    BUDGET_EXHAUSTED = "budget_exhausted"
    TURN_LIMIT = "turn_limit"
    DEADLINE = "deadline"
    CANCELLED = "cancelled"
    SANDBOX_LOST = "sandbox_lost"
    MODEL_FAILED = "model_failed"
    ABUSE = "abuse"
    """The guest flooded its socket."""
    INTERNAL_ERROR = "internal_error"


# --- Events: what happened ------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelReplied:
    """The model said something. `tokens` is what the provider counted, input and output."""

    reply: Reply
    tokens: int


@dataclass(frozen=True, slots=True)
class BudgetShort:
    """The next turn could not be paid for."""

    why: str


@dataclass(frozen=True, slots=True)
class CellEnded:
    """The cell that was asked for is over."""

    result: CellResult
    note: str = ""
    """What its model must know besides; see `Noted`."""


@dataclass(frozen=True, slots=True)
class SandboxReplaced:
    """A new sandbox stands in for the lost one, with an empty namespace."""


@dataclass(frozen=True, slots=True)
class Noted:
    """Before the model is asked: something happened to its namespace that no report tells."""

    text: str


@dataclass(frozen=True, slots=True)
class Stopped:
    """Something outside the conversation ends the run."""

    outcome: Outcome
    why: str


Event: TypeAlias = ModelReplied | BudgetShort | CellEnded | SandboxReplaced | Noted | Stopped


# --- Actions: what to do --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AskModel:
    """Ask the model for turn `turn`."""

    turn: int
    conversation: Conversation
    last_answer: bool
    """It may use what the budget keeps for the last answer."""


@dataclass(frozen=True, slots=True)
class RunCell:
    """Run a cell. Report back `CellEnded`."""

    code: str
    invented_bytes: int = 0
    """How much the model wrote behind it, as if it had seen the output. It was cut off."""


@dataclass(frozen=True, slots=True)
class ReplaceSandbox:
    """Get a new sandbox. Report back `SandboxReplaced`, or `Stopped` when there is none."""


@dataclass(frozen=True, slots=True)
class Compacted:
    """Outputs were elided; for the record only."""

    reports: int
    freed_bytes: int


@dataclass(frozen=True, slots=True)
class End:
    """The run is over."""

    outcome: Outcome
    answer: str | None
    why: str


Action: TypeAlias = AskModel | RunCell | ReplaceSandbox | Compacted | End


@dataclass(frozen=True, kw_only=True, slots=True)
class State:
    """Where one run stands."""

    conversation: Conversation
    max_turns: int
    window_tokens: int
    dialect: Dialect
    turn: int = 0
    useless_replies: int = 0
    last_answer: bool = False
    newest_removed: bool = False
    """The last resort, so that the last answer can be paid whatever the newest exchange has grown to."""
    replacements: int = 0
    tokens: int = 0
    """What the provider counted for the conversation up to its last reply."""
    unanswered: tuple[str, ...] = ()
    """Tool calls of the last reply; the first is the one whose cell runs. None with fences."""
    lost: CellResult | None = None
    """The cell that was running when the sandbox went away."""
    note: str = ""
    """To be told behind the report of that cell, or of the one that has just ended."""


def start(
    task: str, *, max_turns: int, window_tokens: int, dialect: Dialect = Dialect.TOOLS
) -> tuple[State, tuple[Action, ...]]:
    """A run's first state and action."""
    state = State(
        conversation=(Told(task),), max_turns=max_turns, window_tokens=window_tokens, dialect=dialect
    )
    return _ask(state)


def step(state: State, event: Event) -> tuple[State, tuple[Action, ...]]:
    """What follows from an event. The last action is the one to report back on, or `End`."""
    match event:
        case ModelReplied():
            return _on_reply(replace(state, tokens=event.tokens), event.reply)
        case CellEnded():
            return _on_cell(replace(state, note=event.note), event.result)
        case SandboxReplaced():
            if state.lost is None:
                raise InvariantError("no sandbox was lost")
            return _report(replace(state, lost=None), state.lost)
        case Noted():
            return _ask_instead(_tell(state, event.text))
        case BudgetShort():
            return _on_budget_short(state, event.why)
        case Stopped():
            return state, (End(event.outcome, None, event.why),)


def _on_reply(state: State, said: Reply) -> tuple[State, tuple[Action, ...]]:
    kind = reply.read_reply(said, state.dialect)
    counts = reply.what_counts(said, state.dialect)
    kept = replace(state, conversation=(*state.conversation, counts)) if counts.content else state
    match kind:
        case reply.SaysAnswer():
            return kept, (End(Outcome.ANSWERED, kind.text, ""),)
        case reply.WantsCell():
            calls = (kind.call_id, *kind.not_run) if state.dialect is Dialect.TOOLS else ()
            invented_bytes = utf8_bytes(said.text) - utf8_bytes(counts.text)
            return replace(kept, useless_replies=0, unanswered=calls), (RunCell(kind.code, invented_bytes),)
        case reply.OnlyWords():
            if state.last_answer or state.turn == state.max_turns:
                return kept, (End(Outcome.ANSWERED, kind.text, ""),)
            told = _tell(kept, prompts.REPLY_ONLY_WORDS)
            return _useless(told, "the model wrote neither cells nor an answer")
        case reply.BadCall():
            reports = tuple(ToolReport(call_id, kind.why, is_error=True) for call_id in kind.call_ids)
            told = _add(kept, *(reports or (Told(kind.why),)))
            return _useless(told, "the model asked for cells that could not be run")
        case reply.CutOff():
            heard = kept if said.text.strip() else state
            return _useless(_tell(heard, prompts.REPLY_CUT_OFF), "the model's replies were cut off")
        case reply.Empty():
            return _useless(_tell(state, prompts.REPLY_EMPTY), "the model's replies were empty")
        case reply.Refused():
            return _useless(_tell(state, prompts.REPLY_REFUSED), "the model refused")
        case reply.WindowFull():
            return _make_room(state)


def _useless(state: State, why: str) -> tuple[State, tuple[Action, ...]]:
    state = replace(state, useless_replies=state.useless_replies + 1)
    if state.last_answer:
        return state, (End(Outcome.BUDGET_EXHAUSTED, None, f"the last reply brought no answer: {why}"),)
    if state.useless_replies == USELESS_REPLIES_IN_A_ROW:
        why = f"{why}, {USELESS_REPLIES_IN_A_ROW} useless replies in a row"
        return state, (End(Outcome.MODEL_FAILED, None, why),)
    return _ask(state)


def _on_budget_short(state: State, why: str) -> tuple[State, tuple[Action, ...]]:
    if not state.last_answer:
        told = _tell(replace(state, last_answer=True), prompts.BUDGET_USED_UP)
        return _ask_instead(told)
    smaller, elided = _elide(state, reports_kept=0)
    if elided:
        # Without a note, which costs too: the marks where the outputs were say the same.
        return _ask_instead(smaller, elided)
    newest = max(
        (at for at, entry in enumerate(state.conversation) if isinstance(entry, Reply)), default=None
    )
    if newest is None or state.newest_removed:
        return state, (End(Outcome.BUDGET_EXHAUSTED, None, why),)
    # What is left was paid for once, and as much was kept when it was (`_keep` in runs/run.py).
    before = replace(state, conversation=state.conversation[:newest], newest_removed=True)
    return _ask_instead(_tell(before, prompts.NEWEST_REMOVED))


def _on_cell(state: State, result: CellResult) -> tuple[State, tuple[Action, ...]]:
    if result.answer is not None:
        return state, (End(Outcome.ANSWERED, result.answer, ""),)
    is_last = state.last_answer or state.turn == state.max_turns
    if result.outcome is not CellOutcome.SANDBOX_LOST or is_last:
        return _report(state, result)
    if state.replacements == SANDBOX_REPLACEMENTS:
        return state, (End(Outcome.SANDBOX_LOST, None, "the sandbox was lost, and its replacement too"),)
    return replace(state, lost=result, replacements=state.replacements + 1), (ReplaceSandbox(),)


def _report(state: State, result: CellResult) -> tuple[State, tuple[Action, ...]]:
    """Tell the model about the cell it ran, and that it ran no other."""
    report = prompts.cell_report(result)
    if state.dialect is Dialect.FENCES:
        state = _add(state, CellReport(prompts.told_report(report)))
    else:
        ran, *not_run = state.unanswered
        state = _add(
            replace(state, unanswered=()),
            ToolReport(ran, report, is_error=result.outcome is not CellOutcome.OK),
            *(ToolReport(call_id, prompts.NOT_RUN, is_error=True) for call_id in not_run),
        )
    if state.note:
        state = _tell(replace(state, note=""), state.note)
    if state.last_answer:
        return state, (End(Outcome.BUDGET_EXHAUSTED, None, "the last reply's cell gave no answer"),)
    return _ask(state)


def _ask(state: State) -> tuple[State, tuple[Action, ...]]:
    if state.turn == state.max_turns:
        return state, (End(Outcome.TURN_LIMIT, None, f"no answer within {state.max_turns} turns"),)
    state = replace(state, turn=state.turn + 1)
    if state.turn == state.max_turns and not state.last_answer:
        state = _tell_once(state, prompts.LAST_TURN)
    compacted: tuple[Compacted, ...] = ()
    if _expected_tokens(state) > WINDOW_SHARE * state.window_tokens:
        state, compacted = _compact(state)
    return state, (*compacted, AskModel(state.turn, state.conversation, state.last_answer))


def _ask_instead(state: State, before: tuple[Action, ...] = ()) -> tuple[State, tuple[Action, ...]]:
    """Ask for a turn in the place of the last one, which came to nothing."""
    state, actions = _ask(replace(state, turn=state.turn - 1))
    return state, (*before, *actions)


def _make_room(state: State) -> tuple[State, tuple[Action, ...]]:
    """The provider itself said that the window is full."""
    for reports_kept in (REPORTS_KEPT, 0):
        smaller, compacted = _compact(state, reports_kept)
        if compacted:
            return _ask_instead(smaller, compacted)
    return state, (End(Outcome.MODEL_FAILED, None, "the conversation does not fit the model's window"),)


def _add(state: State, *entries: Entry) -> State:
    return replace(state, conversation=(*state.conversation, *entries))


def _tell(state: State, text: str) -> State:
    return _add(state, Told(text))


def _tell_once(state: State, text: str) -> State:
    return state if Told(text) in state.conversation else _tell(state, text)


def _expected_tokens(state: State) -> int:
    """What the provider counted, plus at most what was added since."""
    since = len(state.conversation)
    while since and not isinstance(state.conversation[since - 1], Reply):
        since -= 1
    return state.tokens + input_bound_tokens("", state.conversation[since:], python_tool=False)


def _compact(state: State, reports_kept: int = REPORTS_KEPT) -> tuple[State, tuple[Compacted, ...]]:
    """Elide old outputs and say so."""
    state, compacted = _elide(state, reports_kept)
    return (_tell_once(state, prompts.WINDOW_COMPACTED) if compacted else state), compacted


def _elide(state: State, reports_kept: int) -> tuple[State, tuple[Compacted, ...]]:
    """Elide all outputs but the newest. Replies stay verbatim: thinking blocks may not be touched."""
    entries = list(state.conversation)
    reports = [
        (position, entry)
        for position, entry in enumerate(entries)
        if isinstance(entry, ToolReport | CellReport) and utf8_bytes(entry.text) > WORTH_ELIDING_BYTES
    ]
    elided = reports[: max(0, len(reports) - reports_kept)]
    if not elided:
        return state, ()
    for position, report in elided:
        mark = prompts.OUTPUT_ELIDED
        text = prompts.told_report(mark) if isinstance(report, CellReport) else mark
        entries[position] = replace(report, text=text)
    before_bytes = input_bound_tokens("", state.conversation, python_tool=False)
    after_bytes = input_bound_tokens("", tuple(entries), python_tool=False)
    state = replace(
        state,
        conversation=tuple(entries),
        # The provider's count scales with what is left; it is corrected by the next reply.
        tokens=state.tokens * after_bytes // before_bytes,
    )
    return state, (Compacted(len(elided), before_bytes - after_bytes),)
