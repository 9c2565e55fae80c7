"""The processes of a sandbox: reaping them, and killing all but the worker."""

import asyncio
import os
import signal
from collections.abc import Set
from pathlib import Path

# A process in an uninterruptible system call outlives SIGKILL for a while; a new interpreter can start
# beside it.
_GONE_TIMEOUT_S = 5.0


class Reaper:
    """Collects every process that ends. As PID 1 that includes the orphans of all others.

    It owns SIGCHLD and `waitpid(-1)`: nothing else in the worker may wait for a process.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._watched: dict[int, asyncio.Future[int]] = {}
        self._sessions: set[int] = set()
        self._no_children = asyncio.Event()
        loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def watch(self, pid: int) -> asyncio.Future[int]:
        """The exit code of a direct child to come: what it returned, or minus the signal that ended it."""
        exit_code: asyncio.Future[int] = self._loop.create_future()
        self._watched[pid] = exit_code
        self._sessions.add(pid)
        # It may have ended before anybody watched.
        self._loop.call_soon(self._reap)
        return exit_code

    async def kill_all(self) -> None:
        """Kill every process but the worker and wait until they are gone."""
        self._no_children.clear()
        if os.getpid() == 1:
            _kill(-1)
        else:
            # Run by hand or in a test, outside a container: -1 would be everything the user owns.
            for pid in _descendants(os.getpid(), self._sessions):
                _kill(pid)
        self._reap()
        try:
            await asyncio.wait_for(self._no_children.wait(), _GONE_TIMEOUT_S)
        except TimeoutError:
            return

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                self._no_children.set()
                return
            if pid == 0:
                return
            exit_code = self._watched.pop(pid, None)
            if exit_code is not None and not exit_code.done():
                exit_code.set_result(os.waitstatus_to_exitcode(status))


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _descendants(ancestor: int, sessions: Set[int]) -> list[int]:
    """Processes started by `ancestor`, directly or not, and all of the given sessions.

    An orphan has lost its ancestors but not its session.
    """
    parents: dict[int, int] = {}
    session_of: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The command name before the last parenthesis may hold spaces and parentheses of its own.
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
            session_of[int(entry.name)] = int(fields[3])
    found = {pid for pid, session in session_of.items() if session in sessions} | {ancestor}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return sorted(found - {ancestor})
