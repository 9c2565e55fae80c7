"""What a process has used so far, read from /proc."""

import os
from contextlib import suppress
from pathlib import Path

_KIB_IN_MIB = 1024


def cpu_s(pid: int) -> float:
    """User and system seconds of a process, in hundredths."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mib(pid: int) -> dict[str, float]:
    """Its resident memory, `now` and at its `peak`."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {name: int(status[field].split()[0]) / _KIB_IN_MIB for name, field in _FIELDS.items()}


def cpu_s_by_thread(pid: int) -> dict[str, float]:
    """Likewise of its threads, by who began them: `main`, `grpc`, and all `others` of Python's."""
    spent = dict.fromkeys(("main", "grpc", "others"), 0.0)
    for task in Path(f"/proc/{pid}/task").iterdir():
        # One may end meanwhile.
        with suppress(OSError):
            head, _, rest = (task / "stat").read_text().rpartition(")")
            is_grpc = head.partition("(")[2].startswith(_GRPC_THREADS)
            whose = "main" if int(task.name) == pid else "grpc" if is_grpc else "others"
            fields = rest.split()
            spent[whose] += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return spent


_GRPC_THREADS = ("grpc", "event_engine", "lifeguard", "timer_manager", "resolver", "ev_poll")
_FIELDS = {"now": "VmRSS", "peak": "VmHWM"}


def reset_peak_memory() -> None:
    """This process's peak counts from here on. Source: proc(5), clear_refs."""
    Path("/proc/self/clear_refs").write_text("5")
