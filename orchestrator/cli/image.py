"""`rlm image`: the sandbox image of the present sources, made here or carried here in a file."""

import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

from orchestrator.cli import exits
from orchestrator.cli.exits import Exit
from orchestrator.cli.json_line import json_line
from orchestrator.config import Settings
from orchestrator.engine import connect
from orchestrator.errors import ImageMissingError, InvalidRequestError, MachineError
from orchestrator.machine import image_id
from orchestrator.sandbox import image, image_leftovers, image_transfer
from orchestrator.sandbox.image_archive import Advance, ArchivedImage
from orchestrator.sandbox.image_transfer import Contents

STANDARD = "-"
"""Instead of a file: standard input or output."""

_ID = re.compile(r"sha256:[0-9a-f]{64}")
_PROGRESS_S = 1.0


def build(settings: Settings) -> Exit:
    """Build the image unless it is there; its id goes to stdout.

    Raises:
        MachineError: The engine does not answer, or something the image is made from cannot be had.
    """
    _unwind_when_terminated()
    with closing(connect()) as client:
        try:
            built = image.build(client, wheelhouse=settings.state_dir / "wheels", say=exits.tell)
        except OSError as error:
            raise ImageMissingError(f"the image's sources cannot be put together: {error}") from error
    exits.put(built)
    return Exit.DONE


def save(settings: Settings, file: str, *, force: bool) -> Exit:
    """Write the image into a file; its id goes to stdout, or to stderr when the image does.

    Raises:
        InvalidRequestError: The file exists, or cannot be written there.
        MachineError: The engine does not answer, or has no such image.
    """
    _unwind_when_terminated()
    with closing(connect()) as client:
        wanted = image_id(client, settings)
        if file == STANDARD:
            if sys.stdout.isatty():
                raise InvalidRequestError(
                    "an image is nothing for a terminal: name a file, or redirect stdout"
                )
            archived = image_transfer.save(client, wanted, sys.stdout.buffer, advance=_progress("packed"))
            sys.stdout.buffer.flush()
            exits.tell(archived.image_id)
            return Exit.DONE
        try:
            with _new_file(Path(file), force=force) as sink:
                archived = image_transfer.save(client, wanted, sink, advance=_progress("packed"))
            size_bytes = Path(file).stat().st_size
        except OSError as error:
            raise InvalidRequestError(f"{file} cannot be written: {error.strerror or error}") from error
    exits.tell(
        f"image: {file} has {size_bytes / 1e6:.1f} MB, {archived.size_bytes / 1e6:.1f} MB unpacked;"
        f" on the other machine: rlm image load {file} --id {archived.image_id}"
    )
    exits.put(archived.image_id)
    return Exit.DONE


def load(file: str, *, expected_id: str) -> Exit:
    """Give the engine the image in a file; its id goes to stdout.

    Raises:
        InvalidRequestError: The file cannot be read, or is refused; then nothing has changed.
        MachineError: The engine does not answer.
    """
    if expected_id and not _ID.fullmatch(expected_id):
        raise InvalidRequestError(f"--id must be sha256: and 64 hexadecimal digits, not {expected_id!r}")
    with closing(connect()) as client, _readable(file) as source:
        loaded = image_transfer.load(
            client, source, expected_id=expected_id, say=exits.tell, advance=_progress("read")
        )
    exits.put(loaded)
    return Exit.DONE


def show(settings: Settings, file: str, *, as_json: bool) -> Exit:
    """Print what the engine's image, or the one in a file, is and holds.

    Raises:
        InvalidRequestError: The file cannot be read, or is no image.
        MachineError: The engine does not answer, or has no such image.
    """
    if file:
        with _readable(file) as source, image_transfer.from_file(source) as (spool, archived):
            held = image_transfer.contents(spool, archived)
    else:
        with (
            closing(connect()) as client,
            image_transfer.from_engine(client, image_id(client, settings)) as (spool, archived),
        ):
            held = image_transfer.contents(spool, archived)
    exits.put(json_line(_plain(archived, held)) if as_json else lines(archived, held))
    return Exit.DONE


