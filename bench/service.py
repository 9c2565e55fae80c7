"""The service under load: `python -m bench.service [--levels 50 200 500]`.

A server in a process of its own, with its SQLite file, its gRPC port and real runs. Sandboxes are coroutines
of another process that speak the real protocol over real sockets, and the model answers at once: what is left
is what the service costs. A client process beside them creates runs, watches them and counts.

For each level so many runs are live at once: first held in their first turn, for their memory; then let go,
ten turns each, for turns, events and ended runs a second. Creations are measured against a server that starts
nothing meanwhile. Then one run is watched by a thousand streams: as fast as it goes, for their throughput,
and at the pace of a quick model, for how long after it happened an event, stored meanwhile, is there.
"""

import argparse
import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc.aio
from rlm_proto.v1 import run_pb2 as pb
from rlm_proto.v1 import run_pb2_grpc

from bench.guests_elsewhere import GuestsElsewhere
from bench.measuring import keep, spread_ms
from bench.processes import cpu_s, memory_mib
from orchestrator.conversation import Reply
from orchestrator.errors import OrchestratorError
from orchestrator.ids import RunId, TenantId
from orchestrator.machine import allow_open_files
from orchestrator.models.port import ModelRequest
from orchestrator.runs.recorder import Observer
from orchestrator.store.books import Role, RunRow, TenantRules
from orchestrator.trajectory import Event, RunEnded, TurnStarted
from tests.fakes.in_process_driver import InProcessDriver
from tests.fakes.model import FakeModel, runs
from tests.fakes.service import open_server

_LEVELS = (50, 200, 500)
_TURNS = 10
_CREATED = 1_000
_CREATORS = 32
_WATCHERS = 1_000
_WATCHED_TURNS = 100
_PACED_TURNS = 10
_PACE_S = 2.0
_MOST_TURNS = 10_000
_LONGEST_LINE = 1 << 24


# --- The server's process ------------------------------------------------------------------------------


class Clock:
    """A `ServiceHook`: when each event happened, and how long turns took."""

    def __init__(self) -> None:
        self.happened_at: list[float] = []
        """Unix time; of one run, by position."""
        self.turns_s: list[float] = []
        self._began: dict[RunId, float] = {}

    def created(self, run: RunRow) -> None:
        """See `ServiceHook`."""

    def refused(self, tenant_id: TenantId, error: OrchestratorError) -> None:
        """See `ServiceHook`."""

    def observer(self, run: RunRow) -> Observer:
        """See `ServiceHook`."""
        return self._see

    def left(self, run: RunRow) -> None:
        """See `ServiceHook`."""

    def _see(self, event: Event) -> None:
        self.happened_at.append(event.at)
        if isinstance(event.payload, TurnStarted | RunEnded):
            began = self._began.get(event.run_id)
            # The first turn is held until all runs are live.
            if began is not None:
                self.turns_s.append(event.at - began)
            if isinstance(event.payload, TurnStarted) and event.payload.turn > 1:
                self._began[event.run_id] = event.at


async def serve(directory: Path, max_running: int, turns: int, pace_s: float) -> None:
    """Serve until stdin ends. A line on it lets the runs go that are held in their first turn."""
    allow_open_files(max_running + _WATCHERS)
    go, clock = asyncio.Event(), Clock()

    async def reply(request: ModelRequest) -> Reply:
        await go.wait()
        if pace_s:
            await asyncio.sleep(pace_s)
        said = sum(isinstance(entry, Reply) for entry in request.conversation)
        return runs("FINAL('done')" if said + 1 >= turns else f"x = {said}")

    async with (
        GuestsElsewhere() as guests,
        open_server(
            directory,
            FakeModel(otherwise=reply),
            sandboxes=max(1, max_running),
            max_running=max_running,
            hooks=[clock],
            # It is used as a driver only.
            driver=cast(InProcessDriver, guests),
        ) as server,
    ):
        rules = TenantRules(max_concurrent_runs=100_000, max_queued_runs=1_000_000)
        tenant = await server.books.tenants.add_tenant("bench", rules)
        _, key = await server.books.tenants.add_key(tenant.tenant_id, Role.ADMIN)
        print(server.port.address, key, flush=True)
        stdin = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(stdin), sys.stdin
        )
        while (line := await stdin.readline()) != b"":
            if line == b"go\n":
                go.set()
            else:
                print(json.dumps({"happened_at": clock.happened_at, "turns_s": clock.turns_s}), flush=True)


