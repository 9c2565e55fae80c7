"""Locks by which processes of a host know of each other: the kernel frees them whatever ends a process."""

import fcntl
import os
from pathlib import Path


def try_lock(path: Path) -> int | None:
    """An open, locked descriptor of the file, made if need be; None while somebody else has the lock."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor
