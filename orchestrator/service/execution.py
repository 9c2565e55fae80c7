"""Runs what was queued: fairly, on this server's machine, each to an end that is stored before it is told.

Rules:

1. A run is submitted after it was stored, and started when `fair` says so and the books agree that its tenant
   has room over all servers.
2. Its end is stored (`RunBook.ended`) before any watcher hears of it. A store that does not answer is asked
   again until it does, or the server drains.
3. A run whose events cannot be stored does not go on: nothing must be paid that nobody knows of. It is left
   as it stands, and resumed when the store answers again.
4. A run that the machine fails, be it an engine that is away or a disk that is full, is left as it stands
   too, and goes on in a new sandbox. Nothing else is started for `MACHINE_RESTS_S` then, and nothing at all
   while the server is not ready (`hold`).
5. Draining starts nothing. What still runs when the grace is over is left: its record takes nothing more, as
   if the server had been killed, and the next server resumes it from there.
"""

import asyncio
import logging
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

from orchestrator.access import ModelAccess
from orchestrator.app import RunOptions, Tenant, root_run, staged
from orchestrator.budget import ZERO, Amounts
from orchestrator.contexts.shelf import ContextShelf
from orchestrator.contexts.store import StagedContext
from orchestrator.errors import (
    CallerError,
    ConflictError,
    InvariantError,
    MachineError,
    NotFoundError,
    OrchestratorError,
    StoreError,
    TakenOverError,
)
from orchestrator.ids import RunId, TenantId
from orchestrator.machine import Machine
from orchestrator.models.choice import Wanted
from orchestrator.models.port import Model
from orchestrator.runs.call_slots import CallSlots
from orchestrator.runs.recorder import Observer
from orchestrator.runs.tree import ROOT_ALIAS, SUB_ALIAS
from orchestrator.service.books import Books
from orchestrator.service.context_desk import ContextDesk
from orchestrator.service.fair import FairQueue, Waiting
from orchestrator.service.hooks import ServiceHook
from orchestrator.service.log_context import log_context
from orchestrator.service.presence import Presence
from orchestrator.service.rules import Decided, Offer, decide, permits
from orchestrator.service.watching import Watching
from orchestrator.shielding import run_shielded
from orchestrator.store.books import RunRow, RunState, TenantRow
from orchestrator.store.port import NO_BLOBS, LedgerEntry, RunStore
from orchestrator.tenants.port import TenantAccount
from orchestrator.trajectory import CallSettled, Event, RunStarted
from orchestrator.turn import Outcome

_log = logging.getLogger(__name__)

_ASK_AGAIN_S = 1.0
"""A tenant whose runs other servers run is asked about so often; so is a store that does not answer ..."""
_LONGEST_PAUSE_S = 30.0
"""... and then ever less often."""
MACHINE_RESTS_S = 8.0
"""After it failed a run: so long until a look at it has found out what is the matter."""
MAX_RESUMES = 20
"""A run that is resumed more often does not get any further."""

_FAILED = Outcome.INTERNAL_ERROR.value

OnLeft = Callable[[RunId, TenantId], None]

MAX_CHAIN = 50
"""Runs that continue one another with one namespace: each runs the cells of all before it again."""

