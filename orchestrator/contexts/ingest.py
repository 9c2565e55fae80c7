"""Files of the host's file system, read as if whoever made them wanted us to read something else.

Only the path that was asked for may be a symbolic link; it is resolved once. Below it no link is followed:
directories are walked by file descriptor, everything is opened without following and looked at again after it
was opened, so a file swapped for a link, a pipe or a device between two looks is left out, not read.

Left out and named in the notes: symbolic links, sockets, named pipes, devices, what vanished meanwhile, and
the context store itself. Nothing else is: hidden files, `.git`, build output and binary files are part of a
directory, and whoever does not want them names other paths. A hard link is a file like any other. Mounted
file systems below the path are walked into.

A path that is named like an archive is read like a directory (`archives`); an archive found in one is a file.
"""

import errno
import os
import stat
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from orchestrator.contexts import archives
from orchestrator.contexts.manifest import Kind, unique_names
from orchestrator.contexts.staging import CHUNK_BYTES, BlobWriter, Cancelled, check_cancelled
from orchestrator.errors import ContextInputError
from orchestrator.visible import visible_line

MAX_NOTES = 50
"""What was left out is named up to here and counted from there."""
MAX_PATH_BYTES = 128 * 1024 * 1024
"""Of the names in one context together: they are held in memory, and a hostile tree has any length."""
_SHOWN_CHARS = 300

# Non-blocking: opening a pipe that nobody writes to would wait for ever. No controlling terminal either.
_FILE_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY
_DIRECTORY_FLAGS = _FILE_FLAGS | os.O_DIRECTORY
_STEP_FLAGS = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

_KINDS = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFSOCK: "a socket",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFBLK: "a device",
    stat.S_IFCHR: "a device",
}
# What opening says of something that is no longer the file or directory that the listing showed.
_SWAPPED = {errno.ELOOP: "a symbolic link", errno.ENXIO: "a socket", errno.ENOTDIR: "no directory any more"}


class Identity(NamedTuple):
    """Which directory this is, whatever it is called."""

    device: int
    inode: int

    @classmethod
    def of(cls, fd: int) -> "Identity":
        """Of an open directory."""
        status = os.fstat(fd)
        return cls(status.st_dev, status.st_ino)


@dataclass(slots=True)
class Notes:
    """What a person should know about how a context was read, one sentence each."""

    sentences: list[str] = field(default_factory=list)
    _more: int = 0

    def add(self, sentence: str) -> None:
        """One more, or one more that is only counted."""
        if len(self.sentences) < MAX_NOTES:
            self.sentences.append(sentence)
        else:
            self._more += 1

    def all(self) -> tuple[str, ...]:
        """The sentences, the last one saying how many are not here."""
        more = (f"{self._more:,} more notes like these",) if self._more else ()
        return (*self.sentences, *more)


@dataclass(frozen=True, slots=True)
class Source:
    """One path that was asked for."""

    typed: bytes
    """As it was written."""
    resolved: bytes
    """Without symbolic links, at the time of asking."""
    is_directory: bool
    archive_form: str | None = None
    """Of an archive; None for a directory, and for a file like any other."""

    @property
    def is_tree(self) -> bool:
        """Whether it has files in it."""
        return self.is_directory or self.archive_form is not None


def find_sources(paths: Sequence[Path]) -> list[Source]:
    """What was asked for, resolved.

    Raises:
        ContextInputError: A path is missing, neither file nor directory, or given twice; or there is none.
    """
    if not paths:
        raise ContextInputError("no context was given; name a file or a directory")
    sources = [_find(os.fsencode(path)) for path in paths]
    for position, source in enumerate(sources):
        for other in sources[:position]:
            if source.resolved == other.resolved:
                raise ContextInputError(f"{shown(source.typed)} is given twice")
            outer, inner = sorted((source, other), key=lambda each: len(each.resolved))
            if inner.resolved.startswith(outer.resolved.rstrip(b"/") + b"/"):
                raise ContextInputError(
                    f"{shown(inner.typed)} lies inside {shown(outer.typed)}; give one of them"
                )
    return sources


def kind_of(sources: Sequence[Source]) -> Kind:
    """One file is a text; a directory, an archive, or several paths, are files."""
    return "text" if len(sources) == 1 and not sources[0].is_tree else "files"


def shown(path: bytes) -> str:
    """A path in a sentence."""
    return "'" + visible_line(path.decode(errors="backslashreplace"), _SHOWN_CHARS) + "'"


