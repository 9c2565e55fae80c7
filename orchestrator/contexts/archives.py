"""Archives as contexts: each member is a file of the context. They are read apart, and never unpacked.

Rules. They live in this file and nowhere else:

1. The name says whether a file is an archive, and of which form; what is in it has to agree. Archives inside
   directories and inside archives are files like any other.
2. A member is called as the archive calls it, without empty parts and `.`. One that is absolute or has `..`
   in it makes no sense outside a file system: the archive is refused.
3. Links, pipes and devices are left out and named, as in a directory.
4. Of two files of one name the last counts, as when it is unpacked; that is told.
5. An archive may grow by a factor of `MAX_GROWTH` once what comes out of it is over `FREE_GROWTH_BYTES`. What
   its members claim to hold counts before it is read.
6. The process that reads it (`archive_reader`) is trusted no more than the archive: what it says is checked
   here, and it is killed when it says nothing for `SILENCE_S`, and at the end in any case.
"""

import os
import select
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from typing import Final, NamedTuple

from orchestrator.contexts import archive_reader as frames
from orchestrator.contexts.staging import Cancelled, check_cancelled
from orchestrator.errors import ContextInputError, InvariantError, MachineError

FREE_GROWTH_BYTES = 256 * 1024 * 1024
"""Small archives of very regular text grow a thousandfold in all honesty; this much does no harm."""
MAX_GROWTH = 250
"""Logs grow twenty- to a hundredfold. What grows more can be unpacked by hand and given as a directory."""
MAX_MEMBERS = 250_000
"""Of one archive, of every kind: three times the Linux sources. Each takes a tenth of a millisecond."""
MAX_NAME_BYTES = 4_096
"""Of a member: what Linux allows a path. Bounds its depth too."""
SILENCE_S = 30.0
"""From one frame to the next."""
_LOOK_S = 0.2
"""Between two looks at whether to go on, while nothing comes."""
_READ_BYTES = 1024 * 1024

_FORMS: Final = {
    ".zip": "zip",
    ".tar": "tar",
    ".tar.gz": "tar.gz",
    ".tgz": "tar.gz",
    ".tar.bz2": "tar.bz2",
    ".tbz2": "tar.bz2",
    ".tbz": "tar.bz2",
    ".tar.xz": "tar.xz",
    ".txz": "tar.xz",
    ".tar.zst": "zst",
    ".tzst": "zst",
}


class File(NamedTuple):
    """A file begins; the parts that follow are its."""

    name: bytes


class LeftOut(NamedTuple):
    """A member that is no file."""

    name: bytes
    what: str


Said = File | LeftOut | bytes
"""What an archive is made of; bytes are a part of the file begun last."""


def form_of(path: bytes) -> str | None:
    """Which form of archive a name stands for; None for a file like any other."""
    name = os.path.basename(path).lower().decode(errors="replace")
    return next((form for suffix, form in _FORMS.items() if name.endswith(suffix) and name != suffix), None)


def read(archive: int, form: str, *, shown: str, cancelled: Cancelled) -> Generator[Said]:
    """What is in an archive, in its order.

    Args:
        archive: An open file, at its beginning.
        form: Of `form_of`.
        shown: What it is called, for a sentence.
        cancelled: Asked between parts, and while none comes.

    Raises:
        ContextInputError: It cannot be read, or is refused.
        MachineError: The process that reads it cannot be started.
        RunCancelledError: `cancelled` said so.
    """
    if form == "zst":
        raise ContextInputError(
            f"{shown} cannot be read: zstd is not supported; decompress it first (zstd -d)"
        )
    guard = _Guard(shown, os.fstat(archive).st_size)
    with _reader_process(archive, form) as said:
        for kind, payload in _frames(said, shown, cancelled):
            match kind:
                case frames.DATA:
                    guard.grows(len(payload))
                    yield payload
                case frames.FILE:
                    yield File(guard.file(payload))
                case frames.LEFT_OUT:
                    name, what = guard.left_out(payload)
                    if what != frames.DIRECTORY:
                        yield LeftOut(name, frames.NO_FILE[what])
                case frames.END:
                    guard.end()
                    return
                case _:
                    raise guard.refusal(payload)


