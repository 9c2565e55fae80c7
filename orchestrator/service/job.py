"""A run that waits or runs here: what of it is stored, what it was billed, and how it ended."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass

from orchestrator.budget import ZERO, Amounts
from orchestrator.errors import StoreError
from orchestrator.ids import RunId
from orchestrator.store.books import RunRow, TenantRow
from orchestrator.store.port import NO_BLOBS, LedgerEntry, RunStore
from orchestrator.trajectory import CallSettled, Event, RunStarted
from orchestrator.turn import Outcome


@dataclass(frozen=True, slots=True)
class End:
    """How a run ended."""

    outcome: str
    error: str = ""
    answer: bytes | None = None


CANCELLED = End(Outcome.CANCELLED.value, "the run was cancelled")


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


class Record:
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
class Job:
    """A run that waits or runs here."""

    row: RunRow
    tenant: TenantRow
    resume: bool
    bill: Bill
    record: Record
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
