"""What is asked about, as one file that can be uploaded: a file as it is, anything else as a tar archive.

The archive of a directory is the same whenever its files are: no times, no owners, in the order of the paths'
bytes. So its hash is too, and what a server has already is not sent again.

Links are not followed and not sent, as in a run without a server; what is left out is named in the notes.
"""

import asyncio
import errno
import hashlib
import os
import stat
import tarfile
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

from orchestrator.errors import ContextInputError, MachineError
from orchestrator.visible import visible_line

MAX_NAME_BYTES = 255
MAX_NOTES = 50
"""What was left out is named up to here and counted from there."""
_CHUNK_BYTES = 1024 * 1024
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".tbz2", ".tbz", ".xz", ".txz", ".zst", ".tzst")
"""Among several paths: the server would see a file, and not what is in it."""


@dataclass(slots=True)
class Packed:
    """One file, and what an upload has to say of it."""

    file: IO[bytes]
    name: str
    length_bytes: int
    sha256: str
    notes: list[str] = field(default_factory=list)

    def read(self, offset: int, most_bytes: int) -> bytes:
        """A part of it. Blocking."""
        return os.pread(self.file.fileno(), most_bytes, offset)


class _Stopped(Exception):  # noqa: N818 - nobody sees it
    pass


@asynccontextmanager
async def packed(paths: Sequence[Path], name: str | None = None) -> AsyncIterator[Packed]:
    """The paths as one file, for the length of the block.

    Args:
        paths: One file or directory, or several.
        name: Instead of the path's own. How it ends says whether it is an archive.

    Raises:
        ContextInputError: There is nothing to read, or it cannot be read.
        MachineError: The archive cannot be written.
    """
    stop = threading.Event()
    packing = asyncio.ensure_future(asyncio.to_thread(_pack, paths, name, stop))
    try:
        ready = await asyncio.shield(packing)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([packing])
        if not packing.cancelled() and packing.exception() is None:
            packing.result().file.close()
        raise
    try:
        yield ready
    finally:
        ready.file.close()


@asynccontextmanager
async def packed_bytes(data: bytes, name: str) -> AsyncIterator[Packed]:
    """A text of the caller's, likewise.

    Raises:
        ContextInputError: It is empty.
        MachineError: The file cannot be written.
    """
    file = await asyncio.to_thread(_written, data)
    with file:
        yield _described(file, name)


def _written(data: bytes) -> IO[bytes]:
    file = _temporary()
    try:
        file.write(data)
        file.flush()
    except OSError as error:
        file.close()
        raise _no_room(error) from error
    return file


def _pack(paths: Sequence[Path], name: str | None, stop: threading.Event) -> Packed:
    if not paths:
        raise ContextInputError("no context was given; name a file or a directory")
    if len(paths) == 1 and not _status(paths[0]).is_dir:
        return _described(_opened(paths[0]), name or paths[0].name, stop)
    _refuse_archives(paths)
    return _archive(paths, name, stop)


def _refuse_archives(paths: Sequence[Path]) -> None:
    for path in paths:
        if len(paths) > 1 and path.name.lower().endswith(_ARCHIVES) and not _status(path).is_dir:
            raise ContextInputError(
                f"{_shown(path)} is an archive; a server takes one alone, or unpacked files"
            )


def _described(file: IO[bytes], name: str, stop: threading.Event | None = None) -> Packed:
    """Hash what is there."""
    digest = hashlib.sha256()
    length = 0
    try:
        while chunk := os.pread(file.fileno(), _CHUNK_BYTES, length):
            _check(stop)
            digest.update(chunk)
            length += len(chunk)
    except BaseException:
        file.close()
        raise
    if not length:
        file.close()
        raise ContextInputError(f"{visible_line(name, 200)!r} is empty")
    return Packed(file, _wire_name(name), length, digest.hexdigest())


def _archive(paths: Sequence[Path], name: str | None, stop: threading.Event) -> Packed:
    notes = _Notes()
    file = _temporary()
    try:
        hashing = _Hashing(file)
        members = _members(paths, notes)
        # A stream: tarfile would seek otherwise, and the hash could not.
        with tarfile.open(
            fileobj=cast(Any, hashing), mode="w|", format=tarfile.PAX_FORMAT, bufsize=_CHUNK_BYTES
        ) as archive:
            count = sum(_add(archive, path, member, notes, stop) for path, member in members)
        file.flush()
    except OSError as error:
        file.close()
        raise _no_room(error) from error
    except BaseException:
        file.close()
        raise
    if not count:
        file.close()
        shown = ", ".join(_shown(path) for path in paths[:3]) + ", …" * (len(paths) > 3)
        raise ContextInputError(f"there is no regular file in {shown}")
    name = name or f"{paths[0].resolve().name if len(paths) == 1 else 'files'}.tar"
    return Packed(file, _wire_name(name), hashing.length_bytes, hashing.digest.hexdigest(), notes.all())


