"""When a guest's conduct on its socket is no accident any more. Pure: no clock, no transport.

Two measures, because two things look alike from outside. A program that goes on asking after its budget ran
out is honest, if wasteful: it is slowed down (`Pace`), and may be refused tens of thousands of times before
anybody minds. What our own guest library cannot send at all (an unknown method, a message that is none, a
request that never arrives, calls past the window) is somebody speaking past the library: a few may be a
defect, many are a flood, and end the run (`Conduct`).
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from orchestrator.limits import (
    FREE_CALLS_AT_FULL_SPEED,
    FREE_CALLS_PER_S,
    MAX_HANG_UPS,
    MAX_MALFORMED,
    MAX_REFUSALS,
    MAX_RESETS,
    MAX_TURNED_AWAY,
)


class Offence(Enum):
    """What a guest did that costs it nothing and us something. The values are what people read."""

    REFUSED = "refused calls"
    """Well-formed, and refused: by a budget, the depth, the allow-list, between cells, or as senseless."""
    HUNG_UP = "calls given up before they cost anything"
    RESET = "calls given up as they were made"
    """Their request never came, or was not waited for."""
    TURNED_AWAY = "calls past the window"
    """More at once than the lease allows, twice over: the library queues them."""
    UNKNOWN_METHOD = "calls of unknown methods"
    MALFORMED = "malformed messages"
    """No protobuf of the method's type, one of an absurd shape, or one that did not arrive in time."""


LIMITS: Mapping[Offence, int] = {
    Offence.REFUSED: MAX_REFUSALS,
    Offence.HUNG_UP: MAX_HANG_UPS,
    Offence.RESET: MAX_RESETS,
    Offence.TURNED_AWAY: MAX_TURNED_AWAY,
    Offence.UNKNOWN_METHOD: MAX_MALFORMED,
    Offence.MALFORMED: MAX_MALFORMED,
}
"""How many of each a run may commit. Counted over the whole run: what is slow enough never to get there is
slow enough to be borne."""

_ORDINARY = {Offence.REFUSED, Offence.HUNG_UP, Offence.RESET}
"""What honest programs do too, and what ordinary events tell or nobody misses."""


@dataclass(slots=True)
class Conduct:
    """What one run's guest has done so far, over all its sandboxes."""

    counts: Counter[Offence] = field(default_factory=Counter)
    verdict: str = ""
    """Why the run is to be ended; empty while it is not. Stays what it first was."""

    def blame(self, offence: Offence) -> bool:
        """Count one offence; whether it is the one too many. True once at most."""
        self.counts[offence] += 1
        if self.verdict or self.counts[offence] <= LIMITS[offence]:
            return False
        self.verdict = (
            f"the guest flooded its socket: more than {LIMITS[offence]:,} {offence.value}; the run was ended"
        )
        return True

    @property
    def remarkable(self) -> bool:
        """Whether the guest did what our guest library never does, or too much of what it may do."""
        return bool(self.verdict) or not self.counts.keys() <= _ORDINARY


@dataclass(slots=True)
class Pace:
    """How fast a guest is served what costs it nothing: at once for a while, then at a steady rate.

    A bucket of `burst` calls that fills at `per_s`; who comes when it is empty is told how long to wait.
    """

    burst: int = FREE_CALLS_AT_FULL_SPEED
    per_s: float = FREE_CALLS_PER_S
    _next_s: float = 0.0
    """When the bucket will be full again, were nobody else to come."""

    def delay_s(self, now_s: float) -> float:
        """Count one call; how long it has to wait. `now_s` is of one monotonic clock."""
        self._next_s = max(self._next_s, now_s) + 1 / self.per_s
        return max(0.0, self._next_s - now_s - self.burst / self.per_s)
