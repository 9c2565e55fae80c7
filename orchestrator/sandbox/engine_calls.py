"""Calls to a container engine that blocks, from an event loop that must not.

docker-py blocks, and a stuck runtime can hang even an `inspect` (design, section 5). A thread in such a
call cannot be stopped, only left behind. So that one stuck sandbox takes nothing from the others:

1. Every call has a deadline. When it passes, the caller hears so; the thread goes on until docker-py gives
   up.
2. About one sandbox there is one call at a time, hence at most one stuck thread. While that one is overdue,
   other calls about the same sandbox are refused at once.
3. At most `calls_at_once` calls that are not overdue run at once. An overdue one no longer counts, so however
   many are stuck, the others go on. There are never more of them than sandboxes that could not be ended, and
   those use up the places for new ones (`SandboxSlots.withhold`).
4. Who is to end soon says so (`hurry`): no call is waited for longer than that from then on.
5. Threads are daemons: a stuck one does not keep the process from ending.

A caller that is cancelled leaves its call running; the next call about that sandbox waits for it.
"""

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from math import inf
from typing import Any, TypeVar

from orchestrator.errors import EngineError

T = TypeVar("T")


@dataclass(slots=True, eq=False)
class _Call:
    done: asyncio.Future[Any]
    deadline: asyncio.TimerHandle | None = None
    is_overdue: bool = False


class EngineCalls:
    """Asks one engine, in threads. Used on one event loop."""

    def __init__(self, calls_at_once: int) -> None:
        self._permits = asyncio.Semaphore(calls_at_once)
        self._calls: dict[str, _Call] = {}
        self._waits: set[asyncio.Timeout] = set()
        self._longest_s = inf

    @property
    def overdue(self) -> int:
        """How many threads are stuck in a call."""
        return sum(call.is_overdue for call in self._calls.values())

    async def ask(self, subject: str, call: Callable[[], T], *, within_s: float) -> T:
        """What `call` returns or raises.

        Args:
            subject: What the call is about; calls about the same follow one another.
            call: Blocks; runs in a thread of its own.
            within_s: Waiting for earlier calls counts.

        Raises:
            EngineError: It did not come back in time, or an earlier call about the same is overdue.
        """
        within_s = min(within_s, self._longest_s)
        deadline_s = asyncio.get_running_loop().time() + within_s
        limit = asyncio.timeout_at(deadline_s)
        self._waits.add(limit)
        try:
            async with limit:
                await self._permit(subject)
                return await asyncio.shield(self._begin(subject, call, deadline_s))
        except TimeoutError as error:
            within_s = min(within_s, self._longest_s)
            raise EngineError(f"the container engine did not answer within {within_s:g} s") from error
        finally:
            self._waits.discard(limit)

    def hurry(self, within_s: float) -> None:
        """Wait no longer than this for any call, for those under way from now on."""
        self._longest_s = within_s
        at_last_s = asyncio.get_running_loop().time() + within_s
        for limit in self._waits:
            when_s = limit.when()
            if when_s is not None and when_s > at_last_s:
                limit.reschedule(at_last_s)

    async def _permit(self, subject: str) -> None:
        while True:
            while (earlier := self._calls.get(subject)) is not None:
                if earlier.is_overdue:
                    raise EngineError("the container engine still owes an answer about this sandbox")
                await asyncio.wait((earlier.done,))
            await self._permits.acquire()
            if subject not in self._calls:
                return
            self._permits.release()

    def _begin(self, subject: str, call: Callable[[], T], deadline_s: float) -> asyncio.Future[T]:
        loop = asyncio.get_running_loop()
        begun = _Call(loop.create_future())
        begun.done.add_done_callback(_heard)
        begun.deadline = loop.call_at(deadline_s, self._overdue, begun)
        self._calls[subject] = begun

        # By subject and not with `begun`, and the error under no name: its traceback has this frame, and a
        # cycle would keep open whatever sockets the failed call left.
        def returned(result: object, error: BaseException | None) -> None:
            # A closed loop: the process is ending and nobody waits any more.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(self._returned, subject, result, error)

        def work() -> None:
            try:
                result = call()
            except BaseException as error:
                returned(None, error)
            else:
                returned(result, None)

        threading.Thread(target=work, name=f"engine {subject}", daemon=True).start()
        return begun.done

    def _overdue(self, call: _Call) -> None:
        call.is_overdue = True
        self._permits.release()

    def _returned(self, subject: str, result: object, error: BaseException | None) -> None:
        call = self._calls.pop(subject)
        if call.deadline is not None:
            call.deadline.cancel()
        if not call.is_overdue:
            self._permits.release()
        if call.done.cancelled():
            return
        if error is None:
            call.done.set_result(result)
        else:
            call.done.set_exception(error)


def _heard(done: asyncio.Future[Any]) -> None:
    """Nobody may be waiting any more for an error that came late."""
    if not done.cancelled():
        done.exception()
