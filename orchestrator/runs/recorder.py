"""Writes one run's events: stores them first, then tells whoever watches.

Rules:

1. One write at a time, and events are stored in the order in which they were handed over. What is handed
   over while a write is under way goes with the next one, all of it together: a store that has to wait for
   a disk waits once for many.
2. Whoever must not go on before an event is durable waits for it (`record`). What comes before something
   that is waited for need not be waited for itself (`post`): it is stored no later.
3. When a write fails, those who wait for it are told, and what they recorded is dropped: it did not happen.
   What was posted did happen, and goes with the next write.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from orchestrator.ids import RunId
from orchestrator.store.port import LedgerEntry, RunStore
from orchestrator.trajectory import Blob, Event, Payload, Text, shorten

_log = logging.getLogger(__name__)

Observer = Callable[[Event], None]
"""Called with each event, in order within a run, once it is stored. Must be quick and must not raise."""


@dataclass(slots=True, eq=False)
class _Entry:
    """Events handed over together."""

    at: float
    payloads: Sequence[Payload]
    ledger_entries: Sequence[LedgerEntry]
    is_posted: bool
    is_over: bool = False
    failure: BaseException | None = None
    waiter: asyncio.Future[None] | None = None

    def end(self, failure: BaseException | None) -> None:
        """It is stored, or could not be."""
        self.is_over, self.failure = True, failure
        if self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)


class Recorder:
    """The one writer of a run's events. Tasks of the run may use it side by side."""

    def __init__(
        self, run_id: RunId, store: RunStore, observers: Sequence[Observer], *, next_seq: int = 0
    ) -> None:
        """Go on after `next_seq` events, all that the run has."""
        self.run_id = run_id
        self._store = store
        self._observers = observers
        self._next_seq = next_seq
        self._blobs: dict[str, bytes] = {}
        """By their hash, beside the next event."""
        self._entries: list[_Entry] = []
        """Not yet being written."""
        self._writing: asyncio.Task[None] | None = None

    def text(self, text: str) -> Text:
        """A text as it goes into an event. A long one is stored whole beside the next event."""
        short, whole = shorten(text)
        if isinstance(short, Blob) and whole is not None:
            self.keep(short, whole)
        return short

    def keep(self, short: Blob, whole: bytes) -> None:
        """Store the whole of a text that was shortened elsewhere, beside the next event."""
        self._blobs[short.sha256] = whole

    async def record(self, *payloads: Payload, ledger_entries: Sequence[LedgerEntry] = ()) -> None:
        """Append events; durable when this returns, also when its task is cancelled meanwhile."""
        entry = self._hand_over(payloads, ledger_entries, is_posted=False)
        cancelled: asyncio.CancelledError | None = None
        while not entry.is_over:
            entry.waiter = asyncio.get_running_loop().create_future()
            try:
                await entry.waiter
            except asyncio.CancelledError as error:
                cancelled = error
        if cancelled is not None:
            raise cancelled from entry.failure
        if entry.failure is not None:
            raise entry.failure

    async def stored(self) -> None:
        """Wait until everything that was posted so far is durable.

        Raises:
            OrchestratorError: What the store raised. It goes with the next write.
        """
        await self.record()

    def post(self, *payloads: Payload, ledger_entries: Sequence[LedgerEntry] = ()) -> None:
        """Append events soon, and before anything that is recorded after them. Something has to be."""
        self._hand_over(payloads, ledger_entries, is_posted=True)

    def _hand_over(
        self, payloads: Sequence[Payload], ledger_entries: Sequence[LedgerEntry], *, is_posted: bool
    ) -> _Entry:
        entry = _Entry(time.time(), payloads, ledger_entries, is_posted)
        self._entries.append(entry)
        if self._writing is None:
            self._writing = asyncio.create_task(self._write())
        return entry

    async def _write(self) -> None:
        """Write until nothing is left to write, or a write fails."""
        try:
            while self._entries:
                entries, self._entries = self._entries, []
                try:
                    events = await self._append(entries)
                except BaseException as failure:
                    self._entries[:0] = [entry for entry in entries if entry.is_posted]
                    for entry in entries:
                        if not entry.is_posted:
                            entry.end(failure)
                    if not isinstance(failure, Exception):
                        raise
                    if all(entry.is_posted for entry in self._entries):
                        # Nobody waits. They go with whatever is recorded next.
                        return
                else:
                    self._tell(events)
                    for entry in entries:
                        entry.end(None)
        finally:
            self._writing = None

    async def _append(self, entries: Sequence[_Entry]) -> Sequence[Event]:
        payloads = [(entry.at, payload) for entry in entries for payload in entry.payloads]
        if not payloads:
            return ()
        events = [
            Event(self.run_id, seq, at, payload)
            for seq, (at, payload) in enumerate(payloads, start=self._next_seq)
        ]
        blobs = dict(self._blobs)
        await self._store.append(
            self.run_id,
            self._next_seq,
            events,
            blobs=blobs,
            ledger_entries=[line for entry in entries for line in entry.ledger_entries],
        )
        self._next_seq += len(events)
        # Only now: what could not be stored comes with the next event. Others may have been added since.
        for sha256 in blobs:
            del self._blobs[sha256]
        return events

    def _tell(self, events: Sequence[Event]) -> None:
        for event in events:
            for observe in self._observers:
                try:
                    observe(event)
                except Exception:
                    # What is stored has happened, whoever could not bear to hear of it.
                    _log.exception("an observer of events failed")
