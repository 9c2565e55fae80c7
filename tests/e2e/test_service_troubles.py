"""`rlm serve` while what it stands on goes away: nothing acknowledged is lost, and it comes back by itself.

A provider that is down or refuses the key, a disk that is full, an engine that ends or hangs, a database that
is gone: each is made to happen under a served process, with runs under way and others waiting.
"""

import asyncio
import hashlib
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import pytest
from docker import DockerClient
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.config import Settings
from orchestrator.server.readiness import DATABASE, DISK, ENGINE, KEY_REFUSED, PROVIDER
from tests.containers import containers_of
from tests.databases import postgres
from tests.e2e.serving import Process, client, new_key, serving
from tests.fakes import anthropic_server
from tests.fakes.anthropic_server import Call, Refuse
from tests.fakes.provider import KEY
from tests.fakes.service import short_directory
from tests.postgres.server import PostgresServer
from tests.security.private_engine import PrivateEngine, private_engine

__all__ = ["postgres"]

pytestmark = [pytest.mark.docker, pytest.mark.timeout(180)]

SOON_S = 60.0
"""For what takes a few looks of the server at its parts."""
DRAIN_S = 2
ENDS_WITHIN_S = 30.0
"""After SIGTERM: the grace, and what has a deadline of its own behind it."""

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

Call_ = Callable[[str, Any], Any]


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


def script(directory: Path) -> str:
    return f"GO = {str(directory / 'go')!r}\n{SCRIPT}"


def asking(key: str) -> pb.CreateRunRequest:
    return pb.CreateRunRequest(idempotency_key=key, question=b"How many?", text=key.encode())


async def create(call: Call_, key: str) -> str:
    return str((await call("CreateRun", asking(key))).run.run_id)


async def ended(call: Call_, run_id: str) -> pb.Run:
    """The run once it has ended, whatever its watcher met meanwhile: it asks again from where it was."""
    position = 0
    give_up_s = time.monotonic() + SOON_S
    while True:
        try:
            async for told in call("WatchRun", pb.WatchRunRequest(run_id=run_id, from_position=position)):
                assert told.position == position
                position += 1
            run: pb.Run = (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        else:
            if run.state == pb.RUN_STATE_ENDED:
                return run
        assert time.monotonic() < give_up_s, "the run does not end"
        await asyncio.sleep(0.3)


async def happens(call: Call_, run_id: str, kind: str, *, times: int) -> None:
    """Wait for so many events of a kind."""
    async with asyncio.timeout(SOON_S):
        async for told in call("WatchRun", pb.WatchRunRequest(run_id=run_id)):
            times -= json.loads(told.event_json)["kind"] == kind
            if not times:
                return


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.1)


async def until_paid(directory: Path, *prompts: str) -> None:
    await until(lambda: asked(directory).keys() >= set(prompts))
    # And until the answer is in the books.
    await asyncio.sleep(0.5)


def asked(directory: Path) -> Counter[str]:
    """What reached the provider."""
    log = directory / "asked"
    return Counter(log.read_text().splitlines() if log.exists() else ())


def all_of(*keys: str) -> dict[str, int]:
    """What runs of `SCRIPT` ask for, each once."""
    firsts = {f"first {key}": 1 for key in keys}
    return firsts | {f"{key} {number}": 1 for key in keys for number in range(10)}


async def says(server: Process, *because: str) -> None:
    """Wait until HTTP and gRPC say that it is not ready, and why; or, without a reason, that it is."""
    async with httpx2.AsyncClient(base_url=f"http://{server.http}") as http, asyncio.timeout(SOON_S):
        while True:
            reply = await http.get("/readyz")
            if reply.json().get("because", []) == list(because):
                break
            await asyncio.sleep(0.2)
        assert reply.status_code == (503 if because else 200)
        assert (await http.get("/healthz")).status_code == 200
    async with grpc.aio.insecure_channel(server.grpc) as channel, asyncio.timeout(SOON_S):
        health: Any = health_pb2_grpc.HealthStub(channel)
        wanted = (
            health_pb2.HealthCheckResponse.NOT_SERVING if because else health_pb2.HealthCheckResponse.SERVING
        )
        async for told in health.Watch(health_pb2.HealthCheckRequest()):
            if told.status == wanted:
                break


