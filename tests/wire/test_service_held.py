"""Runs of a service that is not ready, and runs that the machine fails: they wait, and go on."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from orchestrator.errors import EngineError, SandboxStartError, UnavailableError
from orchestrator.ids import SandboxId
from orchestrator.sandbox.port import Ending, SandboxSpec
from orchestrator.service import execution
from orchestrator.service.port import Caller, Question
from orchestrator.store.books import RunRow, RunState
from tests.fakes.in_process_driver import InProcessDriver
from tests.fakes.model import FakeModel, runs, says
from tests.fakes.service import Server, open_server, short_directory

ANSWERS = runs("FINAL('forty-two')")


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


@pytest.fixture(autouse=True)
def the_machine_rests_for_a_moment_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "MACHINE_RESTS_S", 0.1)


async def a_caller(server: Server) -> Caller:
    account = await server.account("acme")
    return await server.office.authenticate(account.admin)


async def create(server: Server, caller: Caller, key: str = "k") -> str:
    question = Question(idempotency_key=key, question="How many?", text=b"some text")
    return (await server.office.create_run(caller, question)).run.run_id


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - of state that nobody tells of
            await asyncio.sleep(0.01)


async def ended(server: Server, caller: Caller, run_id: str) -> RunRow:
    async with asyncio.timeout(20):
        while True:
            # A watcher of a run that is left is told to ask again.
            with contextlib.suppress(UnavailableError):
                async for _ in server.office.watch_run(caller, run_id, 0):
                    pass
                return await server.office.get_run(caller, run_id)
            await asyncio.sleep(0.05)


# --- Held -----------------------------------------------------------------------------------------------


async def test_what_is_created_while_runs_are_held_waits_until_they_are_not(directory: Path) -> None:
    model = FakeModel(otherwise=ANSWERS)
    async with open_server(directory, model) as server:
        caller = await a_caller(server)
        server.office.hold(True)
        created = [await create(server, caller, key) for key in "ab"]
        await asyncio.sleep(0.1)
        assert not model.asked
        for run_id in created:
            assert (await server.office.get_run(caller, run_id)).state is RunState.QUEUED
        server.office.hold(False)
        for run_id in created:
            assert (await ended(server, caller, run_id)).outcome == "answered"


async def test_one_of_them_may_try(directory: Path) -> None:
    async with open_server(directory, FakeModel(otherwise=ANSWERS)) as server:
        caller = await a_caller(server)
        server.office.hold(True)
        first, second = [await create(server, caller, key) for key in "ab"]
        server.office.hold(True, but_one=True)
        assert (await ended(server, caller, first)).outcome == "answered"
        assert (await server.office.get_run(caller, second)).state is RunState.QUEUED
        server.office.hold(False)
        assert (await ended(server, caller, second)).outcome == "answered"


async def test_a_run_that_is_held_can_be_cancelled_and_keeps_nobody_from_draining(directory: Path) -> None:
    async with open_server(directory, FakeModel()) as server:
        caller = await a_caller(server)
        server.office.hold(True)
        first, second = [await create(server, caller, key) for key in "ab"]
        assert (await server.office.cancel_run(caller, first)).outcome == "cancelled"
        async with asyncio.timeout(5):
            await server.drain()
    async with open_server(directory, FakeModel(otherwise=ANSWERS)) as server:
        assert (await ended(server, caller, second)).outcome == "answered"


# --- Failed by the machine ------------------------------------------------------------------------------


class Engine(InProcessDriver):
    """One that goes away with the sandboxes it has, and comes back without them."""

    def __init__(self, **names: object) -> None:
        super().__init__(**names)
        self.failure: Exception | None = None
        self.refused = 0

    async def start(self, spec: SandboxSpec) -> None:
        if self.failure is not None:
            self.refused += 1
            raise self.failure
        await super().start(spec)

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        if self.failure is not None:
            raise EngineError("the engine does not answer")
        return Ending.GONE

    async def goes_away(self) -> None:
        self.failure = EngineError("the engine does not answer")
        guests = list(self._guests.values())
        for guest in guests:
            guest.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*guests)


@pytest.mark.parametrize(
    "failure", [EngineError("it is away"), SandboxStartError("no room"), OSError(28, "full")]
)
async def test_a_run_that_gets_no_sandbox_waits_for_one(directory: Path, failure: Exception) -> None:
    driver = Engine()
    driver.failure = failure
    async with open_server(directory, FakeModel(otherwise=ANSWERS), driver=driver) as server:
        caller = await a_caller(server)
        run_id = await create(server, caller)
        await until(lambda: driver.refused > 1)
        driver.failure = None
        told = await ended(server, caller, run_id)
        assert (told.outcome, told.answer) == ("answered", b"forty-two")


async def test_a_run_whose_engine_goes_away_is_replayed_in_a_new_sandbox(directory: Path) -> None:
    in_the_cell = asyncio.Event()

    async def hang_once() -> None:
        if not in_the_cell.is_set():
            in_the_cell.set()
            await asyncio.Event().wait()

    driver = Engine(hang_once=hang_once)
    model = FakeModel(runs("kept['x'] = await llm('x')"), says("x"), runs("await hang_once()"), ANSWERS)
    async with open_server(directory, model, driver=driver) as server:
        caller = await a_caller(server)
        run_id = await create(server, caller)
        await in_the_cell.wait()
        before = len(model.asked)
        await driver.goes_away()
        await until(lambda: server.office.running == 0)
        assert (await server.office.get_run(caller, run_id)).state is not RunState.ENDED
        driver.failure = None
        told = await ended(server, caller, run_id)
        assert (told.outcome, told.answer) == ("answered", b"forty-two")
        assert len(model.asked) == before + 1, "what was in the record is not asked again"
        assert told.unconfirmed.calls == 0


async def test_a_run_that_was_cancelled_while_it_waits_for_an_engine_ends_as_that(directory: Path) -> None:
    driver = Engine()
    driver.failure = EngineError("it is away")
    async with open_server(directory, FakeModel(), driver=driver) as server:
        caller = await a_caller(server)
        run_id = await create(server, caller)
        await until(lambda: driver.refused > 0)
        await server.office.cancel_run(caller, run_id)
        assert (await ended(server, caller, run_id)).outcome == "cancelled"
