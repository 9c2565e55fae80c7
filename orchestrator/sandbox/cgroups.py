"""What the kernel counted against one sandbox, read from its control group on the host.

The files are opened once and stay readable until the group is removed, some milliseconds after the last
process in it. Reading two of them takes microseconds, so it is done on the event loop.

Sources: Linux Documentation/admin-guide/cgroup-v1/{memory,pids}.rst and cgroup-v2.rst. With gVisor the
group holds the sandbox's own kernel, not the guest's processes: memory is counted all the same, guest
processes aren't.
"""

import os
from contextlib import suppress
from pathlib import Path

from orchestrator.sandbox.port import Counters

_ROOT = Path("/sys/fs/cgroup")
_FILE_BYTES = 4_096

# By file name: the line that is read from it.
_V1 = {"memory": ("memory.oom_control", b"oom_kill"), "pids": ("pids.events", b"max")}
_V2 = {"memory": ("memory.events", b"oom_kill"), "pids": ("pids.events", b"max")}

NOTHING_KNOWN = Counters(oom_kills=None, refused_forks=None)


class CgroupCounters:
    """The counters of one control group. `close` it."""

    def __init__(self, oom: tuple[int, bytes] | None, pids: tuple[int, bytes] | None) -> None:
        self._oom = oom
        self._pids = pids

    def read(self) -> Counters:
        """The counters now; None for what cannot be read, which all is once the group is removed."""
        return Counters(oom_kills=_count(self._oom), refused_forks=_count(self._pids))

    def close(self) -> None:
        """Let go of the files."""
        for opened in (self._oom, self._pids):
            if opened is not None:
                os.close(opened[0])
        self._oom = self._pids = None


def open_counters(
    pid: int, container_id: str, *, root: Path = _ROOT, proc: Path = Path("/proc")
) -> CgroupCounters:
    """The counters of the container whose first process is `pid` on this machine. Blocks, hardly.

    An engine on another machine, or beyond a pid namespace, names a pid that is somebody else's here: only a
    group with the container's own id in its path is believed.
    """
    try:
        lines = (proc / str(pid) / "cgroup").read_text().splitlines()
    except OSError:
        lines = []
    groups: dict[str, Path] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if container_id in path:
            for controller in controllers.split(","):
                groups[controller] = Path(path.lstrip("/"))
    return CgroupCounters(_open(root, groups, "memory"), _open(root, groups, "pids"))


def _open(root: Path, groups: dict[str, Path], controller: str) -> tuple[int, bytes] | None:
    candidates = []
    if controller in groups:
        name, line = _V1[controller]
        candidates.append((root / controller / groups[controller] / name, line))
    if "" in groups:
        name, line = _V2[controller]
        candidates.append((root / groups[""] / name, line))
    for path, line in candidates:
        with suppress(OSError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC), line
    return None


def _count(opened: tuple[int, bytes] | None) -> int | None:
    if opened is None:
        return None
    descriptor, name = opened
    try:
        text = os.pread(descriptor, _FILE_BYTES, 0)
    except OSError:
        return None
    for line in text.splitlines():
        key, _, value = line.partition(b" ")
        if key == name and value.strip().isdigit():
            return int(value)
    return None
