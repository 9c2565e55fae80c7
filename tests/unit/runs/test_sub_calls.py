import asyncio
import time
from collections.abc import Awaitable
from typing import TypeVar

import pytest

from orchestrator.abuse import Offence
from orchestrator.budget import Amounts
from orchestrator.cells import CellClock
from orchestrator.conversation import Reply, StopReason, Told
from orchestrator.errors import (
    Billing,
    BudgetExceededError,
    CallIdReusedError,
    ChildRunFailedError,
    ContextInputError,
    DepthExceededError,
    InvalidRequestError,
    ModelError,
    ModelNotAllowedError,
    NotExecutingError,
    OrchestratorError,
    RunCancelledError,
)
from orchestrator.limits import MAX_INLINE_CONTEXT_BYTES, MAX_PROMPT_BYTES, RunLimits
from orchestrator.models import retry
from orchestrator.models.port import ModelRequest
from orchestrator.runs import asked_text, child_context
from orchestrator.runs import sub_calls as sub_calls_module
from orchestrator.runs.child_context import ContextChoice, InlineText, OwnFiles, OwnPaths, OwnRange, Uploaded
from orchestrator.runs.sub_calls import SubAnswer, SubCalls
from orchestrator.runs.tree import RunResult, RunSpec, RunTree
from orchestrator.trajectory import INLINE_BYTES, Blob, SubCallEnded, SubCallStarted
from orchestrator.turn import Outcome
from tests.fakes.model import FakeModel, after, says, when
from tests.fakes.tree import FakeTree
from tests.unit.runs.conftest import MakeTree

T = TypeVar("T")
TEXT = InlineText(b"some text")


class Children:
    """Plays child runs: each answers with its question unless told otherwise."""

    def __init__(self) -> None:
        self.specs: list[RunSpec] = []
        self.result = RunResult(outcome=Outcome.ANSWERED, answer="", why="", found_so_far="", turns=1)
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.begun = asyncio.Event()
        self.cancelled = 0

    async def __call__(self, tree: RunTree, spec: RunSpec) -> RunResult:
        self.specs.append(spec)
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return self.result


class Run:
    """A run whose cells make sub-calls."""

    def __init__(self, tree: FakeTree, *, depth: int = 0) -> None:
        self.tree = tree
        self.children = Children()
        self.spec = tree.spec(depth=depth)
        self.calls = SubCalls(tree.tree, self.spec, tree.recorder, self.children)

    def cell(self, turn: int = 1) -> "CellBlock":
        return CellBlock(self, turn)

    async def complete(
        self, call_id: str = "c1", prompt: bytes = b"hello", *, model: str = "", max_tokens: int | None = None
    ) -> SubAnswer:
        return await self.calls.complete(call_id, prompt, model_name=model, max_tokens=max_tokens)

    async def child(
        self,
        call_id: str = "c1",
        question: bytes = b"who?",
        context: ContextChoice = TEXT,
        max_tokens: int | None = None,
    ) -> SubAnswer:
        return await self.calls.child_run(call_id, question, context, max_tokens=max_tokens)

    def started(self) -> list[SubCallStarted]:
        return [one for one in self.tree.payloads(SubCallStarted) if isinstance(one, SubCallStarted)]

    def ended(self) -> list[SubCallEnded]:
        return [one for one in self.tree.payloads(SubCallEnded) if isinstance(one, SubCallEnded)]


class CellBlock:
    """One cell of a run, as a `with` block."""

    def __init__(self, run: Run, turn: int) -> None:
        self.clock = CellClock(
            started_s=time.monotonic(), cell_timeout_s=1e6, cell_cpu_s=1e6, cell_ceiling_s=1e6
        )
        self._executing = run.calls.executing(turn, self.clock)

    def __enter__(self) -> "CellBlock":
        self._executing.__enter__()
        return self

    def __exit__(self, *_error: object) -> None:
        self._executing.__exit__(None, None, None)


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(retry, "BASE_S", 0.001)


def begin(call: Awaitable[T]) -> "asyncio.Task[T]":
    return asyncio.ensure_future(call)


async def settle(steps: int = 30) -> None:
    for _ in range(steps):
        await asyncio.sleep(0)


def answering(reply: Reply = says("yes")) -> FakeModel:  # noqa: B008 - frozen
    return FakeModel(otherwise=reply)


