"""Kernel quotas that are counted per uid, and crashes (C09, C10)."""

import os
import resource
import signal

from orchestrator.probes.guest.door import libc, say

_MAX_WATCHES = 600


def _inotify() -> list[int]:
    """How many instances there were to have, at most `_MAX_WATCHES`."""
    held: list[int] = []
    while len(held) < _MAX_WATCHES and (descriptor := libc.inotify_init1(0)) >= 0:
        held.append(descriptor)
    for descriptor in held:
        os.close(descriptor)
    return held


def _crash() -> str:
    """How a process ends that calls abort, and whether it left a core."""
    before = set(os.listdir("/tmp"))  # noqa: S108
    child = os.fork()
    if child == 0:
        os.chdir("/tmp")  # noqa: S108
        os.kill(os.getpid(), signal.SIGABRT)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    left = sorted(set(os.listdir("/tmp")) - before)  # noqa: S108
    if os.WCOREDUMP(status) or left:
        return f"core dumped {left}"
    return signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else "?"


say(
    "quotas",
    {
        "inotify": len(_inotify()),
        "crash": _crash(),
        "core_limit": resource.getrlimit(resource.RLIMIT_CORE),
        "msgqueue": resource.getrlimit(resource.RLIMIT_MSGQUEUE),
    },
)
