"""Processes of a container that its engine no longer knows.

A start that fails inside runsc can leave its shim, gofer and sandbox running although the engine lists no
container (design, section 5). They are known by the container's id, 256 random bits that the engine gave to a
container of ours, which a runtime's processes carry in their arguments; and by the program they run, because
other programs (somebody's `grep`) may name that id too. Reading /proc blocks for a few milliseconds.
"""

import os
import re
import signal
from collections.abc import Collection, Iterator, Set
from contextlib import suppress
from pathlib import Path

_PROGRAMS = ("containerd-shim", "runsc")
"""How the names of the programs begin. runc itself leaves nothing running but the shim."""
_CONTAINER_ID = re.compile(r"[0-9a-f]{64}")
_BETWEEN_WORDS = re.compile(rb"[\0/=:,]")


def leftovers(container_ids: Collection[str], *, proc: Path = Path("/proc")) -> Iterator[int]:
    """The pids of a runtime's processes that belong to these containers."""
    wanted = {name.encode() for name in container_ids if _CONTAINER_ID.fullmatch(name)}
    if not wanted:
        return
    for name in os.listdir(proc):
        if name.isdecimal() and _belongs(proc / name, wanted):
            yield int(name)


def end_leftovers(container_ids: Collection[str]) -> int:
    """Kill what is left of containers that the engine no longer has; how many processes that were."""
    wanted = {name.encode() for name in container_ids if _CONTAINER_ID.fullmatch(name)}
    killed = 0
    for pid in leftovers(container_ids):
        # Gone meanwhile, or another user's: without root there is nothing we could do.
        with suppress(ProcessLookupError, PermissionError):
            process = os.pidfd_open(pid)
            try:
                # The pid may have become another's since; what the descriptor means cannot.
                if _belongs(Path(f"/proc/{pid}"), wanted):
                    signal.pidfd_send_signal(process, signal.SIGKILL)
                    killed += 1
            finally:
                os.close(process)
    return killed


def _belongs(process: Path, wanted: Set[bytes]) -> bool:
    with suppress(OSError):
        if os.path.basename(os.readlink(process / "exe")).startswith(_PROGRAMS):
            return not wanted.isdisjoint(_BETWEEN_WORDS.split((process / "cmdline").read_bytes()))
    return False
