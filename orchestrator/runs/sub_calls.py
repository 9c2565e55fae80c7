"""What a run's cells may ask for: completions, child runs, and what is left.

A sub-call belongs to the cell that made it. When that cell ends, in whatever way, its child runs are
cancelled, calls that wait for a slot or for budget are dropped, and calls already at a provider finish
detached and are settled. Between cells every call is refused.
"""

import asyncio
import hashlib
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Protocol

from orchestrator.budget import UNLIMITED, Account, Amounts, Ask
from orchestrator.cells import CellClock
from orchestrator.conversation import StopReason, Told
from orchestrator.errors import (
    CallIdReusedError,
    ChildRunFailedError,
    DepthExceededError,
    InvalidRequestError,
    NotExecutingError,
    OrchestratorError,
    RunCancelledError,
)
from orchestrator.ids import child_run_id
from orchestrator.limits import (
    DEFAULT_SUB_CALL_MAX_TOKENS,
    LEAST_SUB_CALL_MAX_TOKENS,
    MAX_CALL_ID_BYTES,
    MAX_PROMPT_BYTES,
)
from orchestrator.models.port import Completion
from orchestrator.runs.child_context import ChildContexts, ContextChoice
from orchestrator.runs.model_calls import Wish
from orchestrator.runs.recorder import Recorder
from orchestrator.runs.tree import RunResult, RunSpec, RunTree
from orchestrator.trajectory import SubCallEnded, SubCallStarted
from orchestrator.turn import Outcome


@dataclass(frozen=True, slots=True)
class SubAnswer:
    """The answer to a sub-call."""

    text: str
    truncated: bool = False
    memoised: bool = False


_TELLABLE = {Outcome.BUDGET_EXHAUSTED, Outcome.TURN_LIMIT, Outcome.DEADLINE, Outcome.MODEL_FAILED}
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
    task: asyncio.Task[SubAnswer] = field(init=False)
    callers: int = 0
    """Who waits for it: more than one after a repeated transmission."""
    dispatched: bool = False
    """At a provider: it may cost money, so it is not cancelled with its cell."""
    abandoned: bool = False
    """Nobody waits for it any more: what is at a provider finishes, nothing else is begun."""

    def abandon(self) -> None:
        """Its cell has ended, or its last caller hung up."""
        self.abandoned = True
        if not self.dispatched:
            self.task.cancel()

    def on_dispatch(self) -> None:
        """An attempt goes out."""
        self.dispatched = True

    def on_retry(self) -> None:
        """An attempt failed, and another would follow."""
        self.dispatched = False
        if self.abandoned:
            self.task.cancel()


_Work = Callable[[_Call], Awaitable[SubAnswer]]


@dataclass(slots=True)
class _Cell:
    """The cell that is executing."""

    turn: int
    clock: CellClock
    calls: dict[str, _Call] = field(default_factory=dict)
    """By the id the guest chose. It is unique within the cell at best, so it names nothing in the record."""
    occurrences: Counter[str] = field(default_factory=Counter)

    def next_name(self) -> str:
        """What the next sub-call is called in the run's events."""
        return f"{self.turn}.{len(self.calls) + 1}"


