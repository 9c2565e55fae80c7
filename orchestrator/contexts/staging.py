"""Texts on their way into the store: one temporary file, written once, named by its hash when it is whole."""

import hashlib
import os
import secrets
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from orchestrator.contexts.landmarks import PIECE_BYTES, LandmarkNotes
from orchestrator.contexts.manifest import Entry, Kind, Manifest
from orchestrator.contexts.normalise import Normaliser
from orchestrator.errors import InvariantError, MachineError, RunCancelledError

CHUNK_BYTES = 1024 * 1024
"""How much is read and written at a time, and between two looks at whether to go on."""

Cancelled = Callable[[], bool]
"""Asked between chunks, files and directories; true ends the work. `threading.Event().is_set` is one."""


def never() -> bool:
    """A `Cancelled` for work that nobody stops."""
    return False


def check_cancelled(cancelled: Cancelled) -> None:
    """Raises `RunCancelledError` when the work is no longer wanted."""
    if cancelled():
        raise RunCancelledError("staging the context was cancelled")


class BlobWriter:
    """Writes the texts of one context one after the other. Whoever makes one calls `discard` in the end."""

    def __init__(self, directory: Path, kind: Kind) -> None:
        self.path = directory / f"t-{secrets.token_hex(16)}"
        self._kind = kind
        self._length_bytes = 0
        self._entries: list[Entry] = []
        self._digest = hashlib.sha256()
        self._landmarks = LandmarkNotes()
        self._chars = 0  # of the texts that are whole
        self._newlines = 0
        self._text: Normaliser | None = None
        self._path = ""
        self.first_replaced: tuple[int, int] | None = None
        """The first text in which bytes were replaced, by its position, and where in it."""
        try:
            fd = os.open(
                self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
            )
        except OSError as error:
            raise cannot_write(error) from error
        self._file = open(fd, "wb", buffering=CHUNK_BYTES)  # noqa: SIM115 - closed by seal and discard

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()

    @property
    def texts(self) -> int:
        """Texts that are whole."""
        return len(self._entries)

    @property
    def length_bytes(self) -> int:
        """Bytes of the blob so far."""
        return self._length_bytes

    def begin(self, path: str = "") -> None:
        """Starts the next text."""
        self._path = path
        self._text = Normaliser()

    def write(self, chunk: bytes) -> None:
        """A part of the text begun last, of any size."""
        text = self._current()
        if len(chunk) <= PIECE_BYTES:
            self._put(text, text.feed(chunk))
            return
        # Small pieces stay in the processor's cache while they are checked, counted and hashed; and other
        # threads never wait long, because each piece is hashed without the interpreter's lock.
        for start in range(0, len(chunk), PIECE_BYTES):
            self._put(text, text.feed(chunk[start : start + PIECE_BYTES]))

    def end(self) -> None:
        """The text begun last is whole."""
        text = self._current()
        self._put(text, text.finish())
        self._chars += text.chars
        self._newlines += text.newlines
        measured = text.measured()
        if text.first_replaced_byte is not None and self.first_replaced is None:
            self.first_replaced = (len(self._entries), text.first_replaced_byte)
        self._entries.append(Entry(self._path, self._length_bytes - measured.length_bytes, measured))
        self._text = None

    def seal(self, named: Sequence[tuple[int, str]] | None = None) -> Manifest:
        """Closes the file, which is now whole and readable by anyone who can reach it.

        Args:
            named: When `begin` was not given the last word: of each text that counts its position in the
                order of writing, and its name.
        """
        try:
            self._file.flush()
            os.fchmod(self._file.fileno(), 0o444)
            self._file.close()
        except OSError as error:
            raise cannot_write(error) from error
        entries = tuple(self._entries)
        if named is not None:
            entries = tuple(entries[position]._replace(path=name) for position, name in named)
        sha256 = entries[0].sha256 if self._kind == "text" else self._digest.hexdigest()
        return Manifest(self._kind, entries, self._length_bytes, sha256)

    def landmarks(self) -> bytes:
        """Those of the blob, once it is sealed."""
        return self._landmarks.encode(self._length_bytes, self._chars, self._newlines)

    def discard(self) -> None:
        """Nothing of the temporary file is left. Harmless after its renaming, and when repeated."""
        with suppress(OSError):  # a full disk may refuse the last buffer; the file goes anyway
            self._file.close()
        self.path.unlink(missing_ok=True)

    def _current(self) -> Normaliser:
        if self._text is None:
            raise InvariantError("no text was begun")
        return self._text

    def _put(self, text: Normaliser, clean: bytes) -> None:
        if not clean:
            return
        self._length_bytes += len(clean)
        self._landmarks.pass_by(
            self._length_bytes, self._chars + text.chars, self._newlines + text.newlines, text.piece_width
        )
        if self._kind == "files":  # one text's hash is the blob's
            self._digest.update(clean)
        try:
            self._file.write(clean)
        except OSError as error:
            raise cannot_write(error) from error


def cannot_write(error: OSError) -> MachineError:
    """What a person has to see to when the store's disk refuses."""
    return MachineError(
        f"the context store cannot be written ({error.strerror}); free some space or check its rights"
    )
