"""`rlm runs export`: all that a server has of a run, as files.

    run.json       the object of `rlm runs show --json`
    events.jsonl   as `rlm run --events` writes it
    answer.txt     the answer, byte for byte
    texts/SHA256   each long text that an event refers to

What is there of a run that has not ended is exported as it is now.
"""

import os
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, aclosing, contextmanager
from pathlib import Path
from typing import IO, NamedTuple, Protocol

from orchestrator.cli import exits, words
from orchestrator.cli.json_line import json_line
from orchestrator.cli.remote.connection import Connection
from orchestrator.cli.remote.session import carry_out
from orchestrator.cli.remote.shapes import run_object
from orchestrator.client import Client, Run
from orchestrator.errors import InvalidRequestError, ServerError

_HEX = frozenset("0123456789abcdef")


class _Counts(NamedTuple):
    events: int
    texts: int


class _Target(Protocol):
    """Where files go. They hold what the context holds, so they are their owner's alone."""

    def file(self, name: str) -> AbstractContextManager[IO[bytes]]:
        """A new file, whole when its block ends."""
        ...


def export(connection: Connection, run_id: str, target: Path, *, as_json: bool) -> None:
    """Write a run's files.

    Raises:
        InvalidRequestError: The target is there already, or cannot be written.
    """

    async def work(client: Client) -> _Counts:
        # Of a run that is not there, nothing is made.
        run = await client.get_run(run_id)
        with _opened(target) as opened:
            return await _export(client, run, opened)

    try:
        counts = carry_out(connection, work)
    except OSError as error:
        raise InvalidRequestError(f"cannot write {target}: {error.strerror}") from error
    if as_json:
        exits.put(json_line({"run_id": run_id, "target": str(target), **counts._asdict()}))
    else:
        texts = words.many(counts.texts, "long text")
        exits.tell(f"rlm: {words.many(counts.events, 'event')} and {texts} of {run_id} are in {target}")


async def _export(client: Client, run: Run, target: _Target) -> _Counts:
    run_id = run.run_id
    hashes: dict[str, None] = {}
    count = 0
    with target.file("events.jsonl") as events:
        if run.next_position > 0:
            async with aclosing(client.watch(run_id)) as watched:
                async for position, event in watched:
                    events.write((json_line(event) + "\n").encode("ascii"))
                    hashes.update(dict.fromkeys(_texts(event)))
                    count += 1
                    # A run that goes on would go on here.
                    if position + 1 >= run.next_position and not run.is_over:
                        break
    for sha256 in hashes:
        with target.file(f"texts/{sha256}") as long_text:
            async with aclosing(client.read_text(run_id, sha256)) as parts:
                async for part in parts:
                    long_text.write(part)
    answer = await _answer(client, run, target)
    # Last: where it is, the rest is whole.
    with target.file("run.json") as about:
        about.write((json_line(run_object(run) | {"answer": answer}) + "\n").encode("ascii"))
    return _Counts(count, len(hashes))


async def _answer(client: Client, run: Run, target: _Target) -> str | None:
    if run.answer is None:
        return None
    data = bytearray()
    async with aclosing(client.read_text(run.run_id)) as parts:
        async for part in parts:
            data += part
    with target.file("answer.txt") as whole:
        whole.write(data)
    return data.decode("utf-8", "replace")


def _texts(event: Mapping[str, object]) -> Iterator[str]:
    for value in event.values():
        if isinstance(value, dict) and {"head", "length_bytes", "sha256"} <= value.keys():
            sha256 = value["sha256"]
            # It becomes a file's name, and a server's word for it is not enough.
            if not isinstance(sha256, str) or len(sha256) != 64 or not _HEX.issuperset(sha256):
                raise ServerError("the server sent an event with a hash that is none")
            yield sha256


@contextmanager
def _opened(target: Path) -> Iterator[_Target]:
    if target.suffix == ".tar":
        with _new_file(target) as file, tarfile.open(fileobj=file, mode="w") as archive:
            yield _Archive(archive)
        return
    target.mkdir(mode=0o700)
    yield _Directory(target)


def _new_file(path: Path) -> IO[bytes]:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    return os.fdopen(fd, "wb")


class _Directory:
    def __init__(self, path: Path) -> None:
        self._path = path

    def file(self, name: str) -> AbstractContextManager[IO[bytes]]:
        path = self._path / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        return _new_file(path)


class _Archive:
    def __init__(self, archive: tarfile.TarFile) -> None:
        self._archive = archive

    @contextmanager
    def file(self, name: str) -> Iterator[IO[bytes]]:
        # A file without a name, until its length is known.
        with tempfile.TemporaryFile(prefix="rlm-export-") as file:
            yield file
            entry = tarfile.TarInfo(name)
            entry.size = file.tell()
            entry.mode = 0o600
            file.seek(0)
            self._archive.addfile(entry, file)
