"""What the probes share. It is sent first, and kept under its name for those that follow."""

import ctypes
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

arguments: dict[str, Any] = {}
"""What the host tells the probes: where its listeners are, which calls to try."""

OPEN = "open"
_TRY_S = 1
"""A call that waits is ended after this long: it went through."""

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


def say(probe: str, facts: Mapping[str, object]) -> None:
    """The one line of a probe."""
    print(json.dumps({"id": probe, "ran": True, **facts}, separators=(",", ":")))


def attempt(what: Callable[[], object]) -> str:
    """`open`, or the name of the error that closed the door."""
    try:
        what()
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, type(error).__name__)
    return OPEN


def attempts(table: Mapping[str, Callable[[], object]]) -> dict[str, str]:
    """Each of them."""
    return {name: attempt(what) for name, what in table.items()}


def writable(path: str) -> bool:
    """Whether an existing file can be opened for writing. Nothing is written."""
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY))
    except OSError:
        return False
    return True


def can_create_in(directory: str) -> bool:
    """Whether a file can be made there; it is removed again."""
    path = os.path.join(directory, "probe-attempt")
    try:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600))
    except OSError:
        return False
    os.unlink(path)
    return True


def read(path: str, limit: int = 65_536) -> str:
    """The beginning of a file as text; empty when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return file.read(limit).decode("utf-8", "replace")
    except OSError:
        return ""


def call(number: int, *values: int) -> str:
    """One system call in this process: `open`, or the name of its error."""
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *map(ctypes.c_long, values))
    return errno.errorcode.get(ctypes.get_errno(), "?") if result == -1 else OPEN


def apart(what: Callable[[], str]) -> str:
    """What it says in a child process, which it may change or end; the signal's name if that ended it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_TRY_S)
            os.write(writer, what().encode() + b".")
        finally:
            os._exit(0)
    os.close(writer)
    said = os.read(reader, 100)
    os.close(reader)
    status = os.waitpid(child, 0)[1]
    if said:
        return said.partition(b".")[0].decode()
    if os.WIFSIGNALED(status):
        return signal.Signals(os.WTERMSIG(status)).name
    return OPEN  # it ended without a word, as `exit` does


@contextmanager
def scratch(name: str) -> Iterator[str]:
    """A path in /tmp, gone after the block."""
    path = f"/tmp/{name}-{os.getpid()}"  # noqa: S108 - the sandbox's own
    try:
        yield path
    finally:
        if os.path.lexists(path):
            os.unlink(path)