async def drains(server: Process) -> None:
    """SIGTERM ends it in an orderly way, whatever is the matter."""
    started_s = time.monotonic()
    assert await server.end(signal.SIGTERM) == 0
    assert time.monotonic() - started_s < DRAIN_S + ENDS_WITHIN_S


async def unavailable(answer: Awaitable[object]) -> None:
    """The client is told that trying again helps."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await answer
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def is_queued(call: Call_, run_id: str) -> bool:
    run: pb.Run = (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run
    return run.state == pb.RUN_STATE_QUEUED


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


@pytest.mark.parametrize("store", ["sqlite", "postgresql"])
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


# --- The engine -------------------------------------------------------------------------------------------


@pytest.fixture
def private(engine: DockerClient, image_id: str) -> Iterator[PrivateEngine]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("NOT TESTED: an engine of one's own takes root and dockerd")
    with private_engine(engine, image_id) as started:
        yield started


# The cell in which the run is when its engine ends: what it had paid for is not asked again.
IN_A_CELL = """
def run(question, depth):
    yield "kept = llm_query('first ' + context)"
    yield "import time\\nprint(llm_query('second ' + context))\\ntime.sleep(4)"
    yield "FINAL(f'{kept} {context}')"

def complete(prompt):
    with open(LOG, "a") as log:
        log.write(prompt + "\\n")
    return "fine"
"""


@asynccontextmanager
async def up(private: PrivateEngine) -> AsyncIterator[None]:
    """It runs within the block, or is at least brought to its end after it."""
    client = await asyncio.to_thread(private.up)
    client.close()
    try:
        yield
    finally:
        private.go_on()
        await asyncio.to_thread(private.end, signal.SIGTERM)


async def test_runs_go_on_in_new_sandboxes_when_their_engine_was_restarted_or_hung(
    directory: Path, settings: Settings, private: PrivateEngine
) -> None:
    more = {"DOCKER_HOST": private.address, "RLM_POOL_RUNC": "1", "RLM_DRAIN_S": str(DRAIN_S)}
    state = directory / "state"
    async with up(private):
        async with serving(directory, settings, IN_A_CELL, **more) as server:
            key = await new_key(directory)
            async with client(server, key) as call:
                runs = await create(call, "runs")
                await until_paid(directory, "second runs")
                await asyncio.to_thread(private.end, signal.SIGTERM)
                await says(server, ENGINE)
                waits = await create(call, "waits")
                back = await asyncio.to_thread(private.up)
                await says(server)
                for key_of, run_id in (("runs", runs), ("waits", waits)):
                    run = await ended(call, run_id)
                    assert (run.outcome, run.answer.decode()) == ("answered", f"fine {key_of}"), run.error
                paid = {f"{which} {key_of}" for which in ("first", "second") for key_of in ("runs", "waits")}
                assert asked(directory) == dict.fromkeys(paid, 1)
                await until(lambda: len(back.containers.list()) == 1)
                # It hangs, with a run in the middle of a cell: that needs no engine.
                hung = await create(call, "hung")
                await until_paid(directory, "second hung")
                private.hang()
                await happens(call, hung, "cell_ended", times=2)
                await says(server, ENGINE)
                waits = await create(call, "waits on")
            await drains(server)
        private.go_on()
        async with serving(directory, settings, IN_A_CELL, **more) as server, client(server, key) as call:
            for run_id in (hung, waits):
                assert (await ended(call, run_id)).outcome == "answered"
            await drains(server)
        assert set(asked(directory).values()) == {1}
        assert not containers_of(back, state)
        back.close()


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
