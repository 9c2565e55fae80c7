"""The files the host staged for a run, mapped: all texts in one, and where characters and lines are in it."""

import mmap
import time
from functools import cached_property

from sandbox_image.worker.interpreter.landmarks import Landmarks

_VISIBLE_WITHIN_S = 1.0


def map_file(file: str, size_bytes: int | None = None) -> mmap.mmap:
    """A file's bytes, read when they are touched.

    Args:
        file: Which.
        size_bytes: How much of it; left out, all.

    Raises:
        OSError: It is not there, or not so long.
    """
    with open(file, "rb") as opened:
        # An empty file cannot be mapped; one anonymous byte that nothing points to stands in for it.
        if size_bytes == 0:
            return mmap.mmap(-1, 1)
        return mmap.mmap(opened.fileno(), size_bytes or 0, access=mmap.ACCESS_READ)


def map_once_visible(file: str) -> mmap.mmap:
    """As `map_file`, after waiting a while for the file.

    What the host links into a mounted directory is seen here a few milliseconds later under some runtimes.

    Raises:
        OSError: It did not come.
    """
    deadline_s = time.monotonic() + _VISIBLE_WITHIN_S
    while True:
        try:
            return map_file(file)
        except FileNotFoundError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.001)


class Blob:
    """All texts of a context, one after the other.

    Args:
        mapped: Their bytes.
        landmarks_file: Opened when somebody asks for a position in a text that is not in memory.
    """

    def __init__(self, mapped: mmap.mmap, landmarks_file: str) -> None:
        self.mapped = mapped
        self._landmarks_file = landmarks_file

    @cached_property
    def landmarks(self) -> Landmarks:
        """Where characters and lines are in it."""
        return Landmarks(memoryview(map_once_visible(self._landmarks_file)), self.read)

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`."""
        return self.mapped[start:end]
