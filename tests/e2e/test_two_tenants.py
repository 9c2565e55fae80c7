"""Two tenants of one `rlm serve`, many runs each, one honest and one hostile, over gRPC and HTTP.

How many runs each is in RLM_TEST_RUNS, 12 unless it is set; `make test-service` takes 100.
"""

import asyncio
import json
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import aiohttp
import grpc.aio
import pytest
from docker import DockerClient
from rlm_proto.v1 import run_pb2 as pb

from orchestrator.config import Settings
from orchestrator.store.books import TenantRules
from tests.containers import containers_of
from tests.e2e.serving import Process, client, new_key, serving
from tests.fakes import anthropic_server as fake
from tests.fakes.service import short_directory

RUNS = int(os.environ.get("RLM_TEST_RUNS", "12"))
KEY = "sk-ant-canary-of-the-provider"
HONEST, HOSTILE = "canary-of-the-honest", "canary-of-the-hostile"

pytestmark = [pytest.mark.docker, pytest.mark.timeout(120 + 4 * RUNS)]

HONEST_CELL = "FINAL(llm_query('honest ' + context))"
# Each spends what it can, then tries one thing more. None may cost the other tenant anything.
HOSTILE_BEGINNING = (
    "try:\n    llm_query_batched(['hostile ' + context] * 200)\nexcept SubCallError:\n    pass\n"
)
HOSTILE_CELLS = (
    "import glob\nprint([open(name).read()[:9999] for name in glob.glob('/context/*')[:3]])\nFINAL('spent')",
    "print('x' * 10**7)\nFINAL('flooded')",
    "import os\nos.kill(1, 9)\nos.kill(os.getppid(), 9)\nFINAL('killed')",
    """\
import socket
open_ones = []
for _ in range(200):
    one = socket.socket(socket.AF_UNIX)
    one.connect('/run/rlm/broker.sock')
    one.send(b'PRI * HTTP/2.0 junk')
    open_ones.append(one)
FINAL('dialled')
""",
    """\
import os
for _ in range(500):
    try:
        os.fork() or os._exit(0)
    except OSError:
        break
FINAL('forked')
""",
)


def play(request: dict[str, Any]) -> fake.Play:
    """The models of both."""
    said = json.dumps(request["messages"])
    if "tools" not in request:
        content = request["messages"][0]["content"]
        prompt = content if isinstance(content, str) else content[0]["text"]
        return fake.Say(prompt.split()[-1] if prompt.startswith("honest ") else "spent")
    if any(message["role"] == "assistant" for message in request["messages"]):
        return fake.Say("no further")
    if "Honest question" in said:
        return fake.Call(HONEST_CELL)
    number = int(said.partition("Hostile question ")[2].partition(".")[0])
    return fake.Call(HOSTILE_BEGINNING + HOSTILE_CELLS[number % len(HOSTILE_CELLS)])


@pytest.fixture
def directory() -> Iterator[Path]:
    with short_directory() as path:
        yield path


