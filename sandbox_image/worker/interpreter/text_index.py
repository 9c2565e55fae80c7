"""Finding the n-th of something in a large UTF-8 buffer without reading it all again.

The buffer is counted in blocks, once, from the start, and only as far as somebody asked.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable

# Small enough to be read again for one lookup, large enough for a short table: 1 GB is 16,384 entries.
BLOCK_BYTES = 65_536

CONTINUATION_BYTES = bytes(range(0x80, 0xC0))


def count_characters(block: bytes) -> int:
    """How many characters start in a piece of UTF-8."""
    # Checking for ASCII is twenty times as fast as counting, and most blocks of most texts are ASCII.
    if block.isascii():
        return len(block)
    return len(block.translate(None, CONTINUATION_BYTES))


def locate_character(block: bytes, number: int) -> int:
    """Where the `number`-th character that starts in `block` starts; the block's end for one too many."""
    if block.isascii():
        return number
    lead = 0
    while lead < len(block) and 0x80 <= block[lead] < 0xC0:
        lead += 1
    # "ignore" drops the part of a last character that the block cuts off. It is never asked to step over it.
    return lead + len(block[lead:].decode("utf-8", "ignore")[:number].encode())


def count_newlines(block: bytes) -> int:
    """How many newlines a piece of text has."""
    return block.count(b"\n")


def locate_newline(block: bytes, number: int) -> int:
    """Where the `number`-th newline of `block` is, counted from 0."""
    before = block.split(b"\n", number + 1)
    return len(block) - len(before[-1]) - 1


class BlockIndex:
    """Cumulative counts per block of one buffer.

    Args:
        read: Gives bytes `start` to `end` of the buffer.
        length_bytes: Of the buffer.
        count: Counts what is indexed in a piece of it.
        locate: Finds the n-th, from 0, in a piece that has more than n.
    """

    def __init__(
        self,
        read: Callable[[int, int], bytes],
        length_bytes: int,
        count: Callable[[bytes], int],
        locate: Callable[[bytes, int], int],
    ) -> None:
        self._read = read
        self._length_bytes = length_bytes
        self._count = count
        self._locate = locate
        # Entry i is the count before block i.
        self._before = array("Q", [0])

    def offset_of(self, number: int) -> int | None:
        """Where the `number`-th is, from 0, in bytes; None when there are not so many."""
        while self._before[-1] <= number:
            if not self._grow():
                return None
        block = bisect_right(self._before, number) - 1
        start = block * BLOCK_BYTES
        return start + self._locate(self._block(block), number - self._before[block])

    def count_before(self, offset: int) -> int:
        """How many there are in the first `offset` bytes."""
        block = offset // BLOCK_BYTES
        while len(self._before) <= block:
            self._grow()
        start = block * BLOCK_BYTES
        return self._before[block] + (self._count(self._read(start, offset)) if offset > start else 0)

    def _block(self, number: int) -> bytes:
        start = number * BLOCK_BYTES
        return self._read(start, min(start + BLOCK_BYTES, self._length_bytes))

    def _grow(self) -> bool:
        block = len(self._before) - 1
        if block * BLOCK_BYTES >= self._length_bytes:
            return False
        self._before.append(self._before[-1] + self._count(self._block(block)))
        return True
