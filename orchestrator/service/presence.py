"""Whether the other servers of the database hear of this one, and it of them.

Rules:

1. A server enters before it does anything for a run, and is heard of for `lease_s` from then on, by the
   database's clock. It extends its lease `BEATS_PER_LEASE` times as often as it has to.
2. A lease that has run out is no harm by itself: a database was away, a process stood still. Only when
   another server takes its runs over is its epoch over. Then nothing that it does for a run can be stored, so
   nothing is paid for; it learns of that with its next beat at the latest, and enters again.
3. Whoever judges others must have heard of the database for as long as a lease, without a break. So a
   database that comes back finds everybody's lease run out, and nobody is taken over because of that.
"""

import time

from orchestrator.errors import StoreError
from orchestrator.store.books import HomeBook

LEASE_S = 60.0
"""Longer than a database restarts, a disk hangs or a machine collects its garbage; a tenant waits so long for
the room that the runs of a lost server take."""
BEATS_PER_LEASE = 6
_BREAK = 0.5
"""Of a lease without a beat: more is a break."""


class Presence:
    """Of the server of one state directory."""

    def __init__(self, book: HomeBook, home: str, *, lease_s: float = LEASE_S) -> None:
        """Not there yet.

        Args:
            book: Where servers are heard of.
            home: The id of the state directory.
            lease_s: For how long each beat says that it is there.
        """
        self._book = book
        self._lease_s = lease_s
        self._beaten_at_s = self._unbroken_since_s = time.monotonic()
        self.home = home
        self.epoch = 0
        """Under which it does what it does; 0 before it entered."""
        self.is_alone = True
        """Whether no other server was heard of at the last beat."""

    @property
    def beat_every_s(self) -> float:
        """From one beat to the next."""
        return self._lease_s / BEATS_PER_LEASE

    @property
    def may_judge(self) -> bool:
        """Whether what it knows of others is to be relied on."""
        return time.monotonic() - self._unbroken_since_s >= self._lease_s

    async def enter(self) -> None:
        """Be there, in a new epoch.

        Raises:
            StoreError: The database does not answer.
        """
        self.epoch = await self._book.enter(self.home, lease_s=self._lease_s)
        self._beaten_at_s = self._unbroken_since_s = time.monotonic()

    async def beat(self) -> None:
        """Say that it is still there.

        Raises:
            TakenOverError: It is not, to the others: the epoch is over.
            StoreError: The database does not answer.
        """
        try:
            self.is_alone = not await self._book.beat(self.home, self.epoch, lease_s=self._lease_s)
        except StoreError:
            self._unbroken_since_s = time.monotonic()
            raise
        now_s = time.monotonic()
        if now_s - self._beaten_at_s > _BREAK * self._lease_s:
            self._unbroken_since_s = now_s
        self._beaten_at_s = now_s
