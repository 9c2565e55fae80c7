"""What a failed cell found used up, told from the exception that ended it."""

import errno
import os
from collections.abc import Sequence
from typing import Any

from sandbox_image.worker import protocol

# In the sandbox both are in memory and have a size of their own; elsewhere they are just file systems.
_MOUNTS = (
    ("/tmp", protocol.TMP_BYTES, protocol.TMP_FILES),  # noqa: S108 - the sandbox's own
    ("/dev/shm", protocol.SHM_BYTES, protocol.SHM_BYTES),  # noqa: S108 - likewise
)

# More than the room for one file's metadata, less than anybody would call room.
_NO_ROOM_BYTES = 64 * 1024

_CHAIN = 16

# The built-in attributes, because a class may redefine them.
_CAUSE: Any = BaseException.__cause__
_CONTEXT: Any = BaseException.__context__
_TRACEBACK: Any = BaseException.__traceback__


def used_up(error: BaseException | None) -> list[str]:
    """The limits that `error`, or what it was raised from, ran into. Runs nothing of the cell's."""
    found: list[str] = []
    for _ in range(_CHAIN):
        if error is None:
            break
        found += _told_by(error)
        error = _CAUSE.__get__(error) or _CONTEXT.__get__(error)
    return list(dict.fromkeys(found))


def _told_by(error: BaseException) -> Sequence[str]:
    # Exact types: a subclass may be the cell's own, and its `errno` code of the cell.
    if type(error) is RuntimeError:
        return [protocol.PROCESSES] if error.args == ("can't start new thread",) else []
    number = error.errno if type(error) in (OSError, BlockingIOError) else None  # type: ignore[attr-defined]
    if number == errno.ENOSPC:
        return _full_mounts()
    if number == errno.EMFILE:
        return [protocol.OPEN_FILES]
    # A pipe that is not read says so too; only fork(2) has nothing else to say.
    if number == errno.EAGAIN and _raised_by_fork(error):
        return [protocol.PROCESSES]
    return []


def _raised_by_fork(error: BaseException) -> bool:
    trace = _TRACEBACK.__get__(error)
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    names = trace.tb_frame.f_code.co_names if trace is not None else ()
    return bool({"fork", "_fork_exec", "posix_spawn", "forkpty"}.intersection(names))


def _full_mounts() -> list[str]:
    """The mounts without room; when all have some, the one with the least: too much was wanted at once."""
    full, least, fallback = [], float("inf"), ""
    for path, bytes_name, files_name in _MOUNTS:
        try:
            stat = os.statvfs(path)
        except OSError:
            continue
        free_bytes = stat.f_bavail * stat.f_frsize
        if free_bytes < _NO_ROOM_BYTES:
            full.append(bytes_name)
        elif stat.f_files and not stat.f_ffree:
            # gVisor does not limit the number and says 0 of 0.
            full.append(files_name)
        elif free_bytes < least:
            least, fallback = free_bytes, bytes_name
    return full or ([fallback] if fallback else [])
