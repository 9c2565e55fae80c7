"""What keeps other processes of the same user out of this one's memory. Linux only, as containers are.

It does not keep out root, nor what can become root: a member of the `docker` group can.
"""

import ctypes
import os
import resource
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_DUMPABLE = 4
# Ctrl-C and a closed terminal are the orchestrator's to answer, and so is the signal with which a service
# manager stops both at once: calls in flight still have to settle.
_NOT_OURS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def close_this_process() -> None:
    """No core dump, no debugger, no /proc/<pid>/mem or environ for others; it dies with its parent.

    Raises:
        OSError: The kernel refuses. There must be no key here then.
    """
    # Hard limit too: nothing that runs here can raise it again.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _prctl(_PR_SET_DUMPABLE, 0)
    # The end of the channel says so too, but only to a loop that turns.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for number in _NOT_OURS:
        signal.signal(number, signal.SIG_IGN)
    # `cli.held_signals` was at work in the parent; a mask is inherited.
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
