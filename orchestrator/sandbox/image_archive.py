"""An image in one file: what is believed of such a file, and what is written.

The format is the archive that `docker save` writes: a tar with `manifest.json`, one configuration and the
layers. It vouches for itself: an image's id is the SHA-256 of its configuration, and the configuration lists
the SHA-256 of every layer. Who knows the id therefore knows the image, whoever carried the file.

Rules:

1. A file comes from anybody. Nothing in it becomes a path, nothing is unpacked, and every number in it is
   checked against what is there before it is used.
2. Headers are walked here, one block of 512 bytes at a time, and not by `tarfile.open`: that one follows a
   header's word into memory. What an image archive has no use for (links, devices, sparse files, names
   outside the header) is refused.
3. Hashes are computed from the bytes, never taken from a name.
4. What goes on, to an engine or into a file, is written anew from the checked parts. One image has one file.

No engine and no clock: it reads and writes open files.
"""

import gzip
import hashlib
import json
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NoReturn

from orchestrator.errors import InvalidRequestError

MAX_IMAGE_BYTES = 2 * 1024**3
"""Of an image, unpacked. Ours has 90 MB."""
_MAX_ENTRIES = 4_096
_MAX_LAYERS = 64
_MAX_JSON_BYTES = 1024 * 1024
_MAX_EXTENSION_BYTES = 64 * 1024
_MAX_LAYER_ENTRIES = 200_000

_BLOCK_BYTES = tarfile.BLOCKSIZE
_CHUNK_BYTES = 1024 * 1024
_GZIP_MAGIC = b"\x1f\x8b"
_FILE_TYPES = {tarfile.REGTYPE, tarfile.AREGTYPE}
_EXTENSION_TYPES = {tarfile.XHDTYPE, tarfile.XGLTYPE}
# Records that would make the next member another one than its header says.
_RENAMING = (b" path=", b" linkpath=", b" size=", b" GNU.")

_OTHER_KIND = "it is nothing that `rlm image save` writes"

Advance = Callable[[int], None]


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer, and where it lies in the spool."""

    diff_id: str
    """`sha256:` and the hash of its tar, before any compression."""
    size_bytes: int
    """Of its tar."""
    offset_bytes: int
    stored_bytes: int
    gzipped: bool


@dataclass(frozen=True, slots=True)
class ArchivedImage:
    """An image whose parts have been checked against each other."""

    image_id: str
    """`sha256:` and the hash of the configuration."""
    configuration: bytes
    layers: tuple[Layer, ...]
    architecture: str
    created: str
    settings: dict[str, Any]
    """Of a container: labels, environment, user, entry point."""

    def label(self, name: str) -> str:
        """A label's value; empty without one."""
        labels = self.settings.get("Labels")
        value = labels.get(name, "") if isinstance(labels, dict) else ""
        return value if isinstance(value, str) else ""

    @property
    def diff_ids(self) -> list[str]:
        """Of its layers, from below."""
        return [layer.diff_id for layer in self.layers]

    @property
    def size_bytes(self) -> int:
        """Of its layers, unpacked."""
        return sum(layer.size_bytes for layer in self.layers)


def unpack(pieces: Iterable[bytes], spool: IO[bytes], advance: Advance) -> None:
    """Copy an archive, compressed with gzip or not, into a seekable file of ours.

    Args:
        pieces: Of the archive, of any size.
        spool: Empty.
        advance: Told how many bytes have been taken.

    Raises:
        InvalidRequestError: It is cut off, damaged, empty, or larger than `MAX_IMAGE_BYTES`.
    """
    read_bytes, size_bytes = 0, 0
    inflate: Any = None
    for chunk in pieces:
        if read_bytes == 0 and chunk.startswith(_GZIP_MAGIC):
            inflate = zlib.decompressobj(wbits=31)
        read_bytes += len(chunk)
        for piece in _inflated(inflate, chunk) if inflate else (chunk,):
            size_bytes += len(piece)
            if size_bytes > MAX_IMAGE_BYTES:
                _refuse(f"it is larger than {MAX_IMAGE_BYTES // 1024**3} GiB")
            spool.write(piece)
        advance(read_bytes)
    if read_bytes == 0:
        _refuse("it is empty")
    if inflate and not inflate.eof:
        _refuse("it is cut off")
    spool.flush()


