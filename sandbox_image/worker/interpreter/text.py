"""A text too large for a `str`: the same questions, answered from a memory-mapped file."""

import itertools
import re
from collections.abc import Iterator
from typing import Any, SupportsIndex, overload

from sandbox_image.worker.interpreter.stretch import Stretch
from sandbox_image.worker.interpreter.text_bytes import count_in, find_in, rfind_in, split_lines
from sandbox_image.worker.interpreter.text_search import ViewMatch, all_matches

_SHOWN_CHARACTERS = 60

_USE_INSTEAD = (
    "slice it to get a str, as in context[a:b], or use find, count, lines(), line_range(), chunks(), "
    "search(), findall() or finditer()"
)


class TextView:
    """A text larger than this sandbox holds as a `str`, with most of what a `str` can do.

    len(t), t[i], t[a:b], t[a:b:step]      in characters; a slice is a str, or a TextView if it is too large
    x in t, t == x, t.count(x)             as str has them, and so are the next two lines
    t.find(x), t.rfind(x), t.index(x), t.rindex(x)
    t.startswith(x), t.endswith(x), t.isascii()
    t.lines()                              the lines one by one, without their ends
    t.line_range(a, b)                     lines a to b-1 as a list
    t.line_count(), t.line_number(i)       how many lines; in which one, from 0, character i is
    t.search(p), t.finditer(p), t.findall(p)  regular expressions; matches have positions in t
    t.chunks(n, overlap=0)                 pieces of n characters, as str
    str(t)                                 the whole, if it fits

    Iterating gives characters, as a str does; use lines() for lines. It has no hash: that would read it all.
    """

    def __init__(self, stretch: Stretch, max_str_bytes: int) -> None:
        self.stretch = stretch
        """Where the text lies."""
        self._max_str_bytes = max_str_bytes

    def __len__(self) -> int:
        return self.stretch.characters

    def __str__(self) -> str:
        self._check_fits(len(self))
        return self.stretch.text(0, len(self))

    def __repr__(self) -> str:
        return f"<TextView of {len(self):,} characters: {self.stretch.text(0, _SHOWN_CHARACTERS)!r}...>"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    @overload
    def __getitem__(self, key: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, key: slice) -> "str | TextView": ...
    def __getitem__(self, key: "SupportsIndex | slice") -> "str | TextView":
        if not isinstance(key, slice):
            position = range(len(self))[key]
            return self.stretch.text(position, position + 1)
        start, end, step = key.indices(len(self))
        if step != 1:
            return self._stepped(range(start, end, step))
        end = max(start, end)
        if self._fits(end - start):
            return self.stretch.text(start, end)
        # Maybe only because of wide characters that are elsewhere.
        part = TextView(self.stretch.part(start, end), self._max_str_bytes)
        return str(part) if part._fits(end - start) else part

    def __iter__(self) -> Iterator[str]:
        return itertools.chain.from_iterable(self.stretch.pieces())

    def __contains__(self, sub: str) -> bool:
        return self.find(sub) >= 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str | TextView):
            return NotImplemented
        if len(other) != len(self):
            return False
        start = 0
        for piece in self.stretch.pieces():
            if str(other[start : start + len(piece)]) != piece:
                return False
            start += len(piece)
        return True

    __hash__ = None  # type: ignore[assignment]

    def __getattr__(self, name: str) -> object:
        # Only called for what a TextView lacks. That a str has it is the likely reason for asking.
        hint = f": it is too large for a str; {_USE_INSTEAD}" if hasattr(str, name) else ""
        raise AttributeError(f"TextView has no {name!r}{hint}", name=name, obj=self)

    def find(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        """The first position of `sub` in t[start:end], or -1."""
        first, last = self._bounds(start, end)
        if first > last:
            return -1
        found = find_in(
            self.stretch.read, _encode(sub), self.stretch.byte_of(first), self.stretch.byte_of(last)
        )
        return -1 if found < 0 else self.stretch.character_at(found)

    def index(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        """As `find`, but raises ValueError where there is none."""
        found = self.find(sub, start, end)
        if found < 0:
            raise ValueError("substring not found")
        return found

    def rfind(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        """The last position of `sub` in t[start:end], or -1."""
        first, last = self._bounds(start, end)
        if first > last:
            return -1
        found = rfind_in(
            self.stretch.read, _encode(sub), self.stretch.byte_of(first), self.stretch.byte_of(last)
        )
        return -1 if found < 0 else self.stretch.character_at(found)

    def rindex(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        """As `rfind`, but raises ValueError where there is none."""
        found = self.rfind(sub, start, end)
        if found < 0:
            raise ValueError("substring not found")
        return found

    def isascii(self) -> bool:
        """Whether all characters are ASCII."""
        return self.stretch.is_ascii

    def count(self, sub: str, start: int | None = None, end: int | None = None) -> int:
        """How often `sub` occurs in t[start:end], without overlaps."""
        first, last = self._bounds(start, end)
        if first > last:
            return 0
        if not sub:
            return last - first + 1
        return count_in(
            self.stretch.read, _encode(sub), self.stretch.byte_of(first), self.stretch.byte_of(last)
        )

    def startswith(
        self, prefix: str | tuple[str, ...], start: int | None = None, end: int | None = None
    ) -> bool:
        """Whether t[start:end] starts with `prefix`, or with one of several."""
        first, last = self._bounds(start, end)
        prefixes = prefix if isinstance(prefix, tuple) else (prefix,)
        return any(
            first + len(one) <= last and self.stretch.text(first, first + len(one)) == one for one in prefixes
        )

    def endswith(
        self, suffix: str | tuple[str, ...], start: int | None = None, end: int | None = None
    ) -> bool:
        """Whether t[start:end] ends with `suffix`, or with one of several."""
        first, last = self._bounds(start, end)
        suffixes = suffix if isinstance(suffix, tuple) else (suffix,)
        return any(
            first + len(one) <= last and self.stretch.text(last - len(one), last) == one for one in suffixes
        )

    def lines(self, keepends: bool = False) -> Iterator[str]:
        r"""The lines one by one. A line ends with "\n" or "\r\n"; the ends are left out unless `keepends`."""
        return split_lines(self.stretch.read, 0, self.stretch.length_bytes, keepends)

    def line_range(self, start: int, end: int) -> list[str]:
        """Lines `start` to `end` - 1, counted from 0: list(t.lines())[start:end], but quick.

        Raises:
            ValueError: A bound is negative.
        """
        if start < 0 or end < 0:
            raise ValueError("line_range counts lines from 0, from the start of the text")
        if end <= start:
            return []
        first_byte, last_byte = self.stretch.line_start(start), self.stretch.line_start(end)
        return list(split_lines(self.stretch.read, first_byte, last_byte, False))

    def line_count(self) -> int:
        """How many lines() there are."""
        newlines = self.stretch.newlines_before(self.stretch.length_bytes)
        return newlines + (len(self) > 0 and not self.endswith("\n"))

    def line_number(self, position: int) -> int:
        """The line, counted from 0, that the character at a position is in; a line's end is part of it.

        Raises:
            IndexError: There is no such character.
        """
        return self.stretch.newlines_before(self.stretch.byte_of(range(len(self))[position]))

    def chunks(self, n_chars: int, overlap: int = 0) -> Iterator[str]:
        """Pieces of `n_chars` characters, each starting `overlap` before the end of the one before it.

        Raises:
            ValueError: `n_chars` is below 1 or too many for a str, or `overlap` is not within 0 and
            `n_chars` - 1.
        """
        if n_chars < 1 or not 0 <= overlap < n_chars:
            raise ValueError("chunks: n_chars must be at least 1 and overlap from 0 to n_chars - 1")
        length = len(self)
        self._check_fits(min(n_chars, length))
        # A piece that held nothing but the overlap would say nothing new.
        starts = range(0, max(length - overlap, min(length, 1)), n_chars - overlap)
        return (self.stretch.text(start, min(start + n_chars, length)) for start in starts)

    def finditer(self, pattern: "str | re.Pattern[str]", flags: int = 0) -> Iterator[ViewMatch]:
        """All matches of a regular expression, one by one, with positions in t.

        Where the text is not all ASCII, and the pattern asks what Unicode says of a character, one match
        may be a million bytes long; ValueError is raised for a longer one.
        """
        return all_matches(re.compile(pattern, flags), self.stretch)

    def search(self, pattern: "str | re.Pattern[str]", flags: int = 0) -> ViewMatch | None:
        """The first match of a regular expression, or None."""
        return next(self.finditer(pattern, flags), None)

    def findall(self, pattern: "str | re.Pattern[str]", flags: int = 0) -> list[Any]:
        """As `re.findall`: all matches, or of each its group, or a tuple of its groups. All in memory."""
        compiled = re.compile(pattern, flags)
        matches = all_matches(compiled, self.stretch)
        if compiled.groups == 0:
            return [match[0] for match in matches]
        if compiled.groups == 1:
            return [match[1] or "" for match in matches]
        return [match.groups("") for match in matches]

    def _bounds(self, start: int | None, end: int | None) -> tuple[int, int]:
        """Bounds as `str.find` takes them: a start beyond the text finds nothing, not even ''."""
        first, last, _ = slice(start, end).indices(len(self))
        return (len(self) + 1 if start is not None and start > len(self) else first), last

    def _stepped(self, positions: range) -> str:
        self._check_fits(len(positions))
        if not positions:
            return ""
        forward = positions if positions.step > 0 else positions[::-1]
        taken: list[str] = []
        wanted = forward.start
        start = 0
        for piece in self.stretch.pieces():
            end = start + len(piece)
            if wanted < end:
                picked = piece[wanted - start : forward.stop - start : forward.step]
                taken.append(picked)
                wanted += len(picked) * forward.step
            start = end
            if wanted >= forward.stop:
                break
        return "".join(taken)[:: 1 if positions.step > 0 else -1]

    def _fits(self, characters: int) -> bool:
        return characters * self.stretch.width <= self._max_str_bytes

    def _check_fits(self, characters: int) -> None:
        if not self._fits(characters):
            raise ValueError(
                f"{characters:,} characters take up to {characters * self.stretch.width:,} bytes as a str, "
                f"and this sandbox allows {self._max_str_bytes:,}; {_USE_INSTEAD}"
            )


def _encode(text: str) -> bytes | None:
    """UTF-8, or None for a lone surrogate, which no text here holds."""
    try:
        return text.encode()
    except UnicodeEncodeError:
        return None
