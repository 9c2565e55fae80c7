"""The run's context as the host staged it: one UTF-8 file, and a manifest that says what lies where."""

import json
import mmap
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from sandbox_image.worker.interpreter.files import FileMap, Shelf
from sandbox_image.worker.interpreter.stretch import Place, Stretch
from sandbox_image.worker.interpreter.text import TextView

_MANIFEST_VERSION = 1
_VISIBLE_WITHIN_S = 1.0


class StagingError(Exception):
    """What was staged is not what this image understands."""


@dataclass(frozen=True, slots=True)
class OwnContext:
    """What this run's cells see as `context`, for recognising it and its parts."""

    value: "str | TextView | FileMap"
    length_bytes: int


class _Entry(NamedTuple):
    path: str
    offset: int
    length_bytes: int
    characters: int
    width: int


def open_context(directory: Path, max_str_bytes: int) -> OwnContext:
    """Open what lies in `directory` as a str, a TextView or a FileMap.

    Raises:
        OSError: It is not there, also not after a while.
        StagingError: It is of another version or kind.
    """
    manifest = json.loads(_read_once_visible(directory / "manifest.json"))
    if manifest["version"] != _MANIFEST_VERSION:
        raise StagingError(f"manifest version {manifest['version']}; this image knows {_MANIFEST_VERSION}")
    mapped = _map(directory / "blob", manifest["blob_bytes"])
    if manifest["kind"] == "files":
        return OwnContext(_files(mapped, manifest["entries"], max_str_bytes), manifest["blob_bytes"])
    if manifest["kind"] != "text":
        raise StagingError(f"a context of kind {manifest['kind']!r}")
    entry = _Entry(*manifest["entries"][0])
    stretch = _stretch(mapped, entry)
    if entry.characters * entry.width <= max_str_bytes:
        return OwnContext(stretch.text(0, entry.characters), entry.length_bytes)
    return OwnContext(TextView(stretch, max_str_bytes), entry.length_bytes)


def _files(mapped: mmap.mmap, entries: "list[list[str | int]]", max_str_bytes: int) -> FileMap:
    by_path: Mapping[str, _Entry] = {entry[0]: _Entry(*entry) for entry in entries}  # type: ignore[arg-type,misc]
    shelf = Shelf(lambda path: _stretch(mapped, by_path[path]), max_str_bytes)
    return FileMap(by_path, shelf)


def _stretch(mapped: mmap.mmap, entry: _Entry) -> Stretch:
    place = Place(entry.path, 0, entry.offset)
    return Stretch(mapped, place, entry.length_bytes, entry.characters, entry.width)


def _read_once_visible(file: Path) -> bytes:
    # What the host links into a mounted directory is seen here a few milliseconds later under some runtimes.
    deadline_s = time.monotonic() + _VISIBLE_WITHIN_S
    while True:
        try:
            return file.read_bytes()
        except FileNotFoundError:
            if time.monotonic() > deadline_s:
                raise
        time.sleep(0.001)


def _map(file: Path, size_bytes: int) -> mmap.mmap:
    with file.open("rb") as blob:
        # An empty file cannot be mapped; one anonymous byte that nothing points to stands in for it.
        if size_bytes == 0:
            return mmap.mmap(-1, 1)
        return mmap.mmap(blob.fileno(), size_bytes, access=mmap.ACCESS_READ)
