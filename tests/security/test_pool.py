"""Sandboxes made ahead, in real containers: nobody's until they are lent, once, and gone with their maker."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient

from orchestrator.config import PoolSettings, Settings
from orchestrator.limits import RunLimits
from orchestrator.sandbox.pool_events import Phase
from tests.containers import containers_of, instances_in
from tests.security.house import House, Script, open_house, until

_ROOT = Path(__file__).resolve().parents[2]


@asynccontextmanager
async def pooled(
    settings: Settings, engine: DockerClient, runtime: str, size: int, *, max_sandboxes: int = 8
) -> AsyncIterator[House]:
    """A house whose pool is full."""
    with_pool = replace(settings, max_sandboxes=max_sandboxes, pool=PoolSettings(runc=size, runsc=size))
    async with open_house(with_pool, engine, runtime) as house:
        await full(house, size)
        yield house


async def full(house: House, size: int) -> None:
    await until(lambda: house.machine.pool.count(Phase.WAITING) == size)


def description(engine: DockerClient, container: str) -> dict[str, Any]:
    """What the engine knows of a container but for its state. It tells mounts in any order."""
    body = engine.api.inspect_container(container)
    mounts = sorted(body["Mounts"], key=itemgetter("Destination"))
    return {"Config": body["Config"], "HostConfig": body["HostConfig"], "Mounts": mounts}


@pytest.mark.case("F04")
async def test_sandboxes_made_ahead_share_no_randomness(
    settings: Settings, engine: DockerClient, runtime: str
) -> None:
    draw = (
        "import os, random, secrets, tempfile, uuid\n"
        "print(os.urandom(8).hex(), random.random(), secrets.token_hex(8), uuid.uuid4(), uuid.uuid1(),"
        " hash('x'), next(tempfile._get_candidate_names()), sep='\\n')"
    )
    async with pooled(settings, engine, runtime, 2) as house, house.sandbox() as one, house.sandbox() as two:
        assert house.machine.pool.stats()[runtime].warm == 2
        assert one.leased.hash_seed != two.leased.hash_seed
        both = [(await inmate.says(draw)).splitlines() for inmate in (one, two)]
        assert all(mine != others for mine, others in zip(*both, strict=True))


@pytest.mark.case("F05")
async def test_a_waiting_sandbox_is_nobodys_and_then_one_tenants_for_ever(
    settings: Settings, engine: DockerClient, runtime: str
) -> None:
    look = (
        "import os, pathlib\n"
        "print(context, *sorted(os.listdir('/context')), *os.listdir('/tmp'), sorted(os.environ), sep='|')"
    )
    async with pooled(settings, engine, runtime, 2) as house:
        waiting = containers_of(engine, settings.state_dir)
        described = {container: description(engine, container) for container in waiting}
        async with house.sandbox("of the first") as first, house.sandbox("of the second") as second:
            assert {first.container["Id"], second.container["Id"]} == set(waiting)
            said_first, said_second = await first.says(look), await second.says(look)
            assert said_first.startswith("of the first|")
            assert said_first.replace("first", "second") == said_second
            # What the engine knows of them it knew before there was a tenant.
            assert {container: description(engine, container) for container in waiting} == described
        await full(house, 2)
        async with house.sandbox("of the third") as third:
            assert third.container["Id"] not in waiting
            assert "first" not in await third.says(look)


@pytest.mark.case("F05")
async def test_one_that_is_killed_while_it_waits_is_not_lent(
    settings: Settings, engine: DockerClient, runtime: str
) -> None:
    async with pooled(settings, engine, runtime, 1) as house:
        (doomed,) = containers_of(engine, settings.state_dir)
        await asyncio.to_thread(engine.api.kill, doomed)
        await until(lambda: house.machine.pool.stats()[runtime].died == 1)
        async with house.sandbox() as inmate:
            assert inmate.container["Id"] != doomed
            assert await inmate.says("print('well')") == "well"


async def test_a_run_tree_lives_from_the_pool_within_the_limit_of_sandboxes(
    settings: Settings, engine: DockerClient, runtime: str
) -> None:
    children = "print(rlm_query_batched(['a', 'b', 'c'], ['1', '2', '3']))\nFINAL('all of them')"
    async with pooled(settings, engine, runtime, 2, max_sandboxes=4) as house:
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, len(await asyncio.to_thread(containers_of, engine, settings.state_dir)))
                await asyncio.sleep(0.02)

        watching = asyncio.create_task(watch())
        story = await house.run(
            Script([children], child_steps=["FINAL(context)"]), limits=RunLimits(max_depth=1)
        )
        watching.cancel()
        assert story.end.answer == "all of them"
        stats = house.machine.pool.stats()[runtime]
        assert stats.warm >= 2
        assert stats.warm + stats.cold == 4
        assert most <= 4
        await full(house, 2)
        assert len(house.workplace.instance.alive) == 2


async def test_a_resumed_run_has_the_seed_it_had_in_a_sandbox_made_for_it(
    settings: Settings, engine: DockerClient, runtime: str
) -> None:
    draw = "import random\nprint(random.random(), hash('x'))"
    async with pooled(settings, engine, runtime, 1) as house:
        async with house.sandbox() as first:
            seed, drawn = first.leased.hash_seed, await first.says(draw)
        async with house.sandbox(hash_seed=seed) as again:
            assert again.leased.hash_seed == seed
            assert await again.says(draw) == drawn
        assert house.machine.pool.stats()[runtime].own == 1


@contextmanager
def full_pool(settings: Settings, runtime: str, size: int) -> Iterator["subprocess.Popen[str]"]:
    """Another orchestrator with so many waiting and one lent; killed after the block at the latest."""
    program = [sys.executable, "-m", "tests.security.full_pool"]
    arguments = [str(settings.state_dir), settings.image, runtime, str(size)]
    with subprocess.Popen([*program, *arguments], cwd=_ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


@pytest.mark.case("F01")
async def test_of_a_killed_orchestrators_pool_nothing_is_left_after_the_next_start(
    settings: Settings, engine: DockerClient, runtime: str
) -> None:
    with full_pool(settings, runtime, 3):
        assert len(containers_of(engine, settings.state_dir)) == 4
    async with open_house(settings, engine, runtime):
        await until(lambda: not containers_of(engine, settings.state_dir))
        await until(lambda: len(instances_in(settings.state_dir)) == 2)
