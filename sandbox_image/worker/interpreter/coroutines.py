"""Runs cells that `await`. Imported by the first that does: asyncio is half of what an interpreter loads."""

import asyncio
from collections.abc import Coroutine
from typing import Any

from sandbox_image.worker.interpreter.interrupts import Interrupts

Cancelled = asyncio.CancelledError


class CoroutineRunner:
    """One event loop for all cells, so that tasks and queues made in one can be used in the next."""

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._loop: asyncio.AbstractEventLoop | None = None

    def run(self, coroutine: Coroutine[Any, Any, object]) -> None:
        """Run a cell's code to its end, and raise what it raises."""
        if self._loop is None or self._loop.is_closed():
            self._loop = asyncio.new_event_loop()
        loop = self._loop
        asyncio.set_event_loop(loop)
        task = loop.create_task(coroutine)
        self._interrupts.cancel_first(lambda: loop.call_soon_threadsafe(task.cancel))
        try:
            loop.run_until_complete(task)
        finally:
            if not task.done():
                # The second interrupt left it hanging; it must not go on in the next cell.
                task.cancel()