# --- Completions ------------------------------------------------------------------------------------------


async def test_a_completion_is_answered_and_recorded(make_tree: MakeTree) -> None:
    run = Run(make_tree(answering()))
    with run.cell(turn=3):
        assert await run.complete(prompt=b"hello") == SubAnswer("yes")
    (started,), (ended,) = run.started(), run.ended()
    assert (started.call, started.turn, started.what, started.prompt) == ("3.1", 3, "complete", "hello")
    assert (ended.call, ended.answer, ended.error, ended.memoised) == ("3.1", "yes", "", False)


async def test_an_answer_that_was_cut_says_so(make_tree: MakeTree) -> None:
    run = Run(make_tree(answering(says("ye", StopReason.MAX_TOKENS))))
    with run.cell():
        assert (await run.complete()).truncated


async def test_a_sub_call_has_no_system_prompt_and_no_tool(make_tree: MakeTree) -> None:
    model = answering()
    run = Run(make_tree(model))
    with run.cell():
        await run.complete(max_tokens=77)
    (request,) = model.asked
    assert (request.system, request.python_tool, request.max_tokens) == ("", False, 77)


async def test_a_prompt_that_is_not_utf8_is_asked_with_replacement(make_tree: MakeTree) -> None:
    model = answering()
    run = Run(make_tree(model))
    with run.cell():
        await run.complete(prompt=b"a\xffb")
    assert [getattr(entry, "text", None) for entry in model.asked[0].conversation] == ["a\ufffdb"]


@pytest.mark.parametrize(
    ("claimed", "cached_chars"), [(0, 0), (2, 1), (3, 2), (5, 2), (6, 3), (2**32 - 1, 4)]
)
async def test_a_shared_beginning_is_whole_characters_and_no_more_than_the_prompt(
    make_tree: MakeTree, claimed: int, cached_chars: int
) -> None:
    model = answering()
    run = Run(make_tree(model))
    with run.cell():
        await run.calls.complete(
            "c1", "aä€x".encode(), model_name="", max_tokens=None, shared_prefix_bytes=claimed
        )
    assert model.asked[0].conversation == (Told("aä€x", cached_chars),)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"prompt": b""}, InvalidRequestError),
        ({"prompt": b"x" * (MAX_PROMPT_BYTES + 1)}, InvalidRequestError),
        ({"max_tokens": 0}, InvalidRequestError),
        ({"max_tokens": -1}, InvalidRequestError),
        ({"max_tokens": 32_001}, InvalidRequestError),
        ({"model": "another"}, ModelNotAllowedError),
        ({"call_id": ""}, InvalidRequestError),
        ({"call_id": "", "prompt": b"x" * 5_000}, InvalidRequestError),
        ({"call_id": "x" * 65}, InvalidRequestError),
        ({"call_id": "ä" * 33}, InvalidRequestError),
    ],
)
async def test_a_completion_that_makes_no_sense_is_refused_unasked_and_leaves_no_trace(
    make_tree: MakeTree, wrong: dict[str, object], error: type[OrchestratorError]
) -> None:
    model = FakeModel()
    run = Run(make_tree(model))
    with run.cell():
        with pytest.raises(error):
            await run.complete(**wrong)  # type: ignore[arg-type]
        assert not run.calls._recorder._blobs, "a refused prompt must not pile up in memory"
    assert run.tree.seen == []


async def test_a_refusal_is_recorded_with_its_kind(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel(), limits=RunLimits(max_tokens=100)))
    with run.cell(), pytest.raises(BudgetExceededError):
        await run.complete()
    (ended,) = run.ended()
    assert ended.error_kind == "BudgetExceededError"
    assert "too low" in ended.error


async def test_many_completions_keep_their_answers_apart(make_tree: MakeTree) -> None:
    async def echo(request: ModelRequest) -> Reply:
        prompt = str(getattr(request.conversation[0], "text", ""))
        return await after(len(prompt), says(prompt))(request)

    run = Run(make_tree(FakeModel(otherwise=echo)))
    with run.cell() as cell:
        answers = await asyncio.gather(*(run.complete(f"c{n}", b"x" * (30 - n)) for n in range(30)))
        assert not cell.clock.waiting
    assert [answer.text for answer in answers] == ["x" * (30 - n) for n in range(30)]
    assert len({one.call for one in run.started()}) == 30


