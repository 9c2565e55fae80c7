import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack
from typing import cast

import pytest

from orchestrator.errors import StoreError
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.server.readiness import Readiness, looking
from orchestrator.store.database import Database
from tests.fakes.provider import provider_at


class FakeDatabase:
    """Answers, or does not."""

    is_away = False

    async def ping(self) -> None:
        if self.is_away:
            raise StoreError("the database does not answer")


class FakeProcess:
    has_ended = False


@pytest.fixture
def database() -> FakeDatabase:
    return FakeDatabase()


@pytest.fixture
def process() -> FakeProcess:
    return FakeProcess()


@pytest.fixture
def readiness(database: FakeDatabase, process: FakeProcess) -> Readiness:
    return Readiness(cast(Database, database), cast(ProviderProcess, process))


async def test_a_server_is_not_ready_while_its_database_is_away(
    readiness: Readiness, database: FakeDatabase
) -> None:
    said: list[bool] = []
    for is_away in (False, True, True, False):
        database.is_away = is_away
        await readiness.look()
        said.append(readiness.is_ready)
    assert said == [True, False, False, True]
    assert not readiness.broken


async def test_a_server_whose_provider_process_has_ended_gives_up(
    readiness: Readiness, process: FakeProcess
) -> None:
    said: list[bool] = []
    looked, over = asyncio.Event(), asyncio.Event()

    async def say_ready(is_ready: bool) -> None:
        said.append(is_ready)
        looked.set()

    async with looking(readiness, say_ready=say_ready, on_broken=over.set, every_s=0.001):
        async with asyncio.timeout(10):
            await looked.wait()
            process.has_ended = True
            await over.wait()
    assert (said[0], said[-1]) == (True, False)
    assert "credentials" in readiness.broken


async def test_a_server_of_scripted_models_alone_needs_no_provider(database: FakeDatabase) -> None:
    readiness = Readiness(cast(Database, database), None)
    await readiness.look()
    assert readiness.is_ready


@pytest.fixture
async def real_process() -> AsyncIterator[ProviderProcess]:
    with ExitStack() as stack:
        yield stack.enter_context(provider_at("http://127.0.0.1:1"))


async def test_a_provider_process_tells_when_it_has_ended(real_process: ProviderProcess) -> None:
    assert not real_process.has_ended
    real_process.close()
    assert real_process.has_ended
