"""Which contexts go when nobody asked for them to go.

Rules:

1. A context is kept from the moment it is put on the shelf, and each asking for it makes it the most recent.
2. What nobody asked for during `max_age_s` goes.
3. While what is left takes more than `max_bytes`, the one that was asked for longest ago goes. One that is
   too large alone does not stay either.
4. Contexts over one blob share its bytes: they count once, and they are freed when the last of them has gone.

What goes here goes from the shelf only: a run that uses it has a reference of its own.

Pure: no clock, no files.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Generic, TypeVar

K = TypeVar("K")


@dataclass(frozen=True, slots=True)
class Kept(Generic[K]):
    """One context on the shelf."""

    key: K
    blob: str
    """Names its bytes."""
    blob_bytes: int
    asked_for_s: float
    """When it was put there or last asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KeepingLimits:
    """How much is kept, and for how long."""

    max_bytes: int = 16 * 1024 * 1024 * 1024
    """Of all blobs together, of all tenants."""
    max_age_s: float = 24 * 3_600.0
    """Since it was last asked for."""


def to_go(kept: Iterable[Kept[K]], limits: KeepingLimits, now_s: float) -> list[K]:
    """The keys of what goes, in the order of going."""
    oldest_first = sorted(kept, key=lambda one: one.asked_for_s)
    sharing = Counter(one.blob for one in oldest_first)
    left_bytes = sum({one.blob: one.blob_bytes for one in oldest_first}.values())
    going: list[K] = []
    for one in oldest_first:
        if now_s - one.asked_for_s <= limits.max_age_s and left_bytes <= limits.max_bytes:
            break
        going.append(one.key)
        sharing[one.blob] -= 1
        if not sharing[one.blob]:
            left_bytes -= one.blob_bytes
    return going
