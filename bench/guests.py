"""What sandboxes cost the host, read on the host: memory and CPU time, theirs and the engine's."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from docker import APIClient

from orchestrator.ids import SandboxId
from orchestrator.sandbox.cgroups import open_counters
from orchestrator.sandbox.docker_driver import ending_of
from orchestrator.sandbox.port import Ending

_PROC = Path("/proc")
_KIB_IN_MIB = 1_024
_ENGINE = ("dockerd", "containerd", "containerd-shim")


class Guest:
    """One running sandbox."""

    def __init__(self, engine: APIClient, sandbox_id: SandboxId) -> None:
        self.name = f"rlm-{sandbox_id}"
        inspected = engine.inspect_container(self.name)
        assert ending_of(inspected["State"]) is Ending.RUNNING, inspected["State"]
        self._pid = int(inspected["State"]["Pid"])
        self._counters = open_counters(self._pid, inspected["Id"])

    def cpu_s(self) -> float:
        """CPU time of all its processes so far."""
        spent_s = self._counters.read().cpu_s
        assert spent_s is not None, "its control group cannot be read"
        return spent_s

    def pss_mib(self) -> dict[str, float]:
        """Proportional share of memory: of its first process, of those below it, and of both together."""
        first, *below = (_pss_kib(pid) / _KIB_IN_MIB for pid in _family(self._pid))
        return {"first": first, "below": sum(below), "all": first + sum(below)}

    def close(self) -> None:
        """Let go of its counters."""
        self._counters.close()


def engine_cpu_s() -> float:
    """CPU time of the engine's own processes so far, all containers' together."""
    ticks = 0
    for pid in _engine_pids():
        with suppress(OSError):
            fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def engine_pss_mib() -> dict[str, float]:
    """Memory of the engine's own processes, by program."""
    found = dict.fromkeys(_ENGINE, 0.0)
    for pid in _engine_pids():
        with suppress(OSError):
            program = (_PROC / str(pid) / "comm").read_text().strip()
            # The kernel keeps 15 characters of a name.
            program = next(name for name in _ENGINE[::-1] if name.startswith(program[:15]))
            found[program] += _pss_kib(pid) / _KIB_IN_MIB
    return found


def own_open_files() -> int:
    """Open files of this process."""
    return len(list((_PROC / "self/fd").iterdir()))


def _engine_pids() -> Iterable[int]:
    short = {name[:15] for name in _ENGINE}
    for entry in _PROC.iterdir():
        if entry.name.isdecimal():
            with suppress(OSError):
                if (entry / "comm").read_text().strip() in short:
                    yield int(entry.name)


def _family(pid: int) -> list[int]:
    found = [pid]
    for one in found:
        with suppress(OSError):
            for children in (_PROC / str(one) / "task").glob("*/children"):
                found += map(int, children.read_text().split())
    return found


def _pss_kib(pid: int) -> int:
    """Pss of proc(5)'s smaps_rollup; 0 for a process that is gone."""
    with suppress(OSError):
        for line in (_PROC / str(pid) / "smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    return 0
