"""What is read off a run's events: the machine's state, the namespace's cells, the answers of sub-calls."""

import asyncio
import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator import errors, prompts, turn
from orchestrator.budget import Amounts
from orchestrator.cells import CellOutcome, CellResult, Resource, SandboxLoss, UsedUp
from orchestrator.conversation import Reply, StopReason
from orchestrator.errors import (
    Billing,
    BudgetExceededError,
    ChildRunFailedError,
    ModelError,
    OrchestratorError,
    ReplayError,
    RunCancelledError,
)
from orchestrator.ids import RunId
from orchestrator.pricing import Usage
from orchestrator.rpc import status
from orchestrator.runs import replayed_cell
from orchestrator.runs.divergence import Namespace, cannot_run_again, note_of
from orchestrator.runs.past import PastCell, RunPast, TreePast, left_open, read_run
from orchestrator.runs.recorded_errors import error_again
from orchestrator.runs.replay import STARTS_OF_A_CELL, compare, fast_forward, given_up
from orchestrator.runs.replayed_cell import ReplayedCell
from orchestrator.trajectory import (
    LOST,
    Blob,
    CallHeld,
    CallSettled,
    CellEnded,
    CellStarted,
    Event,
    ModelReplied,
    Payload,
    ReplayDiverged,
    RunEnded,
    RunResumed,
    RunStarted,
    SandboxLeased,
    SubCallEnded,
    SubCallStarted,
    Text,
    TurnStarted,
)

ROOT, CHILD = RunId("r" + "0" * 20), RunId("r" + "1" * 20)
OK = CellResult(outcome=CellOutcome.OK, output_head="out", output_bytes=3)


def text_of(text: Text) -> str:
    assert isinstance(text, str)
    return text


def recorded(*payloads: Payload, run_id: RunId = ROOT) -> list[Event]:
    return [Event(run_id, seq, 1_000.0 + seq, payload) for seq, payload in enumerate(payloads)]


def read(*payloads: Payload) -> RunPast:
    return read_run(recorded(started(), *payloads), text_of)


def started(parent: RunId | None = None) -> RunStarted:
    return RunStarted(
        question="Who?",
        context="one text",
        model="m",
        sub_model="m",
        depth=int(parent is not None),
        parent=parent,
        parent_call="1.1" if parent else "",
        limits={},
    )


def cell_started(number: int) -> CellStarted:
    return CellStarted(turn=number, code=f"cell {number}")


def cell_ended(number: int, result: CellResult = OK) -> CellEnded:
    return CellEnded(
        turn=number,
        outcome=result.outcome.value,
        output=result.output,
        output_bytes=result.output_bytes,
        cut_bytes=result.cut_bytes,
        traceback=result.traceback,
        status=result.status,
        lost_variables=result.lost_variables,
        duration_s=result.duration_s,
        guest_s=result.guest_s,
        used_up=tuple(used.resource.value for used in result.used_up),
        loss=result.loss.value if result.loss else "",
        used_up_limits={used.resource.value: used.limit for used in result.used_up if used.limit},
        answer=result.answer,
    )


def a_cell(number: int, result: CellResult = OK) -> tuple[Payload, ...]:
    """A turn with its cell."""
    said = runs_cell(number)
    return (
        TurnStarted(turn=number, request_bytes=1),
        replied(number, said),
        cell_started(number),
        cell_ended(number, result),
    )


def runs_cell(number: int) -> Reply:
    call = {"type": "tool_use", "id": f"t{number}", "name": "python", "input": {"code": f"cell {number}"}}
    return Reply((call,), StopReason.TOOL_USE)


def replied(number: int, said: Reply) -> ModelReplied:
    content = json.dumps([dict(block) for block in said.content])
    return ModelReplied(turn=number, content=content, stop=said.stop.value)


def leased(seed: int = 7) -> SandboxLeased:
    return SandboxLeased(sandbox_id="s", runtime="runc", image="i", hash_seed=seed, wait_s=0.1)


def resumed(times: int = 1, number: int = 1) -> RunResumed:
    return RunResumed(times=times, turn=number, cells=0)