# --- Whose cell -------------------------------------------------------------------------------------------


async def test_between_cells_nothing_is_served(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel()))
    for _ in range(2):
        with pytest.raises(NotExecutingError):
            await run.complete()
        with pytest.raises(NotExecutingError):
            await run.child()
        with pytest.raises(NotExecutingError):
            run.calls.require_executing()
        with run.cell():
            run.calls.require_executing()


async def test_the_cell_clock_waits_while_a_call_is_in_flight_and_no_longer(make_tree: MakeTree) -> None:
    gate = asyncio.Event()
    run = Run(make_tree(FakeModel(when(gate, says("yes")))))
    with run.cell() as cell:
        call = begin(run.complete())
        await settle()
        assert [cell.clock.waiting] == [True]
        gate.set()
        await call
        assert [cell.clock.waiting] == [False]


async def test_a_call_at_its_provider_outlives_its_cell_and_is_paid(make_tree: MakeTree) -> None:
    gate = asyncio.Event()
    run = Run(make_tree(FakeModel(when(gate, says("yes")))))
    with run.cell():
        call = begin(run.complete())
        await settle()
    gate.set()
    await call
    await run.calls.aclose(grace_s=10)
    (settled,) = run.tree.settlements()
    assert settled.confirmed.calls == 1
    assert run.ended()[0].answer == "yes"


async def test_a_call_at_its_provider_when_the_run_ends_has_a_grace_and_is_then_charged(
    make_tree: MakeTree,
) -> None:
    run = Run(make_tree(FakeModel(when(asyncio.Event(), says("never")))))
    with run.cell():
        call = begin(run.complete())
        await settle()
    await run.calls.aclose(grace_s=0.01)
    with pytest.raises(RunCancelledError):
        await call
    (settled,) = run.tree.settlements()
    assert settled.unconfirmed.calls == 1
    assert run.ended()[0].error_kind == "RunCancelledError"


async def test_calls_that_wait_are_dropped_with_their_cell_and_cost_nothing(make_tree: MakeTree) -> None:
    gate = asyncio.Event()
    model = FakeModel(when(gate, says("yes")))
    run = Run(make_tree(model, limits=RunLimits(max_concurrency=1)))
    with run.cell():
        first = begin(run.complete("c1"))
        await settle()
        waiting = [begin(run.complete(f"w{n}")) for n in range(5)]
        await settle()
    for call in waiting:
        with pytest.raises(RunCancelledError):
            await call
    gate.set()
    assert (await first).text == "yes"
    assert len(model.asked) == 1
    await run.calls.aclose(grace_s=1)
    assert len(run.started()) == len(run.ended()) == 6


async def test_a_call_whose_attempt_fails_after_its_cell_has_ended_is_not_tried_again(
    make_tree: MakeTree,
) -> None:
    gate = asyncio.Event()

    async def fail(_request: ModelRequest) -> Reply:
        await gate.wait()
        raise ModelError("overloaded", billing=Billing.NOTHING, retryable=True)

    model = FakeModel(fail)
    run = Run(make_tree(model))
    with run.cell():
        call = begin(run.complete())
        await settle()
    gate.set()
    with pytest.raises(RunCancelledError):
        await call
    await run.calls.aclose(grace_s=10)
    assert len(model.asked) == 1


async def test_a_call_that_waits_to_be_tried_again_is_dropped_with_its_cell(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retry, "BASE_S", 1_000.0)
    monkeypatch.setattr(retry, "CAP_S", 1_000.0)
    model = FakeModel(ModelError("overloaded", billing=Billing.NOTHING, retryable=True, retry_after_s=30.0))
    run = Run(make_tree(model))
    with run.cell():
        call = begin(run.complete())
        await settle()
    async with asyncio.timeout(5):
        with pytest.raises(RunCancelledError):
            await call


@pytest.mark.parametrize("steps", range(30))
async def test_a_cell_that_ends_at_any_point_leaves_every_call_recorded_and_paid(
    make_tree: MakeTree, steps: int
) -> None:
    model = FakeModel(otherwise=after(3, says("yes")))
    run = Run(make_tree(model, limits=RunLimits(max_concurrency=2)))
    with run.cell():
        calls = [begin(run.complete(f"c{n}")) for n in range(4)] + [begin(run.child("child"))]
        await settle(steps)
    await asyncio.gather(*calls, return_exceptions=True)
    await run.calls.aclose(grace_s=5)
    assert sorted(one.call for one in run.started()) == sorted(one.call for one in run.ended())
    assert sum(usage.total for usage in model.served) <= run.tree.account.used().tokens
    run.tree.contexts.release(run.spec.context)
    assert not run.tree.contexts._live


