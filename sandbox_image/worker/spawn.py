"""Starts an interpreter. Imports little, so that it can happen before the worker loads gRPC."""

import fcntl
import os
import socket
import sys
from dataclasses import dataclass

# Fewer switches between the processes when a cell floods its output; what the kernel grants is taken.
_PIPE_BYTES = 262_144

# The highest there is; the container's own is 500 (orchestrator/sandbox/posture.py).
_OOM_SCORE = "1000"


@dataclass(frozen=True, slots=True)
class Spawned:
    """A started interpreter: its process and the worker's ends of what connects them."""

    pid: int
    hash_seed: int
    control: socket.socket
    calls: socket.socket
    output_fd: int


def random_seed() -> int:
    """A hash seed no sibling has, 1 to 4294967295. 0 would switch hash randomisation off."""
    return int.from_bytes(os.urandom(4), "big") or 1


def spawn_interpreter(hash_seed: int, work_dir: str) -> Spawned:
    """Start an interpreter in a session of its own, with `work_dir` as its home and current directory.

    Raises:
        OSError: No process, memory or file descriptor is left for it.
    """
    control, their_control = socket.socketpair()
    calls, their_calls = socket.socketpair()
    output_fd, their_output = os.pipe()
    _widen(output_fd)
    for their_socket in (their_control, their_calls):
        their_socket.set_inheritable(True)
    environment = {
        **os.environ,
        "HOME": work_dir,
        "PYTHONHASHSEED": str(hash_seed),
        # A container has no locale; cells and the Python processes they start write UTF-8 all the same.
        "PYTHONUTF8": "1",
    }
    arguments = ["-P", "-s", "-m", "sandbox_image.worker.interpreter"]
    arguments += [str(their_control.fileno()), str(their_calls.fileno()), str(hash_seed), work_dir]
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, *arguments],
        environment,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, their_output, 1),
            (os.POSIX_SPAWN_DUP2, their_output, 2),
        ],
        setsid=True,
    )
    _offer_to_the_oom_killer(pid)
    their_control.close()
    their_calls.close()
    os.close(their_output)
    return Spawned(pid, hash_seed, control, calls, output_fd)


def _offer_to_the_oom_killer(pid: int) -> None:
    """Let the kernel, short of memory, take what cells run before it takes the worker.

    Everything an interpreter starts inherits it. A cell may lower it again, but not below the worker's own.
    """
    try:
        with open(f"/proc/{pid}/oom_score_adj", "w") as adjustment:
            adjustment.write(_OOM_SCORE)
    except OSError:
        # gVisor keeps none that counts: there the kernel sees one process only.
        return


def _widen(pipe_fd: int) -> None:
    try:
        fcntl.fcntl(pipe_fd, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    except OSError:
        # Over the user's share of pipe memory: the default size only costs speed.
        return
