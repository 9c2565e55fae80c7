"""The service itself. See `port.Office` for what each method promises.

Every method checks the caller's role in one place (`_enter`), and finds a run or context by asking the books
with the caller's tenant: what is another's is not there. What a method acknowledges is stored first, and is
finished once begun, also when its caller hangs up meanwhile.
"""

import asyncio
import functools
import hashlib
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

from orchestrator.access import ModelAccess
from orchestrator.contexts.shelf import ContextShelf
from orchestrator.errors import (
    BudgetExceededError,
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    OrchestratorError,
    StoreError,
    UnauthenticatedError,
    UnavailableError,
)
from orchestrator.ids import RunId, TenantId, new_run_id
from orchestrator.machine import Machine
from orchestrator.pricing import ModelCard
from orchestrator.runs.tree import ROOT_ALIAS, SUB_ALIAS
from orchestrator.service import windows
from orchestrator.service.books import Books
from orchestrator.service.context_desk import ContextDesk
from orchestrator.service.departures import Departures
from orchestrator.service.errands import Errands
from orchestrator.service.execution import Execution
from orchestrator.service.hooks import ServiceHook
from orchestrator.service.job import CANCELLED
from orchestrator.service.one_run import OpenAccount, Runner, wanted_by
from orchestrator.service.port import Caller, Created, Question, Upload, Usage
from orchestrator.service.presence import LEASE_S, Presence
from orchestrator.service.recovery import Recovery
from orchestrator.service.retention import SWEEP_EVERY_S, Retention
from orchestrator.service.rooms import Rooms
from orchestrator.service.rules import (
    Decided,
    Offer,
    check_idempotency_key,
    check_models,
    check_outcomes,
    check_question,
    check_role,
    decide,
)
from orchestrator.service.standing import Standing
from orchestrator.service.upkeep import again_and_again
from orchestrator.service.watching import Watching
from orchestrator.shielding import run_shielded
from orchestrator.store.books import (
    OPERATOR_KEY_PREFIX,
    AuditRow,
    ContextRow,
    RunFilter,
    RunRow,
    RunState,
    Wish,
)

_log = logging.getLogger(__name__)

MAX_PAGE = 200
TEXT_PART_BYTES = 256 * 1024
_KEEP_AGAIN = 3
_ID = re.compile(r"[a-z0-9]{1,40}")
"""Of a run or context. Anything else is none, and does not get as far as the database."""
_SHA256 = re.compile(r"[0-9a-f]{64}")
_NO_RUN = "there is no such run"
_NO_CONTEXT = "there is no such context"
_NO_TEXT = "there is no such text"

P = ParamSpec("P")
T = TypeVar("T")


@contextmanager
def _answering() -> Iterator[None]:
    """A database that does not answer is no caller's business: only that trying again helps."""
    try:
        yield
    except StoreError as error:
        _log.warning("the store does not answer: %s", error)
        raise UnavailableError("the server cannot store or read that now; try again") from error


def _stored(
    method: Callable[Concatenate["ServiceOffice", P], Awaitable[T]],
) -> Callable[Concatenate["ServiceOffice", P], Coroutine[Any, Any, T]]:
    @functools.wraps(method)
    async def answering(self: "ServiceOffice", /, *args: P.args, **kwargs: P.kwargs) -> T:
        with _answering():
            return await method(self, *args, **kwargs)

    return answering


@dataclass(frozen=True, kw_only=True, slots=True)
class OfficeParts:
    """What a service is made of. Whoever opens it owns all of it."""

    books: Books
    machine: Machine
    models: ModelAccess
    offer: Offer
    open_account: OpenAccount
    contexts_dir: Path
    """Of clients' contexts."""
    home: str
    """The id of the state directory."""
    max_running: int
    max_model_calls: int
    drain_grace_s: float
    lease_s: float = LEASE_S
    """After so long without a sign of it other servers settle what it was doing."""
    is_held: bool = False
    """Whether no run is started before `hold(False)`."""
    hooks: Sequence[ServiceHook] = ()


