"""Searching and splitting a large UTF-8 buffer piece by piece.

Pieces, and not one call over the whole map: `bytes` searches several times as fast as `mmap` does, and a
cell can be interrupted between two of them. UTF-8 synchronises itself: whole characters are found only at
characters.
"""

from collections.abc import Callable, Iterator

Read = Callable[[int, int], bytes]
"""Gives bytes `start` to `end` of the buffer."""

PIECE_BYTES = 1_048_576


def find_in(read: Read, sub: bytes | None, start: int, end: int) -> int:
    """The first offset of `sub` within `start` to `end`, or -1; also for None, which is no UTF-8."""
    if sub is None:
        return -1
    while start + len(sub) <= end:
        # A piece overlaps the next by all but one byte of `sub`: what straddles the border is found once.
        found = read(start, min(start + PIECE_BYTES + len(sub) - 1, end)).find(sub)
        if found >= 0:
            return start + found
        start += PIECE_BYTES
    return -1


def rfind_in(read: Read, sub: bytes | None, start: int, end: int) -> int:
    """The last offset of `sub` within `start` to `end`, or -1; also for None, which is no UTF-8."""
    if sub is None:
        return -1
    while start + len(sub) <= end:
        piece_start = max(start, end - PIECE_BYTES - len(sub) + 1)
        found = read(piece_start, end).rfind(sub)
        if found >= 0:
            return piece_start + found
        end = piece_start + len(sub) - 1
    return -1


def count_in(read: Read, sub: bytes | None, start: int, end: int) -> int:
    """How often `sub`, not empty, occurs within `start` to `end`, without overlaps."""
    if sub is None:
        return 0
    if _overlaps_itself(sub):
        return _count_one_by_one(read, sub, start, end)
    total = 0
    for piece_start in range(start, end, PIECE_BYTES):
        total += read(piece_start, min(piece_start + PIECE_BYTES + len(sub) - 1, end)).count(sub)
    return total


def split_lines(read: Read, start: int, end: int, keepends: bool) -> Iterator[str]:
    r"""Lines of a buffer that starts at a line. They end with "\n" or "\r\n"."""
    rest = b""
    piece_bytes = PIECE_BYTES
    while start < end:
        piece = rest + read(start, min(start + piece_bytes, end))
        start += piece_bytes
        whole, newline, rest = piece.rpartition(b"\n")
        if not newline:
            # One line over several pieces: each is twice the last, or joining them would take quadratic time.
            piece_bytes *= 2
            continue
        lines = whole.decode().split("\n")
        if keepends:
            yield from (line + "\n" for line in lines)
        else:
            yield from (line.removesuffix("\r") for line in lines)
    if rest:
        yield rest.decode()


def _overlaps_itself(sub: bytes) -> bool:
    """Whether two occurrences can overlap, so that which of them count depends on where counting starts."""
    return any(sub.startswith(sub[start:]) for start in range(1, len(sub)))


def _count_one_by_one(read: Read, sub: bytes, start: int, end: int) -> int:
    total = 0
    while (found := find_in(read, sub, start, end)) >= 0:
        total += 1
        start = found + len(sub)
    return total
