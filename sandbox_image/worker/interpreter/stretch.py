"""Where a text lies in the staged context, and how its characters are found there.

Positions are characters, as in `str`; the file is UTF-8. A text all of whose characters are ASCII needs
nothing to find them, others the host's landmarks.
"""

import codecs
from collections.abc import Iterator
from functools import cached_property
from typing import NamedTuple

from sandbox_image.worker.interpreter.blob import Blob
from sandbox_image.worker.interpreter.text_bytes import PIECE_BYTES


class Place(NamedTuple):
    """Bytes of the run's context, as a child run's context can name them."""

    path: str
    """The file; empty when the context is one text."""
    start_byte: int
    """Of the first byte within that file."""
    offset: int
    """Of the first byte within the blob of all files."""


class Stretch:
    """A run of whole characters in the blob."""

    def __init__(self, blob: Blob, place: Place, length_bytes: int, characters: int, width: int) -> None:
        """`width` is how many bytes a character takes in a `str`, at most: 1, 2 or 4."""
        self.blob = blob
        self.place = place
        self.length_bytes = length_bytes
        self.characters = characters
        self.width = width

    @property
    def is_ascii(self) -> bool:
        """Whether characters and bytes are the same."""
        return self.characters == self.length_bytes

    def read(self, start: int, end: int) -> bytes:
        """Bytes `start` to `end`, at most to the end of the stretch."""
        offset = self.place.offset
        return self.blob.read(offset + start, offset + min(end, self.length_bytes))

    def view(self) -> memoryview:
        """All bytes, without copying them."""
        offset = self.place.offset
        return memoryview(self.blob.mapped)[offset : offset + self.length_bytes]

    def text(self, start: int, end: int) -> str:
        """Characters `start` to `end`."""
        return str(self.read(self.byte_of(start), self.byte_of(end)), "utf-8")

    def part(self, start: int, end: int) -> "Stretch":
        """Characters `start` to `end` as a stretch of its own."""
        first, last = self.byte_of(start), self.byte_of(end)
        place = Place(self.place.path, self.place.start_byte + first, self.place.offset + first)
        width = 1
        if self.width > 1:
            width = min(self.width, self.blob.landmarks.width(place.offset, self.place.offset + last))
        return Stretch(self.blob, place, last - first, end - start, width)

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
        return self.blob.landmarks.byte_of(self._characters_before + character) - self.place.offset

    def character_at(self, byte: int) -> int:
        """Which character starts at a byte."""
        if self.is_ascii:
            return byte
        return self.blob.landmarks.character_at(self.place.offset + byte) - self._characters_before

    def newlines_before(self, byte: int) -> int:
        """How many newlines there are before a byte."""
        return self.blob.landmarks.newlines_before(self.place.offset + byte) - self._newlines_before

    def line_start(self, line: int) -> int:
        """Where a line starts, counted from 0; the end of the text where there are not so many."""
        if line == 0:
            return 0
        newline = self.blob.landmarks.byte_of_newline(self._newlines_before + line - 1)
        start = self.length_bytes if newline is None else newline + 1 - self.place.offset
        return min(start, self.length_bytes)

    @cached_property
    def _characters_before(self) -> int:
        return self.blob.landmarks.character_at(self.place.offset)

    @cached_property
    def _newlines_before(self) -> int:
        return self.blob.landmarks.newlines_before(self.place.offset)