class ServiceOffice:
    """`Office`. Open it with `open_office`."""

    def __init__(self, parts: OfficeParts) -> None:
        books = parts.books
        self._books = books
        self._models = parts.models
        self._offer = parts.offer
        self._home = parts.home
        self._drain_grace_s = parts.drain_grace_s
        self._hooks = parts.hooks
        self._is_draining = False
        self._shelf = ContextShelf(parts.machine.contexts)
        self._desk = ContextDesk(parts.contexts_dir, books.contexts, home=parts.home)
        self._watching = Watching(books.trees)
        self._standing = Standing(books.tenants, on_change=self._watching.look_again)
        self._presence = Presence(books.homes, parts.home, lease_s=parts.lease_s)
        self._rooms = Rooms(
            books.rooms, self._presence, parts.machine.slots, capacity=parts.offer.max_sandboxes
        )
        self._runner = Runner(
            books=books,
            machine=parts.machine,
            models=parts.models,
            desk=self._desk,
            shelf=self._shelf,
            offer=parts.offer,
            open_account=parts.open_account,
            max_model_calls=parts.max_model_calls,
        )
        self._execution = Execution(
            books=books,
            presence=self._presence,
            rooms=self._rooms,
            runner=self._runner,
            watching=self._watching,
            offer=parts.offer,
            max_running=parts.max_running,
            hooks=parts.hooks,
            is_held=parts.is_held,
        )
        self._recovery = Recovery(books, self._execution, self._desk, self._presence)
        self._retention = Retention(books, self._desk, self._runner)
        self._errands = Errands(books, self._presence, self._execution, self._recovery, self._retention)
        self._departures = Departures(books.tenants, self._execution)
        self._execution.on_left = self._take_up_later
        self._tasks: set[asyncio.Task[None]] = set()

    # --- The server's own -----------------------------------------------------------------------------

    @property
    def is_ready(self) -> bool:
        """Whether it takes new runs."""
        return not self._is_draining

    @property
    def running(self) -> int:
        """Runs that run here."""
        return self._execution.running

    @property
    def waiting(self) -> int:
        """Runs that wait here."""
        return self._execution.waiting

    @property
    def epoch(self) -> int:
        """Under which it does what it does for runs. See `HomeBook`."""
        return self._presence.epoch

    @property
    def watchers(self) -> int:
        """Streams of events under way."""
        return self._watching.watchers

    async def open(self) -> None:
        """Take up what the server before left, and begin to look after what gets old."""
        await self._recovery.check_home()
        await self._presence.enter()
        taken_up = await self._recovery.at_start()
        if taken_up:
            _log.info("%d runs that had not ended were taken up", taken_up)
        sweep = self._retention.sweep
        self._begin(
            again_and_again(sweep, every_s=SWEEP_EVERY_S, log=_log, failure="what is too old is still there")
        )
        self._begin(self._errands.beat_on())
        self._begin(self._errands.look_on())
        self._begin(self._rooms.look_on())
        self._begin(self._standing.look_on())
        self._begin(self._departures.look_on())

    def hold(self, held: bool, *, but_one: bool = False) -> None:
        """Start no run that waits, or go on. See `Execution.hold`."""
        self._execution.hold(held, but_one=but_one)

    async def tenant_removed(self, tenant_id: TenantId) -> None:
        """A tenant was just removed from the books: its runs here begin to end."""
        await self._departures.removed(tenant_id)

    async def drain(self) -> None:
        """No new runs from now on; return when those that run have ended or were left to the next server."""
        self._is_draining = True
        await self._execution.drain(self._drain_grace_s)
        try:
            await self._rooms.give_up()
        except StoreError as error:
            _log.warning("others may have the sandboxes of this server's tenants later only: %s", error)

    async def aclose(self) -> None:
        """Leave everything as it is; whoever did not drain before loses what runs were doing just now."""
        self._is_draining = True
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        await self._execution.aclose()
        await asyncio.to_thread(self._shelf.close)

    # --- Who asks -------------------------------------------------------------------------------------

    @_stored
    async def authenticate(self, key: str | None) -> Caller:
        """See `Office.authenticate`."""
        if key and key.startswith(OPERATOR_KEY_PREFIX):
            # Not looked up: what it may is elsewhere, and here it is none.
            raise UnauthenticatedError(
                "an operator's key is no tenant's: runs, contexts and usage need a tenant's key"
            )
        found = await self._books.tenants.who_has(key) if key else None
        if found is None:
            raise UnauthenticatedError("an API key is needed, and this is none")
        tenant, row = found
        return Caller(tenant=tenant, key_id=row.key_id, role=row.role)

    # --- Runs -----------------------------------------------------------------------------------------

    @_stored
    async def create_run(self, caller: Caller, question: Question) -> Created:
        """See `Office.create_run`."""
        with self._refusals(caller):
            self._enter("CreateRun", caller, is_new=True)
            if bool(question.context_id) == (question.text is not None):
                raise InvalidRequestError("give either context_id or text")
            decided = self._decide(caller, question)
            used_up = await self._used_up(caller)
            if used_up is not None:
                return await self._existing(self._row(caller, question, decided, None), used_up)
            if question.text is not None:
                return await self._create_about_text(caller, question, question.text, decided)
            context = await self._usable(await self._context_row(caller, question.context_id))
            row = self._row(caller, question, decided, context)
            return await self._create(caller, row, "CreateRun")

    @_stored
    async def continue_run(
        self, caller: Caller, run_id: str, question: Question, *, keep_namespace: bool
    ) -> Created:
        """See `Office.continue_run`."""
        with self._refusals(caller):
            self._enter("ContinueRun", caller, is_new=True)
            before = await self._run(caller, run_id)
            if question.context_id or question.text is not None:
                raise InvalidRequestError("a run that continues another has that one's context")
            if before.state is not RunState.ENDED:
                raise ConflictError("the run has not ended")
            if keep_namespace:
                await self._runner.chain_of(before)
            question = replace(question, options=question.options or before.options)
            decided = self._decide(caller, question)
            context = await self._books.contexts.context(before.tenant_id, before.context_id)
            if context is None:
                raise ConflictError("the run's context is gone")
            await self._usable(context)
            row = replace(
                self._row(caller, question, decided, context, after=f"{before.run_id} {keep_namespace}"),
                continues=before.run_id,
                keeps_namespace=keep_namespace,
            )
            used_up = await self._used_up(caller)
            if used_up is not None:
                return await self._existing(row, used_up)
            return await self._create(caller, row, "ContinueRun")

    @_stored
    async def get_run(self, caller: Caller, run_id: str) -> RunRow:
        """See `Office.get_run`."""
        self._enter("GetRun", caller)
        return await self._run(caller, run_id)

    @_stored
    async def list_runs(
        self, caller: Caller, which: RunFilter, *, limit: int, before: tuple[float, RunId] | None = None
    ) -> Sequence[RunRow]:
        """See `Office.list_runs`."""
        self._enter("ListRuns", caller)
        _check_limit(limit)
        check_outcomes(which.outcomes)
        rows = await self._books.runs.runs(caller.tenant.tenant_id, which, limit=limit, before=before)
        return [self._now(row) for row in rows]

    async def watch_run(
        self, caller: Caller, run_id: str, from_position: int
    ) -> AsyncIterator[tuple[int, bytes]]:
        """See `Office.watch_run`."""
        with _answering():
            self._enter("WatchRun", caller)
            if from_position < 0:
                raise InvalidRequestError("from_position must not be negative")
            row = await self._run(caller, run_id)

            async def has_ended() -> bool:
                now = await self._books.runs.head(row.tenant_id, row.run_id)
                return now is None or now.state is RunState.ENDED

            with self._standing.stream(caller) as stay:
                watched = self._watching.watch(row.run_id, from_position, has_ended, check=stay.check)
                async with aclosing(watched):
                    async for entry in watched:
                        yield entry

    async def read_text(self, caller: Caller, run_id: str, sha256: str) -> AsyncIterator[bytes]:
        """See `Office.read_text`."""
        with _answering():
            self._enter("ReadText", caller)
            row = await self._run(caller, run_id)
            if sha256 and not _SHA256.fullmatch(sha256):
                raise NotFoundError(_NO_TEXT)
            with self._standing.stream(caller) as stay:
                start = 0
                # Read as it is taken: thousands who take nothing must not hold a text of megabytes each.
                while part := await self._text_part(row, sha256, start):
                    stay.check()
                    yield part
                    start += len(part)

    @_stored
    async def cancel_run(self, caller: Caller, run_id: str) -> RunRow:
        """See `Office.cancel_run`."""
        self._enter("CancelRun", caller)
        row = await self._run(caller, run_id)
        if row.state is RunState.ENDED:
            return row
        await run_shielded(self._cancel(caller, row))
        return await self._run(caller, run_id)

    @_stored
    async def resume_run(self, caller: Caller, run_id: str) -> RunRow:
        """See `Office.resume_run`."""
        self._enter("ResumeRun", caller, is_new=True)
        row = await self._run(caller, run_id)
        await run_shielded(self._resume(caller, row))
        return await self._run(caller, run_id)

    @_stored
    async def delete_run(self, caller: Caller, run_id: str) -> None:
        """See `Office.delete_run`."""
        self._enter("DeleteRun", caller)
        row = await self._run(caller, run_id)
        if row.state is not RunState.ENDED:
            raise ConflictError("the run has not ended; cancel it first")
        audit = _entry(caller, "DeleteRun", row.run_id)
        await run_shielded(self._retention.delete_run(row.tenant_id, row.run_id, audit=audit))

    # --- Contexts -------------------------------------------------------------------------------------

    @_stored
    async def start_upload(self, caller: Caller, *, sha256: str, length_bytes: int, name: str) -> Upload:
        """See `Office.start_upload`."""
        self._enter("StartUpload", caller, is_new=True)
        upload = await self._desk.start(
            caller.tenant.tenant_id,
            sha256=sha256,
            length_bytes=length_bytes,
            name=name,
            max_bytes=caller.tenant.rules.max_context_bytes,
        )
        await self._audit(caller, "StartUpload", upload.context.context_id)
        return upload

    @_stored
    async def write_upload(self, caller: Caller, context_id: str, offset: int, data: bytes) -> Upload:
        """See `Office.write_upload`."""
        self._enter("Upload", caller, is_new=True)
        # One upload may take hours, and its key was shown at its beginning.
        await self._standing.confirm(caller)
        row = await self._context_row(caller, context_id)
        upload = await self._desk.write(row, offset, data)
        if upload.context.is_complete:
            await self._audit(caller, "Upload", row.context_id)
        return upload

    @_stored
    async def list_contexts(
        self, caller: Caller, *, limit: int, before: tuple[float, str] | None = None
    ) -> Sequence[ContextRow]:
        """See `Office.list_contexts`."""
        self._enter("ListContexts", caller)
        _check_limit(limit)
        return await self._books.contexts.contexts(caller.tenant.tenant_id, limit=limit, before=before)

    @_stored
    async def delete_context(self, caller: Caller, context_id: str) -> None:
        """See `Office.delete_context`."""
        self._enter("DeleteContext", caller)
        row = await self._context_row(caller, context_id)
        audit = _entry(caller, "DeleteContext", row.context_id)
        await run_shielded(self._retention.delete_context(row, audit=audit))

    # --- Usage ----------------------------------------------------------------------------------------

    @_stored
    async def get_usage(self, caller: Caller) -> Usage:
        """See `Office.get_usage`."""
        self._enter("GetUsage", caller)
        now, tenant_id = time.time(), caller.tenant.tenant_id
        live = await self._books.runs.count_live(tenant_id)
        return Usage(
            day=await self._books.usage.used(tenant_id, windows.day_of(now)),
            month=await self._books.usage.used(tenant_id, windows.month_of(now)),
            live_runs=sum(live.values()),
            held=await self._books.usage.held(tenant_id),
        )

    # --- Inside ---------------------------------------------------------------------------------------

    def _enter(self, method: str, caller: Caller, *, is_new: bool = False) -> None:
        """Whether this caller may call this now. `is_new`: it would begin something."""
        check_role(method, caller.role)
        if is_new and self._is_draining:
            raise UnavailableError("the server is going down; try again")

    @contextmanager
    def _refusals(self, caller: Caller) -> Iterator[None]:
        try:
            yield
        except OrchestratorError as error:
            for hook in self._hooks:
                hook.refused(caller.tenant.tenant_id, error)
            raise

    async def _run(self, caller: Caller, run_id: str) -> RunRow:
        is_id = _ID.fullmatch(run_id)
        row = await self._books.runs.run(caller.tenant.tenant_id, RunId(run_id)) if is_id else None
        if row is None:
            raise NotFoundError(_NO_RUN)
        return self._now(row)

    async def _context_row(self, caller: Caller, context_id: str) -> ContextRow:
        """One that the caller's tenant uploaded: those that came with a question have no id to ask by."""
        is_id = _ID.fullmatch(context_id)
        row = await self._books.contexts.context(caller.tenant.tenant_id, context_id) if is_id else None
        if row is None or row.is_inline:
            raise NotFoundError(_NO_CONTEXT)
        return row

    async def _text_part(self, row: RunRow, sha256: str, start: int) -> bytes:
        books, part = self._books, {"start": start, "max_bytes": TEXT_PART_BYTES}
        if sha256:
            text = await books.trees.tree_blob_part(row.run_id, sha256, **part)
        else:
            text = await books.runs.answer(row.tenant_id, row.run_id, **part)
        if text is None:
            raise NotFoundError(_NO_TEXT)
        return text

    def _now(self, row: RunRow) -> RunRow:
        """With what it was billed up to now."""
        bill = self._execution.bill(row.run_id) if row.state is not RunState.ENDED else None
        if bill is None:
            return row
        return replace(row, confirmed=bill.confirmed, unconfirmed=bill.unconfirmed)

    async def _usable(self, row: ContextRow) -> ContextRow:
        if not row.is_complete:
            raise ConflictError("the context has not been uploaded whole")
        if row.home != self._home and not await self._books.homes.is_there(row.home):
            raise UnavailableError("the server that has the context is away; try again when it is back")
        return row

    def _decide(self, caller: Caller, question: Question) -> Decided:
        check_idempotency_key(question.idempotency_key)
        check_question(question.question)
        rules = caller.tenant.rules
        decided = decide(question.options, caller.tenant, self._offer)
        cards = self._models.chosen(wanted_by(decided))
        check_models(_named(cards, decided), rules, self._offer)
        return decided

    def _row(
        self,
        caller: Caller,
        question: Question,
        decided: Decided,
        context: ContextRow | None,
        *,
        after: str = "",
    ) -> RunRow:
        home = self._home if context is None else context.home
        return RunRow(
            run_id=new_run_id(),
            tenant_id=caller.tenant.tenant_id,
            idempotency_key=question.idempotency_key,
            request_hash=_request_hash(question, after),
            question=question.question,
            context_id="" if context is None else context.context_id,
            options=decided.as_options(),
            state=RunState.QUEUED,
            created_at=time.time(),
            home=home,
            wish=Wish.NONE if home == self._home else Wish.START,
        )

    async def _create_about_text(
        self, caller: Caller, question: Question, text: bytes, decided: Decided
    ) -> Created:
        rules = caller.tenant.rules
        for _ in range(_KEEP_AGAIN):
            context = await self._desk.keep_text(
                caller.tenant.tenant_id, text, max_bytes=rules.max_context_bytes
            )
            row = self._row(caller, question, decided, context)
            with suppress(NotFoundError):
                return await self._create(caller, row, "CreateRun")
            # The same text had been kept for another run, which was deleted just now.
        raise UnavailableError("the context went away while the run was created; try again")

    async def _create(self, caller: Caller, row: RunRow, action: str) -> Created:
        with self._desk.needed(row.context_id):
            return await run_shielded(self._store_and_submit(caller, row, action))

    async def _store_and_submit(self, caller: Caller, row: RunRow, action: str) -> Created:
        rules = caller.tenant.rules
        stored = await self._books.runs.create(
            row,
            max_queued=rules.max_queued_runs,
            quotas=list(windows.windows(rules, time.time()).items()),
            audit=_entry(caller, action, row.run_id),
        )
        existed = stored.run_id != row.run_id
        if not existed:
            if stored.home == self._home:
                self._execution.submit(stored, caller.tenant, resume=False)
            for hook in self._hooks:
                hook.created(stored)
        return Created(run=self._now(stored), existed=existed)

    async def _used_up(self, caller: Caller) -> BudgetExceededError | None:
        """Why this tenant may begin nothing now; None while it has something left to run on."""
        for window, quota in windows.windows(caller.tenant.rules, time.time()).items():
            if quota.max_tokens is None and quota.max_cost_microusd is None:
                continue
            used = await self._books.usage.used(caller.tenant.tenant_id, window)
            try:
                windows.check_not_used_up(used, quota)
            except BudgetExceededError as error:
                return error
        return None

    async def _existing(self, row: RunRow, used_up: BudgetExceededError) -> Created:
        """Where nothing may be created, a repeat still finds what the first request created."""
        try:
            stored = await self._books.runs.create(row, max_queued=0, quotas=())
        except BudgetExceededError:
            raise used_up from None
        return Created(run=self._now(stored), existed=True)

    async def _cancel(self, caller: Caller, row: RunRow) -> None:
        await self._books.runs.cancel(
            row.tenant_id,
            row.run_id,
            at=time.time(),
            error=CANCELLED.error,
            audit=_entry(caller, "CancelRun", row.run_id),
        )
        if row.home == self._home:
            await self._errands.grant(row.tenant_id, row.run_id, Wish.CANCEL)

    async def _resume(self, caller: Caller, row: RunRow) -> None:
        audit = _entry(caller, "ResumeRun", row.run_id)
        if not await self._books.runs.resume(row.tenant_id, row.run_id, audit=audit):
            raise ConflictError("the run is not interrupted")
        if row.home == self._home:
            await self._errands.grant(row.tenant_id, row.run_id, Wish.RESUME)

    async def _audit(self, caller: Caller, action: str, target: str) -> None:
        await self._books.audit.write(_entry(caller, action, target))

    # --- In the background ----------------------------------------------------------------------------

    def _take_up_later(self, run_id: RunId, tenant_id: TenantId) -> None:
        self._begin(self._take_up_left(run_id, tenant_id))

    async def _take_up_left(self, run_id: RunId, tenant_id: TenantId) -> None:
        """Resume a run that this server had to leave; the store has just answered again."""
        try:
            await self._errands.take_up(tenant_id, run_id)
        except StoreError as error:
            _log.warning("run %s stays interrupted: %s", run_id, error)

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


