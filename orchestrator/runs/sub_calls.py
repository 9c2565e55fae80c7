"""What a run's cells may ask for: completions, child runs, and what is left.

A sub-call belongs to the cell that made it. When that cell ends, in whatever way, its child runs are
cancelled, calls that wait for a slot or for budget are dropped, and calls already at a provider finish
detached and are settled. Between cells every call is refused.

What costs a guest nothing must not cost us much: of a call that was never paid for nothing is kept but one
entry in the record, without the whole prompt, and after many not even that.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol, TypeVar

from orchestrator.abuse import Offence
from orchestrator.budget import UNLIMITED, Account, Amounts, Ask
from orchestrator.cells import CellClock
from orchestrator.conversation import StopReason, Told
from orchestrator.errors import (
    Billing,
    BudgetExceededError,
    CallIdReusedError,
    ChildRunFailedError,
    DepthExceededError,
    InvalidRequestError,
    ModelError,
    NotExecutingError,
    OrchestratorError,
    RunCancelledError,
)
from orchestrator.ids import RunId, child_run_id
from orchestrator.limits import (
    DEFAULT_SUB_CALL_MAX_TOKENS,
    INLINE_WORK_BYTES,
    LEAST_SUB_CALL_MAX_TOKENS,
    MAX_CALL_ID_BYTES,
    MAX_PROMPT_BYTES,
    RECORDED_REFUSALS,
)
from orchestrator.models.port import Completion
from orchestrator.rpc.gate import Gate
from orchestrator.runs.asked_text import AskedText, read_text, request_head
from orchestrator.runs.child_context import ChildContexts, ContextChoice, InlineText, OwnFiles, OwnPaths
from orchestrator.runs.model_calls import Wish
from orchestrator.runs.past import PastCall
from orchestrator.runs.recorder import Recorder
from orchestrator.runs.replayed_cell import ReplayedCell
from orchestrator.runs.tree import RunResult, RunSpec, RunTree
from orchestrator.shielding import run_shielded
from orchestrator.trajectory import Blob, SubCallEnded, SubCallStarted
from orchestrator.turn import Outcome

_T = TypeVar("_T")

_FILE_RUN_BYTES = 16
"""Two numbers."""

_ONE_CHILD_RUN = Amounts(child_runs=1)


@dataclass(frozen=True, slots=True)
class SubAnswer:
    """The answer to a sub-call."""

    text: str
    truncated: bool = False
    memoised: bool = False


_TELLABLE = {
    Outcome.BUDGET_EXHAUSTED,
    Outcome.TURN_LIMIT,
    Outcome.DEADLINE,
    Outcome.MODEL_FAILED,
    Outcome.ABUSE,
}
"""Ends of a child run whose reason its parent's cell is told."""


class RunChild(Protocol):
    """Drives a child run to its end."""

    def __call__(self, tree: RunTree, spec: RunSpec) -> Coroutine[object, object, RunResult]:
        """See `run.run_to_end`."""
        ...


@dataclass(slots=True, eq=False)
class _Call:
    """One sub-call under way or answered."""

    started: SubCallStarted
    whole: bytes | None
    """Of its text, when that is too long for an event."""
    task: asyncio.Task[SubAnswer] = field(init=False)
    callers: int = 0
    """Who waits for it: more than one after a repeated transmission."""
    dispatched: bool = False
    """At a provider: it may cost money, so it is not cancelled with its cell."""
    paid: bool = False
    """It has cost something, or may have."""
    abandoned: bool = False
    """Nobody waits for it any more: what is at a provider finishes, nothing else is begun."""

    def abandon(self) -> None:
        """Its cell has ended, or its last caller hung up."""
        self.abandoned = True
        if not self.dispatched:
            self.task.cancel()

    def on_dispatch(self) -> None:
        """An attempt goes out."""
        self.dispatched = self.paid = True

    def on_retry(self) -> None:
        """An attempt failed, and another would follow."""
        self.dispatched = False
        if self.abandoned:
            self.task.cancel()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Request:
    """What is to be done under a call id."""

    what: str
    model: str
    asked: AskedText
    work: Callable[[_Call], Awaitable[SubAnswer]]
    refusal: Callable[[], BudgetExceededError | None]
    """Whether its run could ever pay for it, before anything is begun."""


