"""`rlm serve` whose container engine ends, comes back, and hangs: its runs go on in new sandboxes."""

import asyncio
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from docker import DockerClient

from orchestrator.config import Settings
from orchestrator.server.readiness import ENGINE
from tests.containers import containers_of
from tests.e2e.serving import client, new_key, serving
from tests.e2e.waiting import (
    DRAIN_S,
    asked,
    create,
    drains,
    ended,
    happens,
    says,
    until,
    until_paid,
)
from tests.fakes.service import short_directory
from tests.security.private_engine import PrivateEngine, private_engine

pytestmark = [pytest.mark.docker, pytest.mark.timeout(180)]


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


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