@asynccontextmanager
async def open_office(parts: OfficeParts) -> AsyncIterator[ServiceOffice]:
    """The service for the length of the block, with what the server before left taken up.

    Its end leaves what runs to the next server; `drain` first gives it time.

    Raises:
        StoreError: The database does not answer, or the state directory takes no files.
        MachineError: The state directory belongs to another database.
    """
    office = ServiceOffice(parts)
    try:
        await office.open()
        yield office
    finally:
        await run_shielded(office.aclose())


def _entry(caller: Caller, action: str, target: str) -> AuditRow:
    """That this caller did this."""
    return AuditRow(
        at=time.time(),
        tenant_id=caller.tenant.tenant_id,
        actor=f"key:{caller.key_id}",
        action=action,
        target=target,
    )


def _named(cards: Mapping[str, ModelCard], decided: Decided) -> set[str]:
    """The models that a run names, by their own names, and not those that it may have besides."""
    if decided.allow_models:
        return {card.name for card in cards.values()}
    return {cards[ROOT_ALIAS].name, cards[SUB_ALIAS].name}


def _check_limit(limit: int) -> None:
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidRequestError(f"a page has 1 to {MAX_PAGE} entries")


def _request_hash(question: Question, after: str) -> str:
    """What makes two requests the same, besides their key."""
    text = None if question.text is None else hashlib.sha256(question.text).hexdigest()
    asked = [question.question, question.context_id, text, dict(question.options), after]
    return hashlib.sha256(json.dumps(asked, sort_keys=True, default=str).encode()).hexdigest()
