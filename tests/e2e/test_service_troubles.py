"""`rlm serve` while what it stands on goes away: nothing acknowledged is lost, and it comes back by itself.

A provider that is down or refuses the key, a disk that is full, a database that is gone: each is made to
happen under a served process, with runs under way and others waiting. The engine has a file of its own.
"""

import asyncio
import hashlib
import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.config import Settings
from orchestrator.server.readiness import DATABASE, DISK, KEY_REFUSED, PROVIDER
from tests.containers import containers_of
from tests.databases import postgres
from tests.e2e.serving import client, new_key, serving
from tests.e2e.waiting import (
    DRAIN_S,
    all_of,
    asked,
    asking,
    create,
    drains,
    ended,
    is_queued,
    says,
    unavailable,
    until_paid,
)
from tests.fakes import anthropic_server
from tests.fakes.anthropic_server import Call, Refuse
from tests.fakes.provider import KEY
from tests.fakes.service import short_directory
from tests.postgres.server import PostgresServer

__all__ = ["postgres"]

pytestmark = [pytest.mark.docker, pytest.mark.timeout(180)]

# A run that pays for `first` before the trouble, and waits for its end in a cell; `go` is made by the test.
SCRIPT = """
import os, time
from orchestrator.models.scripted import Wait

def run(question, depth):
    yield "said = [llm_query('first ' + context)]\\nprint(said)"
    while not os.path.exists(GO):
        yield Wait(0.1)
    yield "said += llm_query_batched([f'{context} {number}' for number in range(10)])"
    yield "FINAL(f'{len(said)} {context}')"

def complete(prompt):
    with open(LOG, "a") as log:
        log.write(prompt + "\\n")
    time.sleep(0.05)
    return "fine"
"""


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


def script(directory: Path) -> str:
    return f"GO = {str(directory / 'go')!r}\n{SCRIPT}"


# --- The provider -----------------------------------------------------------------------------------------


async def test_runs_wait_for_a_provider_that_is_away_and_for_a_key_that_it_accepts(
    directory: Path, settings: Settings, engine: DockerClient
) -> None:
    refuses = False

    def respond(_request: Mapping[str, Any]) -> anthropic_server.Play:
        return Refuse(401, "authentication_error") if refuses else Call("FINAL('forty-two')")

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    theirs = {
        "RLM_MODEL": "claude-sonnet-5-5",
        "RLM_BASE_URL": f"http://127.0.0.1:{port}",
        "ANTHROPIC_API_KEY": KEY,
        "RLM_DRAIN_S": str(DRAIN_S),
    }
    async with serving(directory, settings, script(directory), **theirs) as server:
        key = await new_key(directory)
        await says(server, PROVIDER)
        async with client(server, key) as call:
            first = await create(call, "first")
            await asyncio.sleep(1.0)
            assert await is_queued(call, first)
            async with anthropic_server.serve(respond, port=port) as fake:
                await says(server)
                run = await ended(call, first)
                assert (run.outcome, run.answer, run.resumed) == ("answered", b"forty-two", 0)
                refuses = True
                refused = await ended(call, await create(call, "refused"))
                assert refused.outcome == "model_failed"
                assert "API key" in refused.error
                await says(server, KEY_REFUSED)
                waits = await create(call, "waits")
                await asyncio.sleep(1.0)
                assert await is_queued(call, waits)
                assert len(fake.log) == 2
        await drains(server)
    refuses = False
    async with (
        anthropic_server.serve(respond, port=port) as fake,
        serving(directory, settings, script(directory), **theirs) as server,
        client(server, key) as call,
    ):
        assert (await ended(call, waits)).outcome == "answered"
        assert len(fake.log) == 1
        await drains(server)
    assert not containers_of(engine, directory / "state")


# --- The disk ---------------------------------------------------------------------------------------------


def root_runs(program: str, *arguments: str | Path) -> None:
    path = shutil.which(program)
    assert path is not None, f"this machine has no {program}"
    subprocess.run([path, *arguments], check=True)


@contextmanager
def small_disk(at: Path) -> Iterator[Path]:
    """A disk of its own for a directory; what fills it up."""
    at.mkdir(mode=0o700)
    root_runs("mount", "-t", "tmpfs", "-o", "size=128m,mode=700", "rlm-test", at)
    try:
        yield at / "filler"
    finally:
        # Lazily: of a test that failed, somebody may still be in there.
        root_runs("umount", "--lazy", at)