@dataclass(slots=True)
class Reader:
    """Reads sources into a blob: directories in the order of their paths' bytes, archives in their own."""

    writer: BlobWriter
    notes: Notes
    cancelled: Cancelled
    leave_out: Identity
    """The store: staging a directory around it would never end."""
    max_files: int
    max_bytes: int
    _paths: list[bytes] = field(default_factory=list)
    _path_bytes: int = 0
    _archived: dict[bytes, int] = field(default_factory=dict)
    """Members of archives that count, by path: the position of each."""
    _superseded: set[int] = field(default_factory=set)

    def read(self, sources: Sequence[Source]) -> list[tuple[int, str]]:
        """Everything below the sources; of each text that counts its position in the blob, and its name.

        They are in the order of their paths' bytes, so that an archive makes the same context as its
        directory. One directory's files are named from it on, several paths' files from the innermost
        directory that holds all of them.

        Raises:
            ContextInputError: A file cannot be read, there is nothing to read, or too much.
            MachineError: The store cannot be written.
            RunCancelledError: `cancelled` said so.
        """
        if kind_of(sources) == "text":
            self._read_source_file(sources[0], b"")
            if self.writer.length_bytes == 0:
                raise ContextInputError(f"{shown(sources[0].typed)} is empty")
            return [(0, "")]
        for source, name in sorted(_named(sources), key=lambda pair: pair[1] + b"/" * pair[0].is_tree):
            prefix = name + b"/" if name else b""
            if source.archive_form is not None:
                self._read_archive(source, source.archive_form, prefix)
            elif source.is_directory:
                self._read_tree(source, prefix)
            else:
                self._read_source_file(source, name)
        asked_for = ", ".join(shown(source.typed) for source in sources[:3]) + ", …" * (len(sources) > 3)
        if self.writer.texts == 0:
            raise ContextInputError(f"there is no regular file in {asked_for}")
        if self.writer.length_bytes == 0:
            raise ContextInputError(f"all files in {asked_for} are empty")
        return self._named_texts()

    def place_of(self, position: int) -> str:
        """The path of a text that was read, for a sentence."""
        return shown(self._paths[position])

    def _named_texts(self) -> list[tuple[int, str]]:
        positions: Sequence[int] = range(len(self._paths))
        if self._archived:
            counting = (position for position in positions if position not in self._superseded)
            positions = sorted(counting, key=self._paths.__getitem__)
        paths = [self._paths[position] for position in positions]
        names = unique_names(paths)
        for path, name in zip(paths, names, strict=True):
            # Seen on the cheap: a name that is longer than its bytes has escapes in it.
            if len(name) > len(path) or name.encode() != path:
                self.notes.add(f"a file name is not UTF-8; it is called {shown(name.encode())}")
        return list(zip(positions, names, strict=True))

    def _read_source_file(self, source: Source, name: bytes) -> None:
        fd = _open_source_file(source)
        with _closing_fd(fd):
            self._read_file(fd, name or source.typed)

    def _read_archive(self, source: Source, form: str, prefix: bytes) -> None:
        fd = _open_source_file(source)
        with (
            _closing_fd(fd),
            closing(
                archives.read(fd, form, shown=shown(source.typed), cancelled=self.cancelled)
            ) as everything,
        ):
            is_open = False
            for said in everything:
                if isinstance(said, bytes):
                    self._write(said)
                    continue
                if is_open:
                    self.writer.end()
                is_open = isinstance(said, archives.File)
                path = prefix + said.name
                if isinstance(said, archives.LeftOut):
                    self._skip(path, said.what)
                else:
                    self._begin_member(path)
            if is_open:
                self.writer.end()

    def _begin_member(self, path: bytes) -> None:
        earlier = self._archived.get(path)
        if earlier is not None:
            self._superseded.add(earlier)
            self.notes.add(f"{shown(path)} is in the archive more than once; the last one counts")
        self._archived[path] = self.writer.texts
        self._begin(path)

    def _read_tree(self, source: Source, prefix: bytes) -> None:
        fd = _open_source(source, _DIRECTORY_FLAGS)
        with closing(self._walk(fd, prefix)) as files:
            for directory, name, path in files:
                try:
                    file = os.open(name, _FILE_FLAGS, dir_fd=directory)
                except OSError as error:
                    self._not_opened(path, error)
                    continue
                with _closing_fd(file):
                    mode = os.fstat(file).st_mode
                    if stat.S_ISREG(mode):
                        self._read_file(file, path)
                    else:
                        self._skip(path, _KINDS.get(stat.S_IFMT(mode), "no regular file any more"))

    def _begin(self, path: bytes) -> None:
        self._path_bytes += len(path)
        if self.writer.texts >= self.max_files or self._path_bytes > MAX_PATH_BYTES:
            raise ContextInputError(
                f"the context has more than {self.max_files:,} files, or names too long to hold"
            )
        self._paths.append(path)
        self.writer.begin()

    def _write(self, chunk: bytes) -> None:
        self.writer.write(chunk)
        if self.writer.length_bytes > self.max_bytes:
            raise ContextInputError(f"the context has more than {self.max_bytes:,} bytes")

    def _read_file(self, fd: int, path: bytes) -> None:
        self._begin(path)
        while True:
            check_cancelled(self.cancelled)
            try:
                chunk = os.read(fd, CHUNK_BYTES)
            except OSError as error:
                raise _unreadable(path, error) from error
            if not chunk:
                break
            self._write(chunk)
        self.writer.end()

    def _walk(self, root: int, prefix: bytes) -> Generator[tuple[int, str, bytes]]:
        """Every regular file below a directory: an open directory, a name in it, the whole path.

        Owns `root`. However deep the tree, one directory is open at a time, and the way back up is only taken
        when it leads where it came from.
        """
        here = root
        try:
            levels = [self._list(here, prefix)]
            while levels:
                level = levels[-1]
                if not level.names:
                    levels.pop()
                    if levels:
                        here = _replace_fd(here, self._climb(here, levels[-1]))
                    continue
                name, is_directory = level.names.pop()
                path = level.prefix + os.fsencode(name)
                if not is_directory:
                    yield here, name, path
                    continue
                try:
                    below = os.open(name, _DIRECTORY_FLAGS, dir_fd=here)
                except OSError as error:
                    self._not_opened(path, error)
                    continue
                here = _replace_fd(here, below)
                levels.append(self._list(here, path + b"/"))
        finally:
            os.close(here)

    def _list(self, directory: int, prefix: bytes) -> "_Level":
        identity = Identity.of(directory)
        if identity == self.leave_out:
            self._skip(prefix.rstrip(b"/"), "the context store itself")
            return _Level(identity, prefix, [])
        keyed: list[tuple[bytes, str, bool]] = []
        try:
            with os.scandir(directory) as listing:
                for item in listing:
                    name = os.fsencode(item.name)
                    if item.is_dir(follow_symlinks=False):
                        # The slash makes the order that of whole paths: `a-b` comes before `a/b`.
                        keyed.append((name + b"/", item.name, True))
                    elif item.is_file(follow_symlinks=False):
                        keyed.append((name, item.name, False))
                    else:
                        # Not even opened: opening a device can do things.
                        kind = stat.S_IFMT(item.stat(follow_symlinks=False).st_mode)
                        self._skip(prefix + name, _KINDS.get(kind, "no regular file"))
        except OSError as error:
            raise _unreadable(prefix or b".", error) from error
        check_cancelled(self.cancelled)
        keyed.sort(reverse=True)
        return _Level(identity, prefix, [(name, is_directory) for _, name, is_directory in keyed])

    def _climb(self, here: int, level: "_Level") -> int:
        try:
            above = os.open("..", _DIRECTORY_FLAGS, dir_fd=here)
        except OSError as error:
            raise _unreadable(level.prefix or b".", error) from error
        if Identity.of(above) != level.identity:
            os.close(above)
            raise ContextInputError(
                f"the directory {shown(level.prefix or b'.')} was moved while it was being read"
            )
        return above

    def _not_opened(self, path: bytes, error: OSError) -> None:
        if error.errno == errno.ENOENT:
            self._skip(path, "gone since it was listed")
        elif error.errno in _SWAPPED:
            self._skip(path, _SWAPPED[error.errno])
        else:
            raise _unreadable(path, error) from error

    def _skip(self, path: bytes, what: str) -> None:
        self.notes.add(f"{shown(path)} was left out: it is {what}")


