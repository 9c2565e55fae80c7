"""Moves what a cell writes from its pipe into an `OutputCapture`, and on to the wire in decent pieces."""

import asyncio
import fcntl
import os
import struct
import termios
from collections.abc import Callable

from sandbox_image.worker.output import CHUNK_BYTES, Chunk, OutputCapture

# A cell that ends sooner is read once, at its end: a short cell then costs no extra wake-up of the loop.
_FIRST_LOOK_S = 0.002

# Small writes are sent together, at most this late.
_FLUSH_S = 0.01

# One turn of the event loop reads no more than this, so that a flood cannot starve an interrupt.
_READ_BYTES = 262_144


class OutputPump:
    """Reads one interpreter's output pipe, and only while a cell runs.

    Between cells nothing is read: threads and processes that outlive their cell fill the pipe and then wait.
    What they wrote comes first in the next cell's output. The pipe's size is the cap, and a flood in the
    background costs nothing.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int, send: Callable[[Chunk], None]) -> None:
        os.set_blocking(fd, False)
        self._loop = loop
        self._fd = fd
        self._send = send
        self._capture: OutputCapture | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._watching = False

    def begin(self, capture: OutputCapture) -> None:
        """A cell starts; what can be read from here on is its output."""
        self._capture = capture
        self._timer = self._loop.call_later(_FIRST_LOOK_S, self._watch)

    def end(self) -> list[Chunk]:
        """The cell is over: take exactly what is in the pipe now; what has not been sent yet.

        Not "until the pipe is empty": a process left running may write for ever. Nothing when no cell runs.
        """
        if self._capture is None:
            return []
        remaining = _readable_bytes(self._fd)
        while remaining > 0:
            data = _read(self._fd, min(remaining, _READ_BYTES))
            if not data:
                break
            self._capture.write(data)
            remaining -= len(data)
        rest = self._capture.take_all()
        self._stop()
        return rest

    def close(self) -> None:
        """Let go of the pipe."""
        self._stop()
        os.close(self._fd)

    def _stop(self) -> None:
        self._capture = None
        self._cancel_timer()
        if self._watching:
            self._loop.remove_reader(self._fd)
            self._watching = False

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _watch(self) -> None:
        self._timer = None
        self._watching = True
        self._loop.add_reader(self._fd, self._readable)

    def _readable(self) -> None:
        if self._capture is None:
            return
        data = _read(self._fd, _READ_BYTES)
        if not data:
            # Every writer is gone. An end of file stays readable, so watching on would spin.
            self._loop.remove_reader(self._fd)
            self._watching = False
            return
        self._capture.write(data)
        if self._capture.unsent_bytes >= CHUNK_BYTES:
            self._cancel_timer()
            self._flush()
        elif self._timer is None and self._capture.unsent_bytes:
            self._timer = self._loop.call_later(_FLUSH_S, self._flush)

    def _flush(self) -> None:
        self._timer = None
        if self._capture is not None:
            for chunk in self._capture.take_head():
                self._send(chunk)


def _readable_bytes(fd: int) -> int:
    count: int = struct.unpack("i", fcntl.ioctl(fd, termios.FIONREAD, b"\0\0\0\0"))[0]
    return count


def _read(fd: int, limit: int) -> bytes:
    try:
        return os.read(fd, limit)
    except BlockingIOError:
        return b""
