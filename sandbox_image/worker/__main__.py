"""`python3 -P -m sandbox_image.worker [SOCKET [CONTEXT_DIR [WORK_DIR]]]`: PID 1 of a sandbox."""

import os
import signal
import sys

from sandbox_image.worker.spawn import random_seed, spawn_interpreter


def main(arguments: list[str]) -> None:
    """Run the worker. Never returns."""
    defaults = ["/run/rlm/broker.sock", "/context", "/tmp"]  # noqa: S108 - the sandbox's own
    socket_path, context_dir, work_dir = [*arguments, *defaults[len(arguments) :]]
    # As PID 1 the worker receives only signals it has a handler for, and Python installs one for SIGINT:
    # without it a cell can signal its worker in vain.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    spawned = spawn_interpreter(random_seed(), work_dir)

    # gRPC takes longer to load than an interpreter to start, and the two can go on at once.
    from sandbox_image.worker.serve import serve  # noqa: PLC0415

    exit_code = serve(socket_path, context_dir, work_dir, spawned)
    sys.stderr.flush()
    # Nothing is left to save, and taking gRPC down in order would delay each sandbox's removal.
    os._exit(exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])
