"""The text that a sub-call asks about: read, hashed, and cut down to what the record keeps of it.

Pure: no I/O. A long text is read in a thread.
"""

import codecs
import hashlib
from typing import NamedTuple

from orchestrator.conversation import utf8_bytes
from orchestrator.errors import InvalidRequestError
from orchestrator.limits import MAX_PROMPT_BYTES
from orchestrator.trajectory import INLINE_BYTES, Blob, Text, blob_of

_READ_AT_ONCE_BYTES = 256 * 1024
"""Decoding holds the interpreter's lock: with junk, the slowest case, this much holds it for 4 ms."""


class AskedText(NamedTuple):
    """What a sub-call asks for, read."""

    text: str
    """Whole, with what is no UTF-8 replaced."""
    short: Text
    """As it goes into the record."""
    whole: bytes | None
    """What the record keeps beside that once the call may have cost something."""
    request_hash: str
    """Of text and head: two calls that have it alike ask for the same."""


def request_head(what: str, first: str, max_tokens: int | None) -> bytes:
    """What a request's hash begins with; its fixed width ends it before the only free part."""
    return hashlib.sha256(f"{what}\0{max_tokens}\0{first}".encode("utf-8", "replace")).digest()


def read_text(data: bytes, head: bytes) -> AskedText:
    """Read a text in small steps, between which other threads run.

    Args:
        data: As the guest sent it.
        head: Of its request (`request_head`).

    Raises:
        InvalidRequestError: With everything replaced that is no UTF-8 it is longer than a prompt may be.
    """
    try:
        text = _decode(data, "strict")
    except UnicodeDecodeError:
        text = _decode(data, "replace")
        data = text.encode()
    digest = hashlib.sha256(data)
    short = text if len(data) <= INLINE_BYTES else blob_of(data, digest.hexdigest())
    whole = data if isinstance(short, Blob) else None
    return AskedText(text, short, whole, hashlib.sha256(head + digest.digest()).hexdigest())


def _decode(data: bytes, errors: str) -> str:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    parts, length_bytes = [], 0
    for start in range(0, len(data), _READ_AT_ONCE_BYTES):
        chunk = data[start : start + _READ_AT_ONCE_BYTES]
        parts.append(decoder.decode(chunk, start + len(chunk) == len(data)))
        length_bytes += len(chunk) if errors == "strict" else utf8_bytes(parts[-1])
        if length_bytes > MAX_PROMPT_BYTES:
            raise InvalidRequestError(
                f"the prompt has more than {MAX_PROMPT_BYTES:,} bytes as UTF-8, and no more are allowed"
            )
    return "".join(parts)
