"""Watchers of run trees: what happened, by position, and then what happens.

Rules:

1. A watcher says which position it wants next and gets every event from there on, in order, once.
2. Events are read from the store, in pages. While a tree runs here and is watched, its newest events are also
   kept in memory, encoded once for all watchers; who is further behind reads the store. So a watcher that
   takes nothing costs nothing but its task.
3. What is kept of a tree has no hole: `OnStored` may tell of two appends in either order, and the later one
   then starts what is kept anew. That is enough, because of an event that is stored all before it are.
4. A watch ends behind the last event of a run that has ended. When the server leaves a run, it ends with
   `UnavailableError`, and goes on wherever the run does.
5. Watchers that want the same page of the store at the same time have it read once.
6. Who may not watch any more is given nothing more, also of a page that was read before (`standing`).
"""

import asyncio
import json
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from orchestrator.errors import UnavailableError
from orchestrator.ids import RunId
from orchestrator.shielding import run_shielded
from orchestrator.store.books import OnStored, TreeBook
from orchestrator.trajectory import Event

PAGE = 200
"""Events read from the store at once: a megabyte of the largest."""
KEPT_EVENTS = 512
"""Of one tree, in memory ..."""
KEPT_BYTES = 1024 * 1024
"""... and no more than this."""
POLL_S = 2.0
"""How often the store is asked about a run that does not run here."""


def event_json(event: Event) -> bytes:
    """One line, byte for byte as the store keeps it."""
    return json.dumps(event.to_json(), separators=(",", ":")).encode("ascii")


@dataclass(slots=True, eq=False)
class _Topic:
    """One run tree that runs here, waits here, or is watched."""

    is_here: bool = False
    """This server runs it, and so hears of every event."""
    is_over: bool = False
    is_left: bool = False
    watchers: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Replaced whenever it is set: who waits on it has seen what was before."""
    first: int = 0
    next: int | None = None
    """The position of the first event kept, and of the first to come; None before any was heard of."""
    kept: deque[bytes] = field(default_factory=deque)
    kept_bytes: int = 0

    def stored(self, first: int, events: Sequence[Event]) -> None:
        """See `OnStored`."""
        if not self.watchers:
            self._forget()
            return
        if self.next is not None and first < self.next:
            return  # heard of late; what is kept begins behind it
        if first != self.next:
            self._forget()
            self.first = self.next = first
        for event in events:
            data = event_json(event)
            self.kept.append(data)
            self.kept_bytes += len(data)
        self.next = first + len(events)
        while len(self.kept) > KEPT_EVENTS or self.kept_bytes > KEPT_BYTES:
            self.kept_bytes -= len(self.kept.popleft())
            self.first += 1
        self.wake()

    def wake(self) -> None:
        """Everybody looks again."""
        self.changed.set()
        self.changed = asyncio.Event()

    def page(self, position: int) -> Sequence[tuple[int, bytes]] | None:
        """What is kept from there on, which may be nothing; None when the store has to be asked."""
        if self.next is None or not self.first <= position <= self.next:
            return None
        begin = position - self.first
        return [(position + n, self.kept[begin + n]) for n in range(min(PAGE, len(self.kept) - begin))]

    def _forget(self) -> None:
        self.kept.clear()
        self.kept_bytes, self.next = 0, None


class Watching:
    """All watchers of one server."""

    def __init__(self, trees: TreeBook) -> None:
        self._trees = trees
        self._topics: dict[RunId, _Topic] = {}
        self._reads: dict[tuple[RunId, int], asyncio.Task[Sequence[tuple[int, bytes]]]] = {}
        """Under way, by the position at which they begin."""

    @property
    def watchers(self) -> int:
        """Streams under way."""
        return sum(topic.watchers for topic in self._topics.values())

    def here(self, run_id: RunId) -> OnStored:
        """This server runs the tree, or will; what is to be told of its events."""
        topic = self._topics.setdefault(run_id, _Topic())
        topic.is_here, topic.is_left = True, False
        topic.wake()
        return topic.stored

    def over(self, run_id: RunId) -> None:
        """The run has ended, and that is stored."""
        self._close(run_id, is_left=False)

    def left(self, run_id: RunId) -> None:
        """The run goes on elsewhere, or later."""
        self._close(run_id, is_left=True)

    def close(self) -> None:
        """End every watch."""
        for run_id in tuple(self._topics):
            self.left(run_id)

    def look_again(self) -> None:
        """Everybody looks whether he may still watch."""
        for topic in self._topics.values():
            topic.wake()

    async def watch(
        self,
        run_id: RunId,
        from_position: int,
        has_ended: Callable[[], Awaitable[bool]],
        *,
        check: Callable[[], None],
    ) -> AsyncGenerator[tuple[int, bytes], None]:
        """Positions and events, see `Office.watch_run`.

        Args:
            run_id: Of the root run.
            from_position: The first to tell of.
            has_ended: Asked about a run that does not run here.
            check: Raises when nothing more may be given.

        Raises:
            OrchestratorError: What `check` raises.
            StoreError: The store does not answer.
            UnavailableError: This server leaves the run.
        """
        topic = self._topics.setdefault(run_id, _Topic())
        topic.watchers += 1
        position = from_position
        try:
            while True:
                # All of these before the look at the events: what comes after it changes one of them.
                changed, is_here = topic.changed, topic.is_here
                is_over = topic.is_over or (not is_here and await has_ended())
                page = topic.page(position)
                if page is None:
                    page = await self._read(run_id, position)
                for at, data in page:
                    check()
                    yield at, data
                position += len(page)
                if page:
                    continue
                check()
                if is_over:
                    return
                if topic.is_left:
                    raise UnavailableError("this server leaves the run to the next; ask again")
                with suppress(TimeoutError):
                    async with asyncio.timeout(None if is_here else POLL_S):
                        await changed.wait()
        finally:
            topic.watchers -= 1
            if not topic.watchers and not topic.is_here and self._topics.get(run_id) is topic:
                del self._topics[run_id]

    async def _read(self, run_id: RunId, position: int) -> Sequence[tuple[int, bytes]]:
        """Events from there on that are stored when this is called, if any are; at most a page."""
        # Whoever fell behind together seldom stands at the same event, but on the same page.
        begin = position - position % PAGE
        joined = self._reads.get((run_id, begin))
        if joined is not None:
            page = (await run_shielded(_result(joined)))[position - begin :]
            if page:
                return page
            # It may have missed what was stored since it began. One under way now began after this call.
        read = self._reads.get((run_id, begin))
        if read is None:
            read = asyncio.create_task(self._trees.tree_events(run_id, begin, limit=PAGE))
            self._reads[run_id, begin] = read
            read.add_done_callback(lambda _: self._reads.pop((run_id, begin), None))
        return (await run_shielded(_result(read)))[position - begin :]

    def _close(self, run_id: RunId, *, is_left: bool) -> None:
        topic = self._topics.pop(run_id, None)
        if topic is not None:
            topic.is_over, topic.is_left = not is_left, is_left
            topic.wake()


async def _result(task: "asyncio.Task[Sequence[tuple[int, bytes]]]") -> Sequence[tuple[int, bytes]]:
    return await asyncio.shield(task)
