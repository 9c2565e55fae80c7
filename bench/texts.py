"""Large texts for benchmarks: a megabyte of words, over and over, each time with its number in front."""

import random
from collections.abc import Iterator, Mapping
from pathlib import Path

_BLOCK_BYTES = 1_000_000
_WORDS = 4_000

_LATIN = "abcdefghijklmnopqrstuvwxyz"
_CYRILLIC = "абвгдежзийклмнопрстуфхцчшщъыьэюя"
_HAN = "".join(map(chr, range(0x4E00, 0x5200)))

ALPHABETS: Mapping[str, str] = {"ascii": _LATIN, "sparse": _LATIN, "cyrillic": _CYRILLIC, "han": _HAN}
"""`sparse`: ASCII but for one word in two hundred, and one emoji in each megabyte."""


def write_text(path: Path, kind: str, length_bytes: int) -> None:
    """A file of about that length, always the same for the same arguments."""
    block = _block(kind)
    with path.open("wb") as file:
        for number in range(max(1, length_bytes // _BLOCK_BYTES)):
            file.write(b"Chapter %06d\n" % number + block[: min(len(block), length_bytes)])


def _block(kind: str) -> bytes:
    chance = random.Random(5)  # noqa: S311 - words, not secrets
    lines = "\n".join(_lines(kind, chance))
    if kind == "sparse":
        lines = lines[:1000] + "\U0001f600" + lines[1000:]
    return lines.encode()[: _BLOCK_BYTES - 100].decode("utf-8", "ignore").encode() + b"\n"


def _lines(kind: str, chance: random.Random) -> Iterator[str]:
    alphabet = ALPHABETS[kind]
    words = ["".join(chance.choices(alphabet, k=chance.randint(2, 9))) for _ in range(_WORDS)]
    if kind == "sparse":
        words[:20] = ["naïve" + word for word in words[:20]]
    size = 0
    while size < _BLOCK_BYTES:
        line = " ".join(chance.choices(words, k=12)) + f", {chance.randint(0, 10**6)}"
        size += len(line.encode()) + 1
        yield line
