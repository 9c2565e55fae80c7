"""Signals that wait until somebody can answer them. Apart from `signals`, which needs asyncio."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Ctrl-C, an orderly kill, a closed terminal."""


@contextmanager
def held() -> Iterator[None]:
    """Signals that arrive within the block wait for `signals.until_stopped`.

    For the time in which heavy modules are imported: a signal then would end the process with half a
    sentence, or none.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
