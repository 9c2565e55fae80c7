"""An office without database, containers or models: strict about what it is asked, and played by a script.

A run does what `play` says: it is given the run and tells its events and its end. Everything is in memory.
Roles, tenants, idempotency, offsets and hashes are checked as the real one checks them.
"""

import asyncio
import hashlib
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace

from orchestrator.budget import Amounts
from orchestrator.errors import (
    CallIdReusedError,
    ConflictError,
    ContextInputError,
    HashMismatchError,
    InvalidRequestError,
    NotFoundError,
    UnauthenticatedError,
    UnavailableError,
)
from orchestrator.ids import RunId, TenantId, new_run_id
from orchestrator.pricing import Usage as Tokens
from orchestrator.service.port import Caller, Created, Question, Upload, Usage
from orchestrator.service.rules import check_idempotency_key, check_question, check_role
from orchestrator.store.books import (
    ContextRow,
    Role,
    RunFilter,
    RunRow,
    RunState,
    TenantRow,
    TenantRules,
    Used,
)
from orchestrator.trajectory import CallSettled, Event, Payload, RunEnded

PART_BYTES = 256 * 1024


@dataclass(slots=True, eq=False)
class FakeRun:
    """One run, as its script plays it."""

    row: RunRow
    question: Question
    events: list[bytes] = field(default_factory=list)
    texts: dict[str, bytes] = field(default_factory=dict)
    news: asyncio.Condition = field(default_factory=asyncio.Condition)
    cancelled: asyncio.Event = field(default_factory=asyncio.Event)
    watched: asyncio.Event = field(default_factory=asyncio.Event)
    """Somebody has begun to watch ..."""
    left: asyncio.Event = field(default_factory=asyncio.Event)
    """... and stopped."""

    async def tell(self, *payloads: Payload) -> None:
        """Some events."""
        async with self.news:
            for payload in payloads:
                event = Event(self.row.run_id, len(self.events), 1_700_000_000.5, payload)
                self.events.append(json.dumps(event.to_json()).encode())
            self.row = replace(self.row, last_position=len(self.events) - 1)
            self.news.notify_all()

    async def leave(self) -> None:
        """Its server drains."""
        async with self.news:
            self.row = replace(self.row, state=RunState.INTERRUPTED)
            self.news.notify_all()

    async def billed(self, usage: Tokens) -> None:
        """A model was asked."""
        await self.tell(
            CallSettled(
                call=f"turn-{len(self.events)}",
                attempt=1,
                model="model",
                input_bound_tokens=usage.total_input,
                usage=usage,
                confirmed=Amounts(tokens=usage.total, cost_microusd=7, calls=1),
                unconfirmed=Amounts(),
                error="",
                duration_s=0.1,
            )
        )

    async def end(self, outcome: str = "answered", answer: bytes | None = None, error: str = "") -> None:
        """It is over."""
        text = None if answer is None else answer.decode("utf-8", "replace")[:100]
        await self.tell(RunEnded(outcome=outcome, answer=text, error=error, turns=1, duration_s=1.0))
        async with self.news:
            self.row = replace(
                self.row,
                state=RunState.ENDED,
                outcome=outcome,
                error=error,
                answer=answer,
                ended_at=time.time(),
            )
            self.news.notify_all()


Play = Callable[[FakeRun], Awaitable[None]]


def answers(text: str, usage: Tokens = Tokens(input=10, output=5)) -> Play:  # noqa: B008 - immutable
    """A run that answers at once."""

    async def play(run: FakeRun) -> None:
        await run.billed(usage)
        await run.end(answer=text.encode())

    return play


async def waits_to_be_cancelled(run: FakeRun) -> None:
    """A run that works until somebody ends it."""
    await run.cancelled.wait()
    await run.end("cancelled", error="the run was cancelled")


