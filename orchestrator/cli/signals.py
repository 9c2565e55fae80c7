"""Ending cleanly: Ctrl-C, SIGTERM and a closed terminal cancel a task and wait for its cleaning up."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from orchestrator.cli.held_signals import STOPS

T = TypeVar("T")


class StoppedError(Exception):
    """A signal ended the task; it has cleaned up."""


async def until_stopped(work: Coroutine[Any, Any, T], on_stop: Callable[[int], None]) -> T:
    """The result of `work`, unless a signal comes first.

    Args:
        work: Cancelled once, by the first signal. Later ones don't disturb its cleaning up.
        on_stop: Told how many signals have come.

    Raises:
        StoppedError: A signal came, and `work` ended without a result of its own.
    """
    task = asyncio.get_running_loop().create_task(work)

    def stop(stops: int) -> None:
        on_stop(stops)
        if stops == 1:
            task.cancel()

    with heard(stop):
        await asyncio.wait([task])
        if task.cancelled():
            raise StoppedError
        return task.result()


@contextmanager
def heard(on_stop: Callable[[int], None]) -> Iterator[None]:
    """Signals of the block reach a function on the event loop, and nobody else.

    Args:
        on_stop: Told how many have come.
    """
    loop = asyncio.get_running_loop()
    stops = 0

    def stop() -> None:
        nonlocal stops
        stops += 1
        on_stop(stops)

    # `nohup` and the like ignore a signal on purpose.
    watched = [number for number in STOPS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in watched:
        loop.add_signal_handler(number, stop)
    before = signal.pthread_sigmask(signal.SIG_UNBLOCK, watched)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in watched:
            loop.remove_signal_handler(number)
