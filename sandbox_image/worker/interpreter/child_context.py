"""Where a child run's context comes from: a reference where the parent's context holds it, else its bytes."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from sandbox_image.worker.interpreter.files import FileMap
from sandbox_image.worker.interpreter.staged import OwnContext
from sandbox_image.worker.interpreter.text import TextView
from sandbox_image.worker.protocol import UPLOAD_PART_BYTES

# The contract's cap on a text sent inside the request.
_INLINE_BYTES = 1_048_576

# One frame names at most this many files, so that many small ones need few round trips and little memory.
_PIECES_IN_PART = 1024


class Inline(NamedTuple):
    """A text that fits into the request."""

    text: bytes


class Range(NamedTuple):
    """A part of a text of this run's context; the path is empty when the context is one text."""

    path: str
    start_byte: int
    end_byte: int


class Files(NamedTuple):
    """Files of this run's context, by their numbers in it."""

    runs: Sequence[tuple[int, int]]
    """(first, how many) of those that follow one another, so that most parts of many files are one."""


class Part(NamedTuple):
    """One frame of an upload: (path that starts here or None, bytes of it), and those bytes."""

    pieces: Sequence[tuple[str | None, int]]
    payload: bytes


class Upload(NamedTuple):
    """A text, under no path, or files, that have to be handed in before the child can start."""

    files: Sequence[tuple[str | None, str]]

    def parts(self) -> Iterator[Part]:
        """The files, packed into frames of at most `UPLOAD_PART_BYTES`."""
        pieces: list[tuple[str | None, int]] = []
        payload = bytearray()
        for path, text in self.files:
            start: str | None = path
            for data in _encoded_parts(text):
                if len(payload) + len(data) > UPLOAD_PART_BYTES or len(pieces) >= _PIECES_IN_PART:
                    yield Part(pieces, bytes(payload))
                    pieces, payload = [], bytearray()
                pieces.append((start, len(data)))
                payload += data
                start = None
        if pieces:
            yield Part(pieces, bytes(payload))


Place = Inline | Range | Files | Upload


def place_context(context: Any, question: str, own: OwnContext) -> Place:
    """Decide how a child run gets `context`.

    Raises:
        TypeError: `context` is nothing a child run can be given.
    """
    if context is None:
        return _place_text(question)
    if isinstance(context, FileMap):
        return Files(context.runs())
    if isinstance(context, TextView):
        place, length_bytes = context.stretch.place, context.stretch.length_bytes
        return Range(place.path, place.start_byte, place.start_byte + length_bytes)
    if isinstance(context, str):
        return _place_own_text(context, own) or _place_text(context)
    if isinstance(context, Mapping):
        return Upload([_checked_file(path, text) for path, text in context.items()])
    if isinstance(context, list | tuple):
        return Upload([_checked_file(f"{number:04}.txt", text) for number, text in enumerate(context)])
    raise TypeError(
        "the context of a child run is text, a part of `context`, a dict of path to text or a list of texts, "
        f"not {type(context).__name__}"
    )


def _place_own_text(text: str, own: OwnContext) -> Place | None:
    if text is own.value:
        return Range("", 0, own.length_bytes)
    if isinstance(own.value, FileMap):
        found = own.value.path_of(text)
        return Range(found[0], 0, found[1]) if found else None
    return None


def _place_text(text: str) -> Place:
    # Four bytes a character at most; the exact size decides where that leaves a doubt.
    if len(text) <= _INLINE_BYTES:
        encoded = text.encode("utf-8", "replace")
        if len(encoded) <= _INLINE_BYTES:
            return Inline(encoded)
    return Upload([(None, text)])


def _checked_file(path: Any, text: Any) -> tuple[str, str]:
    if not isinstance(path, str):
        raise TypeError(f"a child run's context: a path is a str, not {type(path).__name__}")
    if not isinstance(text, str | TextView):
        raise TypeError(f"a child run's context: {path[:100]!r} holds a {type(text).__name__}, not text")
    return path, str(text)


def _encoded_parts(text: str) -> Iterator[bytes]:
    """UTF-8 of `text` in parts of whole characters; one empty part for an empty text."""
    characters = UPLOAD_PART_BYTES // 4
    for start in range(0, max(len(text), 1), characters):
        yield text[start : start + characters].encode("utf-8", "replace")
