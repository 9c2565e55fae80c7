"""Where the events of runs are kept."""

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from orchestrator.budget import Amounts
from orchestrator.ids import RunId, TenantId
from orchestrator.trajectory import Event


@dataclass(frozen=True, kw_only=True, slots=True)
class LedgerEntry:
    """One movement of a tenant's account, written in the same breath as the event that explains it."""

    tenant_id: TenantId
    run_id: RunId
    call: str
    attempt: int
    confirmed: Amounts
    unconfirmed: Amounts


NO_BLOBS: Mapping[str, bytes] = MappingProxyType({})


class RunStore(Protocol):
    """Append-only events of runs, their long texts, and the ledger entries that go with them.

    A run has one writer, which waits for one `append` before it begins the next and hands over everything
    that has come up meanwhile. Appends of different runs come side by side: a store that has to wait for a
    disk may commit several of them together.

    One contract suite (`tests/contract/test_run_store.py`) runs over every implementation.
    """

    async def append(
        self,
        run_id: RunId,
        expected_seq: int,
        events: Sequence[Event],
        *,
        blobs: Mapping[str, bytes] = NO_BLOBS,
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        """Store all of it or nothing; durable when this returns.

        Args:
            run_id: Whose events they are.
            expected_seq: The run's length before; what the first event's `seq` must be.
            events: Dense and rising from `expected_seq`.
            blobs: Texts that the events refer to, by the hash under which they do. It is taken as given: who
                shortened a text has computed it.
            ledger_entries: What the events paid.

        Raises:
            InvariantError: The run has another length: somebody else writes to it too.
        """
        ...

    def events(self, run_id: RunId, from_seq: int = 0) -> AsyncIterator[Event]:
        """The run's events from `from_seq` on, in order, as far as there are any now."""
        ...

    async def blob(self, sha256: str) -> bytes | None:
        """A long text by its hash, or None when there is none."""
        ...
