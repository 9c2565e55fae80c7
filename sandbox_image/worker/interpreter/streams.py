"""Standard output as a cell finds it: whole at the start of each cell, whatever the last one did to it."""

import contextlib
import io
import os
import sys


class Streams:
    """Keeps duplicates of the output pipe, and puts it back."""

    def __init__(self) -> None:
        self._saved_fd = os.dup(1)
        self._stdin = _open(0, "r")
        self._stdout = _open(1, "w")
        self._stderr = _open(2, "w")

    def restore(self) -> None:
        """Undo what a cell did to file descriptors 1 and 2 and to `sys.stdin`, `stdout` and `stderr`."""
        os.dup2(self._saved_fd, 1)
        os.dup2(self._saved_fd, 2)
        if self._stdin.closed:
            self._stdin = _open(0, "r")
        if self._stdout.closed:
            self._stdout = _open(1, "w")
        if self._stderr.closed:
            self._stderr = _open(2, "w")
        sys.stdin, sys.stdout, sys.stderr = self._stdin, self._stdout, self._stderr

    def flush(self) -> None:
        """Write out what the cell left in buffers, as far as it can be written."""
        for stream in (self._stdout, self._stderr):
            # The cell may have closed the stream, or what is under it.
            with contextlib.suppress(OSError, ValueError):
                stream.flush()


def _open(fd: int, mode: str) -> io.TextIOWrapper:
    # `closefd=False`: closing sys.stdout, as `exit()` does with sys.stdin, must not close the descriptor.
    # Lines are written as they end, as on a terminal, so that they stay in order with those of child
    # processes. A lone surrogate is shown escaped: printing what a document holds must not be an error.
    return io.TextIOWrapper(
        open(fd, mode + "b", closefd=False), encoding="utf-8", errors="backslashreplace", line_buffering=True
    )
