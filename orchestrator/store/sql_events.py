"""The events of run trees in the database."""

import json
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import (
    ColumnElement,
    LargeBinary,
    Select,
    Table,
    bindparam,
    exists,
    func,
    select,
    type_coerce,
    update,
)

from orchestrator.errors import InvariantError, TakenOverError
from orchestrator.ids import RunId, TenantId
from orchestrator.shielding import run_shielded
from orchestrator.store import tables
from orchestrator.store.backend import Transaction
from orchestrator.store.books import OnStored
from orchestrator.store.database import Database
from orchestrator.store.port import NO_BLOBS, LedgerEntry
from orchestrator.store.tables import amounts_as
from orchestrator.trajectory import Event

PAGE = 500
"""Events read at once: a page is at most some megabytes, and no reader keeps a transaction open."""


class SqlTreeBook:
    """`TreeBook` over a database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def tree(
        self, tenant_id: TenantId, root: RunId, *, on_stored: OnStored | None = None, epoch: int = 0
    ) -> "SqlRunStore":
        """See `TreeBook.tree`."""
        return SqlRunStore(self._database, tenant_id, root, on_stored=on_stored, epoch=epoch)

    async def tree_events(
        self, root: RunId, from_position: int, *, limit: int
    ) -> Sequence[tuple[int, bytes]]:
        """See `TreeBook.tree_events`."""
        found = (
            select(tables.events.c.position, tables.events.c.event)
            .where(tables.events.c.root_run_id == root, tables.events.c.position >= from_position)
            .order_by(tables.events.c.position)
            .limit(limit)
        )

        async def work(connection: Transaction) -> Sequence[tuple[int, bytes]]:
            return [(row.position, row.event.encode("ascii")) for row in await connection.execute(found)]

        return await self._database.read(work)

    async def tree_blob(self, root: RunId, sha256: str) -> bytes | None:
        """See `TreeBook.tree_blob`."""
        its = tables.blobs.c
        return await _blob(
            self._database, select(its.data).where(its.root_run_id == root, its.sha256 == sha256)
        )

    async def tree_blob_part(self, root: RunId, sha256: str, *, start: int, max_bytes: int) -> bytes | None:
        """See `TreeBook.tree_blob_part`."""
        its = tables.blobs.c
        part = type_coerce(func.substr(its.data, start + 1, max_bytes), LargeBinary)
        return await _blob(self._database, select(part).where(its.root_run_id == root, its.sha256 == sha256))


class SqlRunStore:
    """`RunStore` of one run tree, whose root run is in the `RunBook`.

    Args:
        database: Where.
        tenant_id: Whose tree it is. Anybody else's is as if it were not there.
        root: Its root run.
        on_stored: See `TreeBook.tree`.
        epoch: Likewise.
    """

    def __init__(
        self,
        database: Database,
        tenant_id: TenantId,
        root: RunId,
        *,
        on_stored: OnStored | None = None,
        epoch: int = 0,
    ) -> None:
        self._database = database
        self._tenant_id = tenant_id
        self._root = root
        self._on_stored = on_stored
        self._epoch = epoch
        self._owed: set[LedgerEntry] = set()
        """Stored although the tree is gone. Its writer, who is told that it is, hands them over again."""

    async def append(
        self,
        run_id: RunId,
        expected_seq: int,
        events: Sequence[Event],
        *,
        blobs: Mapping[str, bytes] = NO_BLOBS,
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        """See `RunStore.append`. A tree that was deleted, or is another tenant's, takes nothing any more."""
        if any(event.seq != seq for seq, event in enumerate(events, start=expected_seq)):
            raise InvariantError("the events to append are not dense")
        if any(event.run_id != run_id for event in events):
            raise InvariantError("the events to append are another run's")
        if any(entry.tenant_id != self._tenant_id for entry in ledger_entries):
            raise InvariantError("a ledger entry is another tenant's")
        batch = _Batch(
            self._root,
            self._tenant_id,
            self._epoch,
            run_id,
            expected_seq,
            events,
            blobs,
            ledger_entries,
            owed=[entry for entry in ledger_entries if entry not in self._owed],
        )

        async def work(connection: Transaction) -> int | None:
            return await batch.store(self._database, connection)

        async def store_and_tell() -> None:
            first = await self._database.write(work, lane=self._root)
            if first is None:
                self._owed.update(ledger_entries)
                raise InvariantError("the run tree is not there: it was deleted, or never created")
            if self._on_stored is not None:
                self._on_stored(first, events)

        # What is stored is told, also when whoever stores it is cancelled meanwhile.
        await run_shielded(store_and_tell())

    async def events(self, run_id: RunId, from_seq: int = 0) -> AsyncIterator[Event]:
        """See `RunStore.events`."""
        while page := await self._page(run_id, from_seq):
            for event in page:
                yield event
            if len(page) < PAGE:
                return
            from_seq = page[-1].seq + 1

    async def blob(self, sha256: str) -> bytes | None:
        """See `RunStore.blob`."""
        found = select(tables.blobs.c.data).where(*self._ours(tables.blobs), tables.blobs.c.sha256 == sha256)
        return await _blob(self._database, found)

    async def runs(self) -> Sequence[RunId]:
        """The runs of the tree that have events, in the order in which they began."""
        found = (
            select(tables.events.c.run_id)
            .where(*self._ours(tables.events), tables.events.c.seq == 0)
            .order_by(tables.events.c.position)
        )

        async def work(connection: Transaction) -> Sequence[RunId]:
            return [RunId(run_id) for run_id in (await connection.execute(found)).scalars()]

        return await self._database.read(work)

    async def _page(self, run_id: RunId, from_seq: int) -> Sequence[Event]:
        found = (
            select(tables.events.c.event)
            .where(*self._ours(tables.events))
            .where(tables.events.c.run_id == run_id, tables.events.c.seq >= from_seq)
            .order_by(tables.events.c.seq)
            .limit(PAGE)
        )

        async def work(connection: Transaction) -> Sequence[str]:
            return (await connection.execute(found)).scalars().all()

        # Reading them takes some milliseconds in one piece, outside of the transaction.
        return [Event.from_json(json.loads(event)) for event in await self._database.read(work)]

    def _ours(self, table: Table) -> tuple[ColumnElement[bool], ...]:
        """Rows of this tree, if it is this tenant's."""
        is_ours = exists().where(
            tables.runs.c.run_id == self._root, tables.runs.c.tenant_id == self._tenant_id
        )
        return table.c.root_run_id == self._root, is_ours