@dataclass(slots=True)
class _Cell:
    """The cell that is executing."""

    turn: int
    clock: CellClock
    again: ReplayedCell | None = None
    """Set when it is run again after a restart."""
    calls: dict[str, _Call] = field(default_factory=dict)
    """By the id the guest chose. It is unique within the cell at best, so it names nothing in the record. One
    that cost nothing is forgotten when it is over: a repeat is decided anew."""
    named: int = 0
    occurrences: Counter[str] = field(default_factory=Counter)

    def next_name(self) -> str:
        """What the next sub-call is called in the run's events."""
        self.named += 1
        taken = 0 if self.again is None else self.again.names
        return f"{self.turn}.{taken + self.named}"


class SubCalls:
    """The sub-calls of one run. The broker is only its shell; who is calling is fixed by construction."""

    def __init__(self, tree: RunTree, spec: RunSpec, recorder: Recorder, run_child: RunChild) -> None:
        self.contexts = ChildContexts(tree.contexts, tree.tenant_id, spec.context)
        self.gate = Gate()
        """Of the run's socket: bounds and counts what comes in."""
        self.unrecorded_refusals = 0
        self._tree = tree
        self._spec = spec
        self._recorder = recorder
        self._run_child = run_child
        self._cell: _Cell | None = None
        self._tasks: set[asyncio.Task[SubAnswer]] = set()
        self._recorded_refusals = 0
        self._reading = asyncio.Lock()

    @contextmanager
    def executing(self, turn: int, clock: CellClock, again: ReplayedCell | None = None) -> Iterator[None]:
        """Sub-calls are served for the length of the block, and belong to this cell.

        Those of one that is run `again` are answered from its record, as far as they are in it.
        """
        cell = self._cell = _Cell(turn, clock, again)
        try:
            yield
        finally:
            self._cell = None
            for call in cell.calls.values():
                call.abandon()

    async def aclose(self, grace_s: float) -> None:
        """Let calls at a provider finish for a while, then cancel them; all are settled when this returns."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=grace_s)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.contexts.close()

    async def complete(
        self,
        call_id: str,
        prompt: bytes,
        *,
        model_name: str,
        max_tokens: int | None,
        shared_prefix_bytes: int = 0,
    ) -> SubAnswer:
        """One completion. What it raises is listed in broker.proto."""
        cell = self._executing()
        if not prompt:
            raise InvalidRequestError("the prompt is empty")
        if len(prompt) > MAX_PROMPT_BYTES:
            raise InvalidRequestError(
                f"the prompt has {len(prompt):,} bytes; {MAX_PROMPT_BYTES:,} are allowed"
            )
        model = self._tree.model(model_name)
        if max_tokens is not None and not 1 <= max_tokens <= model.card.max_output_tokens:
            raise InvalidRequestError(f"max_tokens must be from 1 to {model.card.max_output_tokens:,}")
        head = request_head("complete", model.card.name, max_tokens)
        asked = await self._read(len(prompt), partial(read_text, prompt, head))
        cached_chars = len(prompt[:shared_prefix_bytes].decode("utf-8", "ignore"))
        wish = partial(
            Wish,
            model=model,
            system="",
            conversation=(Told(asked.text, cached_chars),),
            python_tool=False,
            output_tokens=max_tokens or DEFAULT_SUB_CALL_MAX_TOKENS,
            least_output_tokens=max_tokens or LEAST_SUB_CALL_MAX_TOKENS,
        )

        async def work(call: _Call) -> SubAnswer:
            completion, memoised = await self._ask(call, wish(call=call.started.call))
            truncated = completion.reply.stop is StopReason.MAX_TOKENS
            return SubAnswer(completion.reply.text, truncated, memoised)

        def refusal() -> BudgetExceededError | None:
            return self._tree.calls.refusal(wish(call=""), self._spec.account)

        request = _Request(what="complete", model=model.card.name, asked=asked, work=work, refusal=refusal)
        return await self._once(cell, call_id, request)

    async def child_run(
        self, call_id: str, question: bytes, context: ContextChoice, *, max_tokens: int | None
    ) -> SubAnswer:
        """One child run. What it raises is listed in broker.proto."""
        cell = self._executing()
        if not question.strip():
            raise InvalidRequestError("the question is empty")
        if self.levels_below() < 1:
            raise DepthExceededError(
                f"this run is at depth {self._spec.depth}, which is the limit: no child runs from here"
            )
        if max_tokens is not None and max_tokens < 1:
            raise InvalidRequestError("max_tokens must be at least 1")
        model = self._tree.model("")
        fingerprint = await self._read(_read_bytes(context), partial(self.contexts.fingerprint, context))
        head = request_head("child_run", fingerprint, max_tokens)
        asked = await self._read(len(question), partial(read_text, question, head))

        async def work(call: _Call) -> SubAnswer:
            run_id = child_run_id(
                self._spec.run_id, cell.turn, call.started.request_hash, call.started.occurrence
            )
            if self._tree.past_of(run_id) is None:
                await self._pay_for_child_run()
            call.paid = True
            # A child that is in no event of its parent's could not be found after a crash.
            await self._recorder.stored()
            staged = await self.contexts.stage(context)
            try:
                spec = RunSpec(
                    run_id=run_id,
                    question=asked.text,
                    context=staged,
                    model=model,
                    depth=self._spec.depth + 1,
                    account=self._child_account(run_id, max_tokens),
                    parent=self._spec.run_id,
                    parent_call=call.started.call,
                )
                return _child_answer(await self._run_child(self._tree, spec))
            finally:
                self._tree.contexts.release(staged)

        def refusal() -> BudgetExceededError | None:
            return self._tree.treasury.refusal(self._spec.account, Ask(fixed=_ONE_CHILD_RUN))

        request = _Request(what="child_run", model=model.card.name, asked=asked, work=work, refusal=refusal)
        return await self._once(cell, call_id, request)

    def left(self) -> Amounts:
        """The least that an account on the path has left; open holds and what is kept count as used.

        The tenant's is left out: it draws more when it is needed.
        """
        rooms = [account.free.minus(account.kept) for account in self._spec.account.path[1:]]
        return Amounts(*(min(unit) for unit in zip(*rooms, strict=True))).above_zero()

    def levels_below(self) -> int:
        """How much deeper child runs may go."""
        return self._tree.limits.max_depth - self._spec.depth

    def left_s(self) -> float:
        """Seconds until the run's deadline."""
        return max(0.0, self._tree.calls.left_s())

    def require_executing(self) -> None:
        """Refuse what is only served while a cell runs.

        Raises:
            NotExecutingError: None does.
        """
        self._executing()

    async def refused(self) -> None:
        """A call is refused, and its guest told so in a moment."""
        self.gate.blame(Offence.REFUSED)
        await self.pace()

    async def pace(self) -> None:
        """Wait as long as a call must that costs nothing. The cell's clock stands still meanwhile."""
        cell = self._cell
        if cell is not None:
            cell.clock.sub_call_started(time.monotonic())
        try:
            await self.gate.pace()
        finally:
            if cell is not None:
                cell.clock.sub_call_ended(time.monotonic())

    def _executing(self) -> _Cell:
        if self._cell is None:
            raise NotExecutingError("no cell is running: sub-calls are possible only while one is")
        return self._cell

    async def _ask(self, call: _Call, wish: Wish) -> tuple[Completion, bool]:
        def ask() -> Awaitable[Completion]:
            return self._tree.calls.ask(
                wish,
                self._spec.account,
                self._recorder,
                on_dispatch=call.on_dispatch,
                on_retry=call.on_retry,
            )

        if self._tree.memo is None:
            return await ask(), False
        return await self._tree.memo.once(call.started.request_hash, ask)

    async def _read(self, length_bytes: int, read: Callable[[], _T]) -> _T:
        """Read what a guest sent. A long text is read in a thread, one of a run at a time."""
        if length_bytes <= INLINE_WORK_BYTES:
            return read()
        async with self._reading:
            return await run_shielded(asyncio.to_thread(read))

    async def _once(self, cell: _Cell, call_id: str, request: _Request) -> SubAnswer:
        """Do the work, or join the one under way under the same id."""
        if self._cell is not cell:
            raise RunCancelledError("the cell that made this call has ended")
        if not 1 <= len(call_id.encode("utf-8", "replace")) <= MAX_CALL_ID_BYTES:
            raise InvalidRequestError(f"call_id must have 1 to {MAX_CALL_ID_BYTES} bytes")
        call = cell.calls.get(call_id)
        if call is None:
            if self._recorded_refusals >= RECORDED_REFUSALS and (refused := request.refusal()) is not None:
                self.unrecorded_refusals += 1
                raise refused
            call = self._begin(cell, call_id, request)
        elif call.started.request_hash != request.asked.request_hash:
            raise CallIdReusedError("this call_id was used for another request")
        elif call.task.done():
            # The same answer once more is free.
            await self.pace()
        call.callers += 1
        call.abandoned = False
        cell.clock.sub_call_started(time.monotonic())
        try:
            return await asyncio.shield(call.task)
        except asyncio.CancelledError:
            if call.task.cancelled():
                raise RunCancelledError("the cell that made this call has ended, or hung up") from None
            if call.callers == 1:
                call.abandon()
                if not call.paid:
                    self.gate.blame(Offence.HUNG_UP)
            raise
        finally:
            call.callers -= 1
            cell.clock.sub_call_ended(time.monotonic())

    def _begin(self, cell: _Cell, call_id: str, request: _Request) -> _Call:
        asked = request.asked
        occurrence = cell.occurrences[asked.request_hash]
        cell.occurrences[asked.request_hash] += 1
        recorded = cell.again.recorded(asked.request_hash, occurrence) if cell.again else None
        if cell.again is not None and recorded is None and not cell.again.may_ask:
            # What a budget refused may be among what was only counted.
            raise request.refusal() or cell.again.refusal()
        started = (
            recorded.started
            if recorded
            else SubCallStarted(
                call=cell.next_name(),
                turn=cell.turn,
                what=request.what,
                model=request.model,
                prompt=asked.short,
                request_hash=asked.request_hash,
                occurrence=occurrence,
            )
        )
        call = cell.calls[call_id] = _Call(started, asked.whole)

        def over(task: asyncio.Task[SubAnswer]) -> None:
            self._tasks.discard(task)
            failed = task.cancelled() or task.exception() is not None
            if failed and not call.paid:
                # Its traceback would hold on to the text.
                del cell.calls[call_id]

        if cell.again is not None and recorded is not None:
            call.task = asyncio.create_task(_answer_again(cell.again, recorded))
            call.paid = True
        else:
            call.task = asyncio.create_task(self._perform(call, request))
        self._tasks.add(call.task)
        call.task.add_done_callback(over)
        return call

    async def _perform(self, call: _Call, request: _Request) -> SubAnswer:
        started_s = time.monotonic()
        answer, error, error_kind = SubAnswer(""), "the cell ended first", RunCancelledError.__name__
        try:
            # Stored no later than the hold of its first attempt, or its end.
            self._recorder.post(call.started)
            answer = await request.work(call)
            error, error_kind = "", ""
            return answer
        except Exception as failure:
            is_ours = isinstance(failure, OrchestratorError)
            error = str(failure) if is_ours else "the orchestrator failed"
            error_kind = type(failure).__name__
            self._recorded_refusals += isinstance(failure, BudgetExceededError)
            if isinstance(failure, ModelError) and failure.billing is Billing.NOTHING:
                call.paid = False
            raise
        finally:
            if call.paid and isinstance(call.started.prompt, Blob) and call.whole is not None:
                self._recorder.keep(call.started.prompt, call.whole)
            call.whole = None
            ended = SubCallEnded(
                call=call.started.call,
                answer=self._recorder.text(answer.text),
                error=error,
                error_kind=error_kind,
                memoised=answer.memoised,
                duration_s=time.monotonic() - started_s,
                truncated=answer.truncated,
            )
            await self._recorder.record(ended)

    async def _pay_for_child_run(self) -> None:
        treasury, ask = self._tree.treasury, Ask(fixed=_ONE_CHILD_RUN)
        hold = await treasury.hold(self._spec.account, ask, timeout_s=self._tree.calls.left_s())
        treasury.ledger.settle(hold, confirmed=_ONE_CHILD_RUN)

    def _child_account(self, run_id: RunId, max_tokens: int | None) -> Account:
        """The parent's account, or one below it when the child is to have less."""
        if max_tokens is None:
            return self._spec.account
        limit = Amounts(max_tokens, UNLIMITED, UNLIMITED, UNLIMITED)
        ledger = self._tree.treasury.ledger
        account = ledger.open_account("run", limit, self._spec.account)
        if self._tree.past is not None and self._tree.past.run(run_id) is not None:
            # Its parent's and all above have it in their books already.
            confirmed, unconfirmed = self._tree.past.used(run_id)
            ledger.carry_over([account], confirmed=confirmed, unconfirmed=unconfirmed)
        return account


async def _answer_again(cell: ReplayedCell, call: PastCall) -> SubAnswer:
    """As it was recorded. No event: this has happened already."""
    answer = await cell.answer(call)
    return SubAnswer(answer.text, answer.truncated)


def _child_answer(result: RunResult) -> SubAnswer:
    if result.outcome is Outcome.ANSWERED and result.answer is not None:
        return SubAnswer(result.answer)
    # What broke in the engine or in us is for the operator: it may name paths.
    why = f": {result.why}" if result.outcome in _TELLABLE else ""
    raise ChildRunFailedError(
        result.outcome.value, f"the child run ended without an answer ({result.outcome.value}){why}"
    )


def _read_bytes(context: ContextChoice) -> int:
    """How much there is to read in a choice."""
    match context:
        case InlineText():
            return len(context.data)
        case OwnPaths():
            return sum(map(len, context.paths)) + len(context.paths)
        case OwnFiles():
            return _FILE_RUN_BYTES * len(context.runs)
        case _:
            return 0
