import asyncio
import gc
from collections.abc import AsyncIterator, Sequence

import pytest

from orchestrator.errors import UnavailableError
from orchestrator.ids import RunId, TenantId
from orchestrator.service import watching
from orchestrator.service.watching import Watching, event_json
from orchestrator.store.books import OnStored
from orchestrator.store.port import RunStore
from orchestrator.trajectory import Event, TurnStarted

ROOT = RunId("r" + "0" * 20)


class Trees:
    """A `TreeBook` that counts how often it is asked."""

    def __init__(self) -> None:
        self.stored: list[bytes] = []
        self.reads = 0

    def tree(
        self, tenant_id: TenantId, root: RunId, *, on_stored: OnStored | None = None, epoch: int = 0
    ) -> RunStore:
        raise AssertionError("nobody writes here")

    async def tree_events(
        self, root: RunId, from_position: int, *, limit: int
    ) -> Sequence[tuple[int, bytes]]:
        self.reads += 1
        await asyncio.sleep(0)
        return list(enumerate(self.stored))[from_position : from_position + limit]

    async def tree_blob(self, root: RunId, sha256: str) -> bytes | None:
        raise AssertionError("no event has one")

    async def tree_blob_part(self, root: RunId, sha256: str, *, start: int, max_bytes: int) -> bytes | None:
        raise AssertionError("no event has one")

    def append(self, count: int = 1) -> tuple[int, list[Event]]:
        """Store events; their first position, and they."""
        first = len(self.stored)
        events = [Event(ROOT, first + n, 0.0, TurnStarted(turn=1, request_bytes=n)) for n in range(count)]
        self.stored += map(event_json, events)
        return first, events


async def never() -> bool:
    return False


async def always() -> bool:
    return True


def free() -> None:
    """Everybody may go on watching."""


async def collect(events: AsyncIterator[tuple[int, bytes]], into: list[tuple[int, bytes]]) -> None:
    async for entry in events:
        into.append(entry)