def sub_started(name: str, request_hash: str = "h", occurrence: int = 0) -> SubCallStarted:
    return SubCallStarted(
        call=name,
        turn=int(name.partition(".")[0]),
        what="complete",
        model="m",
        prompt="p",
        request_hash=request_hash,
        occurrence=occurrence,
    )


def sub_ended(name: str, answer: str = "a", error: OrchestratorError | None = None) -> SubCallEnded:
    return SubCallEnded(
        call=name,
        answer=answer,
        error=str(error) if error else "",
        error_kind=type(error).__name__ if error else "",
        memoised=False,
        duration_s=0.1,
    )


def outcome(result: CellOutcome) -> CellResult:
    return replace(OK, outcome=result)


# --- The machine --------------------------------------------------------------------------------------------


def begun() -> tuple[turn.State, tuple[turn.Action, ...]]:
    return turn.start("the task", max_turns=9, window_tokens=20_000)


class Drive:
    """Plays the driver of a run: feeds the machine and records what the driver records."""

    def __init__(self) -> None:
        self.state, self.actions = begun()
        self.payloads: list[Payload] = [started(), leased()]
        self.known: list[tuple[int, turn.State, turn.Action]] = []
        """From so many events on, the record tells this state."""
        self._know(len(self.payloads))

    def ask(self, said: Reply | None) -> None:
        """The model replies, or can't be paid."""
        ask = self.actions[-1]
        assert isinstance(ask, turn.AskModel)
        self.payloads.append(TurnStarted(turn=ask.turn, request_bytes=1))
        if said is None:
            self._step(turn.BudgetShort("short"))
            # Nothing tells of it but that the turn is asked for again.
            self._know(len(self.payloads) + 1)
            return
        usage = Usage(input=900, output=len(self.payloads))
        self.payloads.append(settled(f"turn-{ask.turn}", usage))
        self.payloads.append(replied(ask.turn, said))
        self._step(turn.ModelReplied(said, usage.total))
        self._know(len(self.payloads))

    def run_cell(self, result: CellResult) -> None:
        self.payloads += [cell_started(self.state.turn), cell_ended(self.state.turn, result)]
        self._step(turn.CellEnded(result))
        self._know(len(self.payloads))

    def replace_sandbox(self) -> None:
        self.payloads.append(leased())
        self._step(turn.SandboxReplaced())
        self._know(len(self.payloads))

    def _step(self, event: turn.Event) -> None:
        self.state, self.actions = turn.step(self.state, event)

    def _know(self, length: int) -> None:
        self.known.append((length, self.state, self.actions[-1]))


def settled(call: str, usage: Usage) -> CallSettled:
    return CallSettled(
        call=call,
        attempt=1,
        model="m",
        input_bound_tokens=1,
        usage=usage,
        confirmed=Amounts(tokens=usage.total, calls=1),
        unconfirmed=Amounts(),
        error="",
        duration_s=0.1,
    )


_SAYS = st.sampled_from(
    [
        runs_cell(1),
        runs_cell(2),
        None,
        Reply((), StopReason.END_TURN),
        Reply((), StopReason.REFUSAL),
        Reply(({"type": "text", "text": "cut"},), StopReason.MAX_TOKENS),
        Reply((), StopReason.WINDOW_FULL),
    ]
)
_RESULTS = st.sampled_from(
    [
        OK,
        replace(OK, output_head="x" * 9_000, output_bytes=9_000),
        CellResult(outcome=CellOutcome.ERROR, traceback="Traceback\n  no"),
        CellResult(outcome=CellOutcome.KILLED, lost_variables=("a", "b")),
        CellResult(outcome=CellOutcome.EXITED, status=3),
        replace(OK, used_up=(UsedUp(Resource.TMP_BYTES, 1 << 20), UsedUp(Resource.OPEN_FILES, 0))),
        replace(OK, output_head="head", output_tail="tail", cut_bytes=1_000),
        CellResult(outcome=CellOutcome.SANDBOX_LOST, loss=SandboxLoss.CONTAINER_GONE),
        replace(OK, answer="the answer"),
    ]
)


