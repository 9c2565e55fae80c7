"""What can be written ends where it should (B09-B12): bytes, files, and programs in /tmp."""

import errno
import os

from orchestrator.probes.guest.door import attempt, say

_MIB = 1024 * 1024
_MAX_MIB = 300
_MAX_FILES = 40_000
_PROGRAM = b"#!/bin/sh\nexit 0\n"


def _fill(directory: str) -> tuple[str, int]:
    """The error that ended it, and the MiB that fitted."""
    path, written = f"{directory}/probe-fill", 0
    try:
        with open(path, "wb", buffering=0) as file:
            for _ in range(_MAX_MIB):
                written += file.write(bytes(_MIB))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?"), written // _MIB
    finally:
        os.unlink(path)
    return "open", written // _MIB


def _held_open() -> tuple[str, int]:
    """The same in a file without a name."""
    written = 0
    with open("/tmp/probe-held", "wb", buffering=0) as file:  # noqa: S108
        os.unlink(file.name)
        try:
            for _ in range(_MAX_MIB):
                written += file.write(bytes(_MIB))
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "?"), written // _MIB
    return "open", written // _MIB


def _many_files() -> tuple[str, int]:
    directory = "/tmp/probe-many"  # noqa: S108
    os.mkdir(directory)
    made = 0
    try:
        for made in range(_MAX_FILES):
            os.close(os.open(f"{directory}/{made}", os.O_CREAT | os.O_WRONLY, 0o600))
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, "?"), made
    finally:
        for name in os.listdir(directory):
            os.unlink(f"{directory}/{name}")
        os.rmdir(directory)
    return "open", made


def _execute(path: str) -> None:
    pid = os.posix_spawn(path, [path], {})
    os.waitpid(pid, 0)


def _run_from(directory: str) -> str:
    path = f"{directory}/probe-program"
    with open(path, "wb") as file:
        file.write(_PROGRAM)
    os.chmod(path, 0o700)
    try:
        return attempt(lambda: _execute(path))
    finally:
        os.unlink(path)


def _run_from_memory() -> str:
    """No mount forbids that: `noexec` is hygiene, not a wall."""
    descriptor = os.memfd_create("probe", 0)
    os.write(descriptor, _PROGRAM)
    return attempt(lambda: _execute(f"/proc/self/fd/{descriptor}"))


say(
    "scratch",
    {
        "bytes": {"/tmp": _fill("/tmp"), "/dev/shm": _fill("/dev/shm")},  # noqa: S108
        "held_open": _held_open(),
        "files": _many_files(),
        "program": {"/tmp": _run_from("/tmp"), "/dev/shm": _run_from("/dev/shm")},  # noqa: S108
        "program_in_memory": _run_from_memory(),
    },
)
