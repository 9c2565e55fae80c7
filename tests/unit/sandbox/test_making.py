"""A start that hangs in its runtime, which Docker's own calls cannot end."""

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from orchestrator.errors import EngineError
from orchestrator.ids import SandboxId
from orchestrator.sandbox.cgroups import NOTHING_KNOWN
from orchestrator.sandbox.instance import claim_instance
from orchestrator.sandbox.making import SandboxMaker
from orchestrator.sandbox.port import Counters, Ending, Found, SandboxSpec

CONTAINER = "e" * 64


@pytest.fixture
def state_dir() -> Iterator[Path]:
    # Not `tmp_path`: the path of a Unix socket below it may have 107 bytes.
    made = Path(tempfile.mkdtemp(prefix="rlm", dir="/tmp"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def stuck(tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """A process of a runtime that spins: known by its program and by the container in its arguments."""
    program = tmp_path / "runsc-sandbox"
    shutil.copy("/bin/sh", program)
    with subprocess.Popen(
        [program, "-c", "read forever", f"--bundle=/run/{CONTAINER}"], stdin=subprocess.PIPE
    ) as it:
        yield it
        it.kill()


class StuckDriver:
    """An engine whose start hangs, and all about that container with it, while a process lives."""

    image = "sha256:1"

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self.destroyed = 0

    async def start(self, spec: SandboxSpec) -> None:
        assert spec.record is not None
        spec.record.write_text(CONTAINER, encoding="ascii")
        raise EngineError("the container engine did not answer within 60 s")

    async def destroy(self, sandbox_id: SandboxId) -> None:
        if self._process.poll() is None:
            raise EngineError("the container engine still owes an answer about this sandbox")
        self.destroyed += 1

    async def cpu_s(self, sandbox_id: SandboxId) -> float:
        raise NotImplementedError

    async def ending(self, sandbox_id: SandboxId) -> Ending:
        raise NotImplementedError

    def counters(self, sandbox_id: SandboxId) -> Counters:
        return NOTHING_KNOWN

    async def found(self) -> Sequence[Found]:
        return ()

    async def aclose(self) -> None: ...


@pytest.mark.case("A13")
async def test_a_start_that_hangs_in_its_runtime_is_ended_with_the_runtimes_processes(
    state_dir: Path, stuck: "subprocess.Popen[bytes]"
) -> None:
    driver = StuckDriver(stuck)
    with claim_instance(state_dir, uids_dir=state_dir / "uids") as instance:
        with pytest.raises(EngineError, match="did not answer within 60 s"):
            async with (
                asyncio.timeout(30),
                SandboxMaker(instance, driver).make(runtime="runsc", expires_at_s=0),
            ):
                pytest.fail("it was made")
        assert stuck.wait(5) != 0
        assert driver.destroyed == 1
        assert not instance.leaked
