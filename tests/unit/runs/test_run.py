import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest

from orchestrator import prompts
from orchestrator.abuse import LIMITS, Offence
from orchestrator.cells import CellClock, CellOutcome, CellResult
from orchestrator.conversation import Dialect, Reply, StopReason, Told
from orchestrator.errors import (
    Billing,
    ChildRunFailedError,
    EngineError,
    InvariantError,
    ModelError,
    SandboxStartError,
)
from orchestrator.limits import RunLimits
from orchestrator.models import retry
from orchestrator.models.port import ModelRequest
from orchestrator.runs import run as runs_module
from orchestrator.runs.child_context import InlineText
from orchestrator.runs.run import run_to_end
from orchestrator.runs.sub_calls import SubCalls
from orchestrator.runs.tree import RunResult
from orchestrator.trajectory import (
    CallSettled,
    CellEnded,
    GuestMisbehaved,
    HistoryCompacted,
    ModelReplied,
    RunEnded,
    RunStarted,
    SandboxLeased,
    TurnStarted,
)
from orchestrator.turn import Outcome
from tests.fakes.leases import FakeLeases, FakeSandbox, PlayCell, answers, prints
from tests.fakes.model import FakeModel, after, runs, says, when
from tests.fakes.tree import ROOT, FakeTree
from tests.unit.runs.conftest import MakeTree

BROKEN = ModelError("the provider broke", billing=Billing.UNKNOWN, retryable=False)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE_S", 0.001)
    monkeypatch.setattr(runs_module, "DETACHED_GRACE_S", 0.2)


class Guests:
    """Collects the broker of each run, so that cells can make sub-calls without a wire."""

    def __init__(self) -> None:
        self.sub_calls: list[SubCalls] = []

    def serve(self, sub_calls: SubCalls) -> Callable[[Any], None]:
        self.sub_calls.append(sub_calls)
        return lambda _server: None


async def run(tree: FakeTree, guests: Guests | None = None, *, depth: int = 0) -> RunResult:
    spec = tree.spec(depth=depth)
    try:
        async with asyncio.timeout(30):
            return await run_to_end(tree.tree, spec, (guests or Guests()).serve)
    finally:
        assert_recorded_to_its_end(tree)


def ended(tree: FakeTree) -> RunEnded:
    (over,) = [one for one in tree.payloads(RunEnded, run_id=ROOT) if isinstance(one, RunEnded)]
    return over


def assert_recorded_to_its_end(tree: FakeTree) -> None:
    """One beginning, one end, and nothing after it but late settlements."""
    kinds = [type(payload) for payload in tree.payloads(run_id=ROOT)]
    assert kinds[0] is RunStarted
    assert kinds.count(RunStarted) == kinds.count(RunEnded) == 1
    assert set(kinds[kinds.index(RunEnded) + 1 :]) <= {CallSettled}


def told(request: ModelRequest) -> list[str]:
    return [entry.text for entry in request.conversation if isinstance(entry, Told)]


# --- Outcomes ---------------------------------------------------------------------------------------------


async def test_a_text_is_an_answer(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(says("me")))
    result = await run(tree)
    assert (result.outcome, result.answer, result.why, result.found_so_far, result.turns) == (
        Outcome.ANSWERED,
        "me",
        "",
        "",
        1,
    )
    assert (ended(tree).outcome, ended(tree).answer, ended(tree).error) == ("answered", "me", "")


async def test_a_cell_answers(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(runs("FINAL(1)")), leases=FakeLeases(answers))
    assert (await run(tree)).answer == "FINAL(1)"


async def test_the_record_of_a_run_tells_its_course(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(runs("1 + 1"), says("2")))
    await run(tree)
    assert [event.kind for event in tree.seen] == [
        *("run_started", "sandbox_leased"),
        *("turn_started", "call_held", "call_settled", "model_replied", "cell_started", "cell_ended"),
        *("turn_started", "call_held", "call_settled", "model_replied"),
        "run_ended",
    ]
    assert [event.seq for event in tree.seen] == list(range(len(tree.seen)))


async def test_the_model_is_told_the_shape_of_the_context_and_never_the_context(make_tree: MakeTree) -> None:
    model = FakeModel(says("me"))
    await run(make_tree(model))
    (task,) = told(model.asked[0])
    assert "one text: 18 characters, 1 lines, 18 bytes" in task
    assert "whole context" not in str(model.asked)
    assert model.asked[0].system == prompts.system(Dialect.TOOLS)


