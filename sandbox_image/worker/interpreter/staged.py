"""The run's context as the host staged it: one UTF-8 file, and a manifest that says what lies where."""

import os
from typing import NamedTuple

from sandbox_image.worker.interpreter.blob import Blob, map_file, map_once_visible
from sandbox_image.worker.interpreter.catalogue import Catalogue
from sandbox_image.worker.interpreter.files import FileMap, Shelf
from sandbox_image.worker.interpreter.stretch import Place, Stretch
from sandbox_image.worker.interpreter.text import TextView


class OwnContext(NamedTuple):
    """What this run's cells see as `context`, for recognising it and its parts."""

    value: "str | TextView | FileMap"
    length_bytes: int


def open_context(directory: str | os.PathLike[str], max_str_bytes: int) -> OwnContext:
    """Open what lies in `directory` as a str, a TextView or a FileMap.

    Raises:
        OSError: It is not there, also not after a while.
        StagingError: It is of another version or kind.
    """
    catalogue = Catalogue(memoryview(map_once_visible(os.path.join(directory, "manifest"))))
    # The host puts the manifest there last.
    blob = Blob(
        map_file(os.path.join(directory, "blob"), catalogue.blob_bytes), os.path.join(directory, "landmarks")
    )

    def open_stretch(number: int) -> Stretch:
        entry = catalogue.entry(number)
        place = Place(entry.path, 0, entry.offset)
        return Stretch(blob, place, entry.length_bytes, entry.characters, entry.width)

    if catalogue.kind == "files":
        return OwnContext(FileMap(catalogue, Shelf(open_stretch, max_str_bytes)), catalogue.blob_bytes)
    text = open_stretch(0)
    if text.characters * text.width <= max_str_bytes:
        return OwnContext(text.text(0, text.characters), text.length_bytes)
    return OwnContext(TextView(text, max_str_bytes), text.length_bytes)