@given(st.data())
def test_the_machine_is_fed_what_it_was_fed_wherever_the_record_ends(data: st.DataObject) -> None:
    drive = Drive()
    for _ in range(data.draw(st.integers(0, 25))):
        match drive.actions[-1]:
            case turn.AskModel():
                drive.ask(data.draw(_SAYS))
            case turn.RunCell():
                drive.run_cell(data.draw(_RESULTS))
            case turn.ReplaceSandbox():
                drive.replace_sandbox()
            case _:
                break
    events = recorded(*drive.payloads)
    for length in range(2, len(events) + 1):
        past = read_run(events[:length], text_of)
        state, actions = fast_forward(*begun(), past.steps)
        _, expected, wanted = [one for one in drive.known if one[0] <= length][-1]
        assert state == expected
        assert actions[-1] == wanted
        if length < len(events) and isinstance(events[length].payload, CellStarted):
            following = read_run(events[: length + 1], text_of)
            assert following.running is not None
            assert following.running.code


def test_a_turn_that_was_under_way_at_a_restart_is_asked_for_again() -> None:
    past = read(
        TurnStarted(turn=1, request_bytes=1), resumed(), TurnStarted(turn=1, request_bytes=1), *a_cell(2)[1:2]
    )
    (only,) = past.steps
    assert isinstance(only.event, turn.ModelReplied)
    assert past.asked[1] == 2, "its name is taken"


def test_a_record_that_does_not_fit_the_machine_is_refused() -> None:
    past = read(cell_started(1), cell_ended(1))
    with pytest.raises(ReplayError, match="AskModel"):
        fast_forward(*begun(), past.steps)


@pytest.mark.parametrize(
    "payloads",
    [
        (leased(), started()),
        (started(), cell_ended(1)),
        (started(), replace(replied(1, runs_cell(1)), content="no JSON")),
        (started(), replace(replied(1, runs_cell(1)), stop="a new reason")),
        (started(), cell_started(1), replace(cell_ended(1), outcome="who knows")),
        (started(), sub_ended("1.1")),
    ],
)
def test_a_broken_record_is_refused(payloads: Sequence[Payload]) -> None:
    with pytest.raises(ReplayError):
        read_run(recorded(*payloads), text_of)


def test_a_record_with_a_gap_is_refused() -> None:
    events = recorded(started(), leased(), *a_cell(1))
    with pytest.raises(ReplayError, match="gaps"):
        read_run([*events[:2], *events[3:]], text_of)


# --- The namespace ------------------------------------------------------------------------------------------


def turns_again(past: RunPast) -> list[int]:
    return [cell.turn for cell in past.to_run_again]


@pytest.mark.parametrize("kept", [CellOutcome.OK, CellOutcome.ERROR])
def test_cells_that_kept_their_namespace_are_run_again(kept: CellOutcome) -> None:
    assert turns_again(read(*a_cell(1), *a_cell(2, outcome(kept)), *a_cell(3))) == [1, 2, 3]


@pytest.mark.parametrize(
    "loses", [one for one in CellOutcome if not one.namespace_kept], ids=lambda one: str(one.value)
)
def test_nothing_before_a_loss_is_run_again(loses: CellOutcome) -> None:
    past = read(*a_cell(1), *a_cell(2, outcome(loses)), leased(), *a_cell(3))
    assert (turns_again(past), past.interrupted) == ([3], 0)


def test_an_interrupted_cell_is_not_run_again_and_its_model_is_told_that_all_is_lost() -> None:
    past = read(*a_cell(1), *a_cell(2, outcome(CellOutcome.INTERRUPTED)), *a_cell(3))
    assert past.interrupted == 2
    assert note_of([cannot_run_again(2)]) == prompts.NAMESPACE_LOST_AT_RESTART


def test_an_interrupted_cell_before_a_loss_is_of_no_concern() -> None:
    interrupted = a_cell(1, outcome(CellOutcome.INTERRUPTED))
    past = read(*interrupted, *a_cell(2, outcome(CellOutcome.KILLED)), *a_cell(3))
    assert (turns_again(past), past.interrupted) == ([3], 0)