async def test_a_run_that_cannot_pay_its_turn_gives_its_last_answer(make_tree: MakeTree) -> None:
    async def expensive(request: ModelRequest) -> Reply:
        if prompts.BUDGET_USED_UP in told(request):
            return says("the best I can")
        return runs(f"cell {len(model.asked)}" + "x" * 3_000)

    model = FakeModel(otherwise=expensive)
    tree = make_tree(model, limits=RunLimits(max_tokens=30_000, max_turns=100))
    result = await run(tree)
    assert (result.outcome, result.answer) == (Outcome.ANSWERED, "the best I can")
    assert told(model.asked[-1])[-1] == prompts.BUDGET_USED_UP
    assert tree.account.used().tokens <= 30_000


async def test_the_last_answer_is_paid_from_what_was_kept_although_cells_ate_the_rest(
    make_tree: MakeTree,
) -> None:
    guests = Guests()

    async def eat_everything(_code: str, _clock: CellClock) -> CellResult:
        spent = 0
        while True:
            try:
                await guests.sub_calls[0].complete(f"c{spent}", b"x" * 1_000, model_name="", max_tokens=None)
            except Exception:
                return CellResult(outcome=CellOutcome.OK, output_head=f"{spent} calls")
            spent += 1

    async def play(request: ModelRequest) -> Reply:
        if not request.python_tool:
            return says("x")
        return says("done") if prompts.BUDGET_USED_UP in told(request) else runs("eat")

    model = FakeModel(otherwise=play)
    tree = make_tree(
        model, leases=FakeLeases(eat_everything), limits=RunLimits(max_tokens=40_000, max_turns=500)
    )
    assert (await run(tree, guests)).answer == "done"


async def test_a_budget_too_small_for_any_answer_is_budget_exhausted(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(), limits=RunLimits(max_tokens=1_000))
    result = await run(tree)
    assert (result.outcome, result.answer) == (Outcome.BUDGET_EXHAUSTED, None)
    assert "the budget of the run tree is too low" in result.why


async def test_no_answer_within_its_turns_is_turn_limit_with_what_was_found(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(runs("print('a')"), runs("print('b')")), limits=RunLimits(max_turns=2))
    result = await run(tree)
    assert (result.outcome, result.answer, result.turns) == (Outcome.TURN_LIMIT, None, 2)
    assert result.found_so_far == "print('b')"


async def test_a_model_that_fails_is_model_failed(make_tree: MakeTree) -> None:
    result = await run(make_tree(FakeModel(BROKEN)))
    assert (result.outcome, result.why) == (Outcome.MODEL_FAILED, "the provider broke")


@pytest.mark.parametrize("deadline_s", [-1.0, 0.1])
async def test_a_run_past_its_deadline_is_deadline(make_tree: MakeTree, deadline_s: float) -> None:
    model = FakeModel(when(asyncio.Event(), says("never")))
    result = await run(make_tree(model, limits=RunLimits(deadline_s=deadline_s)))
    assert (result.outcome, result.answer) == (Outcome.DEADLINE, None)


async def test_a_cell_at_the_deadline_ends_with_its_run(make_tree: MakeTree) -> None:
    async def for_ever(_code: str, _clock: CellClock) -> CellResult:
        await asyncio.Event().wait()
        raise AssertionError

    tree = make_tree(
        FakeModel(runs("while True: pass")), leases=FakeLeases(for_ever), limits=RunLimits(deadline_s=0.2)
    )
    assert (await run(tree)).outcome is Outcome.DEADLINE


async def test_a_time_out_that_is_not_the_deadlines_is_our_bug(
    make_tree: MakeTree, caplog: pytest.LogCaptureFixture
) -> None:
    async def slow(_code: str, _clock: CellClock) -> CellResult:
        raise TimeoutError

    with caplog.at_level(logging.CRITICAL):
        result = await run(make_tree(FakeModel(runs("1")), leases=FakeLeases(slow)))
    assert result.outcome is Outcome.INTERNAL_ERROR


