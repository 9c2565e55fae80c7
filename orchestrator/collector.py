"""How often Python looks for garbage in a process that serves calls.

By default every 700 new objects are looked through, which is a call or two, and a look through everything
comes after 100 of those. Nearly nothing that we make lies in cycles, so nearly all of that is for nothing: a
third of what a sub-call costs (`bench/fan_out.py`).
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

_NEW_OBJECTS = 10_000
"""Between two looks at the newest; one takes some tenths of a millisecond."""


@contextmanager
def collecting_seldom() -> Iterator[None]:
    """For the length of the block. What is there before it, imported code above all, is not looked at."""
    before = gc.get_threshold()
    # Without a look first, which takes a tenth of a second: imports leave next to nothing that it would find.
    gc.freeze()
    gc.set_threshold(_NEW_OBJECTS)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()