# Every append runs these. To put one together takes longer than to run it, and so they are put together once.
_TAKE_POSITIONS = (
    update(tables.runs)
    .where(tables.runs.c.run_id == bindparam("root"), tables.runs.c.tenant_id == bindparam("tenant"))
    .where(tables.runs.c.epoch == bindparam("epoch_of_writer"))
    .values(last_position=tables.runs.c.last_position + bindparam("count"))
    .returning(tables.runs.c.last_position)
)
_IS_THERE = select(tables.runs.c.run_id).where(
    tables.runs.c.run_id == bindparam("root"), tables.runs.c.tenant_id == bindparam("tenant")
)
_IS_ANYBODYS = select(tables.runs.c.run_id).where(tables.runs.c.run_id == bindparam("root"))
_LAST_SEQ = select(func.max(tables.events.c.seq)).where(
    tables.events.c.root_run_id == bindparam("root"), tables.events.c.run_id == bindparam("run")
)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What one append stores."""

    root: RunId
    tenant_id: TenantId
    epoch: int
    run_id: RunId
    expected_seq: int
    events: Sequence[Event]
    blobs: Mapping[str, bytes]
    ledger_entries: Sequence[LedgerEntry]
    owed: Sequence[LedgerEntry]
    """Those of them that are stored where the tree is gone."""

    async def store(self, database: Database, connection: Transaction) -> int | None:
        """Store it; the position of its first event.

        None when the tree is gone, as with its tenant. What a call cost that was in flight then is owed all
        the same, and so the ledger's part is stored: it refers to nothing that could be gone.
        """
        first = await self._take_positions(connection)
        if first is None:
            await self._store_ledger(database, connection, self.owed)
            return None
        await self._check_length(connection)
        if self.events:
            await connection.execute(
                database.insert(tables.events),
                [
                    {
                        "root_run_id": self.root,
                        "position": position,
                        "run_id": event.run_id,
                        "seq": event.seq,
                        "event": json.dumps(event.to_json(), separators=(",", ":")),
                    }
                    for position, event in enumerate(self.events, start=first)
                ],
            )
        if self.blobs:
            await connection.execute(
                database.insert(tables.blobs).on_conflict_do_nothing(),
                [
                    {"root_run_id": self.root, "sha256": sha256, "data": data}
                    for sha256, data in self.blobs.items()
                ],
            )
        await self._store_ledger(database, connection, self.ledger_entries)
        return first

    async def _store_ledger(
        self, database: Database, connection: Transaction, entries: Sequence[LedgerEntry]
    ) -> None:
        if entries:
            at = self.events[-1].at if self.events else time.time()
            await connection.execute(
                database.insert(tables.ledger), [self._line(entry, at) for entry in entries]
            )

    async def _take_positions(self, connection: Transaction) -> int | None:
        """The first of as many as there are events. Until the transaction ends, nobody else gets any.

        None when there is no such tree at all.
        """
        moved = await connection.execute(
            _TAKE_POSITIONS,
            {
                "root": self.root,
                "tenant": self.tenant_id,
                "epoch_of_writer": self.epoch,
                "count": len(self.events),
            },
        )
        last: int | None = moved.scalar_one_or_none()
        if last is None:
            its = {"root": self.root, "tenant": self.tenant_id}
            if (await connection.execute(_IS_THERE, its)).one_or_none() is not None:
                raise TakenOverError("the run tree is written under another epoch of its home")
            if (await connection.execute(_IS_ANYBODYS, {"root": self.root})).one_or_none() is None:
                return None
            raise InvariantError("the run tree is not there: it is another tenant's")
        return last + 1 - len(self.events)

    async def _check_length(self, connection: Transaction) -> None:
        # Not part of the statement before: that one may have looked before it got the tree to itself.
        found = await connection.execute(_LAST_SEQ, {"root": self.root, "run": self.run_id})
        last: int | None = found.scalar_one()
        length = 0 if last is None else last + 1
        if length != self.expected_seq:
            raise InvariantError(f"run has {length} events, the writer expected {self.expected_seq}")

    def _line(self, entry: LedgerEntry, at: float) -> dict[str, object]:
        return {
            "at": at,
            "tenant_id": entry.tenant_id,
            "root_run_id": self.root,
            "run_id": entry.run_id,
            "call": entry.call,
            "attempt": entry.attempt,
            **amounts_as(entry.confirmed, "confirmed_"),
            **amounts_as(entry.unconfirmed, "unconfirmed_"),
        }


async def _blob(database: Database, found: Select[Any]) -> bytes | None:
    async def work(connection: Transaction) -> bytes | None:
        data: Any = (await connection.execute(found)).scalar_one_or_none()
        return None if data is None else bytes(data)

    return await database.read(work)