def read(spool: IO[bytes]) -> ArchivedImage:
    """The one image in an archive, checked.

    Raises:
        InvalidRequestError: It is something else, holds several images, is cut off, or its parts do not
            belong together.
    """
    members = _members(spool)
    manifest = _json(spool, members, "manifest.json")
    match manifest:
        case [{"Config": str(configuration_name), "Layers": [*names]}] if len(names) <= _MAX_LAYERS:
            pass
        case _:
            _refuse("its manifest does not name one image")
    configuration = _content(spool, members, configuration_name)
    match _parsed(configuration, configuration_name):
        case {
            "rootfs": {"diff_ids": [*diff_ids]},
            "config": dict(settings),
            "architecture": str(architecture),
            "created": str(created),
        }:
            pass
        case _:
            _refuse("its configuration is not that of an image")
    if len(names) != len(diff_ids):
        _refuse("it has another number of layers than its configuration says")
    layers = []
    for name, diff_id in zip(names, diff_ids, strict=True):
        if not isinstance(name, str) or name not in members:
            _refuse("a layer is missing")
        layers.append(_layer(spool, members[name], diff_id))
    return ArchivedImage(
        image_id=_digest(configuration),
        configuration=configuration,
        layers=tuple(layers),
        architecture=architecture,
        created=created,
        settings=settings,
    )


def archive(image: ArchivedImage, spool: IO[bytes], *, tag: str) -> Iterator[bytes]:
    """The image as an archive of our own making, in pieces: the same bytes for the same image and tag."""
    hexadecimal = image.image_id.removeprefix("sha256:")
    manifest = [
        {
            "Config": f"{hexadecimal}.json",
            "RepoTags": [tag],
            "Layers": [_layer_name(layer) for layer in image.layers],
        }
    ]
    for name, content in (
        ("manifest.json", json.dumps(manifest, separators=(",", ":")).encode()),
        (f"{hexadecimal}.json", image.configuration),
    ):
        yield _header(name, len(content))
        yield content
        yield _padding(len(content))
    for layer in {layer.diff_id: layer for layer in image.layers}.values():
        yield _header(_layer_name(layer), layer.size_bytes)
        yield from layer_bytes(spool, layer)
        yield _padding(layer.size_bytes)
    yield bytes(2 * _BLOCK_BYTES)


def compressed(pieces: Iterable[bytes], sink: IO[bytes], advance: Advance) -> None:
    """Write the pieces with gzip, without a time or a name in the header.

    Args:
        pieces: The parts of an archive.
        sink: A file that is written from where it is.
        advance: Told how many bytes have been compressed.
    """
    done_bytes = 0
    with gzip.GzipFile(filename="", fileobj=sink, mode="wb", compresslevel=6, mtime=0) as out:
        for piece in pieces:
            out.write(piece)
            done_bytes += len(piece)
            advance(done_bytes)


def file_in(spool: IO[bytes], image: ArchivedImage, path: str) -> bytes | None:
    """A small file of the image; None if no layer has it.

    For people to look at: a name that stands outside a header, as those over 100 bytes may, is not found. The
    layers must not be compressed (`archive` writes them plain).

    Raises:
        InvalidRequestError: A layer is damaged, or the file is larger than such a file is.
    """
    for layer in reversed(image.layers):
        for entry in _entries(spool, layer.offset_bytes, layer.stored_bytes, _MAX_LAYER_ENTRIES):
            if entry.name.removeprefix("./") == path and entry.kind in _FILE_TYPES:
                if entry.size_bytes > _MAX_JSON_BYTES:
                    _refuse(f"its {path} has {entry.size_bytes:,} bytes")
                spool.seek(entry.offset_bytes)
                return spool.read(entry.size_bytes)
    return None