# --- The client's --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Server:
    """The process, and a way to it."""

    process: asyncio.subprocess.Process
    stub: Any
    key: str

    def call(self, method: str, request: Any) -> Any:
        """A call with the key."""
        return getattr(self.stub, method)(
            request, metadata=(("authorization", f"Bearer {self.key}"),), timeout=400.0
        )

    async def create(self, number: int, turns: int = _TURNS) -> str:
        """A new run about a short text."""
        request = pb.CreateRunRequest(
            idempotency_key=f"bench-{number}",
            question=b"How many?",
            text=b"some text",
            options=pb.RunOptions(max_depth=0, max_turns=min(_MOST_TURNS, turns + 1)),
        )
        answer = await self.call("CreateRun", request)
        run_id: str = answer.run.run_id
        return run_id

    async def create_many(self, count: int) -> list[str]:
        """So many, from several creators at once."""
        numbers = iter(range(count))
        run_ids: list[str] = []

        async def creator() -> None:
            for number in numbers:
                run_ids.append(await self.create(number))

        await asyncio.gather(*(creator() for _ in range(_CREATORS)))
        return run_ids

    async def watch(self, run_id: str) -> list[float]:
        """The times at which its events came."""
        return [time.time() async for _ in self.call("WatchRun", pb.WatchRunRequest(run_id=run_id))]

    def let_go(self) -> None:
        """The model answers from now on."""
        assert self.process.stdin is not None
        self.process.stdin.write(b"go\n")

    async def times(self) -> dict[str, list[float]]:
        """What its `Clock` has seen."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(b"times\n")
        seen: dict[str, list[float]] = json.loads(await self.process.stdout.readline())
        return seen

    @property
    def memory_mib(self) -> float:
        """Resident, now."""
        return memory_mib(self.process.pid)["now"]


@asynccontextmanager
async def served(max_running: int, turns: int = _TURNS, pace_s: float = 0.0) -> AsyncIterator[Server]:
    """A fresh server."""
    with tempfile.TemporaryDirectory(prefix="rlm") as directory:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.service", "serve", directory,
            str(max_running), str(turns), str(pace_s),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=_LONGEST_LINE,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stdin is not None
        try:
            address, key = (await process.stdout.readline()).decode().split()
            async with grpc.aio.insecure_channel(address) as channel:
                yield Server(process, run_pb2_grpc.RunServiceStub(channel), key)
        finally:
            process.stdin.close()
            await process.wait()


async def creations() -> dict[str, Any]:
    """Runs created a second, while nothing runs but one that is held."""
    async with served(1) as server:
        await server.create_many(_CREATORS)
        took: list[float] = []
        numbers = iter(range(_CREATORS, _CREATORS + _CREATED))

        async def creator() -> None:
            for number in numbers:
                began = time.perf_counter()
                await server.create(number)
                took.append(time.perf_counter() - began)

        before_s, began = cpu_s(server.process.pid), time.perf_counter()
        await asyncio.gather(*(creator() for _ in range(_CREATORS)))
        took_s = time.perf_counter() - began
        return {
            "per_s": round(_CREATED / took_s, 1),
            "server_cpu_ms_each": round((cpu_s(server.process.pid) - before_s) * 1_000 / _CREATED, 2),
            "ms": spread_ms(took),
        }


async def level(count: int) -> dict[str, Any]:
    """So many runs live at once."""
    async with served(count) as server:
        await server.create(-1)
        await asyncio.sleep(1.0)
        base_mib = server.memory_mib
        run_ids = await server.create_many(count - 1)
        while (await _running(server)) < count:  # noqa: ASYNC110 - a question to another process
            await asyncio.sleep(0.2)
        await asyncio.sleep(1.0)
        held_mib = server.memory_mib
        before_s, began = cpu_s(server.process.pid), time.perf_counter()
        server.let_go()
        events = sum(map(len, await asyncio.gather(*map(server.watch, run_ids))))
        took_s = time.perf_counter() - began
        return {
            "runs": count,
            "memory_mib_each": round((held_mib - base_mib) / (count - 1), 3),
            "runs_per_s": round(count / took_s, 1),
            "turns_per_s": round(count * _TURNS / took_s, 1),
            "events_per_s": round(events / took_s, 1),
            "server_cpu_ms_per_turn": round(
                (cpu_s(server.process.pid) - before_s) * 1_000 / (count * _TURNS), 2
            ),
            "server_cores": round((cpu_s(server.process.pid) - before_s) / took_s, 2),
            "turn_ms": spread_ms((await server.times())["turns_s"]),
        }


async def _running(server: Server) -> int:
    states = [pb.RUN_STATE_RUNNING]
    count, token = 0, ""
    while True:
        page = await server.call(
            "ListRuns", pb.ListRunsRequest(states=states, page_size=200, page_token=token)
        )
        count, token = count + len(page.runs), page.next_page_token
        if not token:
            return count


async def watchers() -> dict[str, Any]:
    """One run and a thousand streams of its events."""
    async with served(1, _WATCHED_TURNS) as server:
        run_id = await server.create(0, _WATCHED_TURNS)
        base_mib = server.memory_mib
        streams = [asyncio.create_task(server.watch(run_id)) for _ in range(_WATCHERS)]
        await asyncio.sleep(5.0)
        watched_mib = server.memory_mib
        before_s, began = cpu_s(server.process.pid), time.time()
        server.let_go()
        seen = await asyncio.gather(*streams)
        took_s = max(times[-1] for times in seen) - began
        events = {len(times) for times in seen}
        assert len(events) == 1, "every stream has every event"
        return {
            "streams": _WATCHERS,
            "events": events.pop(),
            "delivered_per_s": round(sum(map(len, seen)) / took_s),
            "memory_kib_each": round((watched_mib - base_mib) * 1_024 / _WATCHERS, 1),
            "server_cpu_us_per_delivery": round(
                (cpu_s(server.process.pid) - before_s) * 1e6 / sum(map(len, seen)), 1
            ),
        }


async def delays() -> dict[str, float]:
    """From the moment something happens until a stream of a thousand has the event; it is stored between."""
    async with served(1, _PACED_TURNS, _PACE_S) as server:
        run_id = await server.create(0, _PACED_TURNS)
        streams = [asyncio.create_task(server.watch(run_id)) for _ in range(_WATCHERS)]
        await asyncio.sleep(5.0)
        # What happened before they came does not count.
        before = len((await server.times())["happened_at"])
        server.let_go()
        seen = await asyncio.gather(*streams)
        happened_at = (await server.times())["happened_at"]
        return spread_ms(
            [
                came - happened
                for times in seen
                for came, happened in zip(times[before:], happened_at[before:], strict=True)
            ]
        )


async def measure(levels: list[int]) -> dict[str, Any]:
    """All of it; see the module."""
    created = await creations()
    by_level = [await level(count) for count in levels]
    streamed = {**await watchers(), "delay_ms": await delays()}
    return {
        "creations": created,
        "levels": by_level,
        "watchers": streamed,
        "growth": [
            {
                "title": "Turns a second",
                "x_name": "live runs",
                "y_name": "turns/s",
                "x": levels,
                "y": [one["turns_per_s"] for one in by_level],
            },
            {
                "title": "Memory of a live run",
                "x_name": "live runs",
                "y_name": "MiB",
                "x": levels,
                "y": [one["memory_mib_each"] for one in by_level],
            },
            {
                "title": "A turn, median",
                "x_name": "live runs",
                "y_name": "ms",
                "x": levels,
                "y": [one["turn_ms"]["p50"] for one in by_level],
            },
            {
                "title": "CPU of a turn",
                "x_name": "live runs",
                "y_name": "ms",
                "x": levels,
                "y": [one["server_cpu_ms_per_turn"] for one in by_level],
            },
        ],
    }


def main() -> None:
    """Measure and keep, or be the server."""
    if sys.argv[1:2] == ["serve"]:
        directory, max_running, turns, pace_s = sys.argv[2:]
        asyncio.run(serve(Path(directory), int(max_running), int(turns), float(pace_s)))
        return
    parser = argparse.ArgumentParser(prog="python -m bench.service")
    parser.add_argument("--levels", nargs="*", type=int, default=list(_LEVELS))
    levels = parser.parse_args().levels
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    print(keep("service", asyncio.run(measure(levels))))


if __name__ == "__main__":
    main()
