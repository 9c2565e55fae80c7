"""A store that lasts as long as the process."""

from collections import defaultdict
from collections.abc import AsyncIterator, Mapping, Sequence

from orchestrator.errors import InvariantError
from orchestrator.ids import RunId
from orchestrator.store.port import NO_BLOBS, LedgerEntry
from orchestrator.trajectory import Event


class MemoryRunStore:
    """`RunStore` in memory: for single runs from the command line, and for tests."""

    def __init__(self) -> None:
        self._events: defaultdict[RunId, list[Event]] = defaultdict(list)
        self._blobs: dict[str, bytes] = {}
        self.ledger_entries: list[LedgerEntry] = []

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
        stored = self._events[run_id]
        if len(stored) != expected_seq:
            raise InvariantError(f"run has {len(stored)} events, the writer expected {expected_seq}")
        if any(event.seq != seq for seq, event in enumerate(events, start=expected_seq)):
            raise InvariantError("the events to append are not dense")
        stored.extend(events)
        self._blobs.update(blobs)
        self.ledger_entries.extend(ledger_entries)

    async def events(self, run_id: RunId, from_seq: int = 0) -> AsyncIterator[Event]:
        """See `RunStore.events`."""
        for event in self._events.get(run_id, [])[from_seq:]:
            yield event

    async def blob(self, sha256: str) -> bytes | None:
        """See `RunStore.blob`."""
        return self._blobs.get(sha256)