async def test_a_cancelled_run_is_recorded_as_such_and_the_cancellation_raised(make_tree: MakeTree) -> None:
    begun = asyncio.Event()

    async def hang(_request: ModelRequest) -> Reply:
        begun.set()
        await asyncio.Event().wait()
        raise AssertionError

    tree = make_tree(FakeModel(hang))
    task = asyncio.create_task(run(tree))
    await begun.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert ended(tree).outcome == "cancelled"
    assert tree.account.unconfirmed.calls == 1


@pytest.mark.case("F10")
@pytest.mark.parametrize("steps", [*range(60), 80, 120])
async def test_a_run_cancelled_at_any_point_is_recorded_paid_and_gone(
    make_tree: MakeTree, steps: int
) -> None:
    tree = make_tree(FakeModel(after(2, runs("1")), after(2, says("2"))))
    task = asyncio.create_task(run_to_end(tree.tree, tree.spec(), Guests().serve))
    for _ in range(steps):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    if steps:
        assert_recorded_to_its_end(tree)
        assert (ended(tree).outcome == "cancelled") is (task.cancelled() and ended(tree).answer is None)
    assert tree.leases.live == 0


async def test_something_of_ours_that_breaks_is_internal_error_and_its_words_stay_in_the_log(
    make_tree: MakeTree, caplog: pytest.LogCaptureFixture
) -> None:
    async def bug(_code: str, _clock: CellClock) -> CellResult:
        raise ZeroDivisionError("secret")

    tree = make_tree(FakeModel(runs("1")), leases=FakeLeases(bug))
    result = await run(tree)
    assert result.outcome is Outcome.INTERNAL_ERROR
    assert "secret" not in result.why
    assert "ZeroDivisionError: secret" in caplog.text


async def test_a_broken_invariant_is_internal_error(make_tree: MakeTree) -> None:
    async def bug(_code: str, _clock: CellClock) -> CellResult:
        raise InvariantError("it cannot be")

    result = await run(make_tree(FakeModel(runs("1")), leases=FakeLeases(bug)))
    assert (result.outcome, result.why) == (Outcome.INTERNAL_ERROR, "it cannot be")


# --- Sandboxes --------------------------------------------------------------------------------------------


def losing(times: int) -> PlayCell:
    """Cells that lose their sandbox, so many times; then one that prints."""
    left = [CellResult(outcome=CellOutcome.SANDBOX_LOST)] * times

    async def play(code: str, clock: CellClock) -> CellResult:
        return left.pop() if left else await prints(code, clock)

    return play


async def test_a_lost_sandbox_is_replaced_once(make_tree: MakeTree) -> None:
    model = FakeModel(runs("1"), runs("2"), says("done"))
    tree = make_tree(model, leases=FakeLeases(losing(1)))
    assert (await run(tree)).answer == "done"
    assert tree.leases.opened == len(tree.payloads(SandboxLeased)) == 2


async def test_a_second_lost_sandbox_ends_the_run(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(runs("1"), runs("2")), leases=FakeLeases(losing(2)))
    assert (await run(tree)).outcome is Outcome.SANDBOX_LOST


async def test_a_sandbox_that_does_not_start_is_sandbox_lost(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(), leases=FakeLeases(prints, start=[SandboxStartError("no")]))
    result = await run(tree)
    assert (result.outcome, result.why) == (Outcome.SANDBOX_LOST, "no")


async def test_an_engine_that_lacks_something_is_raised_and_recorded(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(), leases=FakeLeases(prints, start=[EngineError("no engine")]))
    with pytest.raises(EngineError):
        await run(tree)
    assert (ended(tree).outcome, ended(tree).error) == ("internal_error", "no engine")


async def test_an_engine_that_fails_in_the_middle_ends_the_run_and_not_the_process(
    make_tree: MakeTree,
) -> None:
    leases = FakeLeases(losing(1))
    tree = make_tree(FakeModel(_then(leases, runs("1"))), leases=leases)
    assert (await run(tree)).outcome is Outcome.SANDBOX_LOST


def _then(leases: FakeLeases, reply: Reply) -> Callable[[ModelRequest], Awaitable[Reply]]:
    async def step(_request: ModelRequest) -> Reply:
        leases.start.append(EngineError("gone"))
        return reply

    return step


