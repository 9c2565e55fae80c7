"""What this process has open, for tests that must leave nothing open."""

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def nothing_left_open() -> Iterator[None]:
    """Fails if the block opens what it does not close. What others lost before may be closed meanwhile."""
    gc.collect()
    before = _open()
    yield
    left = _open() - before
    assert not left, f"left open: {sorted(left)}"


def _open() -> set[tuple[str, str]]:
    """Descriptors and what they are of."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            found.add((descriptor, os.readlink(f"/proc/self/fd/{descriptor}")))
        except FileNotFoundError:  # that of the listing itself
            continue
    return found
