"""What a server does again and again beside answering."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from orchestrator.errors import StoreError


async def again_and_again(
    work: Callable[[], Awaitable[object]], *, every_s: float, log: logging.Logger, failure: str
) -> None:
    """Work, pause, and so on for ever. What fails is logged and tried again: only cancelling ends this.

    Args:
        work: The first time at once.
        every_s: The pause.
        log: Of whose work it is.
        failure: What is so when it fails. A store that does not answer costs the log a line, whatever else
            it is a traceback.
    """
    while True:
        try:
            await work()
        except StoreError as error:
            log.warning("%s: %s", failure, error)
        except Exception:
            log.exception(failure)
        await asyncio.sleep(every_s)