class _Guard:
    """Holds what is said of one archive against the rules."""

    def __init__(self, shown: str, archive_bytes: int) -> None:
        self._shown = shown
        self._most_bytes = max(FREE_GROWTH_BYTES, MAX_GROWTH * archive_bytes)
        self._members = 0
        self._declared_bytes = 0
        self._left_bytes = 0
        """Of the file begun last."""

    def file(self, payload: bytes) -> bytes:
        """The name of a file that begins."""
        self.end()
        if len(payload) < frames.LENGTH.size:
            raise self._broken()
        (length,) = frames.LENGTH.unpack_from(payload)
        if length < 0:
            raise self._broken()
        self._left_bytes = length
        self._declared_bytes += length
        if self._declared_bytes > self._most_bytes:
            raise ContextInputError(
                f"{self._shown} would grow to more than {self._most_bytes:,} bytes, which is far too much for"
                " its size; if that is right, unpack it and give the directory"
            )
        name = self._name(payload[frames.LENGTH.size :])
        if not name:
            raise self._broken()
        return name

    def grows(self, length_bytes: int) -> None:
        """A part of the file begun last."""
        if not 0 < length_bytes <= self._left_bytes:
            raise self._broken()
        self._left_bytes -= length_bytes

    def left_out(self, payload: bytes) -> tuple[bytes, bytes]:
        """The name of a member that is no file, and what it is."""
        self.end()
        what, name = payload[:1], payload[1:]
        if what not in frames.NO_FILE:
            raise self._broken()
        return self._name(name), what

    def end(self) -> None:
        """The file begun last, if any, is over."""
        if self._left_bytes:
            raise self._broken()

    def refusal(self, payload: bytes) -> ContextInputError:
        """Why the process that reads it gave up."""
        why = frames.REFUSALS.get(payload)
        return self._broken() if why is None else ContextInputError(f"{self._shown} cannot be read: {why}")

    def _name(self, raw: bytes) -> bytes:
        self._members += 1
        if self._members > MAX_MEMBERS:
            raise ContextInputError(
                f"{self._shown} has more than {MAX_MEMBERS:,} members; unpack it and give the directory"
            )
        if len(raw) > MAX_NAME_BYTES:
            raise ContextInputError(f"{self._shown} has a name of more than {MAX_NAME_BYTES:,} bytes in it")
        parts = [part for part in raw.split(b"/") if part not in {b"", b"."}]
        if raw.startswith(b"/") or b".." in parts or b"\0" in raw:
            raise ContextInputError(
                f"{self._shown} has a name in it that leads out of it (an absolute path, or one with '..');"
                " unpack it with care and give the directory"
            )
        return b"/".join(parts)

    def _broken(self) -> ContextInputError:
        return ContextInputError(f"{self._shown} cannot be read: {frames.REFUSALS[b'd']}")


@contextmanager
def _reader_process(archive: int, form: str) -> Iterator[int]:
    """The reading end of what the process says. It is gone after the block."""
    try:
        process = subprocess.Popen(  # noqa: S603 - our own program, and no word of it from anybody else
            # Isolated, and without site-packages: nothing of the user's or the directory's is imported.
            [sys.executable, "-I", "-S", "-B", frames.__file__, form],
            stdin=archive,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={},  # the provider's key is in ours
            start_new_session=True,  # Ctrl-C is for us to hear
            pipesize=_READ_BYTES,
        )
    except OSError as error:
        raise MachineError(
            f"the process that reads archives cannot be started ({error.strerror}); give a directory instead"
        ) from error
    with process:
        try:
            if process.stdout is None:
                raise InvariantError("a pipe was asked for")
            yield process.stdout.fileno()
        finally:
            process.kill()


def _frames(said: int, shown: str, cancelled: Cancelled) -> Iterator[tuple[bytes, bytes]]:
    held = bytearray()
    for piece in _pieces(said, shown, cancelled):
        held += piece
        at = 0
        while len(held) - at >= frames.HEADER.size:
            kind, length = frames.HEADER.unpack_from(held, at)
            if length > frames.MAX_PAYLOAD_BYTES:
                raise ContextInputError(f"{shown} cannot be read: {frames.REFUSALS[b'd']}")
            end = at + frames.HEADER.size + length
            if len(held) < end:
                break
            yield kind, bytes(held[at + frames.HEADER.size : end])
            at = end
        del held[:at]
    # Killed by one of its own limits, or by a defect of what it reads with.
    raise ContextInputError(f"{shown} cannot be read: the process that reads it was ended by its limits")


def _pieces(said: int, shown: str, cancelled: Cancelled) -> Iterator[bytes]:
    readable = select.poll()
    readable.register(said, select.POLLIN)
    heard_at_s = time.monotonic()
    while True:
        check_cancelled(cancelled)
        if readable.poll(_LOOK_S * 1_000):
            piece = os.read(said, _READ_BYTES)
            if not piece:
                return
            yield piece
            heard_at_s = time.monotonic()
        elif time.monotonic() - heard_at_s > SILENCE_S:
            raise ContextInputError(f"{shown} cannot be read: nothing came out of it for {SILENCE_S:.0f} s")
