"""Archives: whatever the bytes, one last word; and what passes the rules makes a manifest a guest can read.

Input: a byte that says which form, and the archive.
"""

import bz2
import gzip
import io
import lzma
import tarfile
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping

from orchestrator.contexts import archive_reader as frames
from orchestrator.contexts.archives import MAX_NAME_BYTES, _Guard
from orchestrator.contexts.guest_form import encode_manifest
from orchestrator.contexts.manifest import Entry, Manifest, Measured, unique_names
from orchestrator.errors import ContextInputError
from sandbox_image.worker.interpreter.catalogue import Catalogue

_FORMS = ("tar", "zip", "tar.gz", "tar.bz2", "tar.xz")
_COMPRESS: Mapping[str, Callable[[bytes], bytes]] = {
    "tar.gz": lambda raw: gzip.compress(raw, mtime=0),
    "tar.bz2": bz2.compress,
    "tar.xz": lzma.compress,
}
_ENOUGH_BYTES = 4 * 1024 * 1024
"""Of what comes out of one input."""
_MEASURED = Measured(0, 0, 0, 1, 0, "0" * 64)


def one_input(data: bytes) -> None:
    """The reader raises nothing and ends with one last word; the guard lets no name out of the context."""
    if not data:
        return
    said: list[tuple[bytes, bytes]] = []
    came_bytes = 0

    def emit(kind: bytes, payload: bytes) -> None:
        nonlocal came_bytes
        came_bytes += len(payload)
        if came_bytes > _ENOUGH_BYTES and kind not in {frames.END, frames.REFUSED}:
            raise frames.RefusedError(b"m")
        said.append((kind, payload if kind != frames.DATA else bytes(len(payload))))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frames.read(io.BytesIO(data[1:]), _FORMS[data[0] % len(_FORMS)], emit)
    last = {frames.END, frames.REFUSED}
    assert [kind in last for kind, _ in said] == [False] * (len(said) - 1) + [True]
    assert all(len(payload) <= frames.MAX_PAYLOAD_BYTES for _, payload in said)
    try:
        names = list(_names(said, len(data)))
    except ContextInputError:
        return
    texts = unique_names(list(dict.fromkeys(names)))
    manifest = Manifest("files", tuple(Entry(name, 0, _MEASURED) for name in texts), 0, "0" * 64)
    catalogue = Catalogue(memoryview(encode_manifest(manifest)))
    assert [catalogue.path(number) for number in range(len(catalogue))] == texts


def _names(said: list[tuple[bytes, bytes]], archive_bytes: int) -> Iterator[bytes]:
    guard = _Guard("it", archive_bytes)
    for kind, payload in said:
        match kind:
            case frames.FILE:
                name = guard.file(payload)
                assert 0 < len(name) <= MAX_NAME_BYTES
                assert b"\0" not in name
                assert not {b"", b".", b".."} & set(name.split(b"/"))
                yield name
            case frames.DATA:
                guard.grows(len(payload))
            case frames.LEFT_OUT:
                guard.left_out(payload)
            case frames.END:
                guard.end()
            case _:
                raise guard.refusal(payload)


def seeds() -> Iterator[bytes]:
    """A small archive of each form, with what may be in one."""
    for number, form in enumerate(_FORMS):
        buffer = io.BytesIO()
        if form == "zip":
            with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
                for name, content in (("a.txt", b"x" * 60), ("d/größe", b"y"), ("d/", b"")):
                    archive.writestr(zipfile.ZipInfo(name), content)
        else:
            with tarfile.open(fileobj=buffer, mode="w") as tar:
                for kind, name in (
                    (tarfile.REGTYPE, "a.txt"),
                    (tarfile.REGTYPE, "d/" + "größe" * 30),
                    (tarfile.SYMTYPE, "link"),
                    (tarfile.DIRTYPE, "d"),
                ):
                    info = tarfile.TarInfo(name)
                    info.type, info.linkname = kind, "a.txt" * (kind == tarfile.SYMTYPE)
                    info.size = 5 * (kind == tarfile.REGTYPE)
                    tar.addfile(info, io.BytesIO(b"hello"))
        yield bytes([number]) + _COMPRESS.get(form, bytes)(buffer.getvalue())
    sparse = tarfile.TarInfo("s")
    sparse.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "9", "GNU.sparse.name": "s"}
    yield bytes([0]) + sparse.tobuf(tarfile.PAX_FORMAT) + bytes(1_024)