# --- One id, one call -------------------------------------------------------------------------------------


async def test_a_repeated_transmission_gets_the_first_ones_answer_and_is_not_paid(
    make_tree: MakeTree,
) -> None:
    model = FakeModel(after(5, says("yes")))
    run = Run(make_tree(model))
    with run.cell():
        first, second = await asyncio.gather(run.complete("c1"), run.complete("c1"))
        third = await run.complete("c1")
    assert first == second == third
    assert len(model.asked) == len(run.started()) == 1


async def test_an_id_used_for_another_request_is_refused(make_tree: MakeTree) -> None:
    run = Run(make_tree(answering()))
    with run.cell():
        await run.complete("c1")
        for other in (
            run.complete("c1", b"other" * 1_000),
            run.complete("c1", max_tokens=9),
            run.child("c1"),
        ):
            with pytest.raises(CallIdReusedError):
                await other
        assert not run.calls._recorder._blobs


async def test_a_later_cell_may_use_the_same_ids(make_tree: MakeTree) -> None:
    """A replaced sandbox counts from 1 again."""
    run = Run(make_tree(answering()))
    for turn in (1, 2):
        with run.cell(turn):
            await run.complete("c1", f"prompt {turn}".encode())
    assert [one.call for one in run.started()] == ["1.1", "2.1"]


async def test_identical_requests_are_told_apart_by_their_order(make_tree: MakeTree) -> None:
    run = Run(make_tree(answering()))
    with run.cell():
        for call_id in ("c1", "c2"):
            await run.complete(call_id)
        await run.complete("c3", b"other")
    assert [one.occurrence for one in run.started()] == [0, 1, 0]


async def test_a_caller_that_hangs_up_ends_a_call_that_waits(make_tree: MakeTree) -> None:
    model = FakeModel(when(asyncio.Event(), says("never")))
    run = Run(make_tree(model, limits=RunLimits(max_concurrency=1)))
    with run.cell() as cell:
        begun = [begin(run.complete(f"c{n}")) for n in range(2)]
        await settle()
        begun[1].cancel()
        await settle()
        assert len(run.ended()) == 1
        assert [cell.clock.waiting] == [True]
    await run.calls.aclose(grace_s=0)
    await asyncio.gather(*begun, return_exceptions=True)


async def test_a_caller_that_hangs_up_does_not_take_its_repetition_along(make_tree: MakeTree) -> None:
    """A repetition is sent exactly when the first transmission broke."""
    gate = asyncio.Event()
    busy = FakeModel(when(gate, says("first")), says("yes"))
    run = Run(make_tree(busy, limits=RunLimits(max_concurrency=1)))
    with run.cell():
        other = begin(run.complete("other"))
        await settle()
        first = begin(run.complete("c1"))
        await settle()
        repeated = begin(run.complete("c1"))
        await settle()
        first.cancel()
        await settle()
        gate.set()
        assert (await repeated).text == "yes"
        await other


# --- Child runs -------------------------------------------------------------------------------------------


async def test_a_child_run_is_one_level_deeper_and_pays_from_its_parents_account(
    make_tree: MakeTree,
) -> None:
    run = Run(make_tree(FakeModel()))
    run.children.result = RunResult(outcome=Outcome.ANSWERED, answer="me", why="", found_so_far="", turns=1)
    with run.cell(turn=2):
        assert await run.child(question=b"who?") == SubAnswer("me")
    (spec,) = run.children.specs
    assert (spec.question, spec.depth, spec.parent, spec.parent_call) == ("who?", 1, run.spec.run_id, "2.1")
    assert spec.account is run.spec.account
    assert run.tree.account.confirmed == Amounts(child_runs=1)


async def test_a_child_with_a_smaller_limit_has_an_account_below_its_parents(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel()))
    with run.cell():
        await run.child(max_tokens=500)
    (spec,) = run.children.specs
    assert spec.account.path == (*run.spec.account.path, spec.account)
    assert spec.account.limit.tokens == 500


