"""A manifest as the guest reads it: a file to be mapped, not parsed, so that 100,000 files open like one.

All numbers are in the machine's byte order, which both ends share. A header:

    8 bytes   "RLMCTX", a zero byte, the version: 2
    u64       kind: 0 text, 1 files
    u64       entries
    u64       bytes of the blob
    u64       bytes of the entries together

then one column after the other, each with one item for each entry, in the order of the manifest:

    u64       offset in the blob
    u64       bytes
    u64       characters
    u64       where its path ends in the paths; it starts where the one before ends
    u32       order: entry numbers sorted by path. UTF-8 and code points sort alike.
    u8        width: bytes that CPython needs for each character

and the paths, in UTF-8. Nothing says what a text's hash is: the guest has no use for it.
"""

import struct
from array import array
from collections.abc import Sequence
from heapq import merge
from itertools import accumulate, pairwise

from orchestrator.contexts.manifest import Manifest

_MAGIC = b"RLMCTX\0\x02"
_KINDS = {"text": 0, "files": 1}
_SORTED_AT_ONCE = 10_000


def encode_manifest(manifest: Manifest) -> bytes:
    """The file."""
    entries = manifest.entries
    paths = [entry.path.encode() for entry in entries]
    header = struct.pack(
        "=8s4Q", _MAGIC, _KINDS[manifest.kind], len(entries), manifest.blob_bytes, manifest.text_bytes
    )
    columns = (
        array("Q", [entry.offset for entry in entries]),
        array("Q", [entry.length_bytes for entry in entries]),
        array("Q", [entry.chars for entry in entries]),
        array("Q", accumulate(map(len, paths))),
        array("I", _order(paths)),
        bytes([entry.width for entry in entries]),
    )
    return b"".join((header, *columns, *paths))


def _order(paths: Sequence[bytes]) -> Sequence[int]:
    """Positions, sorted by path."""
    if all(before < after for before, after in pairwise(paths)):
        return range(len(paths))
    # In parts: sorting a million at once lets no other thread run for a second.
    parts = [range(at, min(at + _SORTED_AT_ONCE, len(paths))) for at in range(0, len(paths), _SORTED_AT_ONCE)]
    return list(merge(*(sorted(part, key=paths.__getitem__) for part in parts), key=paths.__getitem__))
