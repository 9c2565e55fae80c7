"""The kernel's files: which can be written, which secrets can be read (A09, C02, C03, C05, C11)."""

import os
import time

from orchestrator.probes.guest.door import attempt, attempts, read, say, writable

_MAX_FILES = 60_000
_MAX_S = 20.0

_SECRETS = (
    "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sched_debug", "/proc/kmsg", "/proc/kallsyms",
    "/proc/slabinfo", "/proc/kpagecount", "/proc/vmallocinfo", "/sys/firmware", "/sys/kernel/debug",
    "/sys/kernel/tracing", "/dev/mem", "/dev/kmsg",
)  # fmt: skip
_TRIGGERS = (
    "/proc/sysrq-trigger", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe",
    "/proc/sys/kernel/hostname", "/proc/sys/vm/drop_caches", "/sys/kernel/uevent_helper",
    "/sys/power/state", "/proc/acpi/wakeup", "/proc/mtrr",
)  # fmt: skip


def _writable_below(tops: tuple[str, ...]) -> tuple[list[str], int, bool]:
    """Files that open for writing, how many were tried, and whether it came to its end."""
    found: list[str] = []
    tried, give_up_s = 0, time.monotonic() + _MAX_S
    for top in tops:
        for directory, _, names in os.walk(top):
            for name in names:
                if tried >= _MAX_FILES or time.monotonic() > give_up_s or len(found) > 20:
                    return found, tried, False
                tried += 1
                path = os.path.join(directory, name)
                if not os.path.islink(path) and writable(path):
                    found.append(path)
    return found, tried, True


def _secret(path: str) -> str:
    """What can be read of it: an error's name, or how many bytes other than zeros and blanks."""
    if os.path.isdir(path):
        why = attempt(lambda: os.listdir(path))
        return why if why != "open" else f"{len(os.listdir(path))} entries"
    why = attempt(lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
    if why != "open":
        return why
    text = read(path, 4096)
    if path == "/proc/kallsyms":
        return f"{sum(int(line.split()[0], 16) != 0 for line in text.splitlines()[:-1])} addresses"
    return f"{len(text.strip(chr(0)).strip())} bytes"


pids = sorted(int(name) for name in os.listdir("/proc") if name.isdigit())
files, tried, finished = _writable_below(("/proc/sys", "/sys"))
say(
    "kernel_files",
    {
        "writable": files,
        "tried": tried,
        "finished": finished,
        "triggers": {path: writable(path) for path in _TRIGGERS},
        "secrets": {path: _secret(path) for path in _SECRETS},
        "cgroup": [
            os.path.join(directory, name)
            for directory, _, names in os.walk("/sys/fs/cgroup")
            for name in names
            if os.access(os.path.join(directory, name), os.W_OK)
        ][:20],
        "pids": pids,
        "own": sorted({1, os.getpid(), os.getppid()}),
        "comms": {str(pid): read(f"/proc/{pid}/comm").strip() for pid in pids[:20]},
        "others": attempts(
            {
                "root of PID 1": lambda: os.listdir("/proc/1/root/proc/1/root"),
                "write to PID 1's program": lambda: os.close(os.open("/proc/1/exe", os.O_RDWR)),
                "write to its own program": lambda: os.close(os.open("/proc/self/exe", os.O_RDWR)),
            }
        ),
    },
)
