import asyncio
import logging
import os
from collections.abc import AsyncIterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import NamedTuple, cast

import pytest

from orchestrator.errors import KeyMissingError, MachineError, OrchestratorError, StoreError
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.server.readiness import DATABASE, KEY_REFUSED, PROVIDER, Readiness, looking, room_in
from tests.fakes.provider import provider_at


class FakePart:
    """Is well, or is not; or hangs."""

    def __init__(self) -> None:
        self.error: OrchestratorError | None = None
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked = 0

    async def look(self) -> None:
        self.asked += 1
        await self.answers.wait()
        if self.error is not None:
            raise self.error


class FakeProcess:
    has_ended = False


@pytest.fixture
def database() -> FakePart:
    return FakePart()


@pytest.fixture
def provider() -> FakePart:
    return FakePart()


@pytest.fixture
def process() -> FakeProcess:
    return FakeProcess()


@pytest.fixture
async def readiness(database: FakePart, provider: FakePart, process: FakeProcess) -> AsyncIterator[Readiness]:
    parts = {DATABASE: database.look, PROVIDER: provider.look}
    opened = Readiness(parts, cast(ProviderProcess, process), answer_s=0.02)
    yield opened
    await opened.aclose()


async def test_a_server_is_not_ready_while_its_database_is_away(
    readiness: Readiness, database: FakePart
) -> None:
    said: list[bool] = []
    for is_away in (False, True, True, False):
        database.error = StoreError("the database at db.internal does not answer") if is_away else None
        await readiness.look()
        said.append(readiness.is_ready)
        assert readiness.told == ((DATABASE,) if is_away else ()), "nobody is told where it is"
    assert said == [True, False, False, True]
    assert not readiness.broken


async def test_a_part_that_hangs_is_not_asked_again_and_hides_nothing_about_the_others(
    readiness: Readiness, database: FakePart, provider: FakePart
) -> None:
    database.answers.clear()
    await readiness.look()
    provider.error = MachineError("it is down")
    await readiness.look()
    assert set(readiness.told) == {DATABASE, PROVIDER}
    assert (database.asked, provider.asked) == (1, 2)
    database.answers.set()
    provider.error = None
    await readiness.look()
    assert readiness.is_ready


async def test_a_key_that_is_refused_is_told_apart_from_a_provider_that_is_away(
    readiness: Readiness, provider: FakePart
) -> None:
    provider.error = KeyMissingError("the provider does not accept the API key (401)")
    await readiness.look()
    assert readiness.told == (KEY_REFUSED,)


async def test_a_trouble_is_logged_when_it_begins_and_when_it_is_over(
    readiness: Readiness, database: FakePart, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    for is_away in (True, True, False, False):
        database.error = StoreError("it does not answer") if is_away else None
        await readiness.look()
    assert [record.message for record in caplog.records] == [
        f"not ready: {DATABASE} (it does not answer)",
        "ready again",
    ]


async def test_a_server_whose_provider_process_has_ended_gives_up(
    readiness: Readiness, process: FakeProcess
) -> None:
    said: list[bool] = []
    looked, over = asyncio.Event(), asyncio.Event()

    async def say_ready(is_ready: bool) -> None:
        said.append(is_ready)
        looked.set()

    async with looking(readiness, say_ready=say_ready, on_broken=over.set, every_s=0.001):
        assert said, "it is looked at before anything is served"
        async with asyncio.timeout(10):
            await looked.wait()
            process.has_ended = True
            await over.wait()
    assert (said[0], said[-1]) == (True, False)
    assert "credentials" in readiness.broken


class Disk(NamedTuple):
    """What `statvfs` says of one."""

    f_bavail: int
    f_favail: int
    f_files: int
    f_frsize: int = 4_096


@pytest.mark.parametrize(
    ("disk", "is_well"),
    [
        (Disk(f_bavail=1 << 20, f_favail=100_000, f_files=200_000), True),
        (Disk(f_bavail=1_000, f_favail=100_000, f_files=200_000), False),
        (Disk(f_bavail=1 << 20, f_favail=10, f_files=200_000), False),
        (Disk(f_bavail=1 << 20, f_favail=0, f_files=0), True),
    ],
    ids=["room", "no bytes", "no files", "as many files as it likes"],
)
async def test_a_disk_needs_room_for_bytes_and_for_files(
    disk: Disk, is_well: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _path: disk)
    with nullcontext() if is_well else pytest.raises(MachineError, match="files only"):
        await room_in(tmp_path)()


@pytest.fixture
async def real_process() -> AsyncIterator[ProviderProcess]:
    with ExitStack() as stack:
        yield stack.enter_context(provider_at("http://127.0.0.1:1"))


async def test_a_provider_process_tells_when_it_has_ended(real_process: ProviderProcess) -> None:
    assert not real_process.has_ended
    real_process.close()
    assert real_process.has_ended
