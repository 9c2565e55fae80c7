"""What a server that ended left behind: runs that had not ended, calls that were not settled, files.

Rules:

1. Nothing of a run goes on before its open calls are settled at their worst case, with a ledger entry each,
   and what its tree had drawn from its tenant beyond that is given back.
2. A run whose events have their end has ended: only its row had not heard of it.
3. Any other run that had begun is resumed from its events, in the order of creation; one that had not is
   queued. One that was resumed too often ends, with its events readable.
"""

import json
import logging
import time
from dataclasses import dataclass, field

from orchestrator.budget import ZERO
from orchestrator.errors import CallerError
from orchestrator.ids import RunId
from orchestrator.runs.resuming import end_unresumed
from orchestrator.service.books import Books
from orchestrator.service.context_desk import ContextDesk
from orchestrator.service.execution import MAX_RESUMES, Bill, End, Execution
from orchestrator.service.watching import PAGE
from orchestrator.store.books import RunRow, RunState, TenantRow
from orchestrator.store.port import LedgerEntry, RunStore
from orchestrator.trajectory import Blob, Event, RunEnded, settle_after_crash
from orchestrator.turn import Outcome

_log = logging.getLogger(__name__)
_FAILED = Outcome.INTERNAL_ERROR.value


@dataclass(slots=True)
class _Past:
    """What the events of a tree say, once its open calls are settled."""

    bill: Bill = field(default_factory=Bill)
    has_begun: bool = False
    end: RunEnded | None = None


class Recovery:
    """Takes up the runs of one state directory."""

    def __init__(self, books: Books, execution: Execution, desk: ContextDesk, *, home: str) -> None:
        self._books = books
        self._execution = execution
        self._desk = desk
        self._home = home

    async def at_start(self) -> int:
        """Take up everything, before anybody may ask for anything; how many runs.

        Raises:
            StoreError: The database does not answer.
        """
        removed = await self._desk.sweep()
        if removed:
            _log.warning("%d files of contexts that nobody knows were removed", removed)
        rows = await self._books.runs.unended(self._home)
        for row in rows:
            # All of them first: they would count among those that run.
            if row.state is RunState.RUNNING:
                await self._books.runs.interrupted(row.run_id)
        for row in rows:
            tenant = await self._books.tenants.tenant(row.tenant_id)
            if tenant is not None:
                await self.take_up(row, tenant)
        return len(rows)

    async def take_up(self, row: RunRow, tenant: TenantRow) -> None:
        """Go on with one run that is not here yet.

        Raises:
            StoreError: The database does not answer.
        """
        past = await self._settled(row)
        end = await self._end(row, past)
        if end is None:
            try:
                self._execution.submit(row, tenant, resume=past.has_begun, billed=past.bill)
                return
            except CallerError as error:
                # What the tenant may do, or the server has, was narrowed meanwhile.
                await self.end(row, End(_FAILED, f"the run cannot go on: {error}"))
                return
        if past.end is None:
            await self.end(row, end)
        else:
            await self._ended(row, past, end)

    async def end(self, row: RunRow, end: End) -> None:
        """End an interrupted run that is not to go on.

        Raises:
            StoreError: The database does not answer.
        """
        past = await self._settled(row)
        store = self._books.trees.tree(row.tenant_id, row.run_id)
        await end_unresumed(row.run_id, end.error, tenant_id=row.tenant_id, store=store)
        await self._ended(row, past, end)

    async def _ended(self, row: RunRow, past: _Past, end: End) -> None:
        await self._books.runs.ended(
            row.run_id,
            at=time.time(),
            outcome=end.outcome,
            error=end.error,
            answer=end.answer,
            confirmed=past.bill.confirmed,
            unconfirmed=past.bill.unconfirmed,
        )

    async def _settled(self, row: RunRow) -> _Past:
        past = _Past()
        store = self._books.trees.tree(row.tenant_id, row.run_id)
        for run_id in await self._runs_of(row.run_id):
            past.has_begun = True
            events = [event async for event in store.events(run_id)]
            events += await _settle(store, row, run_id, events)
            for event in events:
                past.bill.add(event)
                if run_id == row.run_id and isinstance(event.payload, RunEnded):
                    past.end = event.payload
        await self._books.usage.reclaim(row.tenant_id, tree=row.run_id)
        return past

    async def _runs_of(self, root: RunId) -> list[RunId]:
        """The runs of a tree, the root first."""
        found: dict[RunId, None] = {}
        position = 0
        while page := await self._books.trees.tree_events(root, position, limit=PAGE):
            found.update((RunId(json.loads(data)["run_id"]), None) for _, data in page)
            position += len(page)
        return list(found)

    async def _end(self, row: RunRow, past: _Past) -> End | None:
        if past.end is not None:
            return End(past.end.outcome, past.end.error, await self._answer(row, past.end))
        if row.resumed >= MAX_RESUMES:
            why = f"the run was resumed {row.resumed} times and gets no further"
            return End(_FAILED, why)
        return None

    async def _answer(self, row: RunRow, end: RunEnded) -> bytes | None:
        if isinstance(end.answer, Blob):
            return await self._books.trees.tree_blob(row.run_id, end.answer.sha256)
        return None if end.answer is None else end.answer.encode("utf-8", "replace")


async def _settle(store: RunStore, row: RunRow, run_id: RunId, events: list[Event]) -> list[Event]:
    """Settle what is open in one run's events; the events that say so."""
    settled = [payload for _, payload in settle_after_crash(events)]
    now = time.time()
    late = [Event(run_id, seq, now, payload) for seq, payload in enumerate(settled, start=len(events))]
    entries = [
        LedgerEntry(
            tenant_id=row.tenant_id,
            run_id=run_id,
            call=payload.call,
            attempt=payload.attempt,
            confirmed=ZERO,
            unconfirmed=payload.unconfirmed,
        )
        for payload in settled
    ]
    if late:
        await store.append(run_id, len(events), late, ledger_entries=entries)
    return late
