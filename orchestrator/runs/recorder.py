"""Writes one run's events: stores them first, then tells whoever watches."""

import asyncio
import time
from collections.abc import Callable, Sequence

from orchestrator.ids import RunId
from orchestrator.shielding import run_shielded
from orchestrator.store.port import LedgerEntry, RunStore
from orchestrator.trajectory import Event, Payload, Text, shorten

Observer = Callable[[Event], None]
"""Called with each event, in order within a run, once it is stored. Must be quick and must not raise."""


class Recorder:
    """The one writer of a run's events. Tasks of the run may use it side by side."""

    def __init__(self, run_id: RunId, store: RunStore, observers: Sequence[Observer]) -> None:
        self.run_id = run_id
        self._store = store
        self._observers = observers
        self._next_seq = 0
        self._blobs: list[bytes] = []
        self._writing = asyncio.Lock()

    def text(self, text: str) -> Text:
        """A text as it goes into an event. A long one is stored whole beside the next event."""
        short, blob = shorten(text)
        if blob is not None:
            self.keep(blob)
        return short

    def keep(self, blob: bytes) -> None:
        """Store the whole of a text that was shortened elsewhere, beside the next event."""
        self._blobs.append(blob)

    async def record(self, *payloads: Payload, ledger_entries: Sequence[LedgerEntry] = ()) -> None:
        """Append events; durable when this returns, also when its task is cancelled meanwhile."""
        await run_shielded(self._append(payloads, ledger_entries))

    async def _append(self, payloads: Sequence[Payload], ledger_entries: Sequence[LedgerEntry]) -> None:
        async with self._writing:
            now = time.time()
            events = [
                Event(self.run_id, self._next_seq + place, now, payload)
                for place, payload in enumerate(payloads)
            ]
            blobs = tuple(self._blobs)
            await self._store.append(
                self.run_id, self._next_seq, events, blobs=blobs, ledger_entries=ledger_entries
            )
            self._next_seq += len(events)
            # Only now: what could not be stored comes with the next event. Others may have been added since.
            del self._blobs[: len(blobs)]
            for event in events:
                for observe in self._observers:
                    observe(event)
