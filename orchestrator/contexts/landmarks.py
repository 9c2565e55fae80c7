"""Where characters and lines are in a blob, so that nobody has to count from its start to find the n-th.

Staging reads every byte anyway, and notes a landmark now and then. They lie beside the blob, in the store and
in each sandbox, as 64-bit numbers in the machine's byte order, four for each landmark:

    byte         where it is: at the start of a character, or at the end of the blob
    characters   how many start before it
    newlines     how many are before it
    width        bytes that CPython needs for each character (1, 2 or 4) since the landmark before it

The first is at the start of the blob, the last at its end. From one to the next it is about `PIECE_BYTES` and
never more than `MAX_GAP_BYTES`: half a megabyte for a gigabyte. Which bytes are landmarks depends on the
chunks that the text came in; any choice gives the same answers.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from typing import NamedTuple

from orchestrator.contexts.normalise import width_of

PIECE_BYTES = 64 * 1024
"""How much is checked and counted at a time."""
MAX_GAP_BYTES = PIECE_BYTES // 2 + 3 * PIECE_BYTES
"""A piece is added to less than half of one, and each byte of it that is not UTF-8 becomes three."""

_COLUMNS = 4


class Counted(NamedTuple):
    """What is in some bytes of a blob."""

    chars: int
    newlines: int
    width: int


class LandmarkNotes:
    """Notes landmarks while a blob is written."""

    def __init__(self) -> None:
        self._noted = array("Q", (0, 0, 0, 1))
        self._width = 1

    def pass_by(self, byte: int, chars: int, newlines: int, width: int) -> None:
        """The blob was written as far as `byte`; what is new since the last call needs `width`."""
        self._width = max(self._width, width)
        if byte - self._noted[-_COLUMNS] >= PIECE_BYTES // 2:
            self._note(byte, chars, newlines)

    def encode(self, byte: int, chars: int, newlines: int) -> bytes:
        """The file, once the blob ended at `byte`."""
        if byte > self._noted[-_COLUMNS]:
            self._note(byte, chars, newlines)
        return self._noted.tobytes()

    def _note(self, byte: int, chars: int, newlines: int) -> None:
        self._noted.extend((byte, chars, newlines, self._width))
        self._width = 1


class Landmarks:
    """The landmarks of a blob, for counting in a part of it."""

    def __init__(self, file: bytes | memoryview) -> None:
        numbers = memoryview(file).cast("Q")
        self._bytes: Sequence[int] = numbers[0::_COLUMNS]
        self._chars: Sequence[int] = numbers[1::_COLUMNS]
        self._newlines: Sequence[int] = numbers[2::_COLUMNS]
        self._widths = numbers[3::_COLUMNS]

    def count(self, read: Callable[[int, int], bytes], start: int, end: int) -> Counted:
        """What is in the bytes from `start` to `end`, each the start of a character or the end of the blob.

        Reads what lies between them and the landmarks nearest to them on the inside.

        Args:
            read: Gives bytes of the blob, from the first number to the second.
            start: First byte.
            end: One past the last byte.
        """
        first, last = bisect_left(self._bytes, start), bisect_right(self._bytes, end) - 1
        if first > last:
            return _count(read(start, end))
        edges = [_count(read(*edge)) for edge in ((start, self._bytes[first]), (self._bytes[last], end))]
        inside = Counted(
            self._chars[last] - self._chars[first],
            self._newlines[last] - self._newlines[first],
            max(self._widths[first + 1 : last + 1], default=1),
        )
        parts = (*edges, inside)
        return Counted(
            sum(part.chars for part in parts),
            sum(part.newlines for part in parts),
            max(part.width for part in parts),
        )


def _count(part: bytes) -> Counted:
    text = part.decode()
    return Counted(len(text), text.count("\n"), width_of(text))
