"""Regular expressions over a text that is not in memory, with the meaning they have for `str`.

Two ways:

* Text all ASCII: `re` on bytes means the same as on `str`, so it runs over the map itself. Exact.
* Else the text is decoded in windows. A window reaches `REACH_BYTES` beyond the last place where a match of
  it may start. So it is exact for matches that are shorter, and look no further ahead, than that; a match
  that touches the window's end is refused. (A greedy `.*` that crosses lines finds its last chance in the
  window, not in the text.)
"""

import re
from collections.abc import Iterator
from typing import Any

from sandbox_image.worker.interpreter.landmarks import count_characters
from sandbox_image.worker.interpreter.text_bytes import PIECE_BYTES, Read

WINDOW_BYTES = 8 * 1_048_576
REACH_BYTES = 1_048_576
# How far back a window shows what is before its first possible match. Look-behinds have a fixed width.
BEHIND_BYTES = 65_536

# White space for `str`, not for `bytes`.
_SEPARATORS = (b"\x1c", b"\x1d", b"\x1e", b"\x1f")


class ViewMatch:
    """A match: like `re.Match`, with positions in characters of the whole text.

    It holds copies of its groups, so that keeping it does not keep a window of the text.
    """

    __slots__ = ("_groups", "_regs", "_shift", "lastgroup", "lastindex", "re")

    # Made once for each match of millions: whatever can wait until it is asked for, waits.
    def __init__(
        self, match: "re.Match[str] | re.Match[bytes]", shift: int, pattern: "re.Pattern[str]"
    ) -> None:
        self.re = pattern
        self.lastindex = match.lastindex
        self.lastgroup = match.lastgroup
        self._groups = (match.group(), *match.groups())
        self._regs = match.regs
        self._shift = shift

    def __repr__(self) -> str:
        return f"<ViewMatch span={self.span()}, match={self[0]!r:.60}>"

    def __getitem__(self, group: int | str) -> str | None:
        return _as_str(self._groups[self._number(group)])

    def group(self, *groups: int | str) -> Any:
        """The text of a group, or a tuple of several; the whole match for none."""
        if len(groups) > 1:
            return tuple(self[group] for group in groups)
        return self[groups[0] if groups else 0]

    def groups(self, default: str | None = None) -> tuple[str | None, ...]:
        """All groups but the whole match; `default` for those that took no part."""
        return tuple(default if group is None else _as_str(group) for group in self._groups[1:])

    def groupdict(self, default: str | None = None) -> dict[str, str | None]:
        """The named groups."""
        groups = self.groups(default)
        return {name: groups[number - 1] for name, number in self.re.groupindex.items()}

    def span(self, group: int | str = 0) -> tuple[int, int]:
        """Where a group starts and ends, in characters of the text; (-1, -1) if it took no part."""
        start, end = self._regs[self._number(group)]
        return (start, end) if start < 0 else (start + self._shift, end + self._shift)

    def start(self, group: int | str = 0) -> int:
        """Where a group starts."""
        return self.span(group)[0]

    def end(self, group: int | str = 0) -> int:
        """Where a group ends."""
        return self.span(group)[1]

    def _number(self, group: int | str) -> int:
        if isinstance(group, str):
            if group not in self.re.groupindex:
                raise IndexError("no such group")
            return self.re.groupindex[group]
        if not 0 <= group < len(self._groups):
            raise IndexError("no such group")
        return group


def as_bytes_pattern(pattern: "re.Pattern[str]") -> "re.Pattern[bytes] | None":
    """The pattern that finds in ASCII bytes what `pattern` finds in that text, or None."""
    if not pattern.pattern.isascii():
        return None
    try:
        return re.compile(pattern.pattern.encode(), pattern.flags & ~re.UNICODE)
    except (re.error, ValueError):
        # `\u1234` and `(?u)` exist for `str` only.
        return None


def matches_in_ascii(
    pattern: "re.Pattern[str]", in_bytes: "re.Pattern[bytes]", text: memoryview
) -> Iterator[ViewMatch]:
    """All matches in an ASCII text."""
    return (ViewMatch(match, 0, pattern) for match in in_bytes.finditer(text))


def has_separators(read: Read, length_bytes: int) -> bool:
    """Whether the text has a character that is white space for `str` but not for `bytes`."""
    return any(
        separator in piece
        for start in range(0, length_bytes, PIECE_BYTES)
        for piece in (read(start, min(start + PIECE_BYTES, length_bytes)),)
        for separator in _SEPARATORS
    )


def matches_in_windows(pattern: "re.Pattern[str]", read: Read, length_bytes: int) -> Iterator[ViewMatch]:
    """All matches in a text of any characters.

    Raises:
        ValueError: A match reaches the end of its window.
    """
    start = start_character = 0
    while True:
        behind = _character_start(read, max(0, start - BEHIND_BYTES))
        end = _character_start(read, min(start + WINDOW_BYTES, length_bytes))
        is_last = end == length_bytes
        window = read(behind, end).decode()
        first = count_characters(read(behind, start))
        limit_byte = end if is_last else _character_start(read, end - REACH_BYTES)
        limit = resume = len(window) - count_characters(read(limit_byte, end))
        for match in pattern.finditer(window, first):
            if not is_last:
                if match.start() >= limit:
                    break
                if match.end() == len(window):
                    raise ValueError(_too_long(pattern, start_character + match.start() - first))
            yield ViewMatch(match, start_character - first, pattern)
            resume = max(resume, match.end())
        if is_last:
            return
        start = limit_byte + len(window[limit:resume].encode())
        start_character += resume - first


def _character_start(read: Read, offset: int) -> int:
    """The last start of a character at or before `offset`; the end of the text is one."""
    while (byte := read(offset, offset + 1)) and 0x80 <= byte[0] < 0xC0:
        offset -= 1
    return offset


def _too_long(pattern: "re.Pattern[str]", position: int) -> str:
    return (
        f"{pattern.pattern[:100]!r} matches more than a million characters at {position:,}, more than is "
        "looked at together in this text; narrow the pattern, or search in slices"
    )


def _as_str(group: str | bytes | None) -> str | None:
    return group.decode("ascii") if isinstance(group, bytes) else group
