"""Runs what was queued: fairly, on this server's machine, each to an end that is stored before it is told.

Rules:

1. A run is submitted after it was stored, and started when `fair` says so and the books agree that its tenant
   has room over all servers: for one more run, and for its sandboxes (`rooms`).
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
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

from orchestrator.errors import (
    CallerError,
    InvariantError,
    MachineError,
    OrchestratorError,
    StoreError,
    TakenOverError,
)
from orchestrator.ids import RunId, TenantId
from orchestrator.service.books import Books
from orchestrator.service.fair import FairQueue, Waiting
from orchestrator.service.hooks import ServiceHook
from orchestrator.service.job import CANCELLED, Bill, End, Job, Record
from orchestrator.service.log_context import log_context
from orchestrator.service.one_run import Runner
from orchestrator.service.presence import Presence
from orchestrator.service.rooms import Rooms
from orchestrator.service.rules import Offer, decide
from orchestrator.service.watching import Watching
from orchestrator.shielding import run_shielded
from orchestrator.store.books import RunRow, RunState, TenantRow
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


class Execution:
    """The runs of one server."""

    def __init__(
        self,
        *,
        books: Books,
        presence: Presence,
        rooms: Rooms,
        runner: Runner,
        watching: Watching,
        offer: Offer,
        max_running: int,
        hooks: Sequence[ServiceHook] = (),
        is_held: bool = False,
    ) -> None:
        """Runs nothing yet.

        Args:
            books: The database.
            presence: Under whose epoch runs are started.
            rooms: Of tenants' sandboxes, of this server.
            runner: Brings each to its end.
            watching: Told of events and ends.
            offer: What runs are decided by.
            max_running: Runs at once.
            hooks: Told of runs.
            is_held: See `hold`.
        """
        self._books = books
        self._presence = presence
        self._rooms = rooms
        self._runner = runner
        self._watching = watching
        self._offer = offer
        self._hooks = hooks
        self._queue = FairQueue(max_running=max_running, sandboxes=offer.max_sandboxes)
        self._jobs: dict[RunId, Job] = {}
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
        record = Record(
            lambda epoch: self._books.trees.tree(row.tenant_id, row.run_id, on_stored=on_stored, epoch=epoch)
        )
        job = self._jobs[row.run_id] = Job(row, tenant, resume, billed or Bill(), record)
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
                self._gone(job)
            else:
                job.stop()

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
        self._rooms.forget()

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
            if not self._starts:
                return
            waiting = self._queue.next()
            if waiting is None:
                return
            job = self._jobs[waiting.run_id]
            with log_context(tenant_id=job.row.tenant_id, run_id=job.row.run_id):
                job.task = self._begin(self._carry(job, waiting.chain))

    @property
    def _starts(self) -> bool:
        """Whether it starts anything now."""
        return not (self._draining.is_set() or self._is_held or self._resting is not None)

    async def _carry(self, job: Job, chain: int) -> None:
        try:
            if not await self._may_start(job, chain):
                return
            end = await self._to_end(job)
            if job.is_removed:
                self._queue.ended(job.row.run_id)
                self._gone(job)
                return
            await run_shielded(self._leave(job) if end is None else self._end(job, end))
        finally:
            self._fill()

    async def _start(self, job: Job, chain: int, epoch: int) -> bool:
        """Store that it is running, if its tenant has the room for it over all servers."""
        row, rules, rooms = job.row, job.tenant.rules, self._rooms
        most, at_once = rules.max_concurrent_sandboxes, rules.max_concurrent_runs
        if rooms.must_claim(row.tenant_id, chain, most) and not self._presence.is_alone:
            live = await self._books.runs.count_live(row.tenant_id)
            if live.get(RunState.RUNNING, 0) >= at_once:
                # Sandboxes are not what it waits for.
                rooms.give_way(row.tenant_id)
                return False
        if not await rooms.begin(row.run_id, row.tenant_id, chain, most=most):
            return False
        return await self._books.runs.started(
            row.run_id, at=time.time(), resumed=job.resume, max_concurrent=at_once, epoch=epoch
        )

    async def _may_start(self, job: Job, chain: int) -> bool:
        """Whether the books agree; if not, the run waits on, or is gone."""
        row, epoch = job.row, self._presence.epoch
        try:
            is_started = await run_shielded(self._start(job, chain, epoch))
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
        self._rooms.not_begun(row.run_id, row.tenant_id)
        self._queue.put_back(row.run_id)
        self._queue.hold_back(row.tenant_id, held=True)
        self._begin(self._ask_again(row.tenant_id))
        return False

    async def _ask_again(self, tenant_id: TenantId) -> None:
        await asyncio.sleep(_ASK_AGAIN_S)
        self._queue.hold_back(tenant_id, held=False)
        self._fill()
        if not self._starts:
            self._rooms.give_way(tenant_id)

    def _rest(self) -> None:
        """Start nothing for a while."""
        if self._resting is not None:
            self._resting.cancel()
        self._resting = asyncio.get_running_loop().call_later(MACHINE_RESTS_S, self._rested)

    def _rested(self) -> None:
        self._resting = None
        self._fill()

    def _failed_by_the_machine(self, job: Job) -> None:
        """The run goes on later. Nothing that becomes of it from here on is recorded."""
        if job.is_cancelled or job.is_ending or job.record.is_left:
            return
        _log.warning("run %s is left as it stands: the machine failed it", job.row.run_id)
        job.record.is_left = True
        self._rest()

    def _in_trouble(self, job: Job) -> None:
        self._failed_by_the_machine(job)
        # Not at once: the run hears of what failed first.
        self._soon(job.stop)

    async def _to_end(self, job: Job) -> End | None:
        """The run's end, or None when it is left as it stands."""
        try:
            if not (job.is_cancelled or job.record.is_left):
                observers = [hook.observer(job.row) for hook in self._hooks]
                return await self._runner.run(job, observers, on_trouble=lambda: self._in_trouble(job))
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
            if job.record.is_left:
                # It may have been settled by another server, which took back what this one would give back.
                _log.warning("a run that was left: %s", error)
                return None
            _log.error("a run failed", exc_info=error)
            return End(_FAILED, str(error))
        except Exception:
            # Whatever it is, it must not take the other runs of this server down.
            _log.exception("a run failed")
            if not job.record.is_left:
                return End(_FAILED, "the orchestrator failed; its log has the details")
        return None if job.record.is_left else CANCELLED

    # --- Ends -----------------------------------------------------------------------------------------

    async def _store_end(self, job: Job, end: End) -> None:
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

    async def _end(self, job: Job, end: End) -> None:
        job.is_ending = True
        await self._until_stored(lambda: self._store_end(job, end), f"the end of run {job.row.run_id}")
        # Drained before it was stored: the next server finds the run running, with its events at their end.
        self._queue.ended(job.row.run_id)
        self._over(job)

    async def _leave(self, job: Job) -> None:
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

    def _gone(self, job: Job) -> None:
        """It is not in the books any more, and nothing of it is stored."""
        job.row = replace(job.row, state=RunState.ENDED)
        self._over(job)

    def _over(self, job: Job) -> None:
        """It is not here any more."""
        self._jobs.pop(job.row.run_id, None)
        self._rooms.over(job.row.run_id, job.row.tenant_id)
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
