"""What of a cell's output crosses the wire: its start and its end.

Rules:

1. The first `head_bytes` are kept as they come, to be sent while the cell runs.
2. Of what follows only the last `tail_bytes` are kept, to be sent when the cell is over.
3. Every byte has one offset, counted from the cell's start; a gap between two chunks is what was cut.
4. Memory stays below head + 2 x tail + one read, whatever is written.

Pure: no clock, no file descriptor.
"""

from typing import NamedTuple

# The contract's cap on one OutputChunk.
CHUNK_BYTES = 65_536


class Chunk(NamedTuple):
    """A piece of output and where it starts in the whole."""

    offset: int
    data: bytes


class OutputCapture:
    """The output of one cell."""

    def __init__(self, head_bytes: int, tail_bytes: int) -> None:
        self.total_bytes = 0
        """Written so far, kept or not."""
        self._head_bytes = head_bytes
        self._tail_bytes = tail_bytes
        self._unsent = bytearray()
        self._sent_bytes = 0
        self._tail = bytearray()

    @property
    def unsent_bytes(self) -> int:
        """Of the head, kept but not taken yet."""
        return len(self._unsent)

    def write(self, data: bytes) -> None:
        """Take what the cell wrote next."""
        room = self._head_bytes - self._sent_bytes - len(self._unsent)
        self.total_bytes += len(data)
        if room >= len(data):
            self._unsent += data
            return
        self._unsent += data[:room]
        self._tail += data[room:]
        # Trimmed at twice its size, not at each write: else a flood of short writes moves it every time.
        if len(self._tail) > 2 * self._tail_bytes:
            del self._tail[: len(self._tail) - self._tail_bytes]

    def take_head(self) -> list[Chunk]:
        """What of the head has not been taken, in chunks that fit the wire."""
        chunks = _split(self._sent_bytes, bytes(self._unsent))
        self._sent_bytes += len(self._unsent)
        self._unsent.clear()
        return chunks

    def take_all(self) -> list[Chunk]:
        """The rest of the head and the tail. Nothing may be written afterwards."""
        chunks = self.take_head()
        tail = bytes(self._tail[-self._tail_bytes :]) if self._tail_bytes else b""
        self._tail.clear()
        return chunks + _split(self.total_bytes - len(tail), tail)


def _split(offset: int, data: bytes) -> list[Chunk]:
    return [
        Chunk(offset + start, data[start : start + CHUNK_BYTES]) for start in range(0, len(data), CHUNK_BYTES)
    ]
