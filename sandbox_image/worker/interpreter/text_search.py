"""Regular expressions over a text that is not in memory, with the meaning they have for `str`.

Two ways:

* On the bytes of the file, where `text_patterns` knows that this means the same. Exact.
* Else the text is decoded in windows. A window reaches beyond the last place where a match of it may start,
  as far as the pattern can look: some characters, some lines, or no one knows. For the last, and for longer
  lines, it reaches `REACH_BYTES`; so it is exact for matches that are shorter, and look no further ahead,
  than that, and a match that touches the window's end is refused. (A greedy `.*` that crosses lines finds
  its last chance in the window, not in the text.) What cannot hold the beginning of a match is not decoded.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from itertools import repeat
from typing import Any, NamedTuple

from sandbox_image.worker.interpreter import text_patterns
from sandbox_image.worker.interpreter.landmarks import count_characters
from sandbox_image.worker.interpreter.stretch import Stretch
from sandbox_image.worker.interpreter.text_bytes import Read

# In how much matches may start that is decoded at a time: little where they are rare, what stays in the
# processor's cache where they are not, and much more than the reach where that is long.
LEAST_WINDOW_BYTES = 4_096
MOST_WINDOW_BYTES = 1_048_576
MOST_FAR_WINDOW_BYTES = 4 * 1_048_576
REACH_BYTES = 1_048_576
_MOST_BYTES_OF_CHARACTER = 4
# On a view it copies nothing, and is quick where the newline is near.
_NEWLINE = re.compile(rb"\n")


class Origin(NamedTuple):
    """What all matches of one search share."""

    pattern: "re.Pattern[str]"
    character_at: Callable[[int], int] | None
    """Which character starts at a byte; None where they are the same."""


class ViewMatch(ABC):
    """A match: like `re.Match`, with positions in characters of the whole text."""

    __slots__ = ()

    @property
    @abstractmethod
    def re(self) -> "re.Pattern[str]":
        """The pattern."""

    @property
    @abstractmethod
    def lastindex(self) -> int | None:
        """The number of the group that was closed last, or None."""

    @abstractmethod
    def __getitem__(self, group: int | str) -> str | None: ...

    @abstractmethod
    def span(self, group: int | str = 0) -> tuple[int, int]:
        """Where a group starts and ends, in characters of the text; (-1, -1) if it took no part."""

    def __repr__(self) -> str:
        return f"<ViewMatch span={self.span()}, match={self[0]!r:.60}>"

    @property
    def lastgroup(self) -> str | None:
        """The name of the group that was closed last, or None."""
        names = (name for name, number in self.re.groupindex.items() if number == self.lastindex)
        return next(names, None)

    def group(self, *groups: int | str) -> Any:
        """The text of a group, or a tuple of several; the whole match for none."""
        if len(groups) > 1:
            return tuple(self[group] for group in groups)
        return self[groups[0] if groups else 0]

    def groups(self, default: str | None = None) -> tuple[str | None, ...]:
        """All groups but the whole match; `default` for those that took no part."""
        texts = (self[number] for number in range(1, self.re.groups + 1))
        return tuple(default if text is None else text for text in texts)

    def groupdict(self, default: str | None = None) -> dict[str, str | None]:
        """The named groups."""
        groups = self.groups(default)
        return {name: groups[number - 1] for name, number in self.re.groupindex.items()}

    def start(self, group: int | str = 0) -> int:
        """Where a group starts."""
        return self.span(group)[0]

    def end(self, group: int | str = 0) -> int:
        """Where a group ends."""
        return self.span(group)[1]


class _BytesMatch(ViewMatch):
    """A match on the bytes of the file. Keeping it keeps nothing in memory."""

    __slots__ = ("_match", "_origin")

    # Made once for each match of millions: everything else waits until it is asked for.
    def __init__(self, match: "re.Match[bytes]", origin: Origin) -> None:
        self._match = match
        self._origin = origin

    @property
    def re(self) -> "re.Pattern[str]":
        return self._origin.pattern

    @property
    def lastindex(self) -> int | None:
        return self._match.lastindex

    def __getitem__(self, group: int | str) -> str | None:
        text: bytes | None = self._match[group]
        return None if text is None else text.decode()

    def span(self, group: int | str = 0) -> tuple[int, int]:
        start, end = self._match.span(group)
        character_at = self._origin.character_at
        if character_at is None or start < 0:
            return start, end
        return character_at(start), character_at(end)

    def start(self, group: int | str = 0) -> int:
        start = self._match.start(group)
        character_at = self._origin.character_at
        return start if character_at is None or start < 0 else character_at(start)


class _WindowMatch(ViewMatch):
    """A match in a decoded window. It holds copies of its groups, so that keeping it keeps no window."""

    __slots__ = ("_lastindex", "_pattern", "_regs", "_shift", "_texts")

    def __init__(self, match: "re.Match[str]", shift: int) -> None:
        self._pattern = match.re
        self._lastindex = match.lastindex
        self._texts = (match[0], *match.groups())
        self._regs = match.regs
        self._shift = shift

    @property
    def re(self) -> "re.Pattern[str]":
        return self._pattern

    @property
    def lastindex(self) -> int | None:
        return self._lastindex

    def __getitem__(self, group: int | str) -> str | None:
        return self._texts[_number_of(group, self._pattern)]

    def span(self, group: int | str = 0) -> tuple[int, int]:
        start, end = self._regs[_number_of(group, self._pattern)]
        return (start, end) if start < 0 else (start + self._shift, end + self._shift)


class _GrouplessMatch(ViewMatch):
    """The same of a pattern without groups; it takes a third of the time to make one."""

    __slots__ = ("_pattern", "_start", "_text")

    def __init__(self, match: "re.Match[str]", shift: int) -> None:
        self._pattern = match.re
        self._text = match[0]
        self._start = match.start() + shift

    @property
    def re(self) -> "re.Pattern[str]":
        return self._pattern

    @property
    def lastindex(self) -> int | None:
        return None

    def __getitem__(self, group: int | str) -> str | None:
        _number_of(group, self._pattern)
        return self._text

    def span(self, group: int | str = 0) -> tuple[int, int]:
        _number_of(group, self._pattern)
        return self._start, self._start + len(self._text)


def _number_of(group: int | str, pattern: "re.Pattern[str]") -> int:
    if isinstance(group, str):
        if group not in pattern.groupindex:
            raise IndexError("no such group")
        return pattern.groupindex[group]
    if not 0 <= group <= pattern.groups:
        raise IndexError("no such group")
    return group


def all_matches(pattern: "re.Pattern[str]", stretch: Stretch) -> Iterator[ViewMatch]:
    """All matches in a text.

    Raises:
        ValueError: A match reaches the end of its window.
    """
    if stretch.is_ascii:
        in_bytes, character_at = text_patterns.on_ascii(pattern), None
    else:
        in_bytes, character_at = text_patterns.on_utf8(pattern), stretch.character_at
    if in_bytes is None:
        return _matches_in_windows(pattern, stretch)
    return map(_BytesMatch, in_bytes.finditer(stretch.view()), repeat(Origin(pattern, character_at)))


def _matches_in_windows(pattern: "re.Pattern[str]", stretch: Stretch) -> Iterator[ViewMatch]:
    read, length_bytes = stretch.read, stretch.length_bytes
    needed = text_patterns.needed_start(pattern).encode()
    next_start = re.compile(re.escape(needed)).search
    view = stretch.view()
    reach = text_patterns.reach(pattern)
    reaches_far = reach.characters is None and reach.newlines is None
    most_bytes = MOST_FAR_WINDOW_BYTES if reaches_far else MOST_WINDOW_BYTES
    window_bytes = LEAST_WINDOW_BYTES if needed else most_bytes
    made = _WindowMatch if pattern.groups else _GrouplessMatch
    start = start_character = 0
    while True:
        if needed:
            place = next_start(view, start)
            if place is None:
                return
            found = place.start()
            is_rare = found - start > LEAST_WINDOW_BYTES
            window_bytes = LEAST_WINDOW_BYTES if is_rare else min(2 * window_bytes, most_bytes)
            start, start_character = found, stretch.character_at(found)
        behind = _character_start(read, max(0, start - _MOST_BYTES_OF_CHARACTER * reach.behind))
        # A match of this window starts before `limit_byte`.
        limit_byte = _character_start(read, min(start + window_bytes, length_bytes))
        end, is_certain = _end_of_reach(read, view, limit_byte, reach)
        window = read(behind, end).decode()
        first = count_characters(read(behind, start))
        limit = len(window) - count_characters(read(limit_byte, end))
        if end == length_bytes:
            limit_byte, limit = end, len(window) + 1
        # `$` also matches before a newline that only the window ends with.
        whole_until = len(window) if is_certain else len(window) - 2
        shift = start_character - first
        taken = 0
        for match in pattern.finditer(window, first):
            begin, stop = match.span()
            if begin >= limit:
                break
            if stop > whole_until:
                raise ValueError(_too_long(pattern, begin + shift))
            yield made(match, shift)
            taken = stop
        if end == length_bytes:
            return
        resume = max(limit, taken)
        start = limit_byte + len(window[limit:resume].encode())
        start_character += resume - first


def _end_of_reach(
    read: Read, view: memoryview, limit_byte: int, reach: text_patterns.Reach
) -> tuple[int, bool]:
    """Where a window ends, and whether nothing beyond matters for matches that start before `limit_byte`."""
    farthest = min(limit_byte + REACH_BYTES, len(view))
    if reach.characters is not None:
        end = limit_byte + _MOST_BYTES_OF_CHARACTER * reach.characters
        if end <= farthest:
            return _character_start(read, end), True
    elif reach.newlines is not None:
        end = limit_byte
        # One more for the line it starts in, and one for what `$` looks at.
        for _ in range(reach.newlines + 2):
            newline = _NEWLINE.search(view, end, farthest)
            if newline is None:
                break
            end = newline.end()
        else:
            return end, True
    return _character_start(read, farthest), farthest == len(view)


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
