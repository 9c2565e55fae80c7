"""One sandbox whose engine calls hang, beside runs that must not notice; and an engine that ends.

The engines are real. A proxy in front of the shared one goes silent; one of the tests' own is stopped and
killed.
"""

import asyncio
import dataclasses
import gc
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.cells import SandboxLoss
from orchestrator.config import Settings
from orchestrator.errors import EngineError
from orchestrator.limits import RunLimits
from orchestrator.prompts import cell_report
from orchestrator.sandbox import docker_driver
from orchestrator.sandbox.reaper import Reaper
from orchestrator.trajectory import CellStarted
from orchestrator.turn import Outcome
from tests.containers import containers_of
from tests.security.engine_proxy import Asked, EngineProxy, engine_proxy
from tests.security.house import House, Story, open_house
from tests.security.private_engine import PrivateEngine, private_engine

# docker-py leaves a socket open for each connection that is refused, and Python finds it at some later time.
pytestmark = pytest.mark.filterwarnings("ignore:.*socket.socket:pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(autouse=True)
def sockets_are_found_here_and_not_in_another_test() -> Iterator[None]:
    yield
    gc.collect()


_DEADLINE_S = 3.0
"""Of engine calls in these tests; the real ones are longer."""
_OTHERS_MUST_END_WITHIN_S = 60.0

OPERATIONS = {
    "create": ("POST", "/containers/create"),
    "start": ("POST", "/start"),
    "inspect": ("GET", "/json"),
    "remove": ("DELETE", "/containers/"),
}


@pytest.fixture
async def proxy(
    state_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[EngineProxy]:
    async with engine_proxy(tmp_path) as opened:
        monkeypatch.setenv("DOCKER_HOST", f"unix://{opened.socket}")
        for name in ("ENGINE_CALL_S", "ENGINE_LOOK_S", "ENGINE_REMOVE_S"):
            monkeypatch.setattr(docker_driver, name, _DEADLINE_S)
        monkeypatch.setattr(docker_driver, "ENGINE_SLOW_START_S", 0.5)
        yield opened


@pytest.fixture
async def house(
    settings: Settings, engine: DockerClient, proxy: EngineProxy, runtime: str
) -> AsyncIterator[House]:
    async with open_house(dataclasses.replace(settings, max_sandboxes=8), engine, runtime) as opened:
        yield opened


class Victims:
    """The first so many sandboxes that are made: one of their operations hangs."""

    def __init__(self, operation: str, count: int = 1) -> None:
        self._method, self._part = OPERATIONS[operation]
        self._count = count
        self.sandboxes: list[str] = []

    def __call__(self, asked: Asked) -> bool:
        if asked.path.startswith("/containers/create") and len(self.sandboxes) < self._count:
            self.sandboxes.append(asked.sandbox)
        return asked.sandbox in self.sandboxes and asked.method == self._method and self._part in asked.path


async def until_stuck(proxy: EngineProxy, calls: int) -> None:
    async with asyncio.timeout(30):
        while len(proxy.stuck) < calls:  # noqa: ASYNC110 - the proxy sets no event
            await asyncio.sleep(0.05)


def is_process(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


async def honest(house: House) -> Story:
    async with asyncio.timeout(_OTHERS_MUST_END_WITHIN_S):
        return await house.cells("FINAL(str(6 * 7))", limits=RunLimits(max_depth=0))


@pytest.mark.case("F06")
@pytest.mark.parametrize("runtime", ["runc"])  # the orchestrator's own affair
@pytest.mark.parametrize("passes_on", [False, True], ids=["not carried out", "carried out, unanswered"])
@pytest.mark.parametrize("operation", OPERATIONS)
async def test_one_sandbox_whose_engine_hangs_holds_up_nobody_else_and_is_reaped(
    house: House, proxy: EngineProxy, operation: str, passes_on: bool
) -> None:
    victims = Victims(operation)
    proxy.is_stuck, proxy.passes_stuck_calls_on = victims, passes_on
    doomed = asyncio.create_task(house.cells("FINAL('x')", limits=RunLimits(max_depth=0)))
    await asyncio.sleep(0.2)
    if operation != "remove":
        await until_stuck(proxy, 1)
    others = await asyncio.gather(honest(house), honest(house))
    assert [story.end.answer for story in others] == ["42", "42"]
    end = (await asyncio.gather(doomed, return_exceptions=True))[0]
    if operation == "remove":
        assert isinstance(end, Story)
        assert end.end.answer == "x"
    else:
        assert isinstance(end, EngineError), end
    await proxy_recovers(house, proxy)


async def proxy_recovers(house: House, proxy: EngineProxy) -> None:
    """The engine answers again: the next look of the reaper leaves nothing, and no place is withheld."""
    proxy.is_stuck = lambda _asked: False
    reaper = Reaper(house.workplace.instance, house.machine.leases._driver)
    async with asyncio.timeout(60):
        while True:
            try:
                swept = await reaper.sweep()
            except EngineError:
                continue
            if not swept.stuck and not house.workplace.instance.leaked:
                break
            await asyncio.sleep(0.5)
    assert containers_of(house.engine, house.settings.state_dir) == []
    assert house.machine.slots._withheld == 0


@pytest.mark.case("F06")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_places_of_sandboxes_that_cannot_be_removed_are_withheld_and_said(
    house: House, proxy: EngineProxy
) -> None:
    victims = Victims("remove", count=6)
    proxy.is_stuck = victims
    six = await asyncio.gather(*(honest(house) for _ in range(6)))
    assert all(story.end.outcome is Outcome.ANSWERED for story in six)
    assert len(house.workplace.instance.leaked) == 6
    # Two of eight places are left, and no thread of theirs is in the way.
    assert (await honest(house)).end.answer == "42"
    with pytest.raises(EngineError, match="6 of 8 places are taken by sandboxes"):
        await house.cells("1", limits=RunLimits(max_depth=2))
    await proxy_recovers(house, proxy)


@pytest.mark.case("F06")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_a_cell_keeps_its_clock_when_the_engine_answers_nothing_at_all(
    house: House, proxy: EngineProxy
) -> None:
    async with house.sandbox() as inmate:
        proxy.is_stuck = lambda _asked: True
        late = await inmate.cell("while True: pass", timeout_s=3.0)
        assert late.outcome.value == "interrupted"
        assert late.duration_s < 10
        assert await inmate.says("print(1)") == "1"
        proxy.is_stuck = lambda _asked: False


@pytest.mark.case("F06")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_a_guest_whose_container_cannot_be_removed_has_lost_its_socket_and_ends(
    house: House, proxy: EngineProxy
) -> None:
    """Rights are taken first, so that a stuck engine leaves no guest with any."""
    proxy.is_stuck = Victims("remove")
    async with house.sandbox() as inmate:
        pid, sandbox_id = inmate.pid, inmate.leased.sandbox_id
    assert sandbox_id in house.workplace.instance.leaked
    for _ in range(100):
        if not is_process(pid):
            break
        await asyncio.sleep(0.1)
    assert not is_process(pid)
    await proxy_recovers(house, proxy)


@pytest.mark.case("F06")
@pytest.mark.parametrize("runtime", ["runc"])
async def test_a_sandbox_that_goes_away_while_the_engine_is_silent_is_told_as_that(
    house: House, proxy: EngineProxy
) -> None:
    async with house.sandbox() as inmate:
        proxy.is_stuck = lambda _asked: True
        ending = asyncio.create_task(inmate.cell("import time; time.sleep(60)"))
        await asyncio.sleep(0.5)
        await asyncio.to_thread(house.engine.api.kill, inmate.container["Id"])
        lost = await ending
        assert lost.loss is SandboxLoss.ENGINE_GONE
        assert "the container engine failed" in cell_report(lost)
    await proxy_recovers(house, proxy)


# --- An engine that ends ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def private(engine: DockerClient, image_id: str) -> Iterator[PrivateEngine]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("NOT TESTED: an engine of one's own takes root and dockerd")
    with private_engine(engine, image_id) as started:
        yield started


@pytest.mark.case("F09")
@pytest.mark.timeout(180)
@pytest.mark.parametrize("runtime", ["runc"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
async def test_an_engine_that_ends_in_the_middle_of_a_run_ends_it_cleanly_and_the_next_leaves_nothing(
    private: PrivateEngine,
    image_id: str,
    runtime: str,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    monkeypatch.setenv("DOCKER_HOST", private.address)
    with tempfile.TemporaryDirectory(prefix="rlm", dir="/tmp") as state_dir:
        settings = Settings(state_dir=Path(state_dir), image=image_id)
        client = await asyncio.to_thread(private.up)
        try:
            story = Story()
            async with open_house(settings, client, runtime) as house:
                run = asyncio.create_task(
                    house.cells(
                        "kept = 1",
                        "import time; time.sleep(3)",
                        "FINAL(f\"{'kept' in globals()}\")",
                        limits=RunLimits(max_depth=0),
                        story=story,
                    )
                )
                while not any(
                    isinstance(event.payload, CellStarted) and event.payload.turn == 2
                    for event in story.events
                ):
                    assert not run.done()
                    await asyncio.sleep(0.05)
                await asyncio.to_thread(private.end, number)
                async with asyncio.timeout(60):
                    await asyncio.wait((run,))
                if number is signal.SIGTERM:
                    # It takes its containers with it, and there is none to replace the sandbox.
                    assert story.end.outcome is Outcome.SANDBOX_LOST
                    assert "was lost and not replaced" in story.end.why
                else:
                    # Its containers go on, and so does the run.
                    assert story.end.answer == "True"
                assert house.workplace.instance.leaked
            client.close()
            client = await asyncio.to_thread(private.up)
            async with open_house(settings, client, runtime) as following:
                assert containers_of(client, settings.state_dir) == []
                assert (await following.cells("FINAL('on')")).end.answer == "on"
        finally:
            client.close()
            await asyncio.to_thread(private.end, signal.SIGTERM)
            # Now and not in the next test, where those sockets would count.
            gc.collect()