def layer_bytes(spool: IO[bytes], layer: Layer) -> Iterator[bytes]:
    """The layer's tar, unpacked, in pieces."""
    inflate = zlib.decompressobj(wbits=31) if layer.gzipped else None
    spool.seek(layer.offset_bytes)
    left_bytes = layer.stored_bytes
    while left_bytes:
        chunk = spool.read(min(_CHUNK_BYTES, left_bytes))
        left_bytes -= len(chunk)
        # One reader at a time: whoever takes these pieces may move the file's position between two.
        position = spool.tell()
        yield from _inflated(inflate, chunk) if inflate else (chunk,)
        spool.seek(position)
    if inflate and not inflate.eof:
        _refuse("a layer is cut off")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One member of a tar: what its header says, and where its content lies."""

    name: str
    kind: bytes
    offset_bytes: int
    size_bytes: int


def _entries(file: IO[bytes], start_bytes: int, length_bytes: int, most: int) -> Iterator[_Entry]:
    end_bytes, offset_bytes = start_bytes + length_bytes, start_bytes
    for _ in range(most):
        file.seek(offset_bytes)
        block = file.read(_BLOCK_BYTES)
        if len(block) < _BLOCK_BYTES or offset_bytes + _BLOCK_BYTES > end_bytes:
            _refuse("it is cut off" if offset_bytes > start_bytes else _OTHER_KIND)
        if not any(block):
            return
        try:
            header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError:
            _refuse("it is damaged" if offset_bytes > start_bytes else _OTHER_KIND)
        content_bytes = offset_bytes + _BLOCK_BYTES
        if header.size < 0 or content_bytes + header.size > end_bytes:
            _refuse("it is cut off")
        yield _Entry(header.name, header.type, content_bytes, header.size)
        offset_bytes = content_bytes + header.size + len(_padding(header.size))
    _refuse(f"it has more than {most:,} members")


def _members(spool: IO[bytes]) -> dict[str, _Entry]:
    """The archive's files by name."""
    found: dict[str, _Entry] = {}
    length_bytes = spool.seek(0, 2)
    for entry in _entries(spool, 0, length_bytes, _MAX_ENTRIES):
        if entry.kind in _EXTENSION_TYPES and entry.size_bytes <= _MAX_EXTENSION_BYTES:
            spool.seek(entry.offset_bytes)
            records = spool.read(entry.size_bytes)
            if not any(name in records for name in _RENAMING):
                continue
        if entry.kind == tarfile.DIRTYPE:
            continue
        if entry.kind not in _FILE_TYPES:
            _refuse("it holds something that is neither a file nor a folder")
        if entry.name in found:
            _refuse("it holds two files of one name")
        found[entry.name] = entry
    return found


def _content(spool: IO[bytes], members: dict[str, _Entry], name: str) -> bytes:
    entry = members.get(name)
    if entry is None:
        _refuse(_OTHER_KIND if name == "manifest.json" else "its configuration is missing")
    if entry.size_bytes > _MAX_JSON_BYTES:
        _refuse("its description is too large")
    spool.seek(entry.offset_bytes)
    return spool.read(entry.size_bytes)


def _json(spool: IO[bytes], members: dict[str, _Entry], name: str) -> object:
    return _parsed(_content(spool, members, name), name)


def _parsed(content: bytes, name: str) -> object:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        _refuse("its manifest is not JSON" if name == "manifest.json" else "its configuration is not JSON")


def _layer(spool: IO[bytes], entry: _Entry, diff_id: object) -> Layer:
    spool.seek(entry.offset_bytes)
    # An engine that keeps layers as a registry sent them saves them so; their id is of what is inside.
    gzipped = spool.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
    stored = Layer("", 0, entry.offset_bytes, entry.size_bytes, gzipped)
    digest, size_bytes = hashlib.sha256(), 0
    for piece in layer_bytes(spool, stored):
        digest.update(piece)
        size_bytes += len(piece)
        if size_bytes > MAX_IMAGE_BYTES:
            _refuse(f"it is larger than {MAX_IMAGE_BYTES // 1024**3} GiB")
    found = f"sha256:{digest.hexdigest()}"
    if found != diff_id:
        _refuse("a layer is not the one that its configuration names")
    return Layer(found, size_bytes, entry.offset_bytes, entry.size_bytes, gzipped)


def _inflated(inflate: Any, chunk: bytes) -> Iterator[bytes]:
    """What the compressed bytes hold, in pieces of bounded size."""
    while True:
        if inflate.eof and chunk:
            _refuse("something follows its end")
        try:
            piece = inflate.decompress(chunk, _CHUNK_BYTES)
        except zlib.error:
            _refuse("it is damaged")
        yield piece
        chunk = inflate.unconsumed_tail or inflate.unused_data
        # A full piece may leave a rest that needs no more input.
        if not chunk and len(piece) < _CHUNK_BYTES:
            return


def _header(name: str, size_bytes: int) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = size_bytes
    return header.tobuf(tarfile.USTAR_FORMAT)


def _padding(size_bytes: int) -> bytes:
    return bytes(-size_bytes % _BLOCK_BYTES)


def _layer_name(layer: Layer) -> str:
    return f"{layer.diff_id.removeprefix('sha256:')}/layer.tar"


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _refuse(why: str) -> NoReturn:
    raise InvalidRequestError(f"the image archive is refused: {why}")
