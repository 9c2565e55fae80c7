"""A program of its own: reads an archive from stdin, writes what is in it to stdout as frames.

It is kept apart from the orchestrator because the libraries it needs trust their input more than we do.
`tarfile` reads a header of any length into memory and matches it with a regular expression that can take
quadratic time (CVE-2024-6232), follows a negative size back to where it was (CVE-2025-8194), and recurses for
each header of a header; `zipfile` holds the whole directory of an archive; all of it would hold the
interpreter lock of every run. Here that costs this process alone, which can neither open nor write a file,
has limits on memory and CPU time, and is killed when it falls silent (`archives`).

Nothing is extracted: names are only said, so links, `..` and devices have nothing to act on. What may be in a
context is decided by the reader of the frames, who trusts this process no more than the archive.

Standard library only, and no import of ours: it starts in a few milliseconds, without site-packages.

A frame is its kind (one byte), the length of what follows (four bytes, big-endian), and what follows.
"""

import bz2
import gzip
import io
import lzma
import os
import resource
import stat
import struct
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import IO, BinaryIO, Final, Protocol

FILE: Final = b"F"
"""A file begins: its length as it is declared (eight bytes, signed), then its name."""
DATA: Final = b"D"
"""A part of the file begun last."""
LEFT_OUT: Final = b"L"
"""A member that is no file: what it is (a key of `NO_FILE`, one byte), then its name."""
END: Final = b"E"
"""The archive is over; nothing follows."""
REFUSED: Final = b"R"
"""It cannot be read: a key of `REFUSALS`, one byte; nothing follows."""

DIRECTORY: Final = b"d"
NO_FILE: Final[Mapping[bytes, str]] = {
    DIRECTORY: "a directory",
    b"s": "a symbolic link",
    b"h": "a hard link",
    b"p": "a named pipe",
    b"v": "a device",
    b"?": "of an unknown type",
}
REFUSALS: Final[Mapping[bytes, str]] = {
    b"d": "it is damaged, cut off, or no archive of the kind that its name says",
    b"e": "it is encrypted",
    b"m": "reading it takes too much memory",
    b"h": "it has a header that is longer than any honest one",
    b"c": "it is compressed in a way that Python cannot read",
}

HEADER = struct.Struct(">cI")
LENGTH = struct.Struct(">q")
MAX_PAYLOAD_BYTES = 1024 * 1024
"""Of one frame."""
_CHUNK_BYTES = 256 * 1024
_MAX_HEADER_BYTES = 1024 * 1024
"""Of a long name or a list of attributes in a tar archive. Longer than what Linux allows of either."""
_MAX_ZIP_DIRECTORY_BYTES = 32 * 1024 * 1024
"""A quarter of a million members with names of usual length."""
_MEMORY_BYTES = 512 * 1024 * 1024
"""Of address space. The longest zip directory takes 270 MB, the largest dictionary of `xz -9` 65 MB."""
_CPU_S = 60
_CPU_BYTES_PER_S = 1024 * 1024
"""A minute, and a second for each megabyte of the archive: bzip2 takes a quarter of that."""

Emit = Callable[[bytes, bytes], None]


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class RefusedError(Exception):
    """Why the archive cannot be read: a key of `REFUSALS`."""

    def __init__(self, why: bytes) -> None:
        super().__init__(REFUSALS[why])
        self.why = why


def read(archive: BinaryIO, form: str, emit: Emit) -> None:
    """Says what is in an archive, in its own order. The last frame is `END` or `REFUSED`.

    Args:
        archive: Open at its beginning, and seekable.
        form: `zip`, or `tar` with `gz`, `bz2`, `xz` or nothing after a dot.
        emit: Takes the kind of a frame and what is in it.
    """
    try:
        if form == "zip":
            _read_zip(archive, emit)
        else:
            _read_tar(_decompressed(archive, form), emit)
    except RefusedError as refused:
        emit(REFUSED, refused.why)
    except MemoryError:
        emit(REFUSED, b"m")
    except NotImplementedError:
        emit(REFUSED, b"c")
    # Whatever these libraries raise on bytes they did not expect; what they document is only a part of it.
    except Exception:
        emit(REFUSED, b"d")
    else:
        emit(END, b"")


def _decompressed(archive: BinaryIO, form: str) -> _Readable:
    match form:
        case "tar":
            return archive
        case "tar.gz":
            return gzip.GzipFile(fileobj=archive, mode="rb")
        case "tar.bz2":
            return bz2.BZ2File(archive)
        case _:
            return lzma.LZMAFile(archive)


class _Forward(io.RawIOBase):
    """What tarfile may do with a stream: read little at a time, and go forward."""

    def __init__(self, stream: _Readable) -> None:
        super().__init__()
        self._stream = stream
        self._at = 0
        self.last_read = b""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_HEADER_BYTES:
            raise RefusedError(b"h")
        self.last_read = self._stream.read(size)
        self._at += len(self.last_read)
        return self.last_read

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        if whence != os.SEEK_SET or offset < self._at:
            raise RefusedError(b"d")
        while self._at < offset:
            if not self.read(min(_CHUNK_BYTES, offset - self._at)):
                break
        return self._at


