"""What the kernel counted against one sandbox, read from its control group on the host.

The files are opened once and stay readable until the group is removed, some milliseconds after the last
process in it. Reading two of them takes microseconds, so it is done on the event loop.

Sources: Linux Documentation/admin-guide/cgroup-v1/{memory,pids}.rst and cgroup-v2.rst. With gVisor the
group holds the sandbox's own kernel, not the guest's processes: memory is counted all the same, guest
processes aren't.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from orchestrator.sandbox.port import Counters

_ROOT = Path("/sys/fs/cgroup")
_FILE_BYTES = 4_096

_V1 = {
    "memory": ("memory.oom_control", b"oom_kill"),
    "pids": ("pids.events", b"max"),
    "cpuacct": ("cpuacct.usage", b""),
}
"""By controller: the file, and how the line begins that is read from it."""
_V2 = {
    "memory": ("memory.events", b"oom_kill"),
    "pids": ("pids.events", b"max"),
    "cpuacct": ("cpu.stat", b"usage_usec"),
}
_CPU_UNITS_PER_S = {b"": 1e9, b"usage_usec": 1e6}

NOTHING_KNOWN = Counters(oom_kills=None, refused_forks=None)


@dataclass(frozen=True, slots=True)
class _Counter:
    descriptor: int
    line: bytes

    def read(self) -> int | None:
        try:
            text = os.pread(self.descriptor, _FILE_BYTES, 0)
        except OSError:
            return None
        for line in text.splitlines():
            name, _, value = line.rpartition(b" ")
            if name == self.line and value.isdigit():
                return int(value)
        return None


class CgroupCounters:
    """The counters of one control group. `close` it."""

    def __init__(self, counters: Mapping[str, _Counter]) -> None:
        self._counters = dict(counters)

    def read(self) -> Counters:
        """The counters now; None for what cannot be read, which all is once the group is removed."""
        cpu = self._counters.get("cpuacct")
        used = self._read("cpuacct")
        return Counters(
            oom_kills=self._read("memory"),
            refused_forks=self._read("pids"),
            cpu_s=None if cpu is None or used is None else used / _CPU_UNITS_PER_S[cpu.line],
        )

    def close(self) -> None:
        """Let go of the files."""
        while self._counters:
            os.close(self._counters.popitem()[1].descriptor)

    def _read(self, controller: str) -> int | None:
        counter = self._counters.get(controller)
        return None if counter is None else counter.read()


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
    groups: dict[str, str] = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if container_id in path:
            groups.update(dict.fromkeys(controllers.split(","), path.lstrip("/")))
    counters = {}
    for controller in _V1:
        counter = _open(root, groups, controller)
        if counter is not None:
            counters[controller] = counter
    return CgroupCounters(counters)


def _open(root: Path, groups: Mapping[str, str], controller: str) -> _Counter | None:
    candidates = []
    if controller in groups:
        name, line = _V1[controller]
        candidates.append((root / controller / groups[controller] / name, line))
    if "" in groups:
        name, line = _V2[controller]
        candidates.append((root / groups[""] / name, line))
    for path, line in candidates:
        with suppress(OSError):
            return _Counter(os.open(path, os.O_RDONLY | os.O_CLOEXEC), line)
    return None