async def ask_over_grpc(server: Process, key: str, question: str, text: str) -> pb.Run:
    async with client(server, key) as call:
        request = pb.CreateRunRequest(
            idempotency_key=question,
            question=question.encode(),
            text=text.encode(),
            options=pb.RunOptions(max_calls=40, max_depth=0, max_turns=4),
        )
        run_id = (await call("CreateRun", request)).run.run_id
        async for _ in call("WatchRun", pb.WatchRunRequest(run_id=run_id)):
            pass
        run: pb.Run = (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run
        return run


async def ask_over_http(http: aiohttp.ClientSession, question: str, text: str) -> dict[str, Any]:
    body = {
        "idempotency_key": question,
        "question": question,
        "text": text,
        "options": {"max_calls": 40, "max_depth": 0, "max_turns": 4},
    }
    async with http.post("/v1/runs", json=body) as created:
        assert created.status == 201, await created.text()
        run_id = (await created.json())["run"]["run_id"]
    async with http.get(f"/v1/runs/{run_id}/events") as events:
        async for _ in events.content:
            pass
    async with http.get(f"/v1/runs/{run_id}") as got:
        run: dict[str, Any] = await got.json()
        return run


def rows(directory: Path, query: str) -> list[Any]:
    with sqlite3.connect(directory / "state" / "service.db") as database:
        return database.execute(query).fetchall()


async def test_a_hostile_tenant_costs_an_honest_one_nothing_and_every_token_is_where_it_belongs(
    directory: Path, settings: Settings, engine: DockerClient
) -> None:
    async with (
        fake.serve(play, key=KEY) as provider,
        serving(
            directory,
            settings,
            "",
            RLM_MODEL="claude-haiku-5-5",
            RLM_BASE_URL=provider.url,
            ANTHROPIC_API_KEY=KEY,
            RLM_MAX_SANDBOXES="8",
        ) as server,
    ):
        rules = TenantRules(max_concurrent_runs=4)
        honest = await new_key(directory, "honest", rules)
        hostile = await new_key(directory, "hostile", rules)
        async with aiohttp.ClientSession(
            f"http://{server.http}", headers={"authorization": f"Bearer {honest}"}
        ) as http:
            asked = [
                ask_over_http(http, f"Honest question {number}.", f"{HONEST} {number * 7}")
                if number % 2
                else ask_over_grpc(server, honest, f"Honest question {number}.", f"{HONEST} {number * 7}")
                for number in range(RUNS)
            ]
            attacks = [
                ask_over_grpc(server, hostile, f"Hostile question {number}.", f"{HOSTILE} {number}")
                for number in range(RUNS)
            ]
            answers, ended = await asyncio.gather(asyncio.gather(*asked), asyncio.gather(*attacks))
        async with client(server, honest) as call:
            usage = await call("GetUsage", pb.GetUsageRequest())
            foreign = {(await _status(call, pb.GetRunRequest(run_id=run.run_id))) for run in ended[:5]}
        async with client(server, hostile) as call:
            usage_of_hostile = await call("GetUsage", pb.GetUsageRequest())
        log = [(json.dumps(served.body), sum((served.billed or {}).values())) for served in provider.log]

    told = [run.answer.decode() if isinstance(run, pb.Run) else cast(Any, run)["answer"] for run in answers]
    assert told == [str(number * 7) for number in range(RUNS)]
    assert len({run.run_id for run in ended}) == RUNS
    assert foreign == {"NOT_FOUND"}
    # The provider's log, the ledger and what the tenants are told agree to the token.
    of_honest = sum(billed for body, billed in log if "onest" in body)
    of_hostile = sum(billed for body, billed in log if "onest" not in body)
    ledger = dict(
        rows(
            directory,
            "SELECT name, sum(confirmed_tokens) FROM ledger JOIN tenants USING (tenant_id) GROUP BY name",
        )
    )
    assert ledger == {b"honest": of_honest, b"hostile": of_hostile}
    assert usage.day.tokens == of_honest
    assert usage_of_hostile.day.tokens >= of_hostile
    assert usage.live_runs == usage_of_hostile.live_runs == 0
    # Every canary where it belongs, and nowhere else.
    assert not [body for body, _ in log if HONEST in body and HOSTILE in body]
    events = rows(
        directory,
        "SELECT tenants.name, events.event FROM events JOIN runs ON runs.run_id = events.root_run_id"
        " JOIN tenants ON tenants.tenant_id = runs.tenant_id",
    )
    assert not [event for name, event in events if (HONEST if name == b"hostile" else HOSTILE) in event]
    assert [event for name, event in events if name == b"honest" and HONEST in event]
    assert not [event for _, event in events if KEY in event]
    assert not containers_of(engine, directory / "state")


async def _status(call: Any, request: Any) -> str:
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await call("GetRun", request)
    return refused.value.code().name
