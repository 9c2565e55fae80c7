"""Sub-calls whose results are taken one by one as they come, with few of them ahead of whoever takes them."""

import threading
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from queue import SimpleQueue
from typing import Any

from sandbox_image.worker.interpreter.calls import Conversation, Steps
from sandbox_image.worker.interpreter.link import CallLink

Result = tuple[int, Any]
"""The call's position, and its value or exception."""


class AsCompleted:
    """Runs conversations for one taker, who calls `fill`, waits for a result to be delivered, and `take`s it.

    Rules:

    1. At most `link.window` calls are in flight, and as many results ready: a taker that is slow, or computes
       between two results, holds the calls up and does not fill memory.
    2. Calls are drawn from their iterator in the taker's thread alone, and not before there is room: it may
       be code of a cell, and may never end.
    3. With `leader_first` the first call goes alone, as in a `Batch`.
    4. After `cancel` nothing more is started, and what is in flight is given up.
    """

    def __init__(
        self,
        link: CallLink,
        calls: Iterator[Steps[Any]],
        deliver: Callable[[Result], None],
        *,
        leader_first: bool = False,
    ) -> None:
        """`deliver` may not block: the thread that reads replies calls it, or the taker's in `fill`."""
        self._link = link
        self._calls = calls
        self._deliver = deliver
        self._leading = leader_first
        self._running: dict[int, Conversation] = {}
        self._ready = 0
        self._next = 0
        self._exhausted = False
        self._lock = threading.Lock()

    def fill(self) -> bool:
        """Start what there is room for. False when no result is left to wait for."""
        while self._has_room():
            steps = next(self._calls, None)
            if steps is None:
                self._exhausted = True
                break
            position = self._next
            self._next += 1
            conversation = Conversation(self._link, steps, partial(self._on_done, position))
            with self._lock:
                self._running[position] = conversation
            conversation.start()
        with self._lock:
            return bool(self._running or self._ready)

    def take(self) -> None:
        """A delivered result has been taken."""
        with self._lock:
            self._ready -= 1

    def cancel(self) -> None:
        """Nobody will take another result."""
        self._exhausted = True
        with self._lock:
            running = list(self._running.values())
        for conversation in running:
            conversation.cancel()

    def _has_room(self) -> bool:
        with self._lock:
            if self._exhausted or self._ready >= self._link.window:
                return False
            at_once = 1 if self._leading else self._link.window
            return not self._running or (len(self._running) < at_once and not self._link.is_full)

    def _on_done(self, position: int, value: Any, error: Exception | None) -> None:
        with self._lock:
            del self._running[position]
            self._leading = False
            self._ready += 1
        self._deliver((position, value if error is None else error))


def results(
    link: CallLink, calls: Iterator[Steps[Any]], *, stop_early: bool, leader_first: bool = False
) -> Iterator[Result]:
    """The results as they come; with `stop_early` the first exception is raised, and the others are given up.

    They are given up too when the iterator is closed, as a `for` loop does that is left.
    """
    delivered: SimpleQueue[Result] = SimpleQueue()
    flow = AsCompleted(link, calls, delivered.put, leader_first=leader_first)
    try:
        while flow.fill():
            position, value = delivered.get()
            flow.take()
            if stop_early and isinstance(value, Exception):
                raise value
            yield position, value
    finally:
        flow.cancel()


async def results_async(
    link: CallLink, calls: Iterator[Steps[Any]], *, stop_early: bool, leader_first: bool = False
) -> AsyncIterator[Result]:
    """`results` for `async for`."""
    from asyncio import Queue, get_running_loop  # noqa: PLC0415 - whoever awaits has it loaded

    loop, delivered = get_running_loop(), Queue[Result]()

    def deliver(result: Result) -> None:
        try:
            loop.call_soon_threadsafe(delivered.put_nowait, result)
        except RuntimeError:
            # A loop of the cell's own that is closed: nobody takes this any more.
            return

    flow = AsCompleted(link, calls, deliver, leader_first=leader_first)
    try:
        while flow.fill():
            position, value = await delivered.get()
            flow.take()
            if stop_early and isinstance(value, Exception):
                raise value
            yield position, value
    finally:
        flow.cancel()
