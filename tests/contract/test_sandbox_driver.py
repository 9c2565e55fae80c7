"""What every sandbox driver must do. A new one joins `DRIVERS`, and nowhere else."""

import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.cells import CellClock, CellOutcome, CellResult, SandboxLoss
from orchestrator.contexts.store import ContextStore
from orchestrator.errors import InvariantError, SandboxStartError
from orchestrator.ids import LOCAL_TENANT, InstanceId
from orchestrator.sandbox import image
from orchestrator.sandbox.docker_driver import DockerDriver, connect_engine
from orchestrator.sandbox.instance import Instance, claim_instance
from orchestrator.sandbox.lease import LeasedSandbox, SandboxLeases
from orchestrator.sandbox.making import SandboxMaker
from orchestrator.sandbox.port import Ending, SandboxDriver
from orchestrator.sandbox.posture import Resources
from tests.fakes.process_driver import ProcessDriver

_MIB = 1024 * 1024
RESOURCES = Resources(
    memory_bytes=256 * _MIB,
    cpus=1.0,
    pids=256,
    tmp_bytes=32 * _MIB,
    shm_bytes=16 * _MIB,
    open_files=1_024,
    file_size_bytes=64 * _MIB,
)


@dataclass(frozen=True)
class Rig:
    driver: SandboxDriver
    leases: SandboxLeases
    runtime: str
    contexts: ContextStore
    instance: Instance

    @asynccontextmanager
    async def sandbox(self, text: bytes = b"a context\n") -> AsyncIterator[LeasedSandbox]:
        context = self.contexts.stage_text(LOCAL_TENANT, text)
        async with self.leases.open(
            lambda directory: self.contexts.link_into(context, directory),
            runtime=self.runtime,
            guest_services=(),
            max_concurrent_calls=4,
        ) as sandbox:
            yield sandbox


async def run_cell(sandbox: LeasedSandbox, code: str, *, timeout_s: float = 30.0) -> CellResult:
    clock = CellClock(time.monotonic(), timeout_s, cell_cpu_s=60.0, cell_ceiling_s=60.0)
    return await sandbox.run_cell(code, clock)


@asynccontextmanager
async def _rig(make: Callable[[InstanceId], SandboxDriver], runtime: str) -> AsyncIterator[Rig]:
    # Short, because a Unix socket's path is: pytest's own temporary directories are too deep.
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir, claim_instance(Path(state_dir)) as instance:
        contexts = ContextStore(instance.contexts_dir)
        driver = make(instance.instance_id)
        leases = SandboxLeases(instance, driver, memory_bytes=RESOURCES.memory_bytes)
        try:
            yield Rig(driver, leases, runtime, contexts, instance)
        finally:
            await driver.aclose()
            contexts.close()


def _process_rig() -> AbstractAsyncContextManager[Rig]:
    return _rig(lambda _instance_id: ProcessDriver(), "runc")


def _docker_rig(runtime: str) -> AbstractAsyncContextManager[Rig]:
    client = connect_engine()
    image_id = image.find(client)
    return _rig(
        lambda instance_id: DockerDriver(
            client.api, image_id=image_id, instance_id=instance_id, resources=RESOURCES
        ),
        runtime,
    )


DRIVERS = [
    pytest.param(_process_rig, id="process"),
    pytest.param(lambda: _docker_rig("runc"), id="docker-runc", marks=pytest.mark.docker),
    pytest.param(
        lambda: _docker_rig("runsc"), id="docker-runsc", marks=[pytest.mark.docker, pytest.mark.runsc]
    ),
]


@pytest.fixture(params=DRIVERS)
async def rig(request: pytest.FixtureRequest) -> AsyncIterator[Rig]:
    async with request.param() as opened:
        yield opened


async def test_a_sandbox_runs_cells_in_one_namespace(rig: Rig) -> None:
    async with rig.sandbox() as sandbox:
        assert (await run_cell(sandbox, "x = 20")).outcome is CellOutcome.OK
        assert (await run_cell(sandbox, "x += 1; print(x); x * 2")).output == "21\n42\n"


async def test_a_sandbox_sees_its_context_and_cannot_change_it(rig: Rig) -> None:
    async with rig.sandbox("grüße\n".encode()) as sandbox:
        assert (await run_cell(sandbox, "print(len(context), context)")).output == "6 grüße\n\n"


async def test_a_cell_that_ends_its_process_loses_its_own_namespace_only(rig: Rig) -> None:
    async with rig.sandbox() as doomed, rig.sandbox() as neighbour:
        await run_cell(doomed, "mine = 1")
        await run_cell(neighbour, "yours = 2")
        died = await run_cell(doomed, "import os; os._exit(7)")
        assert (died.outcome, died.status, died.lost_variables) == (CellOutcome.EXITED, 7, ("mine",))
        assert (await run_cell(doomed, "'mine' in globals()")).output == "False\n"
        assert (await run_cell(neighbour, "yours")).output == "2\n"


