"""What a server that ended left behind: runs that had not ended, calls that were not settled, files.

Rules:

1. Nothing of a run goes on before its open calls are settled at their worst case, with a ledger entry each,
   and what its tree had drawn from its tenant beyond that is given back.
2. A run whose events have their end has ended: only its row had not heard of it.
3. A run that was to be cancelled ends so, and its events say so.
4. Any other run that had begun is resumed from its events, in the order of creation; one that had not is
   queued. One that was resumed too often ends, with its events readable.
5. Only the server of a run's home resumes it. Another one, which took over a server that is away, does the
   first three and leaves the run interrupted.
"""

import logging
import time
from dataclasses import dataclass, field

from orchestrator.errors import CallerError, MachineError
from orchestrator.ids import RunId, TenantId
from orchestrator.runs.resuming import end_unresumed, settle
from orchestrator.service.books import Books
from orchestrator.service.context_desk import ContextDesk
from orchestrator.service.execution import MAX_RESUMES, Execution
from orchestrator.service.job import CANCELLED, Bill, End
from orchestrator.service.presence import Presence
from orchestrator.store.books import RunRow, RunState, TenantRow, Wish
from orchestrator.trajectory import Blob, RunEnded
from orchestrator.turn import Outcome

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Past:
    """What the events of a tree say, once its open calls are settled."""

    bill: Bill = field(default_factory=Bill)
    has_begun: bool = False
    end: RunEnded | None = None


class Recovery:
    """Takes up the runs of one state directory, and settles those of servers that are away."""

    def __init__(self, books: Books, execution: Execution, desk: ContextDesk, presence: Presence) -> None:
        self._books = books
        self._execution = execution
        self._desk = desk
        self._presence = presence

    async def check_home(self) -> None:
        """Refuse a state directory of another database: its contexts would be taken for leftovers.

        Raises:
            MachineError: It has contexts, and this database has never heard of it.
            StoreError: The database does not answer.
        """
        if not await self._books.homes.knows(self._presence.home) and await self._desk.has_files():
            raise MachineError(
                "the state directory has contexts that this database knows nothing of: start the server on "
                "the database that it was used with, or on an empty state directory"
            )

    async def at_start(self) -> int:
        """Take up everything, before anybody may ask for anything; how many runs.

        Raises:
            StoreError: The database does not answer.
        """
        removed = await self._desk.sweep()
        if removed:
            _log.warning("%d files of contexts that nobody knows were removed", removed)
        return await self.take_up_all()

    async def take_up_all(self) -> int:
        """Take up every run of this home that has not ended and is not here; how many.

        Raises:
            StoreError: The database does not answer.
        """
        heads = await self._books.homes.claim(self._presence.home, self._presence.epoch)
        for head in heads:
            await self.take_up(head.tenant_id, head.run_id)
        return len(heads)

    async def take_up(self, tenant_id: TenantId, run_id: RunId) -> None:
        """Go on with one run of this home, or end it if that is wished. What is here stays as it is.

        Raises:
            StoreError: The database does not answer.
        """
        if self._execution.has(run_id):
            return
        row = await self._books.runs.head(tenant_id, run_id)
        tenant = await self._books.tenants.tenant(tenant_id)
        if row is None or tenant is None or row.state in {RunState.ENDED, RunState.RUNNING}:
            return
        past = await self._settled(row, self._presence.epoch)
        end = await self._end_of(row, past)
        if end is None and row.resumed >= MAX_RESUMES:
            end = _failed(f"the run was resumed {row.resumed} times and gets no further")
        if end is None:
            end = self._go_on(row, tenant, past)
        if end is not None:
            await self._end(row, past, end, self._presence.epoch)

    async def cancel(self, tenant_id: TenantId, run_id: RunId, *, was_waiting: bool) -> bool:
        """End a run of this home that does not run; False when it is just being left.

        Args:
            tenant_id: Whose it is.
            run_id: Which.
            was_waiting: It waited here, so it does not run, even if the database took its start.

        Raises:
            StoreError: The database does not answer.
        """
        row = await self._books.runs.head(tenant_id, run_id)
        if row is None or row.state is RunState.ENDED:
            return True
        if row.state is RunState.RUNNING and not was_waiting:
            return False
        past = await self._settled(row, self._presence.epoch)
        end = await self._end_of(row, past) or CANCELLED
        await self._end(row, past, end, self._presence.epoch)
        return True

    async def settle(self, tenant_id: TenantId, run_id: RunId, *, epoch: int) -> None:
        """Settle an interrupted run of a server that is away, and end it if it has ended or is to end.

        Args:
            tenant_id: Whose it is.
            run_id: Which.
            epoch: Under which it was taken over.

        Raises:
            TakenOverError: Its own server is back.
            StoreError: The database does not answer.
        """
        row = await self._books.runs.head(tenant_id, run_id)
        if row is None or row.state is not RunState.INTERRUPTED:
            return
        past = await self._settled(row, epoch)
        end = await self._end_of(row, past)
        if end is not None:
            await self._end(row, past, end, epoch)

    def _go_on(self, row: RunRow, tenant: TenantRow, past: _Past) -> End | None:
        try:
            self._execution.submit(row, tenant, resume=past.has_begun, billed=past.bill)
        except CallerError as error:
            # What the tenant may do, or the server has, was narrowed meanwhile.
            return _failed(f"the run cannot go on: {error}")
        return None

    async def _end_of(self, row: RunRow, past: _Past) -> End | None:
        """How it has ended or is to end, unless it goes on."""
        if past.end is not None:
            return End(past.end.outcome, past.end.error, await self._answer(row, past.end))
        return CANCELLED if row.wish is Wish.CANCEL else None

    async def _end(self, row: RunRow, past: _Past, end: End, epoch: int) -> None:
        if past.end is None:
            store = self._books.trees.tree(row.tenant_id, row.run_id, epoch=epoch)
            await end_unresumed(
                row.run_id, end.error, tenant_id=row.tenant_id, store=store, outcome=Outcome(end.outcome)
            )
        await self._books.runs.ended(
            row.run_id,
            at=time.time(),
            outcome=end.outcome,
            error=end.error,
            answer=end.answer,
            confirmed=past.bill.confirmed,
            unconfirmed=past.bill.unconfirmed,
            epoch=epoch,
        )

    async def _settled(self, row: RunRow, epoch: int) -> _Past:
        past = _Past()
        store = self._books.trees.tree(row.tenant_id, row.run_id, epoch=epoch)
        runs = await settle(row.run_id, tenant_id=row.tenant_id, store=store)
        for run_id, events in runs.items():
            past.has_begun = True
            for event in events:
                past.bill.add(event)
                if run_id == row.run_id and isinstance(event.payload, RunEnded):
                    past.end = event.payload
        await self._books.usage.reclaim(row.tenant_id, tree=row.run_id)
        return past

    async def _answer(self, row: RunRow, end: RunEnded) -> bytes | None:
        if isinstance(end.answer, Blob):
            return await self._books.trees.tree_blob(row.run_id, end.answer.sha256)
        return None if end.answer is None else end.answer.encode("utf-8", "replace")


def _failed(why: str) -> End:
    return End(Outcome.INTERNAL_ERROR.value, why)