def test_a_loss_that_the_model_was_told_of_at_one_restart_is_one_at_the_next() -> None:
    interrupted = (*a_cell(1), *a_cell(2, outcome(CellOutcome.INTERRUPTED)))
    past = read(*interrupted, resumed(), leased(), cannot_run_again(2), *a_cell(3))
    assert (turns_again(past), past.interrupted) == ([3], 0)
    told = [one.event for one in past.steps if isinstance(one.event, turn.Noted)]
    assert told == [turn.Noted(prompts.NAMESPACE_LOST_AT_RESTART)]


def test_a_loss_that_the_model_was_not_yet_told_of_is_told_after_the_next_restart() -> None:
    interrupted = (*a_cell(1), *a_cell(2, outcome(CellOutcome.INTERRUPTED)))
    past = read(*interrupted, resumed(), leased(), cannot_run_again(2), resumed(2))
    assert past.interrupted == 2
    assert not [one for one in past.steps if isinstance(one.event, turn.Noted)]


def test_what_the_model_is_told_while_a_cell_runs_stands_behind_its_report() -> None:
    diverged = ReplayDiverged(turn=1, why="it did", namespace="uncertain")
    running = (*a_cell(2)[:3], resumed(), leased(), diverged, *a_cell(2)[2:])
    past = read(*a_cell(1), *running)
    last = past.steps[-1].event
    assert isinstance(last, turn.CellEnded)
    assert last.note == prompts.NAMESPACE_UNCERTAIN
    state, actions = fast_forward(*begun(), past.steps)
    assert isinstance(actions[-1], turn.AskModel)
    assert getattr(state.conversation[-1], "text", "") == prompts.NAMESPACE_UNCERTAIN


def test_the_seed_is_that_of_the_last_sandbox() -> None:
    assert read(leased(5), *a_cell(1), resumed(), leased(5), *a_cell(2)).hash_seed == 5
    assert read().hash_seed == 0


def test_a_cell_that_was_running_at_a_few_restarts_is_run_again_and_at_many_no_more() -> None:
    again = (resumed(), *a_cell(1)[2:3])
    few = read(*a_cell(1)[:3], *again * (STARTS_OF_A_CELL - 2)).running
    assert few is not None
    with pytest.raises(errors.InvariantError):
        given_up(few)
    many = read(*a_cell(1)[:3], *again * (STARTS_OF_A_CELL - 1)).running
    assert many is not None
    result = given_up(many)
    assert (result.outcome, result.loss) == (CellOutcome.SANDBOX_LOST, SandboxLoss.ORCHESTRATOR_ENDED)
    assert "restarted again and again" in prompts.cell_report(result)


PRINTED = PastCell(turn=4, code="", result=OK)


@pytest.mark.parametrize(
    ("again", "other_calls", "namespace"),
    [
        (OK, False, None),
        (replace(OK, output_head="other"), False, Namespace.KEPT),
        (OK, True, Namespace.UNCERTAIN),
        (outcome(CellOutcome.ERROR), False, Namespace.UNCERTAIN),
        (outcome(CellOutcome.INTERRUPTED), False, Namespace.UNCERTAIN),
        (replace(OK, answer="yes"), False, Namespace.UNCERTAIN),
        (outcome(CellOutcome.KILLED), False, Namespace.LOST),
        (outcome(CellOutcome.SANDBOX_LOST), True, Namespace.LOST),
    ],
)
def test_what_a_difference_means(again: CellResult, other_calls: bool, namespace: Namespace | None) -> None:
    diverged = compare(PRINTED, again, other_calls=other_calls)
    assert (diverged and diverged.namespace) == namespace
    assert diverged is None or diverged.turn == 4


def test_the_worst_difference_is_what_the_model_is_told() -> None:
    kept, uncertain, lost = (ReplayDiverged(turn=1, why="it did", namespace=one.value) for one in Namespace)
    assert note_of([]) == note_of([kept]) == ""
    assert note_of([kept, uncertain]) == prompts.NAMESPACE_UNCERTAIN
    assert note_of([uncertain, lost, kept]) == prompts.NAMESPACE_LOST_IN_REPLAY


