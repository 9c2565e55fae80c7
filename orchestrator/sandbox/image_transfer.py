"""The sandbox image between an engine and a file: what is checked on the way, in both directions.

An engine is given nothing but an archive of our own making (`image_archive`), so a file is judged before the
engine has seen a byte of it. That shows that a file is whole and of the present sources. It does not show who
made it: whoever can write a whole image can write any. Compare the id with the one that `save` told.
"""

import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any

import docker

from orchestrator.errors import EngineError, InvalidRequestError
from orchestrator.sandbox import image, image_archive
from orchestrator.sandbox.image import SOURCE_LABEL, Say, engine_errors
from orchestrator.sandbox.image_archive import Advance, ArchivedImage

CONTENTS_PATH = "usr/share/rlm/contents.json"
"""Written by `sandbox_image/prepare-root`."""

# Not the default place: that may be held in memory, and this is as large as the image.
_SPOOL_DIR = "/var/tmp"  # noqa: S108 - only nameless files
_CHUNK_BYTES = 1024 * 1024
# Before an engine sends the first byte it puts layers together; after the last it unpacks them.
_TRANSFER_SILENCE_S = 600.0
# What of an image's settings decides what runs in it.
_SETTINGS = ("Entrypoint", "Cmd", "Env", "User", "WorkingDir", "Labels")