class FakeOffice:
    """`Office`."""

    def __init__(self, play: Play | None = None) -> None:
        self.play: Play = play or answers("the answer")
        self.callers: dict[str, Caller] = {}
        self.runs: dict[str, FakeRun] = {}
        self.new_runs: asyncio.Queue[FakeRun] = asyncio.Queue()
        """As they are created."""
        self.uploads: dict[str, tuple[ContextRow, bytearray]] = {}
        self.failure: Exception | None = None
        """Raised by every method but `authenticate`."""
        self.asked: list[str] = []
        """The methods, in order."""
        self._tasks: set[asyncio.Task[None]] = set()

    def add_key(self, key: str, tenant: str, role: Role = Role.ADMIN) -> str:
        """A key of a tenant."""
        row = TenantRow(tenant_id=TenantId(tenant), name=tenant, rules=TenantRules(), created_at=1.0)
        self.callers[key] = Caller(tenant=row, key_id=f"k-{key}", role=role)
        return key

    async def aclose(self) -> None:
        """End what plays."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _enter(self, method: str, caller: Caller) -> None:
        self.asked.append(method)
        if self.failure is not None:
            raise self.failure
        check_role(method, caller.role)

    def _run(self, caller: Caller, run_id: str) -> FakeRun:
        run = self.runs.get(run_id)
        if run is None or run.row.tenant_id != caller.tenant.tenant_id:
            raise NotFoundError(f"there is no run {run_id}")
        return run

    async def authenticate(self, key: str | None) -> Caller:
        """See `Office`."""
        if key is None or key not in self.callers:
            raise UnauthenticatedError("an API key is needed, and this is none")
        return self.callers[key]

    async def create_run(self, caller: Caller, question: Question) -> Created:
        """See `Office`."""
        self._enter("CreateRun", caller)
        return await self._create(caller, question, None)

    async def continue_run(
        self, caller: Caller, run_id: str, question: Question, *, keep_namespace: bool
    ) -> Created:
        """See `Office`."""
        self._enter("ContinueRun", caller)
        before = self._run(caller, run_id).row
        if before.state is not RunState.ENDED:
            raise ConflictError("the run has not ended")
        return await self._create(caller, replace(question, context_id=before.context_id), before.run_id)

    async def _create(self, caller: Caller, question: Question, continues: RunId | None) -> Created:
        check_idempotency_key(question.idempotency_key)
        check_question(question.question)
        if bool(question.context_id) == (question.text is not None):
            raise InvalidRequestError("give either context_id or text")
        if question.context_id and continues is None:
            self._context(caller, question.context_id)
        request_hash = hashlib.sha256(repr(question).encode()).hexdigest()
        for run in self.runs.values():
            if (run.row.tenant_id, run.row.idempotency_key) == (
                caller.tenant.tenant_id,
                question.idempotency_key,
            ):
                if run.row.request_hash != request_hash:
                    raise CallIdReusedError("the idempotency key was used for another request")
                return Created(run=run.row, existed=True)
        row = RunRow(
            run_id=new_run_id(),
            tenant_id=caller.tenant.tenant_id,
            idempotency_key=question.idempotency_key,
            request_hash=request_hash,
            question=question.question,
            context_id=question.context_id or "c-inline",
            options=dict(question.options),
            state=RunState.RUNNING,
            created_at=time.time(),
            started_at=time.time(),
            continues=continues,
        )
        run = self.runs[row.run_id] = FakeRun(row, question)
        self.new_runs.put_nowait(run)
        task = asyncio.ensure_future(self._play(run))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return Created(run=row, existed=False)

    async def _play(self, run: FakeRun) -> None:
        await self.play(run)

    async def get_run(self, caller: Caller, run_id: str) -> RunRow:
        """See `Office`."""
        self._enter("GetRun", caller)
        return self._run(caller, run_id).row

    async def list_runs(
        self, caller: Caller, which: RunFilter, *, limit: int, before: tuple[float, RunId] | None = None
    ) -> Sequence[RunRow]:
        """See `Office`."""
        self._enter("ListRuns", caller)
        if not 1 <= limit <= 200:
            raise InvalidRequestError("a page has 1 to 200 entries")
        rows = sorted(
            (
                run.row
                for run in self.runs.values()
                if run.row.tenant_id == caller.tenant.tenant_id
                and (not which.states or run.row.state in which.states)
                and (not which.outcomes or run.row.outcome in which.outcomes)
                and (which.created_from is None or run.row.created_at >= which.created_from)
                and (which.created_before is None or run.row.created_at < which.created_before)
            ),
            key=lambda row: (row.created_at, row.run_id),
            reverse=True,
        )
        return [row for row in rows if before is None or (row.created_at, row.run_id) < before][:limit]

    async def watch_run(
        self, caller: Caller, run_id: str, from_position: int
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """See `Office`."""
        self._enter("WatchRun", caller)
        run, position = self._run(caller, run_id), from_position
        run.watched.set()
        try:
            while True:
                async with run.news:
                    while position >= len(run.events) and run.row.state is not RunState.ENDED:
                        await run.news.wait()
                        if self.failure is not None:
                            raise self.failure
                        if run.row.state is RunState.INTERRUPTED:
                            raise UnavailableError("the run goes on when a server is back")
                if position >= len(run.events):
                    return
                yield position, run.events[position]
                position += 1
        finally:
            run.left.set()

    async def read_text(self, caller: Caller, run_id: str, sha256: str) -> AsyncIterator[bytes]:
        """See `Office`."""
        self._enter("ReadText", caller)
        run = self._run(caller, run_id)
        text = run.texts.get(sha256) if sha256 else run.row.answer
        if text is None:
            raise NotFoundError("there is no such text")
        for start in range(0, len(text), PART_BYTES):
            yield text[start : start + PART_BYTES]

    async def cancel_run(self, caller: Caller, run_id: str) -> RunRow:
        """See `Office`."""
        self._enter("CancelRun", caller)
        run = self._run(caller, run_id)
        run.cancelled.set()
        return run.row

    async def resume_run(self, caller: Caller, run_id: str) -> RunRow:
        """See `Office`."""
        self._enter("ResumeRun", caller)
        run = self._run(caller, run_id)
        if run.row.state is not RunState.INTERRUPTED:
            raise ConflictError("the run is not interrupted")
        return run.row

    async def delete_run(self, caller: Caller, run_id: str) -> None:
        """See `Office`."""
        self._enter("DeleteRun", caller)
        if self._run(caller, run_id).row.state is not RunState.ENDED:
            raise ConflictError("the run has not ended; cancel it first")
        del self.runs[run_id]

    def _context(self, caller: Caller, context_id: str) -> tuple[ContextRow, bytearray]:
        row, data = self.uploads.get(context_id, (None, bytearray()))
        if row is None or row.tenant_id != caller.tenant.tenant_id:
            raise NotFoundError("there is no such context")
        return row, data

    async def start_upload(self, caller: Caller, *, sha256: str, length_bytes: int, name: str) -> Upload:
        """See `Office`."""
        self._enter("StartUpload", caller)
        for row, data in self.uploads.values():
            if (row.tenant_id, row.sha256, row.length_bytes) == (
                caller.tenant.tenant_id,
                sha256,
                length_bytes,
            ):
                return Upload(context=row, next_offset=len(data))
        row = ContextRow(
            context_id=f"c{len(self.uploads)}",
            tenant_id=caller.tenant.tenant_id,
            name=name,
            sha256=sha256,
            length_bytes=length_bytes,
            home="h",
            created_at=time.time(),
            is_complete=False,
        )
        self.uploads[row.context_id] = row, bytearray()
        return Upload(context=row, next_offset=0)

    async def write_upload(self, caller: Caller, context_id: str, offset: int, data: bytes) -> Upload:
        """See `Office`."""
        self._enter("Upload", caller)
        row, there = self._context(caller, context_id)
        if row.is_complete:
            raise ConflictError("this upload is complete")
        if len(data) > 1024 * 1024:
            raise InvalidRequestError("a part has more than 1 MB")
        if offset != len(there) or offset + len(data) > row.length_bytes:
            raise ContextInputError(f"the upload stands at byte {len(there)}, not {offset}")
        there += data
        if len(there) == row.length_bytes:
            if hashlib.sha256(there).hexdigest() != row.sha256:
                del self.uploads[context_id]
                raise HashMismatchError("what was uploaded has another hash than was said; it was dropped")
            row = replace(row, is_complete=True)
            self.uploads[context_id] = row, there
        return Upload(context=row, next_offset=len(there))

    async def list_contexts(
        self, caller: Caller, *, limit: int, before: tuple[float, str] | None = None
    ) -> Sequence[ContextRow]:
        """See `Office`."""
        self._enter("ListContexts", caller)
        rows = sorted(
            (
                row
                for row, _ in self.uploads.values()
                if row.tenant_id == caller.tenant.tenant_id and row.is_complete
            ),
            key=lambda row: (row.created_at, row.context_id),
            reverse=True,
        )
        return [row for row in rows if before is None or (row.created_at, row.context_id) < before][:limit]

    async def delete_context(self, caller: Caller, context_id: str) -> None:
        """See `Office`."""
        self._enter("DeleteContext", caller)
        self._context(caller, context_id)
        del self.uploads[context_id]

    async def get_usage(self, caller: Caller) -> Usage:
        """See `Office`."""
        self._enter("GetUsage", caller)
        used = Used(amounts=Amounts(tokens=5, cost_microusd=6, calls=1), runs=2)
        return Usage(day=used, month=used, live_runs=1)