def test_an_age_is_no_less_than_that_of_the_record() -> None:
    past = read(leased(), *a_cell(1))
    assert past.elapsed_s(1_100.0) == 100.0
    assert past.elapsed_s(0.0) == 5.0, "the clock was set back"


# --- Sub-calls ----------------------------------------------------------------------------------------------


def test_a_second_question_alike_has_the_second_answer() -> None:
    calls = (
        sub_started("1.1"),
        sub_ended("1.1", "first"),
        sub_started("1.2", "h", 1),
        sub_ended("1.2", "second"),
    )
    cell = read(*a_cell(1)[:3], *calls).cells[1]
    answers = {key: call.ended.answer for key, call in cell.calls.items() if call.ended}
    assert answers == {("h", 0): "first", ("h", 1): "second"}
    assert (cell.names, cell.answers) == (2, 2)


def test_what_was_lost_at_a_restart_is_asked_again_and_then_known_by_its_second_answer() -> None:
    lost = (sub_started("1.1"), sub_ended("1.1", "", errors.RunCancelledError(LOST)))
    cell = read(*a_cell(1)[:3], *lost, resumed(), cell_started(1)).cells[1]
    assert ReplayedCell(cell, whole).recorded("h", 0) is None
    again = (sub_started("1.2"), sub_ended("1.2", "at last"))
    cell = read(*a_cell(1)[:3], *lost, resumed(), cell_started(1), *again).cells[1]
    call = ReplayedCell(cell, whole).recorded("h", 0)
    assert call is not None
    assert call.ended is not None
    assert call.ended.answer == "at last"
    assert cell.names == 2


async def whole(text: Text) -> str:
    await asyncio.sleep(0)
    return text_of(text)


async def test_a_call_that_is_not_in_the_record_is_refused_to_a_cell_that_ended() -> None:
    ended = ReplayedCell(read(*a_cell(1)).cells[1], whole)
    assert not ended.may_ask
    assert ended.recorded("other", 0) is None
    assert not ended.made_other_calls
    assert isinstance(ended.refusal(), RunCancelledError)
    assert bool(ended.made_other_calls)
    assert ReplayedCell(read(*a_cell(1)[:3]).cells[1], whole).may_ask


