"""What a context is: an immutable list of texts in one blob of valid UTF-8.

Pure: no I/O. A child's context is a smaller manifest over the same blob, so passing a part of a context on
copies nothing. Offsets and lengths are bytes; only the guest deals in characters.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Literal, NamedTuple

from orchestrator.errors import ContextInputError, InvalidRequestError
from orchestrator.visible import visible_line

Kind = Literal["text", "files"]

SHAPE_NAMES = 20
"""File names the root model is told."""
SHAPE_NAME_CHARS = 200
"""Of each name."""


class Measured(NamedTuple):
    """What one pass over a text finds out about it."""

    length_bytes: int
    chars: int
    lines: int
    """Newlines, and one more for a last line that has none."""
    width: int
    """Bytes that CPython needs for each character: 1, 2 or 4."""
    replaced: int
    """Times U+FFFD stands for bytes that were not UTF-8."""
    sha256: str
    """Hex digest of the normalised bytes; for a part of a text, of what it is a part of and where it lies."""


class Entry(NamedTuple):
    """One text of a context."""

    path: str
    """Relative, with forward slashes; empty when the context is one text. Any characters: see `visible`."""
    offset: int
    """Where it starts in the blob."""
    measured: Measured

    @property
    def length_bytes(self) -> int:
        """Length in the blob."""
        return self.measured.length_bytes

    @property
    def chars(self) -> int:
        """Characters (code points)."""
        return self.measured.chars

    @property
    def width(self) -> int:
        """Bytes that CPython needs for each character."""
        return self.measured.width

    @property
    def sha256(self) -> str:
        """As in `Measured`."""
        return self.measured.sha256


@dataclass(frozen=True)
class Shape:
    """What the root model may be told about a context: never a word of what is in it but file names."""

    kind: Kind
    length_bytes: int
    chars: int
    lines: int
    files: int
    """0 when the context is one text."""
    names: tuple[tuple[str, int], ...]
    """The first file names, made visible and cut, each with its length in bytes."""
    replaced: int
    """Times U+FFFD stands for bytes that were not UTF-8."""


@dataclass(frozen=True)
class Manifest:
    """The texts of one context and the blob they are in. One text has one entry whose path is empty."""

    kind: Kind
    entries: tuple[Entry, ...]
    blob_bytes: int
    """Of the whole blob, which can hold more than these entries."""
    sha256: str
    """Hex digest of the whole blob; its name in the store."""

    @cached_property
    def _by_path(self) -> dict[str, Entry]:
        return {entry.path: entry for entry in self.entries}

    @cached_property
    def content_id(self) -> str:
        """Hex digest of what the context says: never equal for two that differ.

        Staging the same again gives the same. A part of a text has the same each time, but another one than
        its copy, because it is never read as a whole.
        """
        digest = hashlib.sha256(self.kind.encode() + b"\0")
        for entry in self.entries:
            path = entry.path.encode()
            # A fixed-width hash after a length-prefixed path: no two lists of entries look the same.
            digest.update(b"%d:%s%s" % (len(path), path, entry.sha256.encode()))
        return digest.hexdigest()

    @property
    def text_bytes(self) -> int:
        """Bytes of the entries together."""
        return sum(entry.length_bytes for entry in self.entries)

    @property
    def shape(self) -> Shape:
        """What the root model may be told."""
        is_files = self.kind == "files"
        named = self.entries[:SHAPE_NAMES] if is_files else ()
        return Shape(
            kind=self.kind,
            length_bytes=self.text_bytes,
            chars=sum(entry.chars for entry in self.entries),
            lines=sum(entry.measured.lines for entry in self.entries),
            files=len(self.entries) if is_files else 0,
            names=tuple((visible_line(entry.path, SHAPE_NAME_CHARS), entry.length_bytes) for entry in named),
            replaced=sum(entry.measured.replaced for entry in self.entries),
        )

    def entry(self, path: str) -> Entry:
        """The text at a path.

        Raises:
            ContextInputError: There is none.
        """
        found = self._by_path.get(path)
        if found is None:
            what = "is one text and has no files" if self.kind == "text" else "has no such file"
            raise ContextInputError(f"the context {what}: '{visible_line(path, SHAPE_NAME_CHARS)}'")
        return found

    def range_entry(self, path: str, start_byte: int, end_byte: int) -> Entry:
        """The text that a range is in, once the range is known to lie inside it.

        Raises:
            ContextInputError: There is no such text, or the range does not lie inside it.
            InvalidRequestError: The range is empty.
        """
        entry = self.entry(path)
        if not 0 <= start_byte <= end_byte <= entry.length_bytes:
            raise ContextInputError(
                f"bytes {start_byte} to {end_byte} do not lie in a text of {entry.length_bytes} bytes"
            )
        if start_byte == end_byte:
            raise InvalidRequestError("the range of the context is empty")
        return entry

    def text_range(self, path: str, start_byte: int, end_byte: int, measured: Measured) -> "Manifest":
        """One text: a range of bytes of one of these, over the same blob.

        Args:
            path: Of the text the range is in; empty when this context is one text.
            start_byte: First byte, from the start of that text.
            end_byte: One past the last byte.
            measured: What is in those bytes. That they are whole characters is for the caller to see to.

        Raises:
            ContextInputError: There is no such text, or the range does not lie inside it.
            InvalidRequestError: The range is empty, or was not what was measured.
        """
        entry = self.range_entry(path, start_byte, end_byte)
        if measured.length_bytes != end_byte - start_byte:
            raise InvalidRequestError("the range and what was measured differ in length")
        part = Entry("", entry.offset + start_byte, measured)
        return Manifest("text", (part,), self.blob_bytes, self.sha256)

    def subset(self, paths: Sequence[str]) -> "Manifest":
        """Some of the files, in the order asked for, over the same blob.

        Raises:
            ContextInputError: There is no such file.
            InvalidRequestError: None was named, or one twice.
        """
        if not paths:
            raise InvalidRequestError("no files of the context were named")
        if len(set(paths)) != len(paths):
            raise InvalidRequestError("a file of the context was named twice")
        self._check_has_files()
        return self._with_entries(tuple(map(self.entry, paths)))

    def runs(self, runs: Sequence[tuple[int, int]]) -> "Manifest":
        """Some of the files, in the order asked for, over the same blob.

        Args:
            runs: Of each run of files that follow one another here, the number of the first and how many.

        Raises:
            ContextInputError: There are no such files.
            InvalidRequestError: None was named, or one twice, or a run is empty.
        """
        if not runs:
            raise InvalidRequestError("no files of the context were named")
        self._check_has_files()
        end = 0
        for first, count in sorted(runs):
            if count < 1:
                raise InvalidRequestError("a run of files of the context is empty")
            if first < end:
                raise InvalidRequestError("a file of the context was named twice")
            end = first + count
        if end > len(self.entries):
            raise ContextInputError(f"the context has {len(self.entries):,} files, and no number {end - 1:,}")
        chosen = (self.entries[first : first + count] for first, count in runs)
        return self._with_entries(tuple(chain.from_iterable(chosen)))

    def _check_has_files(self) -> None:
        if self.kind == "text":
            raise ContextInputError("the context is one text and has no files")

    def _with_entries(self, entries: tuple[Entry, ...]) -> "Manifest":
        return Manifest("files", entries, self.blob_bytes, self.sha256)


def unique_names(raw_paths: Sequence[bytes]) -> list[str]:
    r"""Names that are text, one for each path, no two alike.

    A path that is UTF-8 keeps its name whatever the others are called. In any other, each byte that is not
    UTF-8 becomes `\xNN`, followed by `~2`, `~3`, ... when that name is taken.
    """
    names = [_strict(raw) for raw in raw_paths]
    taken = {name for name in names if name is not None}
    unique: list[str] = []
    for raw, name in zip(raw_paths, names, strict=True):
        chosen = name
        if chosen is None:
            chosen = next(candidate for candidate in _escaped_names(raw) if candidate not in taken)
            taken.add(chosen)
        unique.append(chosen)
    return unique


def _strict(raw: bytes) -> str | None:
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return None


def _escaped_names(raw: bytes) -> Iterator[str]:
    name = raw.decode(errors="backslashreplace")
    yield name
    number = 2
    while True:
        yield f"{name}~{number}"
        number += 1
