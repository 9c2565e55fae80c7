"""Two served processes on one PostgreSQL, real containers: asked at either, killed, stopped and continued."""

import asyncio
import hashlib
import json
import signal
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from docker import DockerClient
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.config import Settings
from orchestrator.store.books import Role, TenantRules
from orchestrator.store.database import open_database
from orchestrator.store.sql_tenants import SqlTenantBook
from tests.containers import containers_of
from tests.databases import postgres
from tests.e2e.serving import Process, client, serving
from tests.fakes.service import short_directory
from tests.postgres.server import PostgresServer

__all__ = ["postgres"]

pytestmark = [pytest.mark.docker, pytest.mark.timeout(300)]

AWAY_S = 6
TEXT = b"one two three four\n" * 10_000

ANSWER = str(sum(range(40)))

Call = Callable[[str, Any], Any]


@pytest.fixture
def directories() -> Iterator[tuple[Path, Path]]:
    with short_directory() as one, short_directory() as other:
        yield one, other


@pytest.fixture
def store(postgres: PostgresServer) -> str:
    return postgres.new_database()


async def a_key(store: str, rules: TenantRules | None = None) -> str:
    async with open_database(store) as database:
        tenants = SqlTenantBook(database)
        tenant = await tenants.add_tenant("acme", rules or TenantRules())
        return (await tenants.add_key(tenant.tenant_id, Role.ADMIN))[1]


@asynccontextmanager
async def served(directory: Path, settings: Settings, store: str) -> AsyncIterator[Process]:
    # A run's model is decided where it is asked for: both servers have to know it by one name.
    model = f"scripted:{Path(__file__).parent / 'scripts' / 'slow_calls.py'}"
    more = {
        "RLM_STORE": store,
        "RLM_AWAY_S": str(AWAY_S),
        "RLM_MODEL": model,
    }
    async with serving(directory, settings, "", **more) as server:
        yield server


@asynccontextmanager
async def two(
    directories: tuple[Path, Path], settings: Settings, store: str, key: str
) -> AsyncIterator[tuple[tuple[Process, Call], tuple[Process, Call]]]:
    async with AsyncExitStack() as stack:
        servers = []
        for directory in directories:
            server = await stack.enter_async_context(served(directory, settings, store))
            servers.append((server, await stack.enter_async_context(client(server, key))))
        await asyncio.sleep(AWAY_S / 3)  # until each has heard of the other
        yield servers[0], servers[1]


async def asked(call: Call, key: str, question: str = "a", **about: Any) -> pb.Run:
    about = about or {"text": b"nothing to see"}
    request = pb.CreateRunRequest(idempotency_key=key, question=question.encode(), **about)
    run: pb.Run = (await call("CreateRun", request)).run
    return run


async def ended(call: Call, run_id: str) -> pb.Run:
    """Watches it to its end, however often the watch is cut."""
    position = 0
    async with asyncio.timeout(120):
        while True:
            try:
                request = pb.WatchRunRequest(run_id=run_id, from_position=position)
                async for told in call("WatchRun", request):
                    assert told.position == position
                    position += 1
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(0.2)
                continue
            run = await got(call, run_id)
            assert run.state == pb.RUN_STATE_ENDED
            return run


async def got(call: Call, run_id: str) -> pb.Run:
    run: pb.Run = (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run
    return run


async def until_state(call: Call, run_id: str, state: Any) -> pb.Run:
    async with asyncio.timeout(90):
        while (run := await got(call, run_id)).state != state:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.2)
    return run


async def uploaded(call: Call) -> str:
    sha256 = hashlib.sha256(TEXT).hexdigest()
    request = pb.StartUploadRequest(sha256=sha256, length_bytes=len(TEXT), name="a.txt")
    upload_id = (await call("StartUpload", request)).upload_id

    async def parts() -> AsyncIterator[pb.UploadRequest]:
        yield pb.UploadRequest(upload_id=upload_id, offset=0, data=TEXT)

    context_id: str = (await call("Upload", parts())).context.context_id
    return context_id


def calls_to(directory: Path) -> Counter[str]:
    """How often the provider was asked each prompt by the server of this directory."""
    log = directory / "asked"
    return Counter(log.read_text().splitlines() if log.exists() else ())


async def until_asked(directory: Path, count: int) -> None:
    async with asyncio.timeout(60):
        while calls_to(directory).total() < count:  # noqa: ASYNC110 - another process's doing
            await asyncio.sleep(0.05)


def contexts_in(directory: Path) -> list[Path]:
    return [path for path in (directory / "state" / "service" / "contexts").rglob("*") if path.is_file()]