async def test_a_child_run_that_cannot_be_paid_does_not_start(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel(), limits=RunLimits(max_child_runs=1)))
    with run.cell():
        await run.child("c1")
        with pytest.raises(BudgetExceededError, match="child_runs"):
            await run.child("c2")
    assert len(run.children.specs) == 1


async def test_at_the_depth_limit_there_are_no_child_runs(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel(), limits=RunLimits(max_depth=2)), depth=2)
    assert run.calls.levels_below() == 0
    with run.cell(), pytest.raises(DepthExceededError, match="depth 2"):
        await run.child()
    assert run.tree.account.confirmed.child_runs == 0


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"question": b" \n"}, InvalidRequestError),
        ({"max_tokens": 0}, InvalidRequestError),
        ({"context": InlineText(b"")}, ContextInputError),
        ({"context": InlineText(b"x" * (MAX_INLINE_CONTEXT_BYTES + 1))}, InvalidRequestError),
        ({"context": OwnRange("", 5, 1_000)}, ContextInputError),
        ({"context": OwnRange("", 5, 4)}, ContextInputError),
        ({"context": OwnRange("", 5, 5)}, InvalidRequestError),
        ({"context": OwnRange("no such", 0, 1)}, ContextInputError),
        ({"context": OwnPaths(())}, InvalidRequestError),
        ({"context": OwnPaths(("a",))}, ContextInputError),
        ({"context": OwnFiles(())}, InvalidRequestError),
        ({"context": OwnFiles(((0, 1),))}, ContextInputError),
        ({"context": Uploaded("u1")}, InvalidRequestError),
        ({"call_id": ""}, InvalidRequestError),
    ],
)
async def test_a_child_run_that_makes_no_sense_does_not_start(
    make_tree: MakeTree, wrong: dict[str, object], error: type[OrchestratorError]
) -> None:
    run = Run(make_tree(FakeModel()))
    with run.cell(), pytest.raises(error):
        await run.child(**wrong)  # type: ignore[arg-type]
    assert run.children.specs == []


async def test_a_child_sees_the_part_of_its_parents_context_that_was_named(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel()))
    with run.cell():
        await run.child(context=OwnRange("", 4, 9))
    (spec,) = run.children.specs
    (entry,) = spec.context.manifest.entries
    assert spec.context.files.blob.read_bytes()[entry.offset : entry.offset + entry.length_bytes] == b"whole"


async def test_what_was_uploaded_can_be_a_childs_context_until_the_run_ends(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel()))
    with run.cell():
        async with run.calls.contexts.uploading() as upload:
            upload.write(b"uploaded")
            upload_id = await run.calls.contexts.finish_upload(upload)
        await run.child(context=Uploaded(upload_id))
    assert run.children.specs[0].context.manifest.text_bytes == 8
    await run.calls.aclose(grace_s=0)
    run.tree.contexts.release(run.spec.context)
    assert not run.tree.contexts._live


async def test_uploads_side_by_side_cannot_jointly_pass_what_a_run_may_upload(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(child_context, "MAX_UPLOAD_BYTES", 10)
    run = Run(make_tree(FakeModel()))

    async def upload(data: bytes) -> str:
        async with run.calls.contexts.uploading() as part:
            part.write(data[:3])
            await settle()
            part.write(data[3:])
            return await run.calls.contexts.finish_upload(part)

    results = await asyncio.gather(*(upload(b"x" * 6) for _ in range(2)), return_exceptions=True)
    assert [type(result) for result in results] == [str, BudgetExceededError]
    await run.calls.aclose(grace_s=0)


@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome.BUDGET_EXHAUSTED, True),
        (Outcome.TURN_LIMIT, True),
        (Outcome.MODEL_FAILED, True),
        (Outcome.SANDBOX_LOST, False),
        (Outcome.INTERNAL_ERROR, False),
    ],
)
async def test_a_child_without_an_answer_is_a_failure_that_names_no_path_of_ours(
    make_tree: MakeTree, outcome: Outcome, told: bool
) -> None:
    run = Run(make_tree(FakeModel()))
    why = "could not listen on /var/lib/rlm"
    run.children.result = RunResult(outcome=outcome, answer=None, why=why, found_so_far="", turns=1)
    with run.cell(), pytest.raises(ChildRunFailedError) as raised:
        await run.child()
    assert raised.value.outcome == outcome.value
    assert outcome.value in str(raised.value)
    assert (why in str(raised.value)) is told


