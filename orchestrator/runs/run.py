"""Drives one run, root or child, from its question to its end.

The turn machine decides; this file carries out. Whatever ends the run, its sandbox is gone, its sub-calls are
over and settled, and its end is recorded before `run_to_end` returns or raises.
"""

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import asdict
from functools import partial

from orchestrator import prompts, turn
from orchestrator.cells import CellClock, CellOutcome, CellResult
from orchestrator.contexts.manifest import Shape
from orchestrator.conversation import Dialect
from orchestrator.errors import (
    BudgetExceededError,
    DeadlineExceededError,
    MachineError,
    ModelError,
    OrchestratorError,
    SandboxError,
)
from orchestrator.estimate import input_bound_tokens, request_bytes
from orchestrator.limits import (
    MAX_CALLS_IN_GUEST,
)
from orchestrator.reply import what_counts
from orchestrator.rpc.guest_server import AddServices
from orchestrator.runs import divergence, replay
from orchestrator.runs.model_calls import Wish
from orchestrator.runs.past import PastCell, RunPast
from orchestrator.runs.replayed_cell import ReplayedCell, WholeText
from orchestrator.runs.sub_calls import SubCalls
from orchestrator.runs.tree import Earlier, RunResult, RunSpec, RunTree, whole_text
from orchestrator.runs.turn_budget import kept_for_last_answer, turn_output
from orchestrator.sandbox.lease import LeasedSandbox
from orchestrator.shielding import run_shielded
from orchestrator.trajectory import (
    CellEnded,
    CellStarted,
    GuestMisbehaved,
    HistoryCompacted,
    ModelReplied,
    ReplayDiverged,
    RunEnded,
    RunResumed,
    RunStarted,
    SandboxLeased,
    TurnStarted,
)
from orchestrator.turn import Outcome

_log = logging.getLogger(__name__)

DETACHED_GRACE_S = 5.0
"""How long the end of a run waits for sub-calls that its last cell left at a provider."""

ServeBroker = Callable[[SubCalls], AddServices]
"""Makes the broker's gRPC service for one run. Handed in, because the broker stands above this floor."""


async def run_to_end(tree: RunTree, spec: RunSpec, serve_broker: ServeBroker) -> RunResult:
    """Run a question to its end, in a sandbox of its own; one that the tree's past knows, from where it was.

    Cancelling it ends the run as `cancelled`; the cancellation is then raised.

    Raises:
        MachineError: The machine lacks something; only before the first turn.
    """
    past = tree.past_of(spec.run_id)
    if past is not None and past.ended is not None:
        return result_of(past.ended, past.answer)
    return await _Run(tree, spec, serve_broker, past).to_end()


def result_of(ended: RunEnded, answer: str | None) -> RunResult:
    """How a run ended that nobody has to drive any more."""
    return RunResult(
        outcome=Outcome(ended.outcome), answer=answer, why=ended.error, found_so_far="", turns=ended.turns
    )


