"""Many sub-calls side by side, in order, with few of them in memory."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import Any

from sandbox_image.worker.interpreter.calls import Conversation, Steps
from sandbox_image.worker.interpreter.link import CallLink


class Batch:
    """Runs conversations, `link.window` at a time.

    Rules:

    1. Results stand in the order of the calls, whichever ends first.
    2. A failed call puts its exception in its place. With `stop_early` nothing is started after it; what is
       in flight is finished, because it is paid for either way and the first failure by position must not
       depend on who was quicker.
    3. Only what is in flight costs memory: ten thousand prompts are ten thousand references. While the link
       has no room, none is made ready for it.
    4. With `leader_first` the first call goes alone, and the others once it has ended: it writes the cache
       from which they read. Side by side they would all write it.
    """

    def __init__(
        self,
        link: CallLink,
        calls: Sequence[Steps[Any]] | Iterator[Steps[Any]],
        count: int,
        stop_early: bool,
        *,
        leader_first: bool = False,
    ) -> None:
        self.results: Future[list[Any]] = Future()
        """Values and exceptions by position; None for what was never started."""
        self._link = link
        self._calls = iter(calls)
        self._stop_early = stop_early
        self._leading = leader_first
        self._done: list[Any] = [None] * count
        self._running: dict[int, Conversation] = {}
        self._next = 0
        self._stopped = False
        self._starting = False
        self._lock = threading.Lock()
        self.results.add_done_callback(self._on_result)

    def start(self) -> None:
        """Start as many as may run at once; each that ends starts the next."""
        with self._lock:
            if self._starting:
                # The loop below, here or in another thread, looks again before it leaves.
                return
            self._starting = True
        while (started := self._take()) is not None:
            started.start()

    def cancel(self) -> None:
        """Give up on all that has no result yet."""
        with self._lock:
            self._stopped = True
            running = list(self._running.values())
        for conversation in running:
            conversation.cancel()

    def _take(self) -> Conversation | None:
        with self._lock:
            steps = None
            at_once = 1 if self._leading else self._link.window
            has_room = not self._running or (len(self._running) < at_once and not self._link.is_full)
            if not self._stopped and has_room:
                steps = next(self._calls, None)
            if steps is None:
                self._starting = False
                finished = not self._running and (self._stopped or self._next == len(self._done))
            else:
                position = self._next
                self._next += 1
                conversation = Conversation(
                    self._link, steps, lambda value, error: self._on_done(position, value, error)
                )
                self._running[position] = conversation
                return conversation
        if finished:
            self._finish()
        return None

    def _on_done(self, position: int, value: Any, error: Exception | None) -> None:
        with self._lock:
            del self._running[position]
            self._leading = False
            self._done[position] = value if error is None else error
            if error is not None and self._stop_early:
                self._stopped = True
        self.start()

    def _finish(self) -> None:
        try:
            self.results.set_result(self._done)
        except InvalidStateError:
            # Cancelled by whoever waited.
            return

    def _on_result(self, results: "Future[list[Any]]") -> None:
        if results.cancelled():
            self.cancel()
