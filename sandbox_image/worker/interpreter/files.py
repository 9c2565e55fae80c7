"""Many files as a read-only mapping from path to text, each read when it is touched."""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import overload

from sandbox_image.worker.interpreter.catalogue import Catalogue
from sandbox_image.worker.interpreter.stretch import Stretch
from sandbox_image.worker.interpreter.text import TextView

_SHOWN_FILES = 10


class Shelf:
    """Reads files, and keeps those read last as long as they fit into the limit of one str.

    Keeping them also tells a text of the context from a text that was made: see `number_of`.
    """

    def __init__(self, open_stretch: Callable[[int], Stretch], max_str_bytes: int) -> None:
        self._open_stretch = open_stretch
        self._max_str_bytes = max_str_bytes
        # Least recently used first.
        self._kept: dict[int, tuple[str, int]] = {}
        self._kept_bytes = 0

    def read(self, number: int) -> str | TextView:
        """The text of a file, as a str where it fits."""
        if number in self._kept:
            self._kept[number] = self._kept.pop(number)
            return self._kept[number][0]
        stretch = self._open_stretch(number)
        str_bytes = stretch.characters * stretch.width
        if str_bytes > self._max_str_bytes:
            return TextView(stretch, self._max_str_bytes)
        text = stretch.text(0, stretch.characters)
        self._keep(number, text, str_bytes)
        return text

    def number_of(self, text: str) -> int | None:
        """The number of the file that this very object is the text of, if it was read lately."""
        for number, (kept, _) in self._kept.items():
            if kept is text:
                return number
        return None

    def _keep(self, number: int, text: str, str_bytes: int) -> None:
        self._kept[number] = (text, str_bytes)
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

    def __init__(self, catalogue: Catalogue, shelf: Shelf, numbers: Sequence[int] | None = None) -> None:
        self._catalogue = catalogue
        self._shelf = shelf
        self._numbers = range(len(catalogue)) if numbers is None else numbers

    @cached_property
    def _members(self) -> "range | frozenset[int]":
        return self._numbers if isinstance(self._numbers, range) else frozenset(self._numbers)

    @overload
    def __getitem__(self, key: str) -> "str | TextView": ...
    @overload
    def __getitem__(self, key: slice) -> "FileMap": ...
    def __getitem__(self, key: "str | slice") -> "str | TextView | FileMap":
        if isinstance(key, slice):
            return FileMap(self._catalogue, self._shelf, self._numbers[key])
        return self._shelf.read(self._number(key))

    def __iter__(self) -> Iterator[str]:
        return map(self._catalogue.path, self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __contains__(self, path: object) -> bool:
        # Mapping's own would read the file.
        return self._find(path) is not None

    def __repr__(self) -> str:
        total_bytes = sum(map(self._catalogue.length_bytes, self._numbers))
        shown = itertools.islice(map(self._catalogue.entry, self._numbers), _SHOWN_FILES)
        lines = [f"  {entry.path!r}: {entry.length_bytes:,} bytes" for entry in shown]
        if len(self) > _SHOWN_FILES:
            lines.append(f"  ... {len(self) - _SHOWN_FILES:,} more")
        return "\n".join([f"<FileMap of {len(self):,} files, {total_bytes:,} bytes", *lines]) + ">"

    def subset(self, paths: Iterable[str]) -> "FileMap":
        """These files only, in this order.

        Raises:
            KeyError: There is no such file.
        """
        numbers = dict.fromkeys(map(self._number, paths))
        return FileMap(self._catalogue, self._shelf, tuple(numbers))

    def runs(self) -> list[tuple[int, int]]:
        """The numbers of these files in the run's context: (first, how many) that follow one another."""
        if isinstance(self._numbers, range) and self._numbers.step == 1:
            return [(self._numbers.start, len(self._numbers))] if self._numbers else []
        runs: list[tuple[int, int]] = []
        first = count = 0
        for number in self._numbers:
            if count and number == first + count:
                count += 1
                continue
            if count:
                runs.append((first, count))
            first, count = number, 1
        return [*runs, (first, count)] if count else runs

    def path_of(self, text: str) -> tuple[str, int] | None:
        """The path and length in bytes of the file whose text is this very object, if it was read lately."""
        number = self._shelf.number_of(text)
        if number is None:
            return None
        return self._catalogue.path(number), self._catalogue.length_bytes(number)

    def _find(self, path: object) -> int | None:
        number = self._catalogue.find(path) if isinstance(path, str) else None
        return number if number in self._members else None

    def _number(self, path: str) -> int:
        number = self._find(path)
        if number is None:
            hint = (
                "" if isinstance(path, str) else ": files are found by path, as in context[list(context)[0]]"
            )
            raise KeyError(f"no file {path!r}{hint}")
        return number
