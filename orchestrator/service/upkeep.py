"""What a server does again and again beside answering."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress

from orchestrator.errors import StoreError


async def again_and_again(
    work: Callable[[], Awaitable[object]],
    *,
    every_s: float,
    log: logging.Logger,
    failure: str,
    sooner: asyncio.Event | None = None,
) -> None:
    """Work, pause, and so on for ever. What fails is logged and tried again: only cancelling ends this.

    Args:
        work: The first time at once.
        every_s: The pause.
        log: Of whose work it is.
        failure: What is so when it fails. A store that does not answer costs the log a line, whatever else
            it is a traceback.
        sooner: Set by whoever wants the pause over; cleared when it is.
    """
    sooner = sooner or asyncio.Event()
    while True:
        try:
            await work()
        except StoreError as error:
            log.warning("%s: %s", failure, error)
        except Exception:
            log.exception(failure)
        with suppress(TimeoutError):
            async with asyncio.timeout(every_s):
                await sooner.wait()
        sooner.clear()
