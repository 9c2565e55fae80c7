"""Who a cell is: capabilities, uid, filters, namespaces, limits, environment (A01-A05, A08)."""

import os
import resource

from orchestrator.probes.guest.door import libc, read, say

_PR_GET_NO_NEW_PRIVS = 39
_NAMESPACES = ("cgroup", "ipc", "mnt", "net", "pid", "user", "uts")


def _namespace(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{name}")
    except OSError:
        return ""


status = dict(line.split(":", 1) for line in read("/proc/self/status").splitlines())
say(
    "identity",
    {
        "capabilities": {name: int(value, 16) for name, value in status.items() if name.startswith("Cap")},
        "no_new_privileges": libc.prctl(_PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0),
        "seccomp": status.get("Seccomp", "").strip(),
        "uids": sorted(set(map(int, status["Uid"].split()))),
        "gids": sorted(set(map(int, status["Gid"].split() + status.get("Groups", "").split()))),
        "namespaces": {name: _namespace(name) for name in _NAMESPACES},
        "limits": {
            name: resource.getrlimit(getattr(resource, f"RLIMIT_{name.upper()}"))
            for name in ("nofile", "fsize", "core", "memlock", "msgqueue")
        },
        "environment": dict(os.environ),
        "worker_environment": dict(
            entry.partition("=")[::2] for entry in read("/proc/1/environ").split("\0") if entry
        ),
        "hostname": os.uname().nodename,
        "version": read("/proc/version").strip(),
    },
)