async def test_a_cell_past_its_time_is_interrupted_and_keeps_its_namespace(rig: Rig) -> None:
    async with rig.sandbox() as sandbox:
        await run_cell(sandbox, "kept = 'still here'")
        late = await run_cell(sandbox, "while True: pass", timeout_s=0.5)
        assert late.outcome is CellOutcome.INTERRUPTED
        assert "while True" in late.traceback
        assert (await run_cell(sandbox, "kept")).output == "'still here'\n"


async def test_a_cell_that_ignores_the_interrupt_is_killed_and_the_next_one_runs(rig: Rig) -> None:
    stubborn = "import time\nwhile True:\n  try:\n    time.sleep(60)\n  except BaseException: pass"
    async with rig.sandbox() as sandbox:
        await run_cell(sandbox, "gone = 1")
        killed = await run_cell(sandbox, stubborn, timeout_s=0.5)
        assert (killed.outcome, killed.lost_variables) == (CellOutcome.KILLED, ("gone",))
        assert (await run_cell(sandbox, "1 + 1")).output == "2\n"


async def test_siblings_have_different_seeds(rig: Rig) -> None:
    async with rig.sandbox() as one, rig.sandbox() as other:
        assert one.hash_seed != other.hash_seed
        draw = "import random; print(random.random(), hash('x'))"
        assert (await run_cell(one, draw)).output != (await run_cell(other, draw)).output


async def test_processor_time_is_seen_from_outside(rig: Rig) -> None:
    async with rig.sandbox() as sandbox:
        before_s = await rig.driver.cpu_s(sandbox.sandbox_id)
        await run_cell(
            sandbox, "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"
        )
        assert await rig.driver.cpu_s(sandbox.sandbox_id) - before_s > 0.2


async def test_a_destroyed_sandbox_is_gone_and_can_be_destroyed_again(rig: Rig) -> None:
    async with rig.sandbox() as sandbox:
        sandbox_id = sandbox.sandbox_id
        assert await rig.driver.ending(sandbox_id) is Ending.RUNNING
    assert await rig.driver.ending(sandbox_id) is Ending.GONE
    assert await rig.driver.cpu_s(sandbox_id) == 0.0
    await rig.driver.destroy(sandbox_id)


async def test_a_sandbox_that_goes_away_under_a_cell_is_reported_as_lost(rig: Rig) -> None:
    async with rig.sandbox() as sandbox:
        await run_cell(sandbox, "x = 1")
        await rig.driver.destroy(sandbox.sandbox_id)
        lost = await run_cell(sandbox, "x")
        assert (lost.outcome, lost.lost_variables) == (CellOutcome.SANDBOX_LOST, ("x",))


async def test_a_sandbox_that_went_away_under_a_cell_is_told_as_lost_from_outside(rig: Rig) -> None:
    async with rig.sandbox() as sandbox:
        await rig.driver.destroy(sandbox.sandbox_id)
        assert (await run_cell(sandbox, "1")).loss is SandboxLoss.CONTAINER_GONE


async def test_what_is_on_the_engine_can_be_listed_with_whose_it_is(rig: Rig) -> None:
    async with rig.sandbox() as sandbox:
        (found,) = [one for one in await rig.driver.found() if one.sandbox_id == sandbox.sandbox_id]
        assert found.instance_id.startswith("i")
    assert sandbox.sandbox_id not in {one.sandbox_id for one in await rig.driver.found()}


async def test_counters_that_cannot_be_read_are_unknown_and_never_an_error(rig: Rig) -> None:
    async with rig.sandbox() as sandbox:
        counters = rig.driver.counters(sandbox.sandbox_id)
        assert counters.oom_kills in {0, None}
        assert counters.refused_forks in {0, None}
    assert rig.driver.counters(sandbox.sandbox_id) == (None, None, None)


@pytest.mark.case("F03")
async def test_a_sandbox_is_leased_once(rig: Rig) -> None:
    maker = SandboxMaker(rig.instance, rig.driver)
    async with maker.make(runtime=rig.runtime, expires_at_s=0) as made:
        assert not list(made.context_dir.iterdir()), "it knows no context before it is leased"
        made.services.bind(())
        with pytest.raises(InvariantError, match="twice"):
            made.services.bind(())


async def test_an_unknown_runtime_is_refused(rig: Rig) -> None:
    wrong = Rig(rig.driver, rig.leases, "no-such-runtime", rig.contexts, rig.instance)
    with pytest.raises(SandboxStartError):
        async with wrong.sandbox():
            pass
