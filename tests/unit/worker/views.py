"""Texts as a cell sees large ones, over files as the host makes them but with landmarks close together."""

import mmap
import tempfile
from array import array

from sandbox_image.worker.interpreter.blob import Blob
from sandbox_image.worker.interpreter.stretch import Place, Stretch
from sandbox_image.worker.interpreter.text import TextView

BEFORE = "é\n."
"""In front of each text, as in the blob of many files."""


def view_of(text: str, max_str_bytes: int = 10_000) -> TextView:
    """A view of `text` alone, in the middle of a blob."""
    encoded, before = text.encode(), len(BEFORE.encode())
    whole = BEFORE + text + "é\n"
    mapped = mmap.mmap(-1, len(whole.encode()))
    mapped.write(whole.encode())
    width = 1 if text.isascii() else 4
    stretch = Stretch(_blob(mapped, whole), Place("", 0, before), len(encoded), len(text), width)
    return TextView(stretch, max_str_bytes)


def _blob(mapped: mmap.mmap, whole: str) -> Blob:
    with tempfile.NamedTemporaryFile() as file:
        file.write(_landmarks(whole))
        file.flush()
        blob = Blob(mapped, file.name)
        _ = blob.landmarks  # opened when first asked for; the file goes with this block
    return blob


def _landmarks(text: str, every_chars: int = 3) -> bytes:
    noted = array("Q", (0, 0, 0, 1))
    places = [*range(every_chars, len(text), every_chars), len(text)]
    for before, at in zip([0, *places], places, strict=False):
        widest = max(map(ord, text[before:at]))
        width = 1 if widest < 256 else 2 if widest < 65_536 else 4
        noted.extend((len(text[:at].encode()), at, text[:at].count("\n"), width))
    return noted.tobytes()
