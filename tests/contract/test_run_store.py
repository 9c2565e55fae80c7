import hashlib
from collections.abc import AsyncIterator, Callable, Sequence

import pytest

from orchestrator.budget import Amounts
from orchestrator.errors import InvariantError
from orchestrator.ids import LOCAL_TENANT, RunId
from orchestrator.store.database import open_database
from orchestrator.store.memory import MemoryRunStore
from orchestrator.store.port import LedgerEntry, RunStore
from orchestrator.store.sql_events import SqlRunStore
from orchestrator.trajectory import Event, TurnStarted
from tests.databases import DATABASES
from tests.fakes.tenancy import a_tenant, stored_run

RUN, OTHER = RunId("r0"), RunId("r1")
TEXT = b"a long text"
TEXT_HASH = hashlib.sha256(TEXT).hexdigest()
EMPTY_HASH = hashlib.sha256(b"").hexdigest()
BLOB = {TEXT_HASH: TEXT}
ENTRY = LedgerEntry(
    tenant_id=LOCAL_TENANT,
    run_id=RUN,
    call="turn-1",
    attempt=1,
    confirmed=Amounts(10, 20, 1),
    unconfirmed=Amounts(),
)


@pytest.fixture(params=["memory", *DATABASES])
async def store(
    request: pytest.FixtureRequest, new_store_url: Callable[[str], str]
) -> AsyncIterator[RunStore]:
    """Every RunStore we ship. A new one joins here and nowhere else."""
    if request.param == "memory":
        yield MemoryRunStore()
        return
    async with open_database(new_store_url(request.param)) as database:
        tenant_id = await a_tenant(database, tenant_id=LOCAL_TENANT)
        yield SqlRunStore(database, tenant_id, await stored_run(database, tenant_id))


def events(run_id: RunId, *seqs: int) -> list[Event]:
    return [Event(run_id, seq, 1_700_000_000.25, TurnStarted(turn=seq, request_bytes=1)) for seq in seqs]


async def stored(store: RunStore, run_id: RunId, from_seq: int = 0) -> Sequence[Event]:
    return [event async for event in store.events(run_id, from_seq)]


async def test_what_was_appended_is_read_back_in_order(store: RunStore) -> None:
    await store.append(RUN, 0, events(RUN, 0, 1))
    await store.append(RUN, 2, events(RUN, 2))
    assert await stored(store, RUN) == events(RUN, 0, 1, 2)


async def test_events_are_read_from_any_place_on(store: RunStore) -> None:
    await store.append(RUN, 0, events(RUN, 0, 1, 2))
    assert await stored(store, RUN, 2) == events(RUN, 2)
    assert await stored(store, RUN, 3) == []


async def test_runs_are_apart(store: RunStore) -> None:
    await store.append(RUN, 0, events(RUN, 0))
    await store.append(OTHER, 0, events(OTHER, 0, 1))
    assert await stored(store, RUN) == events(RUN, 0)
    assert await stored(store, OTHER) == events(OTHER, 0, 1)


async def test_a_run_that_was_never_written_has_no_events(store: RunStore) -> None:
    assert await stored(store, RUN) == []


@pytest.mark.parametrize("expected_seq", [0, 1, 3])
async def test_a_writer_that_expects_another_length_is_refused(store: RunStore, expected_seq: int) -> None:
    await store.append(RUN, 0, events(RUN, 0, 1))
    with pytest.raises(InvariantError):
        await store.append(RUN, expected_seq, events(RUN, expected_seq))
    assert await stored(store, RUN) == events(RUN, 0, 1)


@pytest.mark.parametrize("seqs", [(1,), (0, 2), (1, 0), (0, 0)])
async def test_events_that_are_not_dense_are_refused(store: RunStore, seqs: tuple[int, ...]) -> None:
    with pytest.raises(InvariantError):
        await store.append(RUN, 0, events(RUN, *seqs))
    assert await stored(store, RUN) == []


async def test_of_what_is_refused_nothing_is_stored(store: RunStore) -> None:
    with pytest.raises(InvariantError):
        await store.append(RUN, 5, events(RUN, 5), blobs=BLOB, ledger_entries=[ENTRY])
    assert await store.blob(TEXT_HASH) is None
    await store.append(RUN, 0, events(RUN, 0))


async def test_a_blob_is_found_by_its_hash(store: RunStore) -> None:
    await store.append(RUN, 0, events(RUN, 0), blobs={**BLOB, EMPTY_HASH: b""})
    assert await store.blob(TEXT_HASH) == TEXT
    assert await store.blob(EMPTY_HASH) == b""


async def test_the_same_blob_may_come_again(store: RunStore) -> None:
    await store.append(RUN, 0, events(RUN, 0), blobs=BLOB)
    await store.append(OTHER, 0, events(OTHER, 0), blobs=BLOB)
    assert await store.blob(TEXT_HASH) == TEXT


async def test_an_unknown_hash_is_no_blob(store: RunStore) -> None:
    assert await store.blob(TEXT_HASH) is None
