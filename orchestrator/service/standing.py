"""Whether who began to listen may still listen: keys are revoked and tenants removed while streams go on.

Rules:

1. A stream belongs to the key that opened it. All keys that have streams are looked up together, in one
   query every `LOOK_EVERY_S`, however many streams there are.
2. The streams of a key that opens nothing any more end with `UnauthenticatedError`, also those with nothing
   to tell: they are woken.
3. While the store does not answer nobody is accused. After `UNKNOWN_S` of that streams end with
   `UnavailableError`: their clients come again, and show their key.
"""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from orchestrator.errors import StoreError, UnauthenticatedError, UnavailableError
from orchestrator.service.port import Caller
from orchestrator.service.upkeep import again_and_again
from orchestrator.store.books import TenantBook

_log = logging.getLogger(__name__)

LOOK_EVERY_S = 5.0
"""So long a stream outlives its key, and no longer ..."""
UNKNOWN_S = 30.0
"""... or so long while the database does not answer."""


@dataclass(slots=True, eq=False)
class Stay:
    """How a key stands that has streams, as far as was seen."""

    known_at_s: float
    """When it was last seen to open something."""
    streams: int = 0
    is_used: bool = True
    """Since the last look."""
    is_revoked: bool = False

    def check(self) -> None:
        """Raise unless its streams may go on. Costs nothing: to be called for all that is given.

        Raises:
            UnauthenticatedError: The key was revoked, or its tenant removed.
            UnavailableError: Nobody knows any more.
        """
        if self.is_revoked:
            raise UnauthenticatedError("this API key is none any more")
        if time.monotonic() - self.known_at_s > UNKNOWN_S:
            raise UnavailableError("the server cannot look up keys now; try again")


class Standing:
    """The keys of one server that have streams."""

    def __init__(self, tenants: TenantBook, *, on_change: Callable[[], None]) -> None:
        """Nothing is looked at before `look_on`.

        Args:
            tenants: Knows the keys.
            on_change: Told when a key's streams must end: who waits is to be woken.
        """
        self._tenants = tenants
        self._on_change = on_change
        self._stays: dict[str, Stay] = {}

    @contextmanager
    def stream(self, caller: Caller) -> Iterator[Stay]:
        """A stream of somebody who was let in just now, for the length of the block."""
        stay = self._stays.setdefault(caller.key_id, Stay(time.monotonic()))
        stay.streams += 1
        try:
            yield stay
        finally:
            stay.streams -= 1
            stay.is_used = True

    async def confirm(self, caller: Caller) -> None:
        """Raise unless the key is still one: for what comes in parts, each of which takes no time.

        Raises:
            UnauthenticatedError: It is not.
            StoreError: The store does not answer.
        """
        stay = self._stays.get(caller.key_id)
        if stay is None:
            opening = await self._tenants.opening([caller.key_id])
            stay = self._stays.setdefault(caller.key_id, Stay(time.monotonic()))
            stay.is_revoked = caller.key_id not in opening
        stay.is_used = True
        stay.check()

    async def look_on(self) -> None:
        """Look now and then, for ever."""
        await again_and_again(
            self.look, every_s=LOOK_EVERY_S, log=_log, failure="the keys of open streams are not looked up"
        )

    async def look(self) -> None:
        """Look all of them up once.

        Raises:
            StoreError: The store does not answer.
        """
        idle = [key_id for key_id, stay in self._stays.items() if not (stay.streams or stay.is_used)]
        for key_id in idle:
            del self._stays[key_id]
        asked = list(self._stays)
        if not asked:
            return
        for stay in self._stays.values():
            stay.is_used = False
        at_s = time.monotonic()
        try:
            opening = await self._tenants.opening(asked)
        except StoreError:
            # Some may not have been known for too long by now.
            self._on_change()
            raise
        for key_id in asked:
            stay = self._stays[key_id]
            if key_id in opening:
                stay.known_at_s = at_s
            else:
                stay.is_revoked = True
        if len(opening) < len(asked):
            self._on_change()
