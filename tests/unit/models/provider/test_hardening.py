"""What another process of the same user can do to one that has closed itself, and to one that has not."""

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from orchestrator.models.provider import hardening

_NOBODY = 65_534
_PR_SET_DUMPABLE = 4
_PTRACE_ATTACH = 16

libc = ctypes.CDLL(None, use_errno=True)


def become_somebody() -> None:
    """A user whom the kernel lets into nothing of root's. Only root has somebody to become."""
    if os.geteuid() == 0:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
        # A process that changes its user is closed by that; a program that was started so is not.
        libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0)


@contextmanager
def process(prepare: Callable[[], None]) -> Iterator[int]:
    """A process of that user that does nothing, once prepared; its pid."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            become_somebody()
            prepare()
            os.write(writing, b"ready")
            signal.pause()
        finally:
            os._exit(1)
    os.close(writing)
    try:
        assert os.read(reading, 5) == b"ready"
        yield pid
    finally:
        os.close(reading)
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def open_to_another(pid: int) -> list[str]:
    """Which ways into the process are open to a second process of the same user."""
    reading, writing = os.pipe()
    looker = os.fork()
    if looker == 0:
        try:
            become_somebody()
            for name in ("environ", "mem", "maps", "fd/0"):
                try:
                    os.close(os.open(f"/proc/{pid}/{name}", os.O_RDONLY))
                    os.write(writing, f"{name} ".encode())
                except PermissionError:
                    continue
            if libc.ptrace(_PTRACE_ATTACH, pid, 0, 0) == 0:
                os.write(writing, b"ptrace ")
        finally:
            os._exit(0)
    os.close(writing)
    os.waitpid(looker, 0)
    with os.fdopen(reading) as told:
        return told.read().split()


@pytest.mark.case("N01")
def test_nobody_of_the_same_user_gets_into_a_process_that_is_closed() -> None:
    with process(hardening.close_this_process) as pid:
        assert open_to_another(pid) == []


@pytest.mark.case("N01")
def test_the_doors_are_open_without_it() -> None:
    with process(lambda: None) as pid:
        # With Yama, a kernel's own rule, a debugger is refused anyhow.
        assert {"environ", "maps", "fd/0"} <= set(open_to_another(pid))


def test_a_closed_process_leaves_no_core_and_ends_by_no_signal_of_a_terminal() -> None:
    program = (
        "import os, resource, signal\n"
        "from orchestrator.models.provider import hardening\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})\n"
        "hardening.close_this_process()\n"
        "for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP): os.kill(os.getpid(), number)\n"
        "print(resource.getrlimit(resource.RLIMIT_CORE), signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
    )
    told = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    assert told.stdout == "(0, 0) set()\n"