@dataclass(frozen=True, slots=True)
class Package:
    """One of Debian's packages of which something is in the image."""

    name: str
    version: str
    architecture: str


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel that was unpacked into the image."""

    file: str
    sha256: str


@dataclass(frozen=True, slots=True)
class Contents:
    """What an image says it holds."""

    python: str
    packages: tuple[Package, ...]
    wheels: tuple[Wheel, ...]


def save(client: docker.DockerClient, image_id: str, sink: IO[bytes], *, advance: Advance) -> ArchivedImage:
    """Write the engine's image into a file that `load` and `docker load` can read. Blocks for seconds.

    Args:
        client: Its time-out is changed while this runs.
        image_id: As `image.find` returns it.
        sink: Written from where it is. One image gives the same bytes each time.
        advance: Told now and then how many bytes have been compressed.

    Raises:
        EngineError: The engine does not answer, or hands out another image than that one.
        InvalidRequestError: It is no sandbox image.
    """
    with from_engine(client, image_id) as (spool, archived):
        pieces = image_archive.archive(archived, spool, tag=image.tag(_source(archived)))
        image_archive.compressed(pieces, sink, advance)
        return archived


def load(
    client: docker.DockerClient,
    source: IO[bytes],
    *,
    expected_id: str = "",
    say: Say,
    advance: Advance = lambda _: None,
) -> str:
    """Give the engine the image in a file, and return its id there (`sha256:...`). Blocks for seconds.

    A file that is refused has changed nothing.

    Args:
        client: Its time-out is changed while this runs.
        source: Read once, from where it is.
        expected_id: The id that `save` told; any when empty.
        say: Told what is being done, a line at a time.
        advance: Told now and then how many bytes of the source have been read.

    Raises:
        InvalidRequestError: The file is no whole archive of one image, or of another image than the one that
            this version or `expected_id` asks for.
        EngineError: The engine does not answer, or has another image afterwards.
        ImageMissingError: This installation lacks the image's sources.
    """
    with _checked(_pieces(source), advance) as (spool, archived):
        present = image.source_hash(image.sources())
        _refuse_unless_wanted(archived, present, expected_id)
        _refuse_other_machines(client, archived)
        before = image.built_id(client, present)
        if before is not None and _is(archived, _inspected(client, before)):
            say(f"image: {image.tag(present)} is there already")
            image.tag_as_latest(client, present)
            return before
        if before is not None:
            say(f"image: {image.tag(present)} replaces {before}, which stays under that id")
        say(f"image: loading {image.tag(present)}, {archived.size_bytes / 1e6:.0f} MB")
        _hand_over(client, archived, spool, image.tag(present))
    loaded = image.built_id(client, present)
    if loaded is None or not _is(archived, _inspected(client, loaded)):
        raise EngineError(
            f"the engine reported that it loaded {image.tag(present)}, but has {loaded or 'nothing'} there"
        )
    image.tag_as_latest(client, present)
    return loaded


@contextmanager
def from_engine(client: docker.DockerClient, image_id: str) -> Iterator[tuple[IO[bytes], ArchivedImage]]:
    """An image of the engine, spooled and checked, for the length of the block.

    Raises:
        EngineError: The engine does not answer, or hands out another image than that one.
    """
    with engine_errors("hand out the sandbox image"), image.time_out(client, _TRANSFER_SILENCE_S):
        pieces = client.api.get_image(image_id, chunk_size=_CHUNK_BYTES)
        with _checked(pieces, lambda _: None) as (spool, archived):
            if not _is(archived, _inspected(client, image_id)):
                raise EngineError(f"the engine handed out {archived.image_id} for {image_id}")
            yield spool, archived


@contextmanager
def from_file(source: IO[bytes]) -> Iterator[tuple[IO[bytes], ArchivedImage]]:
    """The image in a file, spooled and checked, for the length of the block.

    Raises:
        InvalidRequestError: The file is no whole archive of one image.
    """
    with _checked(_pieces(source), lambda _: None) as spooled:
        yield spooled


def contents(spool: IO[bytes], archived: ArchivedImage) -> Contents | None:
    """What the image says it holds; None when it says nothing that makes sense. A claim of its builder."""
    text = image_archive.file_in(spool, archived, CONTENTS_PATH)
    try:
        match json.loads(text or b"null"):
            case {"python": str(python), "packages": [*packages], "wheels": [*wheels]}:
                return Contents(
                    python,
                    tuple(Package(*_texts(entry, "name", "version", "architecture")) for entry in packages),
                    tuple(Wheel(*_texts(entry, "file", "sha256")) for entry in wheels),
                )
    except (ValueError, RecursionError):
        pass
    return None


def _texts(entry: object, *names: str) -> list[str]:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in names):
        raise ValueError("not a record of the contents")
    return [entry[name] for name in names]


@contextmanager
def _checked(pieces: Iterable[bytes], advance: Advance) -> Iterator[tuple[IO[bytes], ArchivedImage]]:
    """A spool without a name, so that nobody changes it between check and use, and the image in it."""
    with tempfile.TemporaryFile(dir=_SPOOL_DIR) as spool, tempfile.TemporaryFile(dir=_SPOOL_DIR) as plain:
        image_archive.unpack(pieces, spool, advance)
        archived = image_archive.read(spool)
        if not any(layer.gzipped for layer in archived.layers):
            yield spool, archived
            return
        image_archive.unpack(image_archive.archive(archived, spool, tag=""), plain, lambda _: None)
        yield plain, image_archive.read(plain)


def _pieces(source: IO[bytes]) -> Iterator[bytes]:
    return iter(lambda: source.read(_CHUNK_BYTES), b"")


def _source(archived: ArchivedImage) -> str:
    source = archived.label(SOURCE_LABEL)
    if not source:
        raise InvalidRequestError(f"{archived.image_id} is no sandbox image: it has no label {SOURCE_LABEL}")
    return source


def _refuse_unless_wanted(archived: ArchivedImage, present: str, expected_id: str) -> None:
    if expected_id not in {"", archived.image_id}:
        raise InvalidRequestError(f"the file holds {archived.image_id}, not {expected_id}")
    source = _source(archived)
    if source != present:
        raise InvalidRequestError(
            f"the file holds the sandbox image of another version (sources {source[:12]}; this version's are"
            f" {present[:12]}): bring the file that `rlm image save` of this version writes"
        )


def _refuse_other_machines(client: docker.DockerClient, archived: ArchivedImage) -> None:
    with engine_errors("ask for its architecture"):
        architecture = client.version()["Arch"]
    if architecture != archived.architecture:
        raise InvalidRequestError(
            f"the file holds an image for {archived.architecture}, and this engine runs on {architecture}"
        )


def _hand_over(client: docker.DockerClient, archived: ArchivedImage, spool: IO[bytes], tag: str) -> None:
    pieces = image_archive.archive(archived, spool, tag=tag)
    with engine_errors("load the sandbox image"), image.time_out(client, _TRANSFER_SILENCE_S):
        for step in client.api.load_image(pieces):  # type: ignore[no-untyped-call]
            if "error" in step:
                raise EngineError(f"the engine could not load the sandbox image: {step['error']}")


def _inspected(client: docker.DockerClient, image_id: str) -> dict[str, Any]:
    with engine_errors("look for the sandbox image"):
        return dict(client.images.get(image_id).attrs)


def _is(archived: ArchivedImage, inspected: dict[str, Any]) -> bool:
    """Whether the engine's image is the archived one.

    An engine that keeps images in containerd's store names them by another hash than their configuration's;
    there layers, settings and the time it was made must be equal.
    """
    if inspected["Id"] == archived.image_id:
        return True
    settings = inspected.get("Config") or {}
    return (
        inspected.get("RootFS", {}).get("Layers") == archived.diff_ids
        and inspected.get("Created") == archived.created
        and all((settings.get(name) or None) == (archived.settings.get(name) or None) for name in _SETTINGS)
    )