async def test_child_runs_are_cancelled_with_their_cell(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel()))
    run.children.go_on.clear()
    with run.cell():
        call = begin(run.child())
        async with asyncio.timeout(5):
            await run.children.begun.wait()
    with pytest.raises(RunCancelledError):
        await call
    assert run.children.cancelled == 1


async def test_the_same_question_of_the_same_cell_has_the_same_id_in_a_replay(make_tree: MakeTree) -> None:
    ids = []
    for _ in range(2):
        run = Run(make_tree(FakeModel()))
        with run.cell():
            await run.child("c1")
            await run.child("c2")
        ids.append([spec.run_id for spec in run.children.specs])
    assert ids[0] == ids[1]
    assert len(set(ids[0])) == 2


# --- What is left -----------------------------------------------------------------------------------------


async def test_what_is_left_is_the_least_of_the_path_without_what_is_held_or_kept(
    make_tree: MakeTree,
) -> None:
    gate = asyncio.Event()
    run = Run(make_tree(FakeModel(when(gate, says("yes"))), limits=RunLimits(max_calls=10)))
    assert run.calls.left().calls == 10
    run.tree.account.kept = Amounts(tokens=1_000)
    assert run.calls.left().tokens == run.tree.account.limit.tokens - 1_000
    with run.cell():
        call = begin(run.complete())
        await settle()
        assert run.calls.left().calls == 9
        gate.set()
        await call


# --- Asked once -------------------------------------------------------------------------------------------


async def test_identical_calls_are_asked_once_when_that_is_wished(make_tree: MakeTree) -> None:
    model = FakeModel(after(5, says("yes")))
    run = Run(make_tree(model, memoise=True))
    with run.cell():
        answers = await asyncio.gather(*(run.complete(f"c{n}") for n in range(5)))
    assert [answer.memoised for answer in answers] == [False, True, True, True, True]
    assert len(model.asked) == 1


@pytest.mark.parametrize("steps", range(25))
async def test_identical_calls_whose_cell_ends_at_any_point_ask_nothing_afterwards(
    make_tree: MakeTree, steps: int
) -> None:
    model = FakeModel(otherwise=after(5, says("yes")))
    run = Run(make_tree(model, memoise=True, limits=RunLimits(max_concurrency=1)))
    with run.cell():
        blocker = begin(run.complete("other", b"other"))
        calls = [begin(run.complete(f"c{n}")) for n in range(3)]
        await settle(steps)
        asked = len(model.asked)
    await asyncio.gather(blocker, *calls, return_exceptions=True)
    assert len(model.asked) == asked
    await run.calls.aclose(grace_s=1)


# --- What costs nothing -----------------------------------------------------------------------------------

POOR = RunLimits(max_tokens=100)


async def test_of_a_refused_call_the_record_keeps_head_size_and_hash_and_nothing_else_is_kept(
    make_tree: MakeTree,
) -> None:
    run = Run(make_tree(FakeModel(), limits=POOR))
    prompt = b"x" * 2_000_000
    with run.cell():
        for number in range(3):
            with pytest.raises(BudgetExceededError):
                await run.complete(f"c{number}", prompt)
        await settle()
        assert run.calls._executing().calls == {}, "a traceback would hold on to the prompt"
    assert not run.calls._recorder._blobs
    for started in run.started():
        assert isinstance(started.prompt, Blob)
        assert len(started.prompt.head) == INLINE_BYTES
        assert started.prompt.length_bytes == len(prompt)
        assert await run.tree.store.blob(started.prompt.sha256) is None
    assert [one.error_kind for one in run.ended()] == ["BudgetExceededError"] * 3


async def test_of_an_answered_call_the_record_keeps_the_whole_prompt(make_tree: MakeTree) -> None:
    run = Run(make_tree(answering()))
    prompt = "ä€".encode() * 200_000
    with run.cell():
        await run.complete(prompt=prompt)
    (started,) = run.started()
    assert isinstance(started.prompt, Blob)
    assert await run.tree.store.blob(started.prompt.sha256) == prompt