class SubCalls:
    """The sub-calls of one run. The broker is only its shell; who is calling is fixed by construction."""

    def __init__(self, tree: RunTree, spec: RunSpec, recorder: Recorder, run_child: RunChild) -> None:
        self.contexts = ChildContexts(tree.contexts, tree.tenant_id, spec.context)
        self._tree = tree
        self._spec = spec
        self._recorder = recorder
        self._run_child = run_child
        self._cell: _Cell | None = None
        self._tasks: set[asyncio.Task[SubAnswer]] = set()

    @contextmanager
    def executing(self, turn: int, clock: CellClock) -> Iterator[None]:
        """Sub-calls are served for the length of the block, and belong to this cell."""
        cell = self._cell = _Cell(turn, clock)
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
        text = prompt.decode("utf-8", "replace")
        cached_chars = len(prompt[:shared_prefix_bytes].decode("utf-8", "ignore"))
        started = SubCallStarted(
            call=cell.next_name(),
            turn=cell.turn,
            what="complete",
            model=model.card.name,
            prompt="",
            request_hash=_hash("complete", model.card.name, max_tokens, prompt),
            occurrence=0,
        )

        async def work(call: _Call) -> SubAnswer:
            wish = Wish(
                call=call.started.call,
                model=model,
                system="",
                conversation=(Told(text, cached_chars),),
                python_tool=False,
                output_tokens=max_tokens or DEFAULT_SUB_CALL_MAX_TOKENS,
                least_output_tokens=max_tokens or LEAST_SUB_CALL_MAX_TOKENS,
            )
            completion, memoised = await self._ask(call, wish)
            truncated = completion.reply.stop is StopReason.MAX_TOKENS
            return SubAnswer(completion.reply.text, truncated, memoised)

        return await self._once(cell, call_id, started, text, work)

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
        text = question.decode("utf-8", "replace")
        model = self._tree.model("")
        started = SubCallStarted(
            call=cell.next_name(),
            turn=cell.turn,
            what="child_run",
            model=model.card.name,
            prompt="",
            request_hash=_hash("child_run", self.contexts.fingerprint(context), max_tokens, question),
            occurrence=0,
        )

        async def work(call: _Call) -> SubAnswer:
            await self._pay_for_child_run()
            staged = await self.contexts.stage(context)
            try:
                spec = RunSpec(
                    run_id=child_run_id(
                        self._spec.run_id, cell.turn, call.started.request_hash, call.started.occurrence
                    ),
                    question=text,
                    context=staged,
                    model=model,
                    depth=self._spec.depth + 1,
                    account=self._child_account(max_tokens),
                    parent=self._spec.run_id,
                    parent_call=call.started.call,
                )
                return _child_answer(await self._run_child(self._tree, spec))
            finally:
                self._tree.contexts.release(staged)

        return await self._once(cell, call_id, started, text, work)

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

    async def _once(
        self, cell: _Cell, call_id: str, started: SubCallStarted, prompt: str, work: _Work
    ) -> SubAnswer:
        """Do the work, or join the one under way under the same id."""
        if not 1 <= len(call_id.encode("utf-8", "replace")) <= MAX_CALL_ID_BYTES:
            raise InvalidRequestError(f"call_id must have 1 to {MAX_CALL_ID_BYTES} bytes")
        call = cell.calls.get(call_id)
        if call is None:
            occurrence = cell.occurrences[started.request_hash]
            cell.occurrences[started.request_hash] += 1
            # Not before now: the text of a call that is refused here, or joined, must not be stored.
            text = self._recorder.text(prompt)
            call = _Call(replace(started, occurrence=occurrence, prompt=text))
            call.task = asyncio.create_task(self._perform(call, work))
            self._tasks.add(call.task)
            call.task.add_done_callback(self._tasks.discard)
            cell.calls[call_id] = call
        elif call.started.request_hash != started.request_hash:
            raise CallIdReusedError("this call_id was used for another request")
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
            raise
        finally:
            call.callers -= 1
            cell.clock.sub_call_ended(time.monotonic())

    async def _perform(self, call: _Call, work: _Work) -> SubAnswer:
        started_s = time.monotonic()
        answer, error, error_kind, memoised = "", "the cell ended first", RunCancelledError.__name__, False
        try:
            await self._recorder.record(call.started)
            result = await work(call)
            answer, error, error_kind, memoised = result.text, "", "", result.memoised
            return result
        except Exception as failure:
            is_ours = isinstance(failure, OrchestratorError)
            error = str(failure) if is_ours else "the orchestrator failed"
            error_kind = type(failure).__name__
            raise
        finally:
            ended = SubCallEnded(
                call=call.started.call,
                answer=self._recorder.text(answer),
                error=error,
                error_kind=error_kind,
                memoised=memoised,
                duration_s=time.monotonic() - started_s,
            )
            await self._recorder.record(ended)

    async def _pay_for_child_run(self) -> None:
        one = Amounts(child_runs=1)
        treasury = self._tree.treasury
        hold = await treasury.hold(self._spec.account, Ask(fixed=one), timeout_s=self._tree.calls.left_s())
        treasury.ledger.settle(hold, confirmed=one)

    def _child_account(self, max_tokens: int | None) -> Account:
        """The parent's account, or one below it when the child is to have less."""
        if max_tokens is None:
            return self._spec.account
        limit = Amounts(max_tokens, UNLIMITED, UNLIMITED, UNLIMITED)
        return self._tree.treasury.ledger.open_account("run", limit, self._spec.account)


def _child_answer(result: RunResult) -> SubAnswer:
    if result.outcome is Outcome.ANSWERED and result.answer is not None:
        return SubAnswer(result.answer)
    # What broke in the engine or in us is for the operator: it may name paths.
    why = f": {result.why}" if result.outcome in _TELLABLE else ""
    raise ChildRunFailedError(
        result.outcome.value, f"the child run ended without an answer ({result.outcome.value}){why}"
    )


def _hash(what: str, first: str, max_tokens: int | None, text: bytes) -> str:
    """Identifies a request within its run; fixed-width parts before the only free one."""
    head = hashlib.sha256(f"{what}\0{max_tokens}\0{first}".encode("utf-8", "replace")).digest()
    return hashlib.sha256(head + text).hexdigest()
