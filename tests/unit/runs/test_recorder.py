import asyncio
from collections.abc import Mapping, Sequence

import pytest

from orchestrator.budget import ZERO
from orchestrator.ids import LOCAL_TENANT, RunId
from orchestrator.runs.recorder import Recorder
from orchestrator.store.memory import MemoryRunStore
from orchestrator.store.port import NO_BLOBS, LedgerEntry
from orchestrator.trajectory import Blob, Event, TurnStarted

RUN = RunId("r0")


def turn(number: int) -> TurnStarted:
    return TurnStarted(turn=number, request_bytes=0)


class SlowStore(MemoryRunStore):
    """A store that takes its time before and after it has stored, like one that goes over a network."""

    def __init__(self) -> None:
        super().__init__()
        self.fail_with: Exception | None = None
        self.appends = 0

    async def append(
        self,
        run_id: RunId,
        expected_seq: int,
        events: Sequence[Event],
        *,
        blobs: Mapping[str, bytes] = NO_BLOBS,
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        await asyncio.sleep(0)
        self.appends += 1
        if self.fail_with is not None:
            raise self.fail_with
        await super().append(run_id, expected_seq, events, blobs=blobs, ledger_entries=ledger_entries)
        await asyncio.sleep(0)


async def stored(store: MemoryRunStore) -> list[Event]:
    return [event async for event in store.events(RUN)]


async def test_events_are_numbered_from_0_without_a_gap_however_many_write() -> None:
    store = SlowStore()
    recorder = Recorder(RUN, store, ())
    await asyncio.gather(*(recorder.record(turn(number), turn(number)) for number in range(50)))
    events = await stored(store)
    assert [event.seq for event in events] == list(range(100))
    assert all(
        first.payload == second.payload for first, second in zip(events[::2], events[1::2], strict=True)
    )


async def test_watchers_see_what_is_stored_in_its_order() -> None:
    store = SlowStore()
    seen: list[Event] = []
    recorder = Recorder(RUN, store, (seen.append,))
    await asyncio.gather(*(recorder.record(turn(number)) for number in range(20)))
    assert seen == await stored(store)


async def test_an_event_is_stored_before_anybody_is_told() -> None:
    store = SlowStore()
    known: list[int] = []
    recorder = Recorder(RUN, store, (lambda event: known.append(len(store._events[RUN]) - event.seq),))
    await recorder.record(turn(1))
    await recorder.record(turn(2))
    assert known == [1, 1]


async def test_a_long_text_is_stored_whole_beside_the_event_that_names_it() -> None:
    store = SlowStore()
    recorder = Recorder(RUN, store, ())
    text = recorder.text("ä" * 5_000)
    assert isinstance(text, Blob)
    assert await store.blob(text.sha256) is None
    await recorder.record(turn(1))
    assert await store.blob(text.sha256) == ("ä" * 5_000).encode()


async def test_a_short_text_is_left_alone() -> None:
    assert Recorder(RUN, SlowStore(), ()).text("short") == "short"


@pytest.mark.parametrize("after", range(6))
async def test_a_writer_cancelled_at_any_point_leaves_the_record_whole(after: int) -> None:
    store = SlowStore()
    recorder = Recorder(RUN, store, ())
    task = asyncio.create_task(recorder.record(turn(1)))
    for _ in range(after):
        await asyncio.sleep(0)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await recorder.record(turn(2))
    events = await stored(store)
    assert [event.seq for event in events] == list(range(len(events)))
    assert events[-1].payload == turn(2)
    if after:
        assert events[0].payload == turn(1), "what was begun is finished"


async def test_an_event_that_could_not_be_stored_leaves_no_gap_and_keeps_its_texts() -> None:
    store = SlowStore()
    seen: list[Event] = []
    recorder = Recorder(RUN, store, (seen.append,))
    text = recorder.text("x" * 5_000)
    assert isinstance(text, Blob)
    store.fail_with = OSError("disk full")
    with pytest.raises(OSError, match="disk full"):
        await recorder.record(turn(1))
    assert seen == []
    store.fail_with = None
    await recorder.record(turn(2))
    assert [event.seq for event in await stored(store)] == [0]
    assert await store.blob(text.sha256) is not None


async def test_what_comes_while_a_write_is_under_way_is_written_at_once() -> None:
    store = SlowStore()
    recorder = Recorder(RUN, store, ())
    await asyncio.gather(*(recorder.record(turn(number)) for number in range(1_000)))
    assert len(await stored(store)) == 1_000
    assert store.appends <= 2


async def test_what_was_posted_is_stored_before_what_is_recorded_after_it() -> None:
    store = SlowStore()
    seen: list[Event] = []
    recorder = Recorder(RUN, store, (seen.append,))
    recorder.post(turn(1), turn(2))
    await recorder.record(turn(3))
    assert [event.payload for event in await stored(store)] == [turn(1), turn(2), turn(3)]
    assert seen == await stored(store)


async def test_what_was_posted_is_stored_soon_also_when_nothing_follows() -> None:
    store = SlowStore()
    recorder = Recorder(RUN, store, ())
    recorder.post(turn(1))
    for _ in range(5):
        await asyncio.sleep(0)
    assert [event.payload for event in await stored(store)] == [turn(1)]


async def test_what_was_posted_outlives_a_failed_write_and_what_was_recorded_does_not() -> None:
    store = SlowStore()
    entry = LedgerEntry(
        tenant_id=LOCAL_TENANT, run_id=RUN, call="turn-1", attempt=1, confirmed=ZERO, unconfirmed=ZERO
    )
    recorder = Recorder(RUN, store, ())
    store.fail_with = OSError("disk full")
    recorder.post(turn(1), ledger_entries=(entry,))
    with pytest.raises(OSError, match="disk full"):
        await recorder.record(turn(2))
    store.fail_with = None
    await recorder.record(turn(3))
    events = await stored(store)
    assert [(event.seq, event.payload) for event in events] == [(0, turn(1)), (1, turn(3))]
    assert store.ledger_entries == [entry]


async def test_a_writer_that_was_cancelled_hears_of_a_failed_write_as_the_cause() -> None:
    store = SlowStore()
    store.fail_with = OSError("disk full")
    task = asyncio.create_task(Recorder(RUN, store, ()).record(turn(1)))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    assert isinstance(raised.value.__cause__, OSError)


async def test_an_observer_that_fails_takes_nothing_from_the_record_or_from_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    store = SlowStore()
    seen: list[Event] = []

    def fail(event: Event) -> None:
        raise RuntimeError("cannot bear it")

    recorder = Recorder(RUN, store, (fail, seen.append))
    await recorder.record(turn(1))
    await recorder.record(turn(2))
    assert seen == await stored(store)
    assert "an observer of events failed" in caplog.text
