"""Whether this server can answer questions now: what runs stand on is asked, not assumed."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from orchestrator.errors import StoreError
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.store.database import Database

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0


class Readiness:
    """What was found at the last look."""

    def __init__(self, database: Database, provider: ProviderProcess | None) -> None:
        self._database = database
        self._provider = provider
        self.is_ready = True
        self.broken = ""
        """Why this process will never be ready again; empty while it may be."""

    async def look(self) -> None:
        """Ask everything once."""
        if self._provider is not None and self._provider.has_ended:
            self.broken = (
                "the process that holds the provider's credentials has ended; start the server again"
            )
            self.is_ready = False
            return
        try:
            await self._database.ping()
        except StoreError as error:
            if self.is_ready:
                _log.error("not ready: %s", error)
            self.is_ready = False
            return
        if not self.is_ready:
            _log.info("ready again")
        self.is_ready = True


@asynccontextmanager
async def looking(
    readiness: Readiness,
    *,
    say_ready: Callable[[bool], Awaitable[None]],
    on_broken: Callable[[], None],
    every_s: float = LOOK_EVERY_S,
) -> AsyncIterator[None]:
    """Look now and then for the length of the block.

    Args:
        readiness: What is asked.
        say_ready: Told after each look.
        on_broken: Told when looking on makes no sense; nothing is looked at any more.
        every_s: From one look to the next.
    """

    async def look_on() -> None:
        while True:
            await asyncio.sleep(every_s)
            await readiness.look()
            await say_ready(readiness.is_ready)
            if readiness.broken:
                _log.error("%s", readiness.broken)
                on_broken()
                return

    task = asyncio.create_task(look_on())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait((task,))
