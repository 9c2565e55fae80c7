"""What texts a context has and where they lie, looked up in the host's file and never read as a whole.

The file is described in the orchestrator's `contexts/guest_form.py`.
"""

import struct
from bisect import bisect_left
from typing import Final, Literal, NamedTuple

_HEADER: Final = struct.Struct("=8s4Q")
_MAGIC: Final = b"RLMCTX\0"
_VERSION: Final = 2
_KINDS: Final = ("text", "files")


class StagingError(Exception):
    """What was staged is not what this image understands."""


class Entry(NamedTuple):
    """Where one text lies, and how large it is."""

    path: str
    offset: int
    length_bytes: int
    characters: int
    width: int


class Catalogue:
    """The texts of a context, numbered from 0 in the order the host gave them.

    Args:
        file: The manifest.

    Raises:
        StagingError: It is of another version or kind.
    """

    def __init__(self, file: memoryview) -> None:
        magic, kind, count, self.blob_bytes, self.text_bytes = _HEADER.unpack_from(file)
        if magic[:-1] != _MAGIC or magic[-1] != _VERSION or kind >= len(_KINDS):
            raise StagingError(f"a manifest {magic!r} of kind {kind}; this image knows version {_VERSION}")
        self.kind = _KINDS[kind]
        self._count: int = count
        at = _HEADER.size

        def column(item_format: Literal["Q", "I", "B"], item_bytes: int) -> "memoryview[int]":
            nonlocal at
            start, at = at, at + self._count * item_bytes
            return file[start:at].cast(item_format)

        self._offsets = column("Q", 8)
        self._lengths = column("Q", 8)
        self._characters = column("Q", 8)
        self._path_ends = column("Q", 8)
        self._order = column("I", 4)
        self._widths = column("B", 1)
        self._paths = file[at:]
        # Found last: whoever goes through the paths asks for it once more, or for the next.
        self._last = -1

    def __len__(self) -> int:
        return self._count

    def path(self, number: int) -> str:
        """The path of a text."""
        return str(self._path_bytes(number), "utf-8")

    def entry(self, number: int) -> Entry:
        """Everything about a text."""
        return Entry(
            self.path(number),
            self._offsets[number],
            self._lengths[number],
            self._characters[number],
            self._widths[number],
        )

    def length_bytes(self, number: int) -> int:
        """Of a text, in UTF-8."""
        return self._lengths[number]

    def find(self, path: str) -> int | None:
        """The number of the text with a path."""
        try:
            wanted = path.encode()
        except UnicodeEncodeError:
            return None  # a lone surrogate is in no path
        for guess in range(max(self._last, 0), min(self._last + 2, self._count)):
            if self._path_bytes(guess) == wanted:
                self._last = guess
                return guess
        place = bisect_left(self._order, wanted, key=self._path_bytes)
        if place == self._count or self._path_bytes(self._order[place]) != wanted:
            return None
        self._last = self._order[place]
        return self._last

    def _path_bytes(self, number: int) -> bytes:
        start = self._path_ends[number - 1] if number else 0
        return bytes(self._paths[start : self._path_ends[number]])