def _members(paths: Sequence[Path], notes: "_Notes") -> list[tuple[str, str]]:
    """Files and their names in the archive, in the order of the names' bytes."""
    found: dict[str, str] = {}
    if len(paths) == 1:
        found = {os.path.relpath(path, paths[0]): path for path in _walk(os.fspath(paths[0]), notes)}
    else:
        typed = [os.path.abspath(path) for path in paths]
        above = os.path.commonpath([os.path.dirname(path) for path in typed])
        for given, path in zip(paths, typed, strict=True):
            # As without a server: what was asked for may be a link, what is below it not.
            files = _walk(path, notes) if _status(given).is_dir else iter([path])
            for file in files:
                member = os.path.relpath(file, above)
                if member in found:
                    raise ContextInputError(f"{_shown(file)} is given twice")
                found[member] = file
    return sorted(((path, member) for member, path in found.items()), key=lambda pair: os.fsencode(pair[1]))


def _walk(top: str, notes: "_Notes") -> Iterator[str]:
    waiting = [top]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    elif entry.is_file(follow_symlinks=False):
                        yield entry.path
                    else:
                        notes.add(f"left out: {_shown(entry.path)}, which is a link or no regular file")
        except OSError as error:
            raise ContextInputError(f"{_shown(folder)} cannot be read: {error.strerror}") from error


def _add(archive: tarfile.TarFile, path: str, member: str, notes: "_Notes", stop: threading.Event) -> bool:
    """Whether it was one."""
    _check(stop)
    try:
        fd = os.open(path, _FLAGS)
    except OSError as error:
        if error.errno == errno.ENOENT:
            notes.add(f"left out: {_shown(path)}, which vanished")
            return False
        raise ContextInputError(f"{_shown(path)} cannot be read: {error.strerror}") from error
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            notes.add(f"left out: {_shown(path)}, which is no regular file any more")
            return False
        entry = tarfile.TarInfo(member)
        entry.size = status.st_size
        entry.mode = 0o644
        archive.addfile(entry, cast(IO[bytes], _Exactly(file, path, stop)))
    # It would keep every entry, and there may be a million.
    cast(Any, archive).members = []
    return True


class _Exactly:
    """A file for `tarfile`, whose failures to read are told from failures to write."""

    def __init__(self, file: IO[bytes], path: str, stop: threading.Event) -> None:
        self._file = file
        self._path = path
        self._stop = stop

    def read(self, length: int) -> bytes:
        _check(self._stop)
        try:
            data = self._file.read(length)
        except OSError as error:
            raise ContextInputError(f"{_shown(self._path)} cannot be read: {error.strerror}") from error
        if len(data) < length:
            raise ContextInputError(f"{_shown(self._path)} became shorter while it was read")
        return data


class _Hashing:
    """A file to write to that knows the hash of what was written."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.digest = hashlib.sha256()
        self.length_bytes = 0

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        self.length_bytes += len(data)
        return self._file.write(data)


class _Notes:
    def __init__(self) -> None:
        self._sentences: list[str] = []
        self._more = 0

    def add(self, sentence: str) -> None:
        if len(self._sentences) < MAX_NOTES:
            self._sentences.append(sentence)
        else:
            self._more += 1

    def all(self) -> list[str]:
        more = [f"{self._more:,} more notes like these"] if self._more else []
        return self._sentences + more


@dataclass(frozen=True, slots=True)
class _Status:
    is_dir: bool


def _status(path: Path) -> _Status:
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise ContextInputError(f"{_shown(path)} cannot be read: {error.strerror}") from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        raise ContextInputError(f"{_shown(path)} is neither a file nor a directory")
    return _Status(stat.S_ISDIR(mode))


def _opened(path: Path) -> IO[bytes]:
    try:
        return os.fdopen(os.open(path, _FLAGS), "rb")
    except OSError as error:
        raise ContextInputError(f"{_shown(path)} cannot be read: {error.strerror}") from error


def _temporary() -> IO[bytes]:
    """A file without a name: gone with this process, however that ends."""
    try:
        return tempfile.TemporaryFile(prefix="rlm-upload-")
    except OSError as error:
        raise _no_room(error) from error


def _no_room(error: OSError) -> MachineError:
    return MachineError(
        f"an archive for the upload cannot be written ({error.strerror}); TMPDIR names another place"
    )


def _wire_name(name: str) -> str:
    """At most 255 bytes of printable UTF-8, with the end kept: it says what kind of file it is."""
    data = "".join(char if char.isprintable() else "_" for char in name).encode("utf-8", "replace")
    return data[-MAX_NAME_BYTES:].decode("utf-8", "ignore") or "context"


def _check(stop: threading.Event | None) -> None:
    if stop is not None and stop.is_set():
        raise _Stopped


def _shown(path: str | Path) -> str:
    return "'" + visible_line(os.fsencode(path).decode(errors="backslashreplace"), 300) + "'"