def fill(filler: Path) -> None:
    """Not a byte more fits."""
    part = b"x" * (1 << 20)
    with open(filler, "ab", buffering=0) as file:
        while part:
            try:
                file.write(part)
            except OSError:
                part = part[: len(part) // 2]


@pytest.mark.parametrize("store", ["sqlite", pytest.param("postgresql", marks=pytest.mark.long)])
async def test_a_disk_that_is_full_is_told_and_loses_nothing(
    directory: Path, settings: Settings, engine: DockerClient, store: str, request: pytest.FixtureRequest
) -> None:
    if os.geteuid() != 0:
        pytest.skip("NOT TESTED: only root can mount a small disk")
    more = {"RLM_DRAIN_S": str(DRAIN_S)}
    url = ""
    if store == "postgresql":
        url = more["RLM_STORE"] = request.getfixturevalue("postgres").new_database()
    text = os.urandom(300_000).hex().encode()
    upload = pb.StartUploadRequest(
        sha256=hashlib.sha256(text).hexdigest(), length_bytes=len(text), name="a.txt"
    )
    half = len(text) // 2

    def parts(upload_id: str, offset: int, end: int) -> Iterator[pb.UploadRequest]:
        yield pb.UploadRequest(upload_id=upload_id, offset=offset, data=text[offset:end])

    with small_disk(directory / "state") as filler:
        async with serving(directory, settings, script(directory), **more) as server:
            key = await new_key(directory, store_url=url)
            async with client(server, key) as call:
                await says(server)
                runs = await create(call, "runs")
                upload_id = (await call("StartUpload", upload)).upload_id
                await call("Upload", parts(upload_id, 0, half))
                await until_paid(directory, "first runs")
                fill(filler)
                await unavailable(call("Upload", parts(upload_id, half, len(text))))
                await unavailable(call("CreateRun", asking("refused")))
                await says(server, DISK)
                (directory / "go").touch()
                await asyncio.sleep(1.0)
                filler.unlink()
                await says(server)
                run = await ended(call, runs)
                assert (run.outcome, run.answer) == ("answered", b"11 runs")
                assert (await call("StartUpload", upload)).next_offset == half
                await call("Upload", parts(upload_id, half, len(text)))
                assert (await call("StartUpload", upload)).next_offset == len(text)
                assert asked(directory) == all_of("runs")
                # Full again, with a run in the middle of it, when the server is to end.
                (directory / "go").unlink()
                left = await create(call, "left")
                await until_paid(directory, "first left")
                fill(filler)
                await says(server, DISK)
            await drains(server)
        filler.unlink()
        (directory / "go").touch()
        async with (
            serving(directory, settings, script(directory), **more) as server,
            client(server, key) as call,
        ):
            run = await ended(call, left)
            assert (run.outcome, run.answer) == ("answered", b"11 left")
            assert asked(directory) == all_of("runs", "left")
            await drains(server)
    assert not containers_of(engine, directory / "state")


# --- The database -----------------------------------------------------------------------------------------


@pytest.fixture
async def running(postgres: PostgresServer) -> AsyncIterator[PostgresServer]:
    """The test server; it runs again afterwards, whatever became of it."""
    yield postgres
    await asyncio.to_thread(postgres.start)


async def test_a_database_that_is_gone_for_a_while_costs_nothing_that_was_acknowledged(
    directory: Path, settings: Settings, engine: DockerClient, running: PostgresServer
) -> None:
    url = await asyncio.to_thread(running.new_database)
    more = {"RLM_STORE": url, "RLM_DRAIN_S": str(DRAIN_S)}
    async with serving(directory, settings, script(directory), **more) as server:
        key = await new_key(directory, store_url=url)
        async with client(server, key) as call:
            names = [f"run {number}" for number in range(3)]
            runs = {name: await create(call, name) for name in names}
            watching = asyncio.gather(*(ended(call, run_id) for run_id in runs.values()))
            await until_paid(directory, *(f"first {name}" for name in names))
            await asyncio.to_thread(running.stop)
            (directory / "go").touch()
            await unavailable(call("CreateRun", asking("refused")))
            await says(server, DATABASE)
            await asyncio.to_thread(running.start)
            await says(server)
            for name, run in zip(names, await watching, strict=True):
                assert (run.outcome, run.answer.decode()) == ("answered", f"11 {name}"), run.error
            assert asked(directory).keys() == all_of(*names).keys()
            usage = await call("GetUsage", pb.GetUsageRequest())
            assert usage.live_runs == 0
            assert usage.held.tokens == 0
            # Again, by a loss of power, and the server is to end while it is away.
            (directory / "go").unlink()
            left = await create(call, "left")
            await until_paid(directory, "first left")
            await asyncio.to_thread(running.kill)
            await says(server, DATABASE)
        await drains(server)
    await asyncio.to_thread(running.start)
    (directory / "go").touch()
    async with serving(directory, settings, script(directory), **more) as server, client(server, key) as call:
        run = await ended(call, left)
        assert (run.outcome, run.answer) == ("answered", b"11 left")
        await drains(server)
    assert asked(directory)["first left"] == 1
    assert not containers_of(engine, directory / "state")