class _Level(NamedTuple):
    """A directory on the way from the root of a walk to where it is."""

    identity: Identity
    prefix: bytes
    names: list[tuple[str, bool]]
    """Still to be visited, last first, and whether each is a directory."""


class _closing_fd:  # noqa: N801 - reads like contextlib.closing; a generator would cost more than the file
    __slots__ = ("_fd",)

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def _replace_fd(old: int, new: int) -> int:
    os.close(old)
    return new


def _find(typed: bytes) -> Source:
    try:
        resolved = os.path.realpath(typed, strict=True)
        mode = os.lstat(resolved).st_mode
    except FileNotFoundError as error:
        raise ContextInputError(f"{shown(typed)} does not exist") from error
    except (OSError, ValueError) as error:
        raise _unreadable(typed, error) from error
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        what = _KINDS.get(stat.S_IFMT(mode), "something else")
        raise ContextInputError(f"{shown(typed)} is {what}, not a file or directory")
    is_directory = stat.S_ISDIR(mode)
    form = None if is_directory else archives.form_of(typed) or archives.form_of(resolved)
    return Source(typed, resolved, is_directory, form)


def _open_source_file(source: Source) -> int:
    fd = _open_source(source, _FILE_FLAGS)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ContextInputError(f"{shown(source.typed)} is no longer a regular file")
    return fd


def _open_source(source: Source, flags: int) -> int:
    """Step by step: a directory on the way that became a link since the path was resolved is not followed."""
    *way, name = source.resolved.split(b"/")[1:]
    try:
        here = os.open("/", _STEP_FLAGS)
        try:
            for step in way:
                here = _replace_fd(here, os.open(step, _STEP_FLAGS, dir_fd=here))
            return os.open(name or b".", flags, dir_fd=here)
        finally:
            os.close(here)
    except OSError as error:
        raise _unreadable(source.typed, error) from error


def _named(sources: Sequence[Source]) -> list[tuple[Source, bytes]]:
    if len(sources) == 1:
        return [(sources[0], b"")]
    typed = [os.path.abspath(source.typed) for source in sources]
    above = os.path.commonpath([os.path.dirname(path) for path in typed])
    return [(source, os.path.relpath(path, above)) for source, path in zip(sources, typed, strict=True)]


def _unreadable(path: bytes, error: OSError | ValueError) -> ContextInputError:
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return ContextInputError(f"{shown(path)} cannot be read: {reason}")
