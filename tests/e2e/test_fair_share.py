"""One tenant with 500 queued runs, each as wide in sub-calls as it may be, beside another with one small run.

What the other waits for is counted in what the provider saw, and not in seconds: see docs/service.md for the
bounds, with two tenants that wait.
"""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from docker import DockerClient
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.config import Settings
from orchestrator.store.books import TenantRules
from tests.containers import containers_of
from tests.e2e.serving import client, new_key, serving
from tests.fakes import anthropic_server as fake
from tests.fakes.service import short_directory

pytestmark = [pytest.mark.docker, pytest.mark.timeout(180)]

QUEUED = 500
SANDBOXES = 4
CALLS_AT_ONCE = 4
WIDE = 16
A_WHILE_S = 0.25
"""For a reply of the flood: so long that a call which stood behind its queue would stand out."""

FLOOD_CELL = f"llm_query_batched(['flood'] * {50 * WIDE})\nFINAL('spent')"
MY_CELL = "FINAL(' '.join(llm_query(f'mine {number}') for number in range(4)))"


@dataclass
class Provider:
    """Its own log of what went out and came back, and whose it was."""

    when: list[tuple[float, str]] = field(default_factory=list)
    """With the Unix time, which the server's events have too."""
    in_flight: int = 0
    most_in_flight: int = 0

    @property
    def log(self) -> list[str]:
        return [entry for _, entry in self.when]

    async def play(self, request: dict[str, Any]) -> fake.Play:
        said = json.dumps(request["messages"])
        whose, what = "mine" if "mine" in said else "flood", "turn" if "tools" in request else "call"
        self.when.append((time.time(), f"{whose} {what} out"))
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            await asyncio.sleep(A_WHILE_S)
        finally:
            self.in_flight -= 1
            self.when.append((time.time(), f"{whose} {what} back"))
        if what == "turn":
            return fake.Call(MY_CELL if whose == "mine" else FLOOD_CELL)
        return fake.Say("yes")

    def count(self, what: str, since: int = 0) -> int:
        return self.log[since:].count(what)


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


def a_run(question: str) -> pb.CreateRunRequest:
    return pb.CreateRunRequest(
        idempotency_key=question,
        question=question.encode(),
        text=b"text",
        options=pb.RunOptions(max_depth=0, max_concurrency=WIDE, max_calls=100_000, max_tokens=1_000_000_000),
    )


async def test_500_queued_runs_of_one_tenant_delay_anothers_run_and_calls_by_the_stated_bounds(
    directory: Path, settings: Settings, engine: DockerClient
) -> None:
    played = Provider()
    async with (
        fake.serve(played.play, key="sk-ant-test") as provider,
        serving(
            directory,
            settings,
            "",
            RLM_MODEL="claude-haiku-5-5",
            RLM_BASE_URL=provider.url,
            ANTHROPIC_API_KEY="sk-ant-test",
            RLM_MAX_SANDBOXES=str(SANDBOXES),
            RLM_MAX_MODEL_CALLS=str(CALLS_AT_ONCE),
        ) as server,
    ):
        rules = TenantRules(max_concurrent_runs=SANDBOXES)
        flood, mine = await new_key(directory, "flood", rules), await new_key(directory, "mine", rules)
        async with client(server, flood) as call, client(server, mine) as my_call:
            created = [(await call("CreateRun", a_run(f"flood {number}"))).run for number in range(QUEUED)]
            async with asyncio.timeout(60):
                while played.count("flood call out") < 2 * CALLS_AT_ONCE:  # noqa: ASYNC110 - its own log
                    await asyncio.sleep(0.05)
            # Whoever asks now finds every sandbox and every slot taken, and a long line behind each.
            before = len(played.log)
            run_id = (await my_call("CreateRun", a_run("mine"))).run.run_id
            await call("CancelRun", pb.CancelRunRequest(run_id=created[0].run_id))
            events = [
                json.loads(told.event_json)
                async for told in my_call("WatchRun", pb.WatchRunRequest(run_id=run_id))
            ]
            answered = (await my_call("GetRun", pb.GetRunRequest(run_id=run_id))).run
            usage = await call("GetUsage", pb.GetUsageRequest())
        assert await server.end(signal.SIGTERM) == 0

    assert answered.answer == b"yes yes yes yes"
    assert usage.live_runs == QUEUED - 1, "the flood has hardly begun"
    assert played.most_in_flight <= CALLS_AT_ONCE
    log = played.log[before:]
    began = log.index("mine turn out")
    # Runs: after one end of another's run, none of the flood's is started before mine.
    assert log[:began].count("flood turn out") == 0
    # Calls: from when one of mine was asked for until it went out, at most one of the flood's goes out first,
    # and those that were on their way to the provider. First in, first out it would be the line, some 60.
    asked = [event["at"] for event in events if event["kind"] == "sub_call_started"]
    went_out = [at for at, entry in played.when if entry == "mine call out"]
    assert len(asked) == len(went_out) == 4
    for from_s, to_s in zip(asked, went_out, strict=True):
        first = [entry for at, entry in played.when if from_s < at < to_s and entry == "flood call out"]
        assert len(first) <= 1 + CALLS_AT_ONCE
    assert not containers_of(engine, directory / "state")
