"""Many files as a read-only mapping from path to text, each read when it is touched."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol, overload

from sandbox_image.worker.interpreter.stretch import Stretch
from sandbox_image.worker.interpreter.text import TextView

_SHOWN_FILES = 10


class Sized(Protocol):
    """What a FileMap has to know of a file before it is read."""

    @property
    def length_bytes(self) -> int:
        """Of its text in UTF-8."""


class Shelf:
    """Reads files, and keeps those read last as long as they fit into the limit of one str.

    Keeping them also tells a text of the context from a text that was made: see `path_of`.
    """

    def __init__(self, open_stretch: Callable[[str], Stretch], max_str_bytes: int) -> None:
        self._open_stretch = open_stretch
        self._max_str_bytes = max_str_bytes
        # Least recently used first.
        self._kept: dict[str, tuple[str, int]] = {}
        self._kept_bytes = 0

    def read(self, path: str) -> str | TextView:
        """The text of a file, as a str where it fits."""
        if path in self._kept:
            self._kept[path] = self._kept.pop(path)
            return self._kept[path][0]
        stretch = self._open_stretch(path)
        str_bytes = stretch.characters * stretch.width
        if str_bytes > self._max_str_bytes:
            return TextView(stretch, self._max_str_bytes)
        text = stretch.text(0, stretch.characters)
        self._keep(path, text, str_bytes)
        return text

    def path_of(self, text: str) -> tuple[str, int] | None:
        """Path and length in bytes of the file that this very object is the text of, if it is known."""
        for path, (kept, _) in self._kept.items():
            if kept is text:
                return path, self._open_stretch(path).length_bytes
        return None

    def _keep(self, path: str, text: str, str_bytes: int) -> None:
        self._kept[path] = (text, str_bytes)
        self._kept_bytes += str_bytes
        while self._kept_bytes > self._max_str_bytes:
            oldest = next(iter(self._kept))
            self._kept_bytes -= self._kept.pop(oldest)[1]


class FileMap(Mapping[str, "str | TextView"]):
    """The files of a context: a read-only dict from path to text.

    f["a/b.txt"]                 the text, read now; a str, or a TextView where a str would be too large
    len(f), list(f), p in f      the number of files, their paths
    f[:10], f.subset(paths)      some of the files, as a FileMap; reads nothing
    f.items(), f.values()        read one file after the other

    Hand f, or a part of it, to rlm_query to give a child run those files without copying them.
    """

    def __init__(self, entries: Mapping[str, Sized], shelf: Shelf) -> None:
        self._entries = entries
        self._shelf = shelf

    @overload
    def __getitem__(self, key: str) -> "str | TextView": ...
    @overload
    def __getitem__(self, key: slice) -> "FileMap": ...
    def __getitem__(self, key: "str | slice") -> "str | TextView | FileMap":
        if isinstance(key, slice):
            return self.subset(list(self._entries)[key])
        if key not in self._entries:
            hint = (
                "" if isinstance(key, str) else ": files are found by path, as in context[list(context)[0]]"
            )
            raise KeyError(f"no file {key!r}{hint}")
        return self._shelf.read(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, path: object) -> bool:
        # Mapping's own would read the file.
        return path in self._entries

    def __repr__(self) -> str:
        total_bytes = sum(entry.length_bytes for entry in self._entries.values())
        shown = itertools.islice(self._entries.items(), _SHOWN_FILES)
        lines = [f"  {path!r}: {entry.length_bytes:,} bytes" for path, entry in shown]
        if len(self) > _SHOWN_FILES:
            lines.append(f"  ... {len(self) - _SHOWN_FILES:,} more")
        return "\n".join([f"<FileMap of {len(self):,} files, {total_bytes:,} bytes", *lines]) + ">"

    def subset(self, paths: Iterable[str]) -> "FileMap":
        """These files only, in this order.

        Raises:
            KeyError: There is no such file.
        """
        return FileMap({path: self._entries[path] for path in paths}, self._shelf)

    def path_of(self, text: str) -> tuple[str, int] | None:
        """The path and length in bytes of the file whose text is this very object, if it was read lately."""
        return self._shelf.path_of(text)