OpenAccount = Callable[[TenantRow, RunId], TenantAccount]
"""The allowance of a tenant, for one run tree."""


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended."""

    outcome: str
    error: str = ""
    answer: bytes | None = None


@dataclass(slots=True)
class Bill:
    """What a tree was billed so far, added up from its events."""

    confirmed: Amounts = ZERO
    unconfirmed: Amounts = ZERO

    def add(self, event: Event) -> None:
        """Count one event. See `Observer`."""
        match event.payload:
            case CallSettled() as settled:
                self.confirmed = self.confirmed.plus(settled.confirmed)
                self.unconfirmed = self.unconfirmed.plus(settled.unconfirmed)
            case RunStarted() as started if started.parent is not None:
                self.confirmed = self.confirmed.plus(Amounts(child_runs=1))
            case _:
                pass


class _Record:
    """The store of one tree, until the run is left.

    Args:
        open_tree: Opens it for writing under an epoch of the server.
    """

    def __init__(self, open_tree: Callable[[int], RunStore]) -> None:
        self._open_tree = open_tree
        self._store = open_tree(0)
        self.epoch = 0
        """Under which it is written; 0 before the run was started here."""
        self.is_left = False
        self.on_lost: Callable[[], None] = lambda: None
        """Told when the store does not take something, and the run is left because of that."""

    def begin(self, epoch: int) -> None:
        """The run was started under this epoch: what is appended is stored under it."""
        self.epoch = epoch
        self._store = self._open_tree(epoch)

    async def append(
        self,
        run_id: RunId,
        expected_seq: int,
        events: Sequence[Event],
        *,
        blobs: Mapping[str, bytes] = NO_BLOBS,
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        """See `RunStore.append`."""
        if self.is_left:
            raise StoreError("this server leaves the run to the next")
        try:
            await self._store.append(run_id, expected_seq, events, blobs=blobs, ledger_entries=ledger_entries)
        except StoreError:
            # Else a store that answers again a moment later would be told that the run ended of this.
            if not self.is_left:
                self.is_left = True
                self.on_lost()
            raise

    def events(self, run_id: RunId, from_seq: int = 0) -> AsyncIterator[Event]:
        """See `RunStore.events`."""
        return self._store.events(run_id, from_seq)

    async def blob(self, sha256: str) -> bytes | None:
        """See `RunStore.blob`."""
        return await self._store.blob(sha256)


@dataclass(slots=True, eq=False)
class _Job:
    """A run that waits or runs here."""

    row: RunRow
    tenant: TenantRow
    resume: bool
    bill: Bill
    record: _Record
    task: asyncio.Task[None] | None = None
    is_cancelled: bool = False
    is_ending: bool = False
    """Its end is being stored: too late to stop it."""
    is_removed: bool = False
    """With its tenant: there is no row any more to store anything in, but for what it costs."""

    def stop(self) -> None:
        """Stop it from outside, once."""
        if self.task is not None and not self.is_ending:
            self.task.cancel()


class Execution:
    """The runs of one server. Open it with `executing`."""

    def __init__(
        self,
        *,
        books: Books,
        presence: Presence,
        machine: Machine,
        models: ModelAccess,
        desk: ContextDesk,
        shelf: ContextShelf,
        watching: Watching,
        offer: Offer,
        open_account: OpenAccount,
        max_running: int,
        max_model_calls: int,
        hooks: Sequence[ServiceHook] = (),
        is_held: bool = False,
    ) -> None:
        """Runs nothing yet.

        Args:
            books: The database.
            presence: Under whose epoch runs are started.
            machine: Where they run.
            models: Connected.
            desk: Where the contexts of runs are.
            shelf: Where they are kept between runs, on the machines.
            watching: Told of events and ends.
            offer: What runs are decided by.
            open_account: Who pays.
            max_running: Runs at once.
            max_model_calls: Calls of models in flight at once, of all runs.
            hooks: Told of runs.
            is_held: See `hold`.
        """
        self._books = books
        self._presence = presence
        self._machine = machine
        self._models = models
        self._desk = desk
        self._shelf = shelf
        self._watching = watching
        self._offer = offer
        self._open_account = open_account
        self._hooks = hooks
        self._queue = FairQueue(max_running=max_running, sandboxes=offer.max_sandboxes)
        self._call_slots = CallSlots(max_model_calls)
        self._jobs: dict[RunId, _Job] = {}
        self._content_ids: dict[str, str] = {}
        """On the shelf, by context id."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._draining = asyncio.Event()
        self._is_held = is_held
        self._resting: asyncio.TimerHandle | None = None
        self.on_left: OnLeft = lambda _run, _tenant: None
        """Told of a run that was left although this server goes on: who resumes runs sets it."""

    @property
    def running(self) -> int:
        """Runs that run here."""
        return self._queue.running

    @property
    def waiting(self) -> int:
        """Runs that wait here."""
        return self._queue.waiting()

    def has(self, run_id: RunId) -> bool:
        """Whether the run waits or runs here."""
        return run_id in self._jobs

    def bill(self, run_id: RunId) -> Bill | None:
        """What a run that is here was billed so far."""
        job = self._jobs.get(run_id)
        return job.bill if job is not None else None

    def submit(self, row: RunRow, tenant: TenantRow, *, resume: bool, billed: Bill | None = None) -> None:
        """Start a stored run when its turn has come.

        Args:
            row: The run.
            tenant: Its tenant, as it is now.
            resume: Go on from its events.
            billed: What it was billed before.

        Raises:
            InvalidRequestError: Its chain is longer than this server's sandboxes.
        """
        if row.run_id in self._jobs:
            raise InvariantError("a run was submitted twice")
        self._enqueue(row, tenant)
        # A thousand may wait, with questions of a megabyte each: those are read when they are needed.
        row = replace(row, question="", answer=None)
        on_stored = self._watching.here(row.run_id)
        record = _Record(
            lambda epoch: self._books.trees.tree(row.tenant_id, row.run_id, on_stored=on_stored, epoch=epoch)
        )
        job = self._jobs[row.run_id] = _Job(row, tenant, resume, billed or Bill(), record)
        # Not at once: whoever could not store something is told of that first.
        record.on_lost = lambda: self._soon(job.stop)
        self._fill()

    def cancel(self, run_id: RunId) -> bool:
        """Begin to end a run that runs here; False when it does not."""
        job = self._jobs.get(run_id)
        if job is None or job.task is None:
            return False
        if not job.is_cancelled and not job.record.is_left:
            job.stop()
        job.is_cancelled = True
        return True

    @contextmanager
    def withdrawn(self, run_id: RunId) -> Iterator[bool]:
        """A run that waits here waits no more when the block has ended it. If that raises, it
        goes on waiting, behind its tenant's others. Whether it waited.
        """
        job = self._jobs.get(run_id)
        if job is None or job.task is not None:
            yield False
            return
        self._queue.remove(run_id, job.row.tenant_id)
        try:
            yield True
        except BaseException:
            self._enqueue(job.row, job.tenant)
            raise
        job.row = replace(job.row, state=RunState.ENDED)
        self._over(job)

    def hold(self, held: bool, *, but_one: bool = False) -> None:
        """Start no run that waits, or go on. What runs goes on in any case.

        Args:
            held: Whether to hold them.
            but_one: Start the one whose turn it is all the same: what it meets tells how things stand.
        """
        self._is_held = False
        self._fill(at_most=int(but_one) if held else sys.maxsize)
        self._is_held = held

    @property
    def tenants(self) -> frozenset[TenantId]:
        """Whose runs wait or run here."""
        return frozenset(job.row.tenant_id for job in self._jobs.values())

    def remove_tenant(self, tenant_id: TenantId) -> None:
        """End what a tenant has here that is not in the books any more."""
        for job in tuple(self._jobs.values()):
            if job.row.tenant_id != tenant_id or job.is_removed:
                continue
            job.is_removed = job.is_cancelled = True
            if job.task is None:
                self._queue.remove(job.row.run_id, tenant_id)
                self._removed(job)
            else:
                job.stop()

    def forget_context(self, tenant_id: TenantId, context_id: str) -> None:
        """A context was deleted: it is not kept on the machine either."""
        content_id = self._content_ids.pop(context_id, None)
        if content_id is not None:
            self._shelf.drop(tenant_id, content_id)

    async def drain(self, grace_s: float) -> None:
        """Start nothing more, give running runs time to end, and leave those that have not. For good."""
        self._draining.set()
        tasks = {job.task for job in self._jobs.values() if job.task is not None}
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=grace_s)
            for job in tuple(self._jobs.values()):
                # What was cancelled is ending anyway, and is to be recorded as that.
                if job.task in late and not job.is_cancelled and not job.record.is_left:
                    job.record.is_left = True
                    job.stop()
            if late:
                await asyncio.wait(late)
        self._watching.close()

    async def leave_all(self) -> None:
        """Leave everything as it stands, at once; what comes meanwhile is here to stay."""
        jobs = tuple(self._jobs.values())
        for job in jobs:
            job.record.is_left = True
            if job.task is None:
                self._queue.remove(job.row.run_id, job.row.tenant_id)
                self._over(job)
            else:
                job.stop()
        if tasks := {job.task for job in jobs if job.task is not None}:
            await asyncio.wait(tasks)

    async def aclose(self) -> None:
        """End whatever is left, at once."""
        await self.drain(0.0)
        if self._resting is not None:
            self._resting.cancel()
        for task in tuple(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)

    def _enqueue(self, row: RunRow, tenant: TenantRow) -> None:
        chain = decide(row.options, tenant, self._offer).limits.max_depth + 1
        self._queue.add(
            Waiting(row.run_id, row.tenant_id, chain),
            max_running=tenant.rules.max_concurrent_runs,
            max_sandboxes=tenant.rules.max_concurrent_sandboxes,
        )

    # --- One run --------------------------------------------------------------------------------------

    def _fill(self, *, at_most: int = sys.maxsize) -> None:
        """Start whatever has its turn and its room."""
        for _ in range(at_most):
            if self._draining.is_set() or self._is_held or self._resting is not None:
                return
            waiting = self._queue.next()
            if waiting is None:
                return
            job = self._jobs[waiting.run_id]
            with log_context(tenant_id=job.row.tenant_id, run_id=job.row.run_id):
                job.task = self._begin(self._carry(job))

    async def _carry(self, job: _Job) -> None:
        try:
            if not await self._may_start(job):
                return
            end = await self._to_end(job)
            if job.is_removed:
                self._removed(job)
                return
            await run_shielded(self._leave(job) if end is None else self._end(job, end))
        finally:
            self._fill()

    async def _may_start(self, job: _Job) -> bool:
        """Whether the books agree; if not, the run waits on, or is gone."""
        row, epoch = job.row, self._presence.epoch
        try:
            is_started = await run_shielded(
                self._books.runs.started(
                    row.run_id,
                    at=time.time(),
                    resumed=job.resume,
                    max_concurrent=job.tenant.rules.max_concurrent_runs,
                    epoch=epoch,
                )
            )
            stored = await self._books.runs.run(row.tenant_id, row.run_id)
        except StoreError as error:
            _log.warning("run %s cannot be started yet: %s", row.run_id, error)
            is_started, stored = False, row
        except asyncio.CancelledError:
            # Cancelled or drained before it began: whether it counts as started is not known.
            if not (job.is_cancelled or job.record.is_left):
                raise
            is_started, stored = True, row
        if is_started and stored is not None:
            job.row = stored
            job.record.begin(epoch)
            return True
        if stored is None or stored.state is RunState.ENDED:
            job.row = stored or replace(row, state=RunState.ENDED)
            self._queue.ended(row.run_id)
            self._over(job)
            return False
        job.task = None
        self._queue.put_back(row.run_id)
        self._queue.hold_back(row.tenant_id, held=True)
        self._begin(self._ask_again(row.tenant_id))
        return False

    async def _ask_again(self, tenant_id: TenantId) -> None:
        await asyncio.sleep(_ASK_AGAIN_S)
        self._queue.hold_back(tenant_id, held=False)
        self._fill()

    def _rest(self) -> None:
        """Start nothing for a while."""
        if self._resting is not None:
            self._resting.cancel()
        self._resting = asyncio.get_running_loop().call_later(MACHINE_RESTS_S, self._rested)

    def _rested(self) -> None:
        self._resting = None
        self._fill()

    def _failed_by_the_machine(self, job: _Job) -> None:
        """The run goes on later. Nothing that becomes of it from here on is recorded."""
        if job.is_cancelled or job.is_ending or job.record.is_left:
            return
        _log.warning("run %s is left as it stands: the machine failed it", job.row.run_id)
        job.record.is_left = True
        self._rest()

    async def _to_end(self, job: _Job) -> End | None:
        """The run's end, or None when it is left as it stands."""
        try:
            if not (job.is_cancelled or job.record.is_left):
                return await self._run(job, [hook.observer(job.row) for hook in self._hooks])
        except asyncio.CancelledError:
            if not (job.is_cancelled or job.record.is_left):
                raise
        except StoreError as error:
            job.record.is_left = True
            _log.warning("a run is left as it stands: %s", error)
        except CallerError as error:
            if not job.record.is_left:
                return End(_FAILED, str(error))
        except MachineError as error:
            _log.warning("a run is left as it stands: %s", error)
            self._failed_by_the_machine(job)
        except OrchestratorError as error:
            if job.is_removed:
                return CANCELLED  # its record takes nothing any more
            _log.error("a run failed", exc_info=error)
            if not job.record.is_left:
                return End(_FAILED, str(error))
        except Exception:
            # Whatever it is, it must not take the other runs of this server down.
            _log.exception("a run failed")
            if not job.record.is_left:
                return End(_FAILED, "the orchestrator failed; its log has the details")
        return None if job.record.is_left else CANCELLED

    async def _run(self, job: _Job, observers: Sequence[Observer]) -> End:
        row, tenant_id = job.row, job.row.tenant_id
        decided = decide(row.options, job.tenant, self._offer)

        def on_trouble() -> None:
            self._failed_by_the_machine(job)
            # Not at once: the run hears of what failed first.
            self._soon(job.stop)

        machine = replace(self._machine, leases=self._machine.leases.telling(on_trouble))
        tenant = Tenant(tenant_id=tenant_id, account=self._open_account(job.tenant, row.run_id))
        async with (
            self._context(row, machine, tenant) as context,
            self._models.models(wanted_by(decided)) as models,
        ):
            result = await root_run(
                row.run_id,
                options_of(row, decided),
                machine=machine,
                tenant=tenant,
                models=self._permitted(models, job.tenant),
                context=context,
                observers=(job.bill.add, *observers),
                store=job.record,
                resume=job.resume,
                after=await self._earlier(row),
                call_slots=self._call_slots,
                max_sandboxes=job.tenant.rules.max_concurrent_sandboxes,
            )
        answer = None if result.answer is None else result.answer.encode("utf-8", "replace")
        return End(result.outcome.value, result.why, answer)

    async def chain_of(self, row: RunRow) -> Sequence[RunId]:
        """The runs whose cells make up the namespace that a run ended with, the first one first.

        Raises:
            ConflictError: One of them was deleted, or there are too many.
            StoreError: The database does not answer.
        """
        chain = [row.run_id]
        one: RunRow | None = row
        while one is not None and one.keeps_namespace and one.continues is not None:
            if len(chain) == MAX_CHAIN:
                raise ConflictError(f"{MAX_CHAIN} runs have continued one another; start afresh")
            one = await self._books.runs.run(one.tenant_id, one.continues)
            if one is None:
                raise ConflictError("a run whose cells its namespace is made of was deleted")
            chain.append(one.run_id)
        return chain[::-1]

    async def _earlier(self, row: RunRow) -> Sequence[tuple[RunId, RunStore]]:
        """What is run again before a run that keeps another's namespace."""
        if not row.keeps_namespace or row.continues is None:
            return ()
        *earlier, _ = await self.chain_of(row)
        return [(run_id, self._books.trees.tree(row.tenant_id, run_id)) for run_id in earlier]

    def _permitted(self, models: Mapping[str, Model], tenant: TenantRow) -> dict[str, Model]:
        """Without a list of its own a run may name all that the settings list: here, what the tenant may."""
        return {
            name: model
            for name, model in models.items()
            if name in {ROOT_ALIAS, SUB_ALIAS} or permits(model.card.name, tenant.rules, self._offer)
        }

    @asynccontextmanager
    async def _context(self, row: RunRow, machine: Machine, tenant: Tenant) -> AsyncIterator[StagedContext]:
        """The run's context, staged; from the shelf where it is kept."""
        kept = await self._kept(row, machine)
        if kept is not None:
            try:
                yield kept
            finally:
                machine.contexts.release(kept)
            return
        context_row = await self._books.contexts.context(row.tenant_id, row.context_id)
        if context_row is None or not context_row.is_complete:
            raise NotFoundError("the run's context is gone")
        async with staged(machine.contexts, tenant, [self._desk.path(context_row)]) as context:
            shared = machine.contexts.share(context)
            self._content_ids[row.context_id] = await asyncio.to_thread(self._shelf.put, shared)
            yield context

    async def _kept(self, row: RunRow, machine: Machine) -> StagedContext | None:
        """The run's context if it is on the shelf. A thread's work: what is too old goes meanwhile."""
        content_id = self._content_ids.get(row.context_id)
        if content_id is None:
            return None
        taking = asyncio.ensure_future(asyncio.to_thread(self._shelf.take, row.tenant_id, content_id))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:
            await asyncio.wait((taking,))
            kept = taking.result()
            if kept is not None:
                machine.contexts.release(kept)
            raise

    # --- Ends -----------------------------------------------------------------------------------------

    async def _store_end(self, job: _Job, end: End) -> None:
        at, bill = time.time(), job.bill
        await self._books.runs.ended(
            job.row.run_id,
            at=at,
            outcome=end.outcome,
            error=end.error,
            answer=end.answer,
            confirmed=bill.confirmed,
            unconfirmed=bill.unconfirmed,
            epoch=job.record.epoch,
        )
        job.row = replace(
            job.row,
            state=RunState.ENDED,
            ended_at=at,
            outcome=end.outcome,
            error=end.error,
            confirmed=bill.confirmed,
            unconfirmed=bill.unconfirmed,
        )

    async def _end(self, job: _Job, end: End) -> None:
        job.is_ending = True
        await self._until_stored(lambda: self._store_end(job, end), f"the end of run {job.row.run_id}")
        # Drained before it was stored: the next server finds the run running, with its events at their end.
        self._queue.ended(job.row.run_id)
        self._over(job)

    async def _leave(self, job: _Job) -> None:
        """The run goes on later: with the next server, or here when the store answers again."""
        row = job.row
        job.is_ending = job.record.is_left = True
        await self._until_stored(
            lambda: self._books.runs.interrupted(row.run_id, epoch=job.record.epoch),
            f"that run {row.run_id} is interrupted",
        )
        job.row = replace(row, state=RunState.INTERRUPTED)
        self._queue.ended(row.run_id)
        self._over(job)
        if not self._draining.is_set():
            self.on_left(row.run_id, row.tenant_id)

    async def _until_stored(self, store: Callable[[], Awaitable[None]], what: str) -> None:
        """Ask the store until it answers, or the server drains."""
        pause_s = _ASK_AGAIN_S
        while True:
            try:
                return await store()
            except TakenOverError as error:
                # Whoever took the run over has stored how it stands.
                _log.warning("%s is not stored: %s", what, error)
                return None
            except StoreError as error:
                _log.warning("%s is not stored yet: %s", what, error)
            except OrchestratorError as error:
                # Its tenant was removed meanwhile, and the run with it.
                _log.error("%s is not stored: %s", what, error)
                return None
            if self._draining.is_set():
                return None
            with suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await self._draining.wait()
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def _removed(self, job: _Job) -> None:
        self._queue.ended(job.row.run_id)
        job.row = replace(job.row, state=RunState.ENDED)
        self._over(job)

    def _over(self, job: _Job) -> None:
        """It is not here any more."""
        self._jobs.pop(job.row.run_id, None)
        if job.row.state is RunState.ENDED:
            self._watching.over(job.row.run_id)
        else:
            self._watching.left(job.row.run_id)
        for hook in self._hooks:
            hook.left(job.row)

    def _soon(self, call: Callable[[], None]) -> None:
        asyncio.get_running_loop().call_soon(call)

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        return task

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            _log.error("a task of the service failed", exc_info=task.exception())


CANCELLED = End(Outcome.CANCELLED.value, "the run was cancelled")


def wanted_by(decided: Decided) -> Wanted:
    """The models of a run."""
    return Wanted(roles={ROOT_ALIAS: decided.model, SUB_ALIAS: decided.sub_model}, allow=decided.allow_models)


def options_of(row: RunRow, decided: Decided) -> RunOptions:
    """The run as the composition root takes it."""
    return RunOptions(
        question=row.question,
        context_paths=(),
        model=decided.model,
        sub_model=decided.sub_model,
        allow_models=decided.allow_models,
        dialect=decided.dialect,
        runtime=decided.runtime,
        memoise=decided.memoise,
        limits=decided.limits,
    )