def prune(settings: Settings, *, dry_run: bool) -> Exit:
    """Remove what former versions and builds have left in the engine; a line each goes to stdout.

    Raises:
        MachineError: The engine does not answer.
    """
    files = image.sources()
    with closing(connect()) as client:
        present = image.built_id(client, image.source_hash(files))
        pinned = {image.pinned(client, settings.image)} if settings.image else set()
        found = image_leftovers.find(
            client,
            kept_ids=pinned | ({present} if present else set()),
            kept_names={image.base_name(files["bootstrap-base"])},
        )
        for leftover in found:
            size = f"{leftover.size_bytes / 1e6:.0f} MB"
            why_kept = "" if dry_run else image_leftovers.remove(client, leftover)
            if why_kept:
                exits.tell(f"image: {leftover.name} stays: {why_kept}")
            else:
                exits.put(f"{'would remove' if dry_run else 'removed'} {leftover.name}, {size}")
    if not found:
        exits.tell("image: nothing is left over")
    return Exit.DONE


def lines(archived: ArchivedImage, held: Contents | None) -> str:
    """An image for people."""
    source = archived.label(image.SOURCE_LABEL)
    present = source == image.source_hash(image.sources())
    head = [
        f"id        {archived.image_id}",
        f"sources   {source or 'not a sandbox image'}{' (those of this version)' if present else ''}",
        f"created   {archived.created}, for {archived.architecture}",
        f"size      {archived.size_bytes / 1e6:.1f} MB in {len(archived.layers)} layers",
    ]
    if held is None:
        return "\n".join([*head, "contents  not recorded in it"])
    return "\n".join(
        [
            *head,
            f"python    {held.python}",
            *(f"wheel     {wheel.file}  sha256:{wheel.sha256}" for wheel in held.wheels),
            *(
                f"package   {package.name} {package.version} {package.architecture}"
                for package in held.packages
            ),
        ]
    )


def _plain(archived: ArchivedImage, held: Contents | None) -> dict[str, object]:
    return {
        "id": archived.image_id,
        "sources": archived.label(image.SOURCE_LABEL) or None,
        "created": archived.created,
        "architecture": archived.architecture,
        "size_bytes": archived.size_bytes,
        "layers": archived.diff_ids,
        "contents": asdict(held) if held else None,
    }


def _unwind_when_terminated() -> None:
    """Like an interrupted command: there are scripts to end and files to remove."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def _readable(file: str) -> Iterator[IO[bytes]]:
    if file == STANDARD:
        yield sys.stdin.buffer
        return
    try:
        source = open(file, "rb")  # noqa: SIM115 - closed below
    except OSError as error:
        raise InvalidRequestError(f"{file} cannot be read: {error.strerror or error}") from error
    with source:
        try:
            yield source
        except OSError as error:
            raise MachineError(
                f"{file} could not be read, or not be copied: {error.strerror or error}"
            ) from error


@contextmanager
def _new_file(path: Path, *, force: bool) -> Iterator[IO[bytes]]:
    """A file that is there under its name once it is whole, and never before."""
    if not force and os.path.lexists(path):
        raise InvalidRequestError(f"{path} exists: name another file, or add --force to replace it")
    if path.is_dir():
        raise InvalidRequestError(f"{path} is a directory: name a file in it")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("xb") as sink:
            yield sink
            sink.flush()
            os.fsync(sink.fileno())
        if not force and os.path.lexists(path):
            raise InvalidRequestError(f"{path} was made by somebody else meanwhile")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _progress(what: str, clock: Callable[[], float] = time.monotonic) -> Advance:
    """Tells a person now and then how far it is; nobody else."""
    if not sys.stderr.isatty():
        return lambda _: None
    told_s = clock()

    def advance(done_bytes: int) -> None:
        nonlocal told_s
        if clock() - told_s >= _PROGRESS_S:
            told_s = clock()
            exits.tell(f"image: {done_bytes / 1e6:.0f} MB {what}")

    return advance