class _Run:
    def __init__(
        self, tree: RunTree, spec: RunSpec, serve_broker: ServeBroker, past: RunPast | None = None
    ) -> None:
        self._tree = tree
        self._past = past
        self._spec = spec
        self._serve_broker = serve_broker
        self._recorder = tree.recorder(spec.run_id)
        self._sub_calls = SubCalls(tree, spec, self._recorder, self._run_child)
        self._lease = AsyncExitStack()
        self._sandbox: LeasedSandbox | None = None
        self._turn = 0
        self._asked: Counter[int] = Counter()
        self._running: PastCell | None = None
        """The cell that was running at a restart, until it runs again."""
        self._note = ""
        """What the model is to be told behind that cell's report."""
        self._found_so_far = ""

    async def to_end(self) -> RunResult:
        started_s = time.monotonic() - (self._past.elapsed_s(time.time()) if self._past else 0.0)
        end = turn.End(Outcome.CANCELLED, None, "the run was cancelled")
        deadline = asyncio.timeout(self._tree.calls.left_s())
        try:
            await self._record_start()
            async with deadline, self._tree.slots.take(self._spec.depth):
                self._sub_calls.gate.on_shut = lambda: _pass_now(deadline)
                try:
                    end = await self._loop()
                finally:
                    await self._end_lease()
                    self._sub_calls.gate.on_shut = _nothing
        except MachineError as error:
            end = turn.End(Outcome.INTERNAL_ERROR, None, str(error))
            raise
        except Exception as error:
            # A deadline that passes while the sandbox of an answered run is removed takes nothing back.
            if end.outcome is Outcome.CANCELLED:
                end = self._broken(error, is_late=deadline.expired())
        finally:
            await run_shielded(self._finish(end, time.monotonic() - started_s))
        return RunResult(
            outcome=end.outcome,
            answer=end.answer,
            why=end.why,
            found_so_far="" if end.answer is not None else self._found_so_far,
            turns=self._turn,
        )

    def _broken(self, error: Exception, *, is_late: bool) -> turn.End:
        match error:
            case TimeoutError() if is_late and self._sub_calls.gate.conduct.verdict:
                return turn.End(Outcome.ABUSE, None, self._sub_calls.gate.conduct.verdict)
            case TimeoutError() if is_late:
                return turn.End(Outcome.DEADLINE, None, "the run's deadline passed")
            case SandboxError():
                return turn.End(Outcome.SANDBOX_LOST, None, str(error))
            case OrchestratorError():
                return turn.End(Outcome.INTERNAL_ERROR, None, str(error))
        # Whatever it is, it must not take the other runs of this process down or lose this one's record.
        _log.error("run %s failed", self._spec.run_id, exc_info=error)
        return turn.End(Outcome.INTERNAL_ERROR, None, "the orchestrator failed; its log has the details")

    async def _loop(self) -> turn.End:
        task = prompts.task(
            self._spec.question,
            depth=self._spec.depth,
            context_shape=_describe(self._spec.context.manifest.shape),
            levels_below=self._sub_calls.levels_below(),
            continues=bool(self._spec.after),
        )
        state, actions = turn.start(
            task,
            max_turns=self._tree.limits.max_turns,
            window_tokens=self._spec.model.card.window_tokens,
            dialect=self._tree.dialect,
        )
        if self._past is not None:
            state, actions = await self._take_up(self._past, state, actions)
        elif self._spec.after:
            state, actions = await self._continue(state, actions)
        else:
            await self._lease_sandbox()
        while True:
            for action in actions:
                if isinstance(action, turn.Compacted):
                    self._recorder.post(
                        HistoryCompacted(
                            turn=self._turn, reports=action.reports, freed_bytes=action.freed_bytes
                        )
                    )
            match actions[-1]:
                case turn.AskModel() as ask:
                    event = await self._ask_model(ask)
                case turn.RunCell() as cell:
                    event = await self._run_cell(cell)
                case turn.ReplaceSandbox():
                    event = await self._replace_sandbox()
                case turn.End() as end:
                    return end
                case turn.Compacted():
                    raise AssertionError("a compaction is never the last action")
            state, actions = turn.step(state, event)

    # --- The model ------------------------------------------------------------------------------------

    async def _ask_model(self, ask: turn.AskModel) -> turn.Event:
        self._turn = ask.turn
        self._asked[ask.turn] += 1
        system, python_tool = prompts.system(self._tree.dialect), self._tree.dialect is Dialect.TOOLS
        bound = input_bound_tokens(system, ask.conversation, python_tool=python_tool)
        sent_bytes = request_bytes(system, ask.conversation)
        self._recorder.post(TurnStarted(turn=ask.turn, request_bytes=sent_bytes))
        card, limits = self._spec.model.card, self._tree.limits
        output_tokens, least_output_tokens = turn_output(card, limits, is_last_answer=ask.last_answer)
        wish = Wish(
            call=self._call_name(ask.turn),
            model=self._spec.model,
            system=system,
            conversation=ask.conversation,
            python_tool=python_tool,
            stop_sequences=() if python_tool else (prompts.INVENTED_OUTPUT,),
            output_tokens=output_tokens,
            least_output_tokens=least_output_tokens,
            keep=None
            if ask.last_answer or self._spec.depth
            else kept_for_last_answer(card, limits, bound, output_tokens),
            last_answer=ask.last_answer and not self._spec.depth,
        )
        try:
            completion = await self._tree.calls.ask(wish, self._spec.account, self._recorder)
        except BudgetExceededError as error:
            return turn.BudgetShort(str(error))
        except DeadlineExceededError as error:
            return turn.Stopped(Outcome.DEADLINE, str(error))
        except ModelError as error:
            return turn.Stopped(Outcome.MODEL_FAILED, str(error))
        said = completion.reply
        self._found_so_far = what_counts(said, self._tree.dialect).text.strip() or self._found_so_far
        await self._recorder.record(
            ModelReplied(
                turn=ask.turn,
                content=self._recorder.text(
                    json.dumps([dict(block) for block in said.content], ensure_ascii=False)
                ),
                stop=said.stop.value,
            )
        )
        return turn.ModelReplied(said, completion.usage.total)

    def _call_name(self, number: int) -> str:
        """Unique in the run: a turn is asked for again when its first request came to nothing."""
        times = self._asked[number]
        return f"turn-{number}" if times == 1 else f"turn-{number}.{times}"

    # --- The sandbox ----------------------------------------------------------------------------------

    async def _lease_sandbox(self, hash_seed: int = 0) -> None:
        lease = self._tree.leases.open(
            lambda directory: self._tree.contexts.link_into(self._spec.context, directory),
            runtime=self._tree.runtime,
            guest_services=(self._serve_broker(self._sub_calls),),
            max_concurrent_calls=min(MAX_CALLS_IN_GUEST, self._tree.limits.max_concurrency),
            wanted_for_s=self._tree.calls.left_s(),
            hash_seed=hash_seed,
            tenant_id=self._tree.tenant_id,
        )
        sandbox = self._sandbox = await self._lease.enter_async_context(lease)
        self._recorder.post(
            SandboxLeased(
                sandbox_id=sandbox.sandbox_id,
                runtime=sandbox.runtime,
                image=sandbox.image,
                hash_seed=sandbox.hash_seed,
                wait_s=sandbox.wait_s,
            )
        )

    async def _end_lease(self) -> None:
        """End the sandbox. One that can't be removed now is left to the reaper; the run goes on."""
        ended, self._lease, self._sandbox = self._lease, AsyncExitStack(), None
        try:
            await run_shielded(ended.aclose())
        except (SandboxError, MachineError) as error:
            _log.error("a sandbox of run %s was not removed", self._spec.run_id, exc_info=error)

    async def _replace_sandbox(self) -> turn.Event:
        await self._end_lease()
        try:
            await self._lease_sandbox()
        except (SandboxError, MachineError) as error:
            return turn.Stopped(Outcome.SANDBOX_LOST, f"the sandbox was lost and not replaced: {error}")
        return turn.SandboxReplaced()

    async def _run_cell(self, cell: turn.RunCell) -> turn.Event:
        assert self._sandbox is not None, "a cell follows a lease"  # noqa: S101 - the loop's own order
        self._recorder.post(
            CellStarted(
                turn=self._turn,
                code=self._recorder.text(cell.code),
                invented_bytes=cell.invented_bytes,
            )
        )
        running, self._running = self._running, None
        again = ReplayedCell(running, partial(whole_text, self._tree.store)) if running else None
        clock = self._clock()
        with self._sub_calls.executing(self._turn, clock, again):
            result = await self._sandbox.run_cell(cell.code, clock)
        note, self._note = self._note, ""
        return await self._cell_ended(result, note)

    async def _cell_ended(self, result: CellResult, note: str = "") -> turn.Event:
        self._found_so_far = result.output.strip() or self._found_so_far
        await self._recorder.record(
            CellEnded(
                turn=self._turn,
                outcome=result.outcome.value,
                output=self._recorder.text(result.output),
                output_bytes=result.output_bytes,
                cut_bytes=result.cut_bytes,
                traceback=self._recorder.text(result.traceback),
                status=result.status,
                lost_variables=result.lost_variables,
                duration_s=result.duration_s,
                guest_s=result.guest_s,
                passed=result.passed.value if result.passed else "",
                used_up=tuple(used.resource.value for used in result.used_up),
                loss=result.loss.value if result.loss else "",
                used_up_limits={used.resource.value: used.limit for used in result.used_up if used.limit},
                answer=None if result.answer is None else self._recorder.text(result.answer),
            )
        )
        return turn.CellEnded(result, note)

    def _clock(self) -> CellClock:
        limits = self._tree.limits
        return CellClock(
            started_s=time.monotonic(),
            cell_timeout_s=limits.cell_timeout_s,
            cell_cpu_s=limits.cell_cpu_s,
            cell_ceiling_s=limits.cell_ceiling_s,
        )

    # --- After a restart ------------------------------------------------------------------------------

    async def _take_up(
        self, past: RunPast, state: turn.State, actions: tuple[turn.Action, ...]
    ) -> tuple[turn.State, tuple[turn.Action, ...]]:
        """Bring machine and namespace to where the record ends; what is to be done from there."""
        state, actions = replay.fast_forward(state, actions, past.steps)
        self._turn, self._asked, self._found_so_far = past.turn, past.asked, past.found_so_far
        running, wanted = past.running, actions[-1]
        if isinstance(wanted, turn.End | turn.ReplaceSandbox):
            return state, actions
        if running is not None and running.starts >= replay.STARTS_OF_A_CELL:
            return turn.step(state, await self._cell_ended(replay.given_up(running), running.note))
        note = await self._restore_namespace([*self._spec.after, Earlier(past, self._tree.store)])
        if isinstance(wanted, turn.RunCell):
            self._running, self._note = running, note or (running.note if running else "")
        elif note:
            return turn.step(state, turn.Noted(note))
        return state, actions

    async def _continue(
        self, state: turn.State, actions: tuple[turn.Action, ...]
    ) -> tuple[turn.State, tuple[turn.Action, ...]]:
        """Begin with the variables of the runs before."""
        note = await self._restore_namespace(self._spec.after)
        return turn.step(state, turn.Noted(note)) if note else (state, actions)

    async def _restore_namespace(self, earlier: Sequence[Earlier]) -> str:
        """Run again what the namespace is made of; what the model has to be told about it."""
        seeds = [one.past.hash_seed for one in earlier if one.past.hash_seed]
        await self._lease_sandbox(seeds[-1] if seeds else 0)
        whole = {one.past.run_id: partial(whole_text, one.store) for one in earlier}
        runs = replay.made_of([one.past for one in earlier])
        diverged: list[ReplayDiverged] = []
        interrupted = max(run.interrupted for run in runs)
        if interrupted:
            diverged.append(divergence.cannot_run_again(interrupted))
            await self._recorder.record(*diverged)
            return divergence.note_of(diverged)
        for cell, of_run in [(cell, run.run_id) for run in runs for cell in run.to_run_again]:
            difference = await self._run_again(cell, whole[of_run])
            if difference is not None:
                diverged.append(difference)
                await self._recorder.record(difference)
                if difference.namespace == divergence.Namespace.LOST:
                    break
        return divergence.note_of(diverged)

    async def _run_again(self, cell: PastCell, whole: WholeText) -> ReplayDiverged | None:
        assert self._sandbox is not None, "it was leased to restore the namespace"  # noqa: S101 - likewise
        clock, again = self._clock(), ReplayedCell(cell, whole)
        with self._sub_calls.executing(cell.turn, clock, again):
            result = await self._sandbox.run_cell(cell.code, clock)
        if result.outcome is CellOutcome.SANDBOX_LOST:
            await self._end_lease()
            await self._lease_sandbox()
        return replay.compare(cell, result, other_calls=again.made_other_calls)

    # --- Beginning and end ----------------------------------------------------------------------------

    async def _run_child(self, tree: RunTree, spec: RunSpec) -> RunResult:
        return await run_to_end(tree, spec, self._serve_broker)

    async def _record_start(self) -> None:
        spec, past = self._spec, self._past
        if past is not None:
            cells = 0 if past.interrupted else len(past.to_run_again)
            resumed = RunResumed(times=past.times + 1, turn=past.turn, cells=cells)
            await self._recorder.record(resumed)
            return
        await self._recorder.record(
            RunStarted(
                question=self._recorder.text(spec.question),
                context=_describe(spec.context.manifest.shape),
                model=spec.model.card.name,
                sub_model=self._tree.model("").card.name,
                depth=spec.depth,
                parent=spec.parent,
                parent_call=spec.parent_call,
                limits=asdict(self._tree.limits),
                dialect=self._tree.dialect.value,
            )
        )

    async def _finish(self, end: turn.End, duration_s: float) -> None:
        await self._sub_calls.aclose(DETACHED_GRACE_S if end.outcome is not Outcome.CANCELLED else 0.0)
        await self._record_misconduct()
        await self._recorder.record(
            RunEnded(
                outcome=end.outcome.value,
                answer=None if end.answer is None else self._recorder.text(end.answer),
                error=end.why,
                turns=self._turn,
                duration_s=duration_s,
            )
        )

    async def _record_misconduct(self) -> None:
        conduct, unrecorded = self._sub_calls.gate.conduct, self._sub_calls.unrecorded_refusals
        if conduct.remarkable or unrecorded:
            counts = {offence.value: count for offence, count in conduct.counts.items()}
            await self._recorder.record(GuestMisbehaved(counts=counts, unrecorded_refusals=unrecorded))


def _pass_now(deadline: asyncio.Timeout) -> None:
    """What ends a run from outside must end it the way its deadline does, which every await is made for."""
    if not deadline.expired():
        deadline.reschedule(asyncio.get_running_loop().time())


def _nothing() -> None:
    """What is left to do for a run whose sandbox is gone."""


def _describe(shape: Shape) -> str:
    return prompts.context_shape(
        is_files=shape.kind == "files",
        length_bytes=shape.length_bytes,
        chars=shape.chars,
        lines=shape.lines,
        files=shape.files,
        names=shape.names,
        replaced=shape.replaced,
    )
