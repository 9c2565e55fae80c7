"""Finding the n-th character or line of a blob: from the nearest of the host's landmarks, not from the start.

The file is described in the orchestrator's `contexts/landmarks.py`: four 64-bit numbers for each landmark, at
the start of a character: byte, characters before it, newlines before it, width since the one before.
Positions here are those of the whole blob, of which a text is a part.
"""

from bisect import bisect_right
from collections.abc import Callable, Sequence

_COLUMNS = 4
_CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


class Landmarks:
    """The landmarks of one blob.

    Args:
        file: Their file.
        read: Gives bytes of the blob, from the first number to the second.
    """

    def __init__(self, file: memoryview, read: Callable[[int, int], bytes]) -> None:
        numbers = file.cast("Q")
        self._bytes: Sequence[int] = numbers[0::_COLUMNS]
        self._characters: Sequence[int] = numbers[1::_COLUMNS]
        self._newlines: Sequence[int] = numbers[2::_COLUMNS]
        self._widths = numbers[3::_COLUMNS]
        self._read = read
        # The last answer, for whoever goes through a text and asks for one position after the other: a byte,
        # the character that starts there, and the landmark after it.
        self._last = 0, 0, 0

    def byte_of(self, character: int) -> int:
        """Where a character of the blob starts; the end of the blob for the one after the last."""
        gap = bisect_right(self._characters, character) - 1
        if gap == len(self._bytes) - 1:
            return self._bytes[gap]
        start, end = self._bytes[gap], self._bytes[gap + 1]
        rest = character - self._characters[gap]
        if end - start == self._characters[gap + 1] - self._characters[gap]:
            return start + rest
        last_byte, last_character, _ = self._last
        if last_byte >= start and last_character <= character:
            start, rest = last_byte, character - last_character
        byte = start + len(self._read(start, end).decode()[:rest].encode())
        self._last = byte, character, end
        return byte

    def character_at(self, byte: int) -> int:
        """How many characters start before a byte at the start of one."""
        start, character, end = self._last
        if not start <= byte < end:
            gap = bisect_right(self._bytes, byte) - 1
            start, character = self._bytes[gap], self._characters[gap]
            end = self._bytes[min(gap + 1, len(self._bytes) - 1)]
        character += count_characters(self._read(start, byte))
        self._last = byte, character, end
        return character

    def newlines_before(self, byte: int) -> int:
        """How many newlines there are before a byte."""
        gap = bisect_right(self._bytes, byte) - 1
        return self._newlines[gap] + self._read(self._bytes[gap], byte).count(b"\n")

    def byte_of_newline(self, number: int) -> int | None:
        """Where a newline of the blob is, counted from 0; None when there are not so many."""
        gap = bisect_right(self._newlines, number) - 1
        if gap == len(self._bytes) - 1:
            return None
        part = self._read(self._bytes[gap], self._bytes[gap + 1])
        after = part.split(b"\n", number - self._newlines[gap] + 1)[-1]
        return self._bytes[gap] + len(part) - len(after) - 1

    def width(self, start: int, end: int) -> int:
        """Bytes that a `str` needs for each character from one byte to another, or more but never less."""
        first, last = bisect_right(self._bytes, start), bisect_right(self._bytes, max(start, end - 1))
        return max(self._widths[first : last + 1], default=1)


def count_characters(part: bytes) -> int:
    """How many characters start in a piece of UTF-8."""
    # Checking for ASCII is twenty times as fast as counting, and most of most texts is ASCII.
    if part.isascii():
        return len(part)
    return len(part.translate(None, _CONTINUATION_BYTES))
