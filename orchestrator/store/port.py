"""Where the events of runs are kept."""

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
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


class RunStore(Protocol):
    """Append-only events of runs, their long texts, and the ledger entries that go with them.

    One contract suite (`tests/contract/test_run_store.py`) runs over every implementation.
    """

    async def append(
        self,
        run_id: RunId,
        expected_seq: int,
        events: Sequence[Event],
        *,
        blobs: Sequence[bytes] = (),
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        """Store all of it or nothing; durable when this returns.

        Args:
            run_id: Whose events they are.
            expected_seq: The run's length before; what the first event's `seq` must be.
            events: Dense and rising from `expected_seq`.
            blobs: Texts that the events refer to by hash.
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