async def test_whatever_is_asked_at_one_server_about_another_ones_contexts_and_runs_is_done(
    directories: tuple[Path, Path], settings: Settings, store: str
) -> None:
    key = await a_key(store)
    async with two(directories, settings, store, key) as ((_, there), (_, here)):
        context_id = await uploaded(there)
        run = await asked(here, "1", "How long?", context_id=context_id)
        told = await ended(here, run.run_id)
        assert (told.outcome, told.answer.decode()) == ("answered", str(len(TEXT))), told.error
        request = pb.ContinueRunRequest(run_id=run.run_id, idempotency_key="2", question=b"How long?")
        further = (await here("ContinueRun", request)).run
        assert (await ended(here, further.run_id)).outcome == "answered"

        long = await asked(there, "3")
        await until_asked(directories[0], 3)
        await here("CancelRun", pb.CancelRunRequest(run_id=long.run_id))
        assert (await ended(here, long.run_id)).outcome == "cancelled"
        assert calls_to(directories[0]).total() < 40
        for run_id in (run.run_id, further.run_id):
            await here("DeleteRun", pb.DeleteRunRequest(run_id=run_id))
        await here("DeleteContext", pb.DeleteContextRequest(context_id=context_id))
        async with asyncio.timeout(30):
            while len(contexts_in(directories[0])) > 1:  # noqa: ASYNC110 - another process's doing
                await asyncio.sleep(0.1)
        assert not calls_to(directories[1])


async def test_a_server_that_is_killed_and_never_returns_leaves_room_and_nothing_unsettled(
    directories: tuple[Path, Path], settings: Settings, store: str, engine: DockerClient
) -> None:
    key = await a_key(store, TenantRules(max_concurrent_runs=1))
    async with two(directories, settings, store, key) as ((lost, there), (_, here)):
        run = await asked(there, "1")
        await until_asked(directories[0], 3)
        mine = await asked(here, "2", "b")
        await asyncio.sleep(1.0)
        assert not calls_to(directories[1]), "the tenant's room is taken"
        await lost.end(signal.SIGKILL)
        told = await until_state(here, run.run_id, pb.RUN_STATE_INTERRUPTED)
        told = await ended(here, mine.run_id)
        assert (told.outcome, told.answer.decode()) == ("answered", ANSWER), told.error
        usage = await here("GetUsage", pb.GetUsageRequest())
        assert usage.held.tokens == 0

        await here("CancelRun", pb.CancelRunRequest(run_id=run.run_id))
        told = await ended(here, run.run_id)
        assert (told.outcome, told.unconfirmed.calls) == ("cancelled", 1)
        assert told.confirmed.calls + told.unconfirmed.calls >= calls_to(directories[0]).total() + 1
        events = [event async for event in here("WatchRun", pb.WatchRunRequest(run_id=run.run_id))]
        last = json.loads(events[-1].event_json)
        assert (last["kind"], last["outcome"]) == ("run_ended", "cancelled")
    # Whoever is on its machine ends what it left there: a server on its state directory, or `rlm doctor`.
    async with served(directories[0], settings, store) as again, client(again, key) as call:
        assert (await got(call, run.run_id)).outcome == "cancelled"
        assert not containers_of(engine, directories[0] / "state")


async def test_a_server_that_stood_still_too_long_pays_for_nothing_before_it_knows(
    directories: tuple[Path, Path], settings: Settings, store: str
) -> None:
    key = await a_key(store)
    async with two(directories, settings, store, key) as ((stopped, there), (_, here)):
        run = await asked(there, "1")
        await until_asked(directories[0], 5)
        stopped.process.send_signal(signal.SIGSTOP)
        await until_state(here, run.run_id, pb.RUN_STATE_INTERRUPTED)
        stopped.process.send_signal(signal.SIGCONT)
        told = await ended(here, run.run_id)
        assert (told.outcome, told.answer.decode(), told.resumed) == ("answered", ANSWER, 1), told.error
        prompts = calls_to(directories[0])
        assert set(prompts) == {f"a {number}" for number in range(40)}
        twice = [prompt for prompt, count in prompts.items() if count > 1]
        assert len(twice) <= 1, "what was in flight, and nothing else"
        assert told.unconfirmed.calls <= 1
        # Its two turns are played without a log.
        assert told.confirmed.calls + told.unconfirmed.calls >= prompts.total() + 2
        usage = await here("GetUsage", pb.GetUsageRequest())
        assert usage.live_runs == 0
        assert usage.day.tokens == sum(
            sum((told.confirmed.tokens, told.unconfirmed.tokens)) for told in [told]
        )