async def settle() -> None:
    """Every task that can go on has gone on."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_the_past_comes_first_and_then_what_happens_without_a_hole_or_a_repeat() -> None:
    trees = Trees()
    trees.append(450)
    live = Watching(trees)
    told = live.here(ROOT)
    seen: list[tuple[int, bytes]] = []
    watcher = asyncio.create_task(collect(live.watch(ROOT, 0, never, check=free), seen))
    for _ in range(30):
        told(*trees.append(3))
        await asyncio.sleep(0)
    await settle()
    live.over(ROOT)
    await watcher
    assert seen == list(enumerate(trees.stored))
    assert live.watchers == 0


async def test_a_watcher_begins_where_it_says() -> None:
    trees = Trees()
    trees.append(10)
    seen: list[tuple[int, bytes]] = []
    await collect(Watching(trees).watch(ROOT, 7, always, check=free), seen)
    assert [position for position, _ in seen] == [7, 8, 9]


async def test_a_position_that_is_yet_to_come_is_waited_for() -> None:
    trees = Trees()
    live = Watching(trees)
    told = live.here(ROOT)
    seen: list[tuple[int, bytes]] = []
    watcher = asyncio.create_task(collect(live.watch(ROOT, 5, never, check=free), seen))
    await settle()
    for _ in range(8):
        told(*trees.append())
        await settle()
    live.over(ROOT)
    await watcher
    assert [position for position, _ in seen] == [5, 6, 7]


async def test_appends_that_are_told_of_in_the_other_order_leave_no_hole() -> None:
    trees = Trees()
    live = Watching(trees)
    told = live.here(ROOT)
    seen: list[tuple[int, bytes]] = []
    watcher = asyncio.create_task(collect(live.watch(ROOT, 0, never, check=free), seen))
    await settle()
    told(*trees.append(2))
    await settle()
    first, second = trees.append(2), trees.append(3)
    told(*second)
    told(*first)
    await settle()
    told(*trees.append(1))
    await settle()
    live.over(ROOT)
    await watcher
    assert seen == list(enumerate(trees.stored))


async def test_a_thousand_watchers_of_what_happens_ask_the_store_for_the_past_only() -> None:
    trees = Trees()
    live = Watching(trees)
    told = live.here(ROOT)
    seen: list[list[tuple[int, bytes]]] = [[] for _ in range(1_000)]
    watchers = [asyncio.create_task(collect(live.watch(ROOT, 0, never, check=free), one)) for one in seen]
    await settle()
    assert live.watchers == 1_000
    told(*trees.append())
    await settle()
    reads = trees.reads
    for _ in range(50):
        told(*trees.append(2))
        await settle()
    assert trees.reads == reads, "events that are kept are not read again"
    live.over(ROOT)
    await asyncio.gather(*watchers)
    assert all(one == list(enumerate(trees.stored)) for one in seen)
    copies = {id(data) for one in seen for _, data in one[1:]}
    assert len(copies) == 100, "an event is encoded once for all of them"


async def test_a_watcher_that_takes_nothing_holds_nothing_and_misses_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watching, "KEPT_EVENTS", 10)
    trees = Trees()
    live = Watching(trees)
    told = live.here(ROOT)
    slow = live.watch(ROOT, 0, never, check=free)
    told(*trees.append())
    seen = [await anext(slow)]
    for _ in range(200):
        told(*trees.append())
    gc.collect()
    (topic,) = live._topics.values()
    assert len(topic.kept) == 10
    live.over(ROOT)
    await collect(slow, seen)
    assert seen == list(enumerate(trees.stored))


async def test_what_is_kept_has_a_limit_in_bytes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "KEPT_BYTES", 1_000)
    trees = Trees()
    live = Watching(trees)
    told = live.here(ROOT)
    watcher = asyncio.create_task(collect(live.watch(ROOT, 0, never, check=free), []))
    await settle()
    told(*trees.append(100))
    (topic,) = live._topics.values()
    assert topic.kept_bytes == sum(map(len, topic.kept)) <= 1_000
    live.over(ROOT)
    await watcher


async def test_nothing_is_kept_of_a_tree_that_nobody_watches() -> None:
    trees = Trees()
    live = Watching(trees)
    live.here(ROOT)(*trees.append(100))
    (topic,) = live._topics.values()
    assert not topic.kept


async def test_a_watch_is_cut_when_the_server_leaves_the_run_and_goes_on_elsewhere() -> None:
    trees = Trees()
    live = Watching(trees)
    told = live.here(ROOT)
    seen: list[tuple[int, bytes]] = []
    watcher = asyncio.create_task(collect(live.watch(ROOT, 0, never, check=free), seen))
    await settle()
    told(*trees.append(3))
    live.left(ROOT)
    with pytest.raises(UnavailableError):
        await watcher
    trees.append(2)
    await collect(Watching(trees).watch(ROOT, seen[-1][0] + 1, always, check=free), seen)
    assert seen == list(enumerate(trees.stored))


async def test_a_run_that_runs_elsewhere_is_looked_at_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "POLL_S", 0.01)
    trees = Trees()
    ended = False

    async def has_ended() -> bool:
        return ended

    seen: list[tuple[int, bytes]] = []
    watcher = asyncio.create_task(collect(Watching(trees).watch(ROOT, 0, has_ended, check=free), seen))
    for _ in range(3):
        trees.append()
        await asyncio.sleep(0.02)
    ended = True
    await watcher
    assert seen == list(enumerate(trees.stored))


async def test_a_watch_that_was_hung_up_on_leaves_nothing() -> None:
    trees = Trees()
    live = Watching(trees)
    watcher = asyncio.create_task(collect(live.watch(ROOT, 0, never, check=free), []))
    await settle()
    watcher.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watcher
    assert live.watchers == 0
    assert not live._topics


def test_an_event_is_one_line() -> None:
    _, (event,) = Trees().append()
    assert b"\n" not in event_json(event)


async def test_watchers_that_want_the_same_page_have_it_read_once() -> None:
    trees = Trees()
    trees.append(50)
    live = Watching(trees)
    starts = range(40)
    seen: list[list[tuple[int, bytes]]] = [[] for _ in starts]
    watches = [live.watch(ROOT, start, always, check=free) for start in starts]
    await asyncio.gather(*map(collect, watches, seen))
    assert [[position for position, _ in into] for into in seen] == [list(range(n, 50)) for n in starts]
    # The page, and what follows it; some came when a read was under way that could be too old.
    assert trees.reads <= 4


async def test_what_is_stored_while_an_older_read_is_under_way_is_not_missed() -> None:
    class Slow(Trees):
        async def tree_events(
            self, root: RunId, from_position: int, *, limit: int
        ) -> Sequence[tuple[int, bytes]]:
            found = list(enumerate(self.stored))[from_position : from_position + limit]
            self.reads += 1
            await may_end.wait()
            return found

    may_end = asyncio.Event()
    trees = Slow()
    live = Watching(trees)
    first: list[tuple[int, bytes]] = []
    second: list[tuple[int, bytes]] = []
    older = asyncio.create_task(collect(live.watch(ROOT, 0, always, check=free), first))
    await settle()
    trees.append(1)
    younger = asyncio.create_task(collect(live.watch(ROOT, 0, always, check=free), second))
    await settle()
    may_end.set()
    await asyncio.gather(older, younger)
    assert [position for position, _ in second] == [0]
