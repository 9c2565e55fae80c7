"""A run that goes on from its record: what is leased, run again, recorded and told."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from orchestrator import prompts
from orchestrator.cells import CellClock, CellOutcome, CellResult
from orchestrator.conversation import ToolReport
from orchestrator.errors import SandboxStartError
from orchestrator.ids import LOCAL_TENANT
from orchestrator.runs.resuming import take_up
from orchestrator.runs.run import run_to_end
from orchestrator.runs.tree import RunResult
from orchestrator.trajectory import (
    CellEnded,
    CellStarted,
    ModelReplied,
    Payload,
    ReplayDiverged,
    RunEnded,
    RunResumed,
    SandboxLeased,
    TurnStarted,
)
from orchestrator.turn import Outcome
from tests.fakes.leases import FakeLeases
from tests.fakes.model import FakeModel, runs, says
from tests.fakes.tree import ROOT, FakeTree
from tests.unit.runs.conftest import MakeTree
from tests.unit.runs.test_replay import OK, a_cell, leased, outcome, recorded, replied, started


class Cells:
    """Plays every cell as told, by its code; one that was not told prints what the record says."""

    def __init__(self, **results: CellResult) -> None:
        self.results = {code.replace("_", " "): result for code, result in results.items()}
        self.ran: list[str] = []

    async def play(self, code: str, _clock: CellClock) -> CellResult:
        self.ran.append(code)
        return self.results.get(code, OK)


async def resume(tree: FakeTree, *payloads: Payload) -> RunResult:
    """Go on with a run that has recorded this."""
    await tree.store.append(ROOT, 0, recorded(started(), *payloads))
    past = await take_up(ROOT, tenant_id=LOCAL_TENANT, store=tree.store)
    tree.tree = replace(tree.tree, past=past)
    spec = tree.spec()
    try:
        async with asyncio.timeout(30):
            return await run_to_end(tree.tree, spec, lambda _calls: lambda _server: None)
    finally:
        tree.contexts.release(spec.context)


def told(model: FakeModel) -> Sequence[str]:
    return [getattr(entry, "text", "") for entry in model.asked[-1].conversation]


async def test_a_run_goes_on_where_its_record_ends(make_tree: MakeTree) -> None:
    cells, model = Cells(), FakeModel(says("done"))
    tree = make_tree(model, leases=FakeLeases(cells.play))
    result = await resume(tree, leased(77), *a_cell(1), *a_cell(2))
    assert (result.outcome, result.answer, result.turns) == (Outcome.ANSWERED, "done", 3)
    assert cells.ran == ["cell 1", "cell 2"]
    resumed, lease, asked, *_ = tree.payloads(RunResumed, SandboxLeased, TurnStarted, CellStarted)
    assert resumed == RunResumed(times=1, turn=2, cells=2)
    assert isinstance(lease, SandboxLeased)
    assert isinstance(asked, TurnStarted)
    assert tree.leases.seeds == [77]
    assert [event.seq for event in tree.seen] == list(range(10, 10 + len(tree.seen)))


async def test_what_the_model_is_told_again_is_what_was_recorded(make_tree: MakeTree) -> None:
    """Whatever the cell prints this time."""
    cells, model = Cells(cell_1=replace(OK, output_head="other")), FakeModel(says("done"))
    await resume(make_tree(model, leases=FakeLeases(cells.play)), leased(), *a_cell(1))
    (report,) = [entry for entry in model.asked[0].conversation if isinstance(entry, ToolReport)]
    assert report.text == "out"


async def test_a_run_whose_answer_was_recorded_needs_neither_model_nor_sandbox(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(), leases=FakeLeases(Cells().play))
    result = await resume(tree, leased(), *a_cell(1), *a_cell(2, replace(OK, answer="there it is")))
    assert (result.outcome, result.answer) == (Outcome.ANSWERED, "there it is")
    assert tree.leases.opened == 0
    (ended,) = tree.payloads(RunEnded)
    assert isinstance(ended, RunEnded)
    assert ended.answer == "there it is"


async def test_an_interrupted_cell_loses_the_namespace_and_the_model_is_told(make_tree: MakeTree) -> None:
    cells, model = Cells(), FakeModel(runs("next"), says("done"))
    tree = make_tree(model, leases=FakeLeases(cells.play))
    await resume(tree, leased(), *a_cell(1), *a_cell(2, outcome(CellOutcome.INTERRUPTED)), *a_cell(3))
    assert cells.ran == ["next"]
    assert told(model).count(prompts.NAMESPACE_LOST_AT_RESTART) == 1
    assert [getattr(entry, "text", "") for entry in model.asked[0].conversation][-1] == (
        prompts.NAMESPACE_LOST_AT_RESTART
    )
    (diverged,) = tree.payloads(ReplayDiverged)
    assert isinstance(diverged, ReplayDiverged)
    assert (diverged.turn, diverged.namespace) == (2, "lost")


async def test_a_cell_that_was_running_is_told_behind_its_report_what_happened(make_tree: MakeTree) -> None:
    cells, model = Cells(cell_1=outcome(CellOutcome.ERROR)), FakeModel(says("done"))
    tree = make_tree(model, leases=FakeLeases(cells.play))
    await resume(tree, leased(), *a_cell(1), *a_cell(2)[:3])
    assert cells.ran == ["cell 1", "cell 2"]
    assert told(model)[-2:] == ["out", prompts.NAMESPACE_UNCERTAIN]


async def test_a_reply_whose_cell_had_not_begun_has_it_run(make_tree: MakeTree) -> None:
    cells, model = Cells(), FakeModel(says("done"))
    await resume(make_tree(model, leases=FakeLeases(cells.play)), leased(), *a_cell(1), *a_cell(2)[:2])
    assert cells.ran == ["cell 1", "cell 2"]


async def test_cells_that_lose_the_namespace_this_time_end_its_restoring(make_tree: MakeTree) -> None:
    cells, model = Cells(cell_2=outcome(CellOutcome.KILLED)), FakeModel(says("done"))
    tree = make_tree(model, leases=FakeLeases(cells.play))
    await resume(tree, leased(), *a_cell(1), *a_cell(2), *a_cell(3))
    assert cells.ran == ["cell 1", "cell 2"]
    assert told(model)[-1] == prompts.NAMESPACE_LOST_IN_REPLAY
    assert tree.leases.opened == 1


async def test_a_sandbox_that_is_lost_meanwhile_is_replaced(make_tree: MakeTree) -> None:
    cells = Cells(cell_1=CellResult(outcome=CellOutcome.SANDBOX_LOST))
    model = FakeModel(runs("next"), says("done"))
    tree = make_tree(model, leases=FakeLeases(cells.play))
    result = await resume(tree, leased(), *a_cell(1))
    assert result.answer == "done"
    assert cells.ran == ["cell 1", "next"]
    assert tree.leases.opened == 2
    assert tree.leases.live == 0
    assert prompts.NAMESPACE_LOST_IN_REPLAY in told(model)


async def test_a_sandbox_that_was_lost_at_the_restart_is_replaced_and_nothing_is_run_again(
    make_tree: MakeTree,
) -> None:
    cells, model = Cells(), FakeModel(says("done"))
    tree = make_tree(model, leases=FakeLeases(cells.play))
    await resume(tree, leased(7), *a_cell(1), *a_cell(2, outcome(CellOutcome.SANDBOX_LOST)))
    assert cells.ran == []
    assert tree.leases.seeds == [0]
    assert "has been replaced" in told(model)[-1]


async def test_a_turn_that_was_under_way_has_another_name_the_next_time(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(says("done")), leases=FakeLeases(Cells().play))
    await resume(tree, leased(), TurnStarted(turn=1, request_bytes=1))
    (settled,) = tree.settlements()
    assert settled.call == "turn-1.2"


async def test_a_run_that_gets_no_sandbox_ends_as_that(make_tree: MakeTree) -> None:
    leases = FakeLeases(Cells().play, start=[SandboxStartError("no room")])
    tree = make_tree(FakeModel(), leases=leases)
    result = await resume(tree, leased(), *a_cell(1))
    assert (result.outcome, result.found_so_far) == (Outcome.SANDBOX_LOST, "out")
    (ended,) = tree.payloads(RunEnded)
    assert isinstance(ended, RunEnded)
    assert ended.turns == 1


async def test_a_record_that_does_not_fit_ends_the_run_as_our_failure(make_tree: MakeTree) -> None:
    tree = make_tree(FakeModel(), leases=FakeLeases(Cells().play))
    result = await resume(tree, leased(), *a_cell(1), *a_cell(3))
    assert result.outcome is Outcome.INTERNAL_ERROR
    assert "do not fit" in result.why


async def test_a_resumed_run_can_be_resumed(make_tree: MakeTree) -> None:
    """The record of a restart, with a divergence that the model was told, and a cell after it."""
    cells, model = Cells(), FakeModel(says("done"))
    tree = make_tree(model, leases=FakeLeases(cells.play))
    diverged = ReplayDiverged(turn=1, why="it did", namespace="uncertain")
    again = (RunResumed(times=1, turn=1, cells=1), leased(), diverged)
    await resume(tree, leased(), *a_cell(1), *again, *a_cell(2))
    assert cells.ran == ["cell 1", "cell 2"]
    assert told(model).count(prompts.NAMESPACE_UNCERTAIN) == 1
    (resumed,) = tree.payloads(RunResumed)
    assert isinstance(resumed, RunResumed)
    assert resumed.times == 2
    assert not tree.payloads(CellEnded, CellStarted)
    assert len(tree.payloads(ModelReplied)) == 1
    assert replied(3, says("done")) in tree.payloads(ModelReplied)
