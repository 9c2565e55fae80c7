"""`rlm serve`, killed again and again in the middle of run trees: nothing is lost, nothing asked for twice.

How often is in RLM_TEST_KILLS, 2 unless it is set; `make test-service` takes 50.
"""

import asyncio
import json
import os
import random
import signal
import sqlite3
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from docker import DockerClient
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.config import Settings
from tests.containers import containers_of, instances_in
from tests.e2e.serving import client, new_key, serving
from tests.fakes.service import short_directory

KILLS = int(os.environ.get("RLM_TEST_KILLS", "2"))
KILLS_OF_A_RUN = 8
"""A cell that got no further in ten restarts is not run again (`runs/replay.py`)."""
LONGEST_LIFE_S = 3.0

pytestmark = [pytest.mark.docker, pytest.mark.timeout(60 + 20 * KILLS)]

# 200 sub-calls: 80 of the root's first cell, 2 children with 40 each, 40 one after the other.
SCRIPT = """
import time

def run(question, depth):
    if depth:
        yield "said = llm_query_batched([f'{context} {number}' for number in range(40)])\\nprint(len(said))"
        yield "FINAL(str(sum(map(int, said))))"
    yield "first = llm_query_batched([f'first {number}' for number in range(80)])\\nprint(len(first))"
    yield "children = rlm_query_batched(['How many?'] * 2, ['one', 'two'])\\nprint(children)"
    yield "then = [llm_query(f'then {number}') for number in range(40)]\\nprint(len(then))"
    yield "FINAL(str(sum(map(int, [*first, *children, *then]))))"

def complete(prompt):
    with open(LOG, "a") as log:
        log.write(prompt + "\\n")
    time.sleep(0.01)
    return prompt.split()[-1]
"""
ANSWER = str(sum(range(80)) + 2 * sum(range(40)) + sum(range(40)))


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


def asked(directory: Path) -> Counter[str]:
    """How often the provider was asked each prompt."""
    log = directory / "asked"
    return Counter(log.read_text().splitlines() if log.exists() else ())


def journalled(directory: Path, root: str) -> set[str]:
    """Prompts of a run tree whose answers the database has."""
    with sqlite3.connect(directory / "state" / "service.db") as database:
        events = [
            json.loads(event)
            for (event,) in database.execute("SELECT event FROM events WHERE root_run_id = ?", (root,))
        ]
    started = {
        (event["run_id"], event["call"]): event for event in events if event["kind"] == "sub_call_started"
    }
    return {
        str(started[event["run_id"], event["call"]]["prompt"])
        for event in events
        if event["kind"] == "sub_call_ended"
        and not event["error"]
        and started[event["run_id"], event["call"]]["what"] == "complete"
    }


async def killed_in_its_life(directory: Path, settings: Settings, life_s: float) -> None:
    async with serving(directory, settings, SCRIPT) as server:
        await asyncio.sleep(life_s)
        await server.end(signal.SIGKILL)


async def test_killed_at_any_moment_each_run_ends_right_and_no_journalled_call_is_asked_again(
    directory: Path, settings: Settings, engine: DockerClient
) -> None:
    moments = random.Random()  # noqa: S311 - no secret
    async with serving(directory, settings, SCRIPT) as server:
        key = await new_key(directory)
        assert await server.end(signal.SIGTERM) == 0
    for start in range(0, KILLS, KILLS_OF_A_RUN):
        (directory / "asked").unlink(missing_ok=True)
        async with serving(directory, settings, SCRIPT) as server, client(server, key) as call:
            request = pb.CreateRunRequest(
                idempotency_key=str(start),
                question=b"How many?",
                text=b"nothing to see",
                options=pb.RunOptions(max_calls=5_000, max_turns=40),
            )
            run_id = (await call("CreateRun", request)).run.run_id
            await asyncio.sleep(moments.uniform(0, LONGEST_LIFE_S))
            await server.end(signal.SIGKILL)
        paid: list[tuple[Counter[str], set[str]]] = [(asked(directory), journalled(directory, run_id))]
        for _ in range(min(KILLS - start, KILLS_OF_A_RUN) - 1):
            await killed_in_its_life(directory, settings, moments.uniform(0, LONGEST_LIFE_S))
            paid.append((asked(directory), journalled(directory, run_id)))
        async with serving(directory, settings, SCRIPT) as server, client(server, key) as call:
            async for _ in call("WatchRun", pb.WatchRunRequest(run_id=run_id)):
                pass
            run = (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run
            usage = await call("GetUsage", pb.GetUsageRequest())
            assert (run.outcome, run.answer.decode()) == ("answered", ANSWER), run.error
            assert usage.live_runs == 0
            assert usage.held.tokens == 0
            assert await server.end(signal.SIGTERM) == 0
        at_last = asked(directory)
        for before, known in paid:
            again = {prompt for prompt in known if at_last[prompt] > before[prompt]}
            assert not again, f"journalled and asked again: {sorted(again)}"
        assert not containers_of(engine, directory / "state")
        assert not instances_in(directory / "state")
