"""A store that lasts as long as the process."""

import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence

from orchestrator.errors import InvariantError
from orchestrator.ids import RunId
from orchestrator.store.port import LedgerEntry
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
        blobs: Sequence[bytes] = (),
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        """See `RunStore.append`."""
        stored = self._events[run_id]
        if len(stored) != expected_seq:
            raise InvariantError(f"run has {len(stored)} events, the writer expected {expected_seq}")
        if [event.seq for event in events] != list(range(expected_seq, expected_seq + len(events))):
            raise InvariantError("the events to append are not dense")
        stored.extend(events)
        self._blobs.update((hashlib.sha256(blob).hexdigest(), blob) for blob in blobs)
        self.ledger_entries.extend(ledger_entries)

    async def events(self, run_id: RunId, from_seq: int = 0) -> AsyncIterator[Event]:
        """See `RunStore.events`."""
        for event in self._events.get(run_id, [])[from_seq:]:
            yield event

    async def blob(self, sha256: str) -> bytes | None:
        """See `RunStore.blob`."""
        return self._blobs.get(sha256)
