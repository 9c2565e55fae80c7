"""How long a client goes on trying, and how long it pauses in between.

Rules:

1. Pauses double from the first to the longest; each is shortened by up to a half at random, so that many
   clients that lost one server don't come back together.
2. What counts is the time since the first failure in a row. Whatever is heard of the server ends the row.
3. When the time is up, the caller gets the last failure.

Pure: no clock and no sleep. The caller says what time it is.
"""

from collections.abc import Callable
from dataclasses import dataclass

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 15.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Patience:
    """For how long a server may be away."""

    call_s: float = 60.0
    """For one call, and for an upload that makes no progress."""
    watch_s: float = 3_600.0
    """For a watcher of a run: a server's restart, and its operator's lunch."""


class Row:
    """Failures in a row."""

    def __init__(self, most_s: float, chance: Callable[[], float]) -> None:
        """Begin without one.

        Args:
            most_s: How long a row may last.
            chance: Gives numbers from 0 to 1.
        """
        self._most_s = most_s
        self._chance = chance
        self._since_s: float | None = None
        self._pause_s = FIRST_PAUSE_S

    @property
    def is_open(self) -> bool:
        """Whether the last thing that happened was a failure."""
        return self._since_s is not None

    def heard(self) -> None:
        """The server did something."""
        self._since_s = None
        self._pause_s = FIRST_PAUSE_S

    def failed(self, now_s: float) -> float | None:
        """One more failure: how long to pause before the next attempt, or None when the time is up."""
        if self._since_s is None:
            self._since_s = now_s
        left_s = self._since_s + self._most_s - now_s
        if left_s <= 0:
            return None
        pause_s = self._pause_s * (1 - self._chance() / 2)
        self._pause_s = min(2 * self._pause_s, LONGEST_PAUSE_S)
        return min(pause_s, left_s)