def _read_tar(stream: _Readable, emit: Emit) -> None:
    forward = _Forward(stream)
    with tarfile.TarFile(fileobj=forward, encoding="utf-8", errors="surrogateescape") as tar:
        while (member := tar.next()) is not None:
            # It keeps all members until the end, a kilobyte each, for random access.
            tar.members.clear()  # type: ignore[attr-defined] # typeshed does not know this old attribute
            if member.size < 0:
                raise RefusedError(b"d")
            name = member.name.encode("utf-8", "surrogateescape")
            if not member.isreg():
                _emit_left_out(_tar_kind(member), name, emit)
                continue
            content = tar.extractfile(member)
            if content is None:
                raise RefusedError(b"d")
            _emit_file(content, member.size, name, emit)
    # tarfile takes any header but the first that it cannot read for the end, and the end of the file too.
    if forward.last_read != bytes(tarfile.BLOCKSIZE):
        raise RefusedError(b"d")
    # The check sum of what it was compressed in comes last, behind some padding.
    left = _MAX_HEADER_BYTES
    while left > 0 and (padding := forward.read(_CHUNK_BYTES)):
        left -= len(padding)


def _tar_kind(member: tarfile.TarInfo) -> bytes:
    if member.isdir():
        return DIRECTORY
    if member.issym():
        return b"s"
    if member.islnk():
        return b"h"
    if member.isfifo():
        return b"p"
    return b"v" if member.isdev() else b"?"


class _Seekable(io.RawIOBase):
    """What zipfile may do with a file: not read a directory as long as memory."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__()
        self._file = file

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            size = _MAX_ZIP_DIRECTORY_BYTES + 1
        elif size > _MAX_ZIP_DIRECTORY_BYTES:
            raise RefusedError(b"h")
        return self._file.read(size)

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._file.tell()

    def seek(self, offset: int, whence: int = os.SEEK_SET, /) -> int:
        return self._file.seek(offset, whence)


def _read_zip(archive: BinaryIO, emit: Emit) -> None:
    with zipfile.ZipFile(_Seekable(archive)) as directory:
        for member in directory.infolist():
            name = _zip_name(member)
            mode = member.external_attr >> 16
            if member.is_dir():
                _emit_left_out(DIRECTORY, name, emit)
            elif stat.S_IFMT(mode) not in {0, stat.S_IFREG}:
                _emit_left_out(b"s" if stat.S_ISLNK(mode) else b"?", name, emit)
            elif member.flag_bits & 1:
                raise RefusedError(b"e")
            else:
                with directory.open(member) as content:
                    _emit_file(content, member.file_size, name, emit)


def _zip_name(member: zipfile.ZipInfo) -> bytes:
    # Not `filename`, which ends at a NUL.
    name = member.orig_filename
    if member.flag_bits & 0x800:
        return name.encode()
    # Without that flag it should be code page 437, and often is UTF-8 all the same.
    raw = name.encode("cp437")
    try:
        raw.decode()
    except UnicodeDecodeError:
        return name.encode()
    return raw


def _emit_left_out(kind: bytes, name: bytes, emit: Emit) -> None:
    _check_name(name)
    emit(LEFT_OUT, kind + name)


def _emit_file(content: IO[bytes], length: int, name: bytes, emit: Emit) -> None:
    _check_name(name)
    emit(FILE, LENGTH.pack(length) + name)
    left = length
    for chunk in _chunks(content):
        left -= len(chunk)
        emit(DATA, chunk)
    if left:
        raise RefusedError(b"d")


def _chunks(content: IO[bytes]) -> Iterator[bytes]:
    while chunk := content.read(_CHUNK_BYTES):
        yield chunk


def _check_name(name: bytes) -> None:
    if len(name) > _CHUNK_BYTES:
        raise RefusedError(b"h")


def _give_up_rights(archive_bytes: int) -> None:
    """From here on this process can neither open nor write a file, nor use more than it needs."""
    for limit, amount in (
        (resource.RLIMIT_AS, _MEMORY_BYTES),
        (resource.RLIMIT_CPU, _CPU_S + archive_bytes // _CPU_BYTES_PER_S),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
        # Stdin, stdout and stderr are open, and stay.
        (resource.RLIMIT_NOFILE, 3),
        # For root it does not hold.
        (resource.RLIMIT_NPROC, 0),
    ):
        resource.setrlimit(limit, (amount, amount))


def main() -> None:
    """Reads the archive that is stdin. Its form is the one argument."""
    form = sys.argv[1]
    # What Python would import when it is needed. By then it can open nothing any more.
    "".encode("cp437")
    zlib.crc32(b"")
    with open(0, "rb", closefd=False) as archive, open(1, "wb", buffering=_CHUNK_BYTES, closefd=False) as out:

        def emit(kind: bytes, payload: bytes) -> None:
            out.write(HEADER.pack(kind, len(payload)))
            out.write(payload)

        _give_up_rights(os.fstat(0).st_size)
        read(archive, form, emit)


if __name__ == "__main__":
    main()
