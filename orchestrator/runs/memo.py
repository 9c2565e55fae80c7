"""Identical sub-calls of one run tree, asked once and paid once.

Off unless asked for: asking a model several times is a technique. One memo serves one run tree, so nothing is
ever shared between tenants. Only replies are kept; a call that fails is asked again by whoever waits for it.
"""

import asyncio
from collections.abc import Awaitable, Callable

from orchestrator.models.port import Completion


class Memo:
    """The completions of one run tree, in flight or there."""

    def __init__(self) -> None:
        self._completions: dict[str, asyncio.Future[Completion]] = {}

    def know(self, key: str, completion: Completion) -> None:
        """Keep a completion that an earlier process paid for."""
        known = self._completions[key] = asyncio.get_running_loop().create_future()
        known.set_result(completion)

    async def once(self, key: str, ask: Callable[[], Awaitable[Completion]]) -> tuple[Completion, bool]:
        """The completion under `key`, and whether somebody else's call brought it.

        Args:
            key: Identifies model, options and prompt.
            ask: Makes the call. Whoever comes first makes it; should it fail or be cancelled, the next one
                who waits does.

        Raises:
            OrchestratorError: What this caller's own `ask` raised. A failure of another's is never passed on.
        """
        while (known := self._completions.get(key)) is not None:
            try:
                return await asyncio.shield(known), True
            except asyncio.CancelledError:
                this = asyncio.current_task()
                # Both may be cancelled at once, when a cell ends that asked twice.
                if not known.cancelled() or (this is not None and this.cancelling()):
                    raise
        mine = self._completions[key] = asyncio.get_running_loop().create_future()
        try:
            completion = await ask()
        except BaseException:
            del self._completions[key]
            mine.cancel()
            raise
        mine.set_result(completion)
        return completion, False
