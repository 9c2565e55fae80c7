"""`python3 -m sandbox_image.worker.interpreter CONTROL_FD CALLS_FD SEED WORK_DIR`, started by the worker."""

import contextlib
import os
import random
import socket
import sys

from sandbox_image.worker.interpreter.loop import Interpreter


def main(control_fd: str, calls_fd: str, seed: str, work_dir: str) -> None:
    """Run cells until the worker goes away."""
    # Under memory pressure the kernel takes this process, and what it starts, before the worker.
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w") as adjustment:
        adjustment.write("1000")
    control, calls = socket.socket(fileno=int(control_fd)), socket.socket(fileno=int(calls_fd))
    for sock in (control, calls):
        sock.set_inheritable(False)
    os.chdir(work_dir)
    # Last, so that a file a cell writes is importable but never takes the place of the standard library.
    sys.path.append("")
    sys.argv = [""]
    random.seed(int(seed))
    Interpreter(control, calls).serve()


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except (BrokenPipeError, ConnectionResetError):
        os._exit(0)
    # The worker is gone, and threads or exit handlers of cells have nobody to tell anything.
    os._exit(0)
