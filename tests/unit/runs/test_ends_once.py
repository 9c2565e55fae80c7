"""However answers, losses, errors and cancellations fall together, a run ends once: the first one wins."""

import asyncio
import shutil
import tempfile
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from orchestrator.cells import CellClock, CellOutcome, CellResult, SandboxLoss
from orchestrator.conversation import Reply
from orchestrator.errors import Billing, EngineError, ModelError
from orchestrator.models.port import ModelRequest
from orchestrator.runs import run as runs_module
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.run import run_to_end
from orchestrator.runs.tree import RunResult
from orchestrator.trajectory import CallSettled, RunEnded, RunStarted
from tests.fakes.leases import FakeLeases
from tests.fakes.model import FakeModel, runs, says
from tests.fakes.tree import ROOT, FakeTree

CELLS = {
    "ok": CellResult(outcome=CellOutcome.OK),
    "error": CellResult(outcome=CellOutcome.ERROR),
    "killed": CellResult(outcome=CellOutcome.KILLED),
    "answer": CellResult(outcome=CellOutcome.OK, answer="from a cell"),
    "answer of a killed cell": CellResult(outcome=CellOutcome.EXITED, answer="from a cell"),
    "lost": CellResult(outcome=CellOutcome.SANDBOX_LOST, loss=SandboxLoss.ENGINE_GONE),
}
BROKEN = ModelError("the provider broke", billing=Billing.UNKNOWN, retryable=False)


class OneRun(RuleBasedStateMachine):
    """A run whose model and cells do what the rules say, one step at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.directory = Path(tempfile.mkdtemp())
        self.waiting_for = ""
        self.expected: str | None = None
        """The outcome that is certain by now."""
        self.is_cancelled = False

    @initialize()
    def start(self) -> None:
        self.runner.run(self._start())

    async def _start(self) -> None:
        self.opened = AsyncExitStack()
        slots = await self.opened.enter_async_context(SandboxSlots(8).admit(2))
        self.leases = FakeLeases(self._cell)
        self.tree = FakeTree(self.directory, slots, FakeModel(otherwise=self._turn), leases=self.leases)
        self.task = asyncio.create_task(
            run_to_end(self.tree.tree, self.tree.spec(), lambda _sub_calls: lambda _server: None)
        )
        await self._settle()

    async def _turn(self, _request: ModelRequest) -> Reply:
        reply: Reply = await self._next("model")
        return reply

    async def _cell(self, _code: str, _clock: CellClock) -> CellResult:
        result: CellResult = await self._next("cell")
        return result

    async def _next(self, what: str) -> Any:
        self.waiting_for, self.answer = what, asyncio.get_running_loop().create_future()
        try:
            return await self.answer
        finally:
            self.waiting_for = ""

    async def _settle(self) -> None:
        """Until the run waits for a rule, or is over."""
        for _ in range(2_000):
            if self.task.done() or self.waiting_for:
                break
            await asyncio.sleep(0)

    async def _give(self, outcome: object) -> None:
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)
        self.waiting_for = ""
        await self._settle()

    # --- Rules ---------------------------------------------------------------------------------------------

    @precondition(lambda self: self.waiting_for == "model")
    @rule(reply=st.sampled_from(["cell", "text", "nothing", "broken"]))
    def the_model_replies(self, reply: str) -> None:
        replies = {"cell": runs("1"), "text": says("from the model"), "nothing": says(""), "broken": BROKEN}
        if reply == "text":
            self._expect("answered")
        if reply == "broken":
            self._expect("model_failed")
        self.runner.run(self._give(replies[reply]))

    @precondition(lambda self: self.waiting_for == "cell")
    @rule(kind=st.sampled_from(sorted(CELLS)), replaceable=st.booleans())
    def the_cell_ends(self, kind: str, replaceable: bool) -> None:
        if CELLS[kind].answer is not None:
            self._expect("answered")
        if kind == "lost" and (not replaceable or self.leases.opened == 2):
            self._expect("sandbox_lost")
        if not replaceable:
            self.leases.start.append(EngineError("there is no other"))
        self.runner.run(self._give(CELLS[kind]))
        self.leases.start.clear()

    @rule(reply=st.sampled_from(["", "text", "answer"]))
    def somebody_cancels(self, reply: str) -> None:
        """Maybe in the same moment in which an answer comes."""

        async def cancel() -> None:
            if reply and self.waiting_for and not self.answer.done():
                self.answer.set_result(
                    says("from the model") if self.waiting_for == "model" else CELLS["answer"]
                )
            self.task.cancel()
            await self._settle()

        if not self.task.done():
            self.is_cancelled = True
        self.runner.run(cancel())

    def _expect(self, outcome: str) -> None:
        if self.expected is None and not self.is_cancelled:
            self.expected = outcome

    # --- What always holds ---

    @invariant()
    def it_has_not_ended_twice(self) -> None:
        if not hasattr(self, "tree"):
            return
        kinds = [type(payload) for payload in self.tree.payloads(run_id=ROOT)]
        assert kinds.count(RunEnded) <= 1
        if RunEnded in kinds:
            assert set(kinds[kinds.index(RunEnded) + 1 :]) <= {CallSettled}
            assert self.leases.live == 0, "its sandbox is gone before it says so"

    def teardown(self) -> None:
        if hasattr(self, "tree"):
            self.runner.run(self._teardown())
        self.runner.close()
        shutil.rmtree(self.directory)

    async def _teardown(self) -> None:
        if not self.task.done():
            self.is_cancelled = True
            self.task.cancel()
        result = (await asyncio.gather(self.task, return_exceptions=True))[0]
        (ended,) = (one for one in self.tree.payloads(RunEnded, run_id=ROOT) if isinstance(one, RunEnded))
        assert len(self.tree.payloads(RunStarted, run_id=ROOT)) == 1
        if isinstance(result, RunResult):
            assert ended.outcome == result.outcome.value
        else:
            assert isinstance(result, asyncio.CancelledError)
            assert self.is_cancelled
        if self.expected is not None:
            assert ended.outcome == self.expected
        assert self.leases.live == 0
        self.tree.assert_books_are_closed()
        await self.opened.aclose()


@pytest.mark.case("F10")
def test_a_run_ends_once_whatever_comes_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runs_module, "DETACHED_GRACE_S", 0.0)
    run_state_machine_as_test(
        OneRun,
        settings=settings(
            max_examples=40,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