@pytest.mark.parametrize("error", [EngineError("stuck"), SandboxStartError("stuck")])
async def test_an_answer_is_not_lost_because_its_sandbox_could_not_be_removed(
    make_tree: MakeTree, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    tree = make_tree(FakeModel(says("me")), leases=FakeLeases(prints, end=[error]))
    assert (await run(tree)).answer == "me"
    assert "was not removed" in caplog.text


async def test_an_answer_just_before_the_deadline_counts_although_removing_its_sandbox_takes_longer(
    make_tree: MakeTree,
) -> None:
    tree = make_tree(FakeModel(says("me")), limits=RunLimits(deadline_s=0.3))
    plain = tree.leases.open

    def slow_end(*args: Any, **more: Any) -> Any:
        lease = plain(*args, **more)
        leave = lease.__aexit__

        class Slow:
            async def __aenter__(self) -> Any:
                return await lease.__aenter__()

            async def __aexit__(self, *error: Any) -> Any:
                await asyncio.sleep(0.5)
                return await leave(*error)

        return Slow()

    tree.leases.open = slow_end  # type: ignore[method-assign]
    assert (await run(tree)).answer == "me"
    assert ended(tree).outcome == "answered"


# --- Children ---------------------------------------------------------------------------------------------


async def test_a_child_run_of_a_cell_has_its_own_record_and_sandbox(make_tree: MakeTree) -> None:
    guests = Guests()

    async def ask_child(code: str, clock: CellClock) -> CellResult:
        if "child" not in code:
            return await prints(code, clock)
        part = InlineText(b"part")
        answer = await guests.sub_calls[0].child_run("c1", b"which?", part, max_tokens=None)
        return CellResult(outcome=CellOutcome.OK, answer=answer.text)

    async def play(request: ModelRequest) -> Reply:
        return says("the child's") if "which?" in told(request)[0] else runs("child")

    tree = make_tree(FakeModel(otherwise=play), leases=FakeLeases(ask_child))
    assert (await run(tree, guests)).answer == "the child's"
    starts = [one for one in tree.payloads(RunStarted) if isinstance(one, RunStarted)]
    assert [(one.depth, one.parent, one.parent_call) for one in starts] == [(0, None, ""), (1, ROOT, "1.1")]
    assert tree.leases.opened == 2
    assert tree.account.confirmed.child_runs == 1


async def test_a_call_left_at_its_provider_is_settled_before_the_run_ends(make_tree: MakeTree) -> None:
    guests = Guests()
    calls: list[asyncio.Task[Any]] = []

    async def leave_one(_code: str, _clock: CellClock) -> CellResult:
        calls.append(
            asyncio.ensure_future(
                guests.sub_calls[0].complete("c1", b"hello", model_name="", max_tokens=None)
            )
        )
        for _ in range(30):
            await asyncio.sleep(0)
        return CellResult(outcome=CellOutcome.OK, answer="done")

    async def play(request: ModelRequest) -> Reply:
        return runs("leave") if request.python_tool else await after(50, says("late"))(request)

    tree = make_tree(FakeModel(otherwise=play), leases=FakeLeases(leave_one))
    assert (await run(tree, guests)).answer == "done"
    assert tree.account.confirmed.calls == 2
    await asyncio.gather(*calls, return_exceptions=True)


# --- The conversation -------------------------------------------------------------------------------------


async def test_a_long_reply_and_output_are_stored_whole_beside_their_events(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(runs("x" * 10_000), says("y" * 10_000)))
    await run(tree)
    (cell,) = [one for one in tree.payloads(CellEnded) if isinstance(one, CellEnded)]
    assert not isinstance(cell.output, str)
    assert await tree.store.blob(cell.output.sha256) == b"x" * 10_000
    last = [one for one in tree.payloads(ModelReplied) if isinstance(one, ModelReplied)][-1]
    assert not isinstance(last.content, str)
    assert await tree.store.blob(last.content.sha256) is not None


async def test_a_compaction_is_recorded(make_tree: MakeTree) -> None:
    cells = [runs(f"{number}" + "x" * 3_000) for number in range(4)]
    full = Reply((), StopReason.WINDOW_FULL)
    tree = make_tree(FakeModel(*cells, full, says("done")))
    assert (await run(tree)).answer == "done"
    (compacted,) = [one for one in tree.payloads(HistoryCompacted) if isinstance(one, HistoryCompacted)]
    assert compacted.reports == 2
    assert compacted.freed_bytes > 5_000
    calls = [settled.call for settled in tree.settlements()]
    assert calls == ["turn-1", "turn-2", "turn-3", "turn-4", "turn-5", "turn-5.2"]


async def test_turns_are_numbered_from_1(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(runs("1"), runs("2"), says("3")))
    assert (await run(tree)).turns == 3
    assert [one.turn for one in tree.payloads(TurnStarted) if isinstance(one, TurnStarted)] == [1, 2, 3]


# --- A guest that floods its socket -----------------------------------------------------------------------


def flood(guests: Guests, offence: Offence) -> None:
    """What the gate does when a guest goes too far."""
    for _ in range(LIMITS[offence] + 1):
        guests.sub_calls[-1].gate.blame(offence)


async def test_a_run_whose_guest_floods_its_socket_is_ended_at_once_and_says_why(make_tree: MakeTree) -> None:
    guests = Guests()

    async def floods(_code: str, _clock: CellClock) -> CellResult:
        flood(guests, Offence.MALFORMED)
        await asyncio.Event().wait()
        raise AssertionError

    tree = make_tree(FakeModel(runs("1")), leases=FakeLeases(floods))
    result = await run(tree, guests)
    assert result.outcome is Outcome.ABUSE
    assert "more than 100 malformed messages" in result.why
    assert (ended(tree).outcome, ended(tree).error) == ("abuse", result.why)
    (misbehaved,) = [one for one in tree.payloads(GuestMisbehaved) if isinstance(one, GuestMisbehaved)]
    assert misbehaved.counts == {"malformed messages": 101}


async def test_a_flood_between_cells_ends_the_run_while_its_model_thinks_and_what_it_may_cost_is_charged(
    make_tree: MakeTree,
) -> None:
    guests = Guests()

    async def thinks(_request: ModelRequest) -> Reply:
        flood(guests, Offence.REFUSED)
        await asyncio.Event().wait()
        raise AssertionError

    tree = make_tree(FakeModel(runs("1"), thinks), leases=FakeLeases(prints))
    assert (await run(tree, guests)).outcome is Outcome.ABUSE
    assert tree.settlements()[-1].unconfirmed.calls == 1


async def test_a_child_run_that_floods_takes_no_other_run_with_it(make_tree: MakeTree) -> None:
    guests = Guests()

    async def play(code: str, _clock: CellClock) -> CellResult:
        if code == "flood":
            flood(guests, Offence.UNKNOWN_METHOD)
            await asyncio.Event().wait()
        with pytest.raises(ChildRunFailedError, match=r"abuse.*unknown methods"):
            await guests.sub_calls[0].child_run("c1", b"who?", InlineText(b"text"), max_tokens=None)
        return CellResult(outcome=CellOutcome.OK, answer="still here")

    tree = make_tree(FakeModel(runs("ask"), runs("flood")), leases=FakeLeases(play))
    assert (await run(tree, guests)).answer == "still here"


async def test_an_answer_is_not_taken_back_by_a_flood_that_comes_after_it(make_tree: MakeTree) -> None:
    guests = Guests()

    class Late(FakeLeases):
        @asynccontextmanager
        async def open(self, *given: Any, **more: Any) -> AsyncIterator[FakeSandbox]:
            async with super().open(*given, **more) as sandbox:
                yield sandbox
                flood(guests, Offence.MALFORMED)
                await asyncio.sleep(0)

    tree = make_tree(FakeModel(runs("FINAL(1)")), leases=Late(answers))
    assert (await run(tree, guests)).answer == "FINAL(1)"
    # Much later, when nothing is left that could be ended.
    for _ in range(LIMITS[Offence.TURNED_AWAY] + 1):
        guests.sub_calls[0].gate.blame(Offence.TURNED_AWAY)


async def test_what_is_ordinary_is_not_recorded_as_misbehaviour(make_tree: MakeTree) -> None:
    guests = Guests()

    async def is_refused(_code: str, _clock: CellClock) -> CellResult:
        await guests.sub_calls[0].refused()
        return CellResult(outcome=CellOutcome.OK, answer="done")

    tree = make_tree(FakeModel(runs("1")), leases=FakeLeases(is_refused))
    assert (await run(tree, guests)).answer == "done"
    assert tree.payloads(GuestMisbehaved) == []