async def test_a_call_that_its_provider_refused_unbilled_keeps_no_prompt_and_one_that_may_be_billed_does(
    make_tree: MakeTree,
) -> None:
    free = ModelError("bad request", billing=Billing.NOTHING, retryable=False)
    dear = ModelError("broken", billing=Billing.UNKNOWN, retryable=False)
    run = Run(make_tree(FakeModel(free, dear)))
    with run.cell():
        for number in range(2):
            with pytest.raises(ModelError):
                await run.complete(f"c{number}", b"%d" % number + b"x" * 10_000)
    kept = [
        await run.tree.store.blob(started.prompt.sha256) is not None
        for started in run.started()
        if isinstance(started.prompt, Blob)
    ]
    assert kept == [False, True]


async def test_a_refused_call_that_is_repeated_is_decided_anew(make_tree: MakeTree) -> None:
    model = answering()
    run = Run(make_tree(model, limits=RunLimits(max_calls=1)))
    with run.cell():
        await run.complete("c1")
        for _ in range(2):
            with pytest.raises(BudgetExceededError):
                await run.complete("c2", b"another")
    assert len(model.asked) == 1
    assert len({one.call for one in run.started()}) == 3


async def test_after_many_refusals_further_ones_are_counted_and_not_recorded(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sub_calls_module, "RECORDED_REFUSALS", 5)
    run = Run(make_tree(answering(), limits=RunLimits(max_tokens=5_000, max_child_runs=0)))
    with run.cell():
        for number in range(10):
            with pytest.raises(BudgetExceededError, match="too low"):
                await run.complete(f"c{number}", b"x" * 10_000)
            with pytest.raises(BudgetExceededError, match="too low"):
                await run.child(f"d{number}")
        # What can still be paid for is served and recorded as ever.
        assert (await run.complete("small")).text == "yes"
    assert len(run.started()) == len(run.ended()) == 5 + 1
    assert run.calls.unrecorded_refusals == 15


async def test_a_refusal_counts_and_a_guest_that_hangs_up_before_it_cost_anything_does_too(
    make_tree: MakeTree,
) -> None:
    run = Run(make_tree(FakeModel(when(asyncio.Event(), says("never"))), limits=RunLimits(max_concurrency=1)))
    with run.cell():
        paid = begin(run.complete("c1"))
        await settle()
        waiting = [begin(run.complete(f"w{n}")) for n in range(5)]
        await settle()
        for call in (paid, *waiting):
            call.cancel()
        await asyncio.gather(paid, *waiting, return_exceptions=True)
        await run.calls.refused()
    assert run.calls.gate.conduct.counts == {Offence.HUNG_UP: 5, Offence.REFUSED: 1}
    await run.calls.aclose(grace_s=0.01)


async def test_an_answer_is_free_once_more_and_so_it_is_paced(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(make_tree(answering()))
    waits: list[bool] = []
    with run.cell() as cell:
        await run.complete()

        async def pace() -> None:
            waits.append(cell.clock.waiting)

        monkeypatch.setattr(run.calls.gate, "pace", pace)
        assert await run.complete() == SubAnswer("yes")
        await run.calls.pace()
        assert not cell.clock.waiting
    assert waits == [True, True], "the cell's clock stands still meanwhile"


async def test_a_prompt_that_replacing_makes_longer_than_allowed_is_refused(make_tree: MakeTree) -> None:
    run = Run(make_tree(FakeModel()))
    with run.cell(), pytest.raises(InvalidRequestError, match="as UTF-8"):
        await run.complete(prompt=b"\xff" * (MAX_PROMPT_BYTES // 2))
    assert run.tree.seen == []


async def test_a_long_prompt_is_read_as_a_short_one_is_wherever_it_is_cut(
    make_tree: MakeTree, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = "a€\U0001f600".encode() * 20_000 + b"\xe2\x82"
    monkeypatch.setattr(asked_text, "_READ_AT_ONCE_BYTES", 1_001)
    model = answering()
    run = Run(make_tree(model))
    with run.cell():
        await run.complete(prompt=prompt)
    assert model.asked[0].conversation == (Told(prompt.decode("utf-8", "replace"), 0),)


async def test_a_call_whose_long_prompt_was_read_when_its_cell_had_ended_is_not_begun(
    make_tree: MakeTree,
) -> None:
    model = FakeModel()
    run = Run(make_tree(model))
    with run.cell():
        call = begin(run.complete(prompt=b"x" * 2_000_000))
        await asyncio.sleep(0)
    with pytest.raises(RunCancelledError):
        await call
    assert (model.asked, run.tree.seen) == ([], [])
