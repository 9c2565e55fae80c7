"""Clients that wait for a server in trouble: for its runs, for what it says of itself, for its end."""

import asyncio
import json
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import httpx2
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rlm_proto.v1 import run_pb2 as pb

from tests.e2e.serving import Process

SOON_S = 60.0
"""For what takes a few looks of the server at its parts."""
DRAIN_S = 2
ENDS_WITHIN_S = 60.0
"""After SIGTERM: the grace, and what has a deadline of its own behind it."""

Call = Callable[[str, Any], Any]
"""Calls a method by its name, as `serving.client` does."""


def asking(key: str) -> pb.CreateRunRequest:
    return pb.CreateRunRequest(idempotency_key=key, question=b"How many?", text=key.encode())


async def create(call: Call, key: str) -> str:
    return str((await call("CreateRun", asking(key))).run.run_id)


async def ended(call: Call, run_id: str) -> pb.Run:
    """The run once it has ended, whatever its watcher met meanwhile: it asks again from where it was."""
    position = 0
    give_up_s = time.monotonic() + SOON_S
    while True:
        try:
            async for told in call("WatchRun", pb.WatchRunRequest(run_id=run_id, from_position=position)):
                assert told.position == position
                position += 1
            run: pb.Run = (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
        else:
            if run.state == pb.RUN_STATE_ENDED:
                return run
        assert time.monotonic() < give_up_s, "the run does not end"
        await asyncio.sleep(0.3)


async def happens(call: Call, run_id: str, kind: str, *, times: int) -> None:
    """Wait for so many events of a kind."""
    async with asyncio.timeout(SOON_S):
        async for told in call("WatchRun", pb.WatchRunRequest(run_id=run_id)):
            times -= json.loads(told.event_json)["kind"] == kind
            if not times:
                return


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(SOON_S):
        while not condition():  # noqa: ASYNC110 - of another process
            await asyncio.sleep(0.1)


async def until_paid(directory: Path, *prompts: str) -> None:
    await until(lambda: asked(directory).keys() >= set(prompts))
    # And until the answer is in the books.
    await asyncio.sleep(0.5)


def asked(directory: Path) -> Counter[str]:
    """What reached the provider."""
    log = directory / "asked"
    return Counter(log.read_text().splitlines() if log.exists() else ())


def all_of(*keys: str) -> dict[str, int]:
    """What runs of `SCRIPT` ask for, each once."""
    firsts = {f"first {key}": 1 for key in keys}
    return firsts | {f"{key} {number}": 1 for key in keys for number in range(10)}


async def says(server: Process, *because: str) -> None:
    """Wait until HTTP and gRPC say that it is not ready, and why; or, without a reason, that it is."""
    async with httpx2.AsyncClient(base_url=f"http://{server.http}") as http, asyncio.timeout(SOON_S):
        while True:
            reply = await http.get("/readyz")
            if reply.json().get("because", []) == list(because):
                break
            await asyncio.sleep(0.2)
        assert reply.status_code == (503 if because else 200)
        assert (await http.get("/healthz")).status_code == 200
    async with grpc.aio.insecure_channel(server.grpc) as channel, asyncio.timeout(SOON_S):
        health: Any = health_pb2_grpc.HealthStub(channel)
        wanted = (
            health_pb2.HealthCheckResponse.NOT_SERVING if because else health_pb2.HealthCheckResponse.SERVING
        )
        async for told in health.Watch(health_pb2.HealthCheckRequest()):
            if told.status == wanted:
                break


async def drains(server: Process) -> None:
    """SIGTERM ends it in an orderly way, whatever is the matter."""
    started_s = time.monotonic()
    assert await server.end(signal.SIGTERM) == 0
    assert time.monotonic() - started_s < DRAIN_S + ENDS_WITHIN_S


async def unavailable(answer: Awaitable[object]) -> None:
    """The client is told that trying again helps."""
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await answer
    assert refused.value.code() is grpc.StatusCode.UNAVAILABLE


async def is_queued(call: Call, run_id: str) -> bool:
    run: pb.Run = (await call("GetRun", pb.GetRunRequest(run_id=run_id))).run
    return run.state == pb.RUN_STATE_QUEUED
