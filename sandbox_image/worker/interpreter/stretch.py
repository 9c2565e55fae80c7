"""Where a text lies in the staged context, and how its characters are found there.

Positions are characters, as in `str`; the file is UTF-8. A text all of whose characters are ASCII needs no
index, others get one as far as they are read.
"""

import codecs
from collections.abc import Iterator
from dataclasses import dataclass, field
from mmap import mmap

from sandbox_image.worker.interpreter.text_bytes import PIECE_BYTES
from sandbox_image.worker.interpreter.text_index import (
    BlockIndex,
    count_characters,
    count_newlines,
    locate_character,
    locate_newline,
)


@dataclass(frozen=True, slots=True)
class Place:
    """Bytes of the run's context, as a child run's context can name them."""

    path: str
    """The file; empty when the context is one text."""
    start_byte: int
    """Of the first byte within that file."""
    offset: int
    """Of the first byte within the map of all files."""


@dataclass(slots=True)
class Stretch:
    """A run of whole characters in a mapped file."""

    mapped: mmap
    place: Place
    length_bytes: int
    characters: int
    width: int
    """Bytes a character takes in a `str`, at most: 1, 2 or 4."""
    _characters_index: BlockIndex = field(init=False)
    _lines_index: BlockIndex = field(init=False)

    def __post_init__(self) -> None:
        self._characters_index = BlockIndex(self.read, self.length_bytes, count_characters, locate_character)
        self._lines_index = BlockIndex(self.read, self.length_bytes, count_newlines, locate_newline)

    @property
    def is_ascii(self) -> bool:
        """Whether characters and bytes are the same."""
        return self.characters == self.length_bytes

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, at most to the end of the stretch."""
        offset = self.place.offset
        return self.mapped[offset + start : offset + min(end, self.length_bytes)]

    def view(self) -> memoryview:
        """All bytes, without copying them."""
        offset = self.place.offset
        return memoryview(self.mapped)[offset : offset + self.length_bytes]

    def text(self, start: int, end: int) -> str:
        """Characters `start` to `end`."""
        with self.view() as view:
            return str(view[self.byte_of(start) : self.byte_of(end)], "utf-8")

    def part(self, start: int, end: int) -> "Stretch":
        """Characters `start` to `end` as a stretch of its own."""
        first, last = self.byte_of(start), self.byte_of(end)
        place = Place(self.place.path, self.place.start_byte + first, self.place.offset + first)
        return Stretch(self.mapped, place, last - first, end - start, self.width)

    def pieces(self) -> Iterator[str]:
        """The text in pieces of about a megabyte."""
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, self.length_bytes, PIECE_BYTES):
            yield decoder.decode(self.read(start, start + PIECE_BYTES))

    def byte_of(self, character: int) -> int:
        """Where a character starts; the end of the text for the one after the last and beyond."""
        if character >= self.characters:
            return self.length_bytes
        if self.is_ascii:
            return character
        offset = self._characters_index.offset_of(character)
        return self.length_bytes if offset is None else offset

    def character_at(self, byte: int) -> int:
        """Which character starts at a byte."""
        return byte if self.is_ascii else self._characters_index.count_before(byte)

    def line_start(self, line: int) -> int:
        """Where a line starts, counted from 0; the end of the text where there are not so many."""
        if line == 0:
            return 0
        newline = self._lines_index.offset_of(line - 1)
        return self.length_bytes if newline is None else newline + 1