async def test_a_call_that_its_cell_never_heard_of_is_left_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that came back when the cell was over, one that the cell gave up."""
    late = (*a_cell(1)[:3], sub_started("1.1"), cell_ended(1), sub_ended("1.1"))
    hung_up = (
        *a_cell(1)[:3],
        sub_started("1.1"),
        sub_ended("1.1", "", RunCancelledError("hung up")),
        cell_ended(1),
    )
    monkeypatch.setattr(replayed_cell, "UNHEARD_WAIT_S", 0.1)
    for payloads in (late, hung_up):
        cell = ReplayedCell(read(*payloads).cells[1], whole)
        assert not cell.made_other_calls
        call = cell.recorded("h", 0)
        assert call is not None
        waiting = asyncio.ensure_future(cell.answer(call))
        await asyncio.sleep(0.02)
        assert not waiting.done()
        with pytest.raises(RunCancelledError):
            await waiting
        assert cell.made_other_calls


async def _answers(again: ReplayedCell, *hashes: str) -> list[str]:
    """Asks in this order; in which order the answers came."""
    came: list[str] = []

    async def ask(request_hash: str) -> None:
        call = again.recorded(request_hash, 0)
        assert call is not None
        came.append((await again.answer(call)).text)

    await asyncio.gather(*map(ask, hashes))
    return came


_THREE = (
    *a_cell(1)[:3],
    *(sub_started(f"1.{n}", name) for n, name in enumerate("abc", 1)),
    *(sub_ended(f"1.{n}", answer) for n, answer in ((3, "C"), (1, "A"), (2, "B"))),
    cell_ended(1),
)


async def test_answers_come_in_the_order_in_which_they_came() -> None:
    again = ReplayedCell(read(*_THREE).cells[1], whole)
    assert await _answers(again, "a", "b", "c") == ["C", "A", "B"]
    assert not again.made_other_calls


async def test_an_answer_that_is_not_asked_for_holds_the_others_up_for_a_moment_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replayed_cell, "ORDER_WAIT_S", 0.05)
    again = ReplayedCell(read(*_THREE).cells[1], whole)
    assert sorted(await _answers(again, "a", "b")) == ["A", "B"]
    assert again.made_other_calls


_RAISED: dict[type[OrchestratorError], OrchestratorError] = {
    BudgetExceededError: BudgetExceededError(
        "run tree", {"tokens": 1_234_567, "calls": 1}, {"tokens": 89, "calls": 0}
    ),
    ModelError: ModelError("overloaded", billing=Billing.NOTHING, retryable=True),
    ChildRunFailedError: ChildRunFailedError(
        "deadline", "the child run ended without an answer (deadline): late"
    ),
}


@pytest.mark.parametrize("kind", status.BY_ERROR, ids=lambda kind: str(kind.__name__))
def test_an_error_comes_again_as_it_was(kind: type[OrchestratorError]) -> None:
    error = _RAISED.get(kind) or kind("what went wrong")
    again = error_again(sub_ended("1.1", "", error))
    assert (type(again), str(again)) == (kind, str(error))
    if isinstance(error, BudgetExceededError) and isinstance(again, BudgetExceededError):
        assert (again.account, again.wanted, again.left) == (error.account, error.wanted, error.left)
    if isinstance(error, ChildRunFailedError) and isinstance(again, ChildRunFailedError):
        assert again.outcome == error.outcome


def test_an_error_that_was_none_of_ours_comes_again_as_our_failure() -> None:
    ended = replace(sub_ended("1.1"), error="the orchestrator failed", error_kind="KeyError")
    assert type(error_again(ended)) is errors.InvariantError


# --- Run trees ----------------------------------------------------------------------------------------------


def test_what_is_left_open_is_brought_to_its_end_once() -> None:
    held = CallHeld(call="1.1", attempt=1, model="m", input_bound_tokens=9, held=Amounts(tokens=50, calls=1))
    events = recorded(started(), *a_cell(1)[:3], sub_started("1.1"), held)
    ends = left_open(events)
    assert {run_id for run_id, _ in ends} == {ROOT}
    paid, lost = (payload for _, payload in ends)
    assert isinstance(paid, CallSettled)
    assert paid.unconfirmed == held.held
    assert isinstance(lost, SubCallEnded)
    assert lost.error == LOST
    closed = [*events, *recorded(paid, lost)]
    assert left_open(closed) == []
    past = read_run(recorded(*(event.payload for event in closed)), text_of)
    assert past.unconfirmed == held.held
    assert past.cells[1].calls["h", 0].ended is None


def test_a_run_has_used_what_all_below_it_have_used() -> None:
    grandchild = RunId("r" + "2" * 20)
    of_root = recorded(started(), settled("turn-1", Usage(input=5)))
    of_child = recorded(started(ROOT), settled("turn-1", Usage(input=7)), run_id=CHILD)
    of_grandchild = recorded(started(CHILD), settled("turn-1", Usage(input=11)), run_id=grandchild)
    past = TreePast(read_run(events, text_of) for events in (of_root, of_child, of_grandchild))
    assert past.used(ROOT) == (Amounts(tokens=23, calls=3, child_runs=2), Amounts())
    assert past.used(CHILD) == (Amounts(tokens=18, calls=2, child_runs=1), Amounts())
    assert past.used(grandchild) == (Amounts(tokens=11, calls=1), Amounts())
    assert past.run(RunId("another")) is None


def test_an_ended_run_has_its_answer() -> None:
    ended = RunEnded(outcome="answered", answer=Blob("he", 5, "0" * 64), error="", turns=1, duration_s=1.0)
    past = read_run(recorded(started(), ended), lambda text: "hello" if isinstance(text, Blob) else text)
    assert past.ended == ended
    assert past.answer == "hello"
