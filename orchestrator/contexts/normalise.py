"""Bytes in, valid UTF-8 out, counted in the same pass."""

import codecs
import hashlib
import sys

from orchestrator.contexts.manifest import Measured

_BOM = codecs.BOM_UTF8
_REPLACEMENT = "\ufffd"
REPLACEMENT_BYTES = _REPLACEMENT.encode()

# CPython stores every character of a string in as many bytes as its widest needs and reports the sum, so the
# width of a megabyte is known without looking at it. Two characters, because one may be a shared object.
_HEADER_BYTES = sys.getsizeof(b"\xc3\xa9\xc3\xa9".decode()) - 3


def width_of(text: str) -> int:
    """Bytes that CPython needs for each character of a text: 1, 2 or 4."""
    if text.isascii():
        return 1
    if len(text) == 1:
        return 1 if text <= "\xff" else 2 if text <= "\uffff" else 4
    return (sys.getsizeof(text) - _HEADER_BYTES) // (len(text) + 1)


class Normaliser:
    """One text on its way through, in chunks of any size.

    What comes out, joined, is what `bytes.decode("utf-8", "replace")` makes of the whole input, without a
    byte order mark at its start. Newlines of every kind stay as they are.
    """

    __slots__ = (
        "_at_start",
        "_consumed_bytes",
        "_digest",
        "_ends_line",
        "_length_bytes",
        "_tail",
        "chars",
        "first_replaced_byte",
        "newlines",
        "piece_width",
        "replaced",
        "width",
    )

    def __init__(self, *, strip_bom: bool = True) -> None:
        self._at_start = strip_bom
        self._consumed_bytes = 0
        self._digest = hashlib.sha256()
        self._ends_line = True
        self._length_bytes = 0
        self._tail = b""
        self.chars = 0
        self.newlines = 0
        self.piece_width = 1
        """Bytes that CPython needs for each character of what came out last."""
        self.width = 1
        self.replaced = 0
        self.first_replaced_byte: int | None = None
        """Where in the input the first bytes that are not UTF-8 were."""

    def feed(self, chunk: bytes) -> bytes:
        """What can be said of the input so far: all but the start of a character at its end."""
        return self._take(chunk, final=False)

    def finish(self) -> bytes:
        """The rest, once the input is over."""
        return self._take(b"", final=True)

    def measured(self) -> Measured:
        """What was found out, after `finish`."""
        return Measured(
            length_bytes=self._length_bytes,
            chars=self.chars,
            lines=self.newlines + (not self._ends_line),
            width=self.width,
            replaced=self.replaced,
            sha256=self._digest.hexdigest(),
        )

    def _take(self, chunk: bytes, *, final: bool) -> bytes:
        if self._tail:
            chunk = self._tail + chunk
            self._tail = b""
        if self._at_start:
            if not final and len(chunk) < len(_BOM) and _BOM.startswith(chunk):
                self._tail = chunk
                return b""
            self._at_start = False
            if chunk.startswith(_BOM):
                chunk = chunk[len(_BOM) :]
                self._consumed_bytes = len(_BOM)
        if not chunk:
            return b""
        if chunk.isascii():
            self.piece_width = 1
            self.chars += len(chunk)
            self._consumed_bytes += len(chunk)
            clean = chunk
        else:
            clean = self._decode(chunk, final=final)
        if clean:
            self._length_bytes += len(clean)
            self.newlines += clean.count(b"\n")
            self._ends_line = clean.endswith(b"\n")
            self._digest.update(clean)
        return clean

    def _decode(self, chunk: bytes, *, final: bool) -> bytes:
        try:
            text, used = codecs.utf_8_decode(chunk, "strict", final)
            clean = chunk[:used]  # the same object, uncopied, when all of it was used
        except UnicodeDecodeError as error:
            if self.first_replaced_byte is None:
                self.first_replaced_byte = self._consumed_bytes + error.start
            text, used = codecs.utf_8_decode(chunk, "replace", final)
            clean = text.encode()
            # An encoded U+FFFD in the input is always read as one: its first byte continues nothing.
            self.replaced += text.count(_REPLACEMENT) - chunk.count(REPLACEMENT_BYTES, 0, used)
        self._tail = chunk[used:]
        self._consumed_bytes += used
        self.chars += len(text)
        self.piece_width = width_of(text)
        self.width = max(self.width, self.piece_width)
        return clean
