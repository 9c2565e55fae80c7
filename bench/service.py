"""The service under load: `python -m bench.service [PART...]`.

A server in a process of its own (`service_process`), with its database, its gRPC port and real runs. Its
sandboxes are coroutines of another process that speak the real protocol over real sockets, and the model
answers at once: what is left is what the service costs. A client process beside them creates runs, watches
them and counts.

Each part has a fresh server, and its result is kept as soon as it is there: a part that fails costs only its
own, and its last result stays. All of them together are meant to end within six
minutes on a machine that does nothing else; those that matter less come last.

    creations       created a second, while nothing runs but one that is held
    live-50 ...     so many runs live at once: first held in their first turn, for their memory; then let go,
                    ten turns each, for turns and events; then so many clients, each of which creates a run of
                    one turn as soon as its last one has ended, for runs a second from creation to end
    watchers        one run and a thousand streams of it, as fast as it goes
    delays          likewise at the pace of a quick model: how long after it happened an event, stored
                    meanwhile, is there
    postgresql-...  the same on a PostgreSQL server in a container
    containers      real containers behind a real `rlm serve`, and a scripted model
"""

import argparse
import asyncio
import json
import os
import resource
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import grpc.aio
from rlm_proto.v1 import run_pb2 as pb
from rlm_proto.v1 import run_pb2_grpc

from bench.measuring import RESULTS, at_least, keep, spread_ms
from bench.processes import cpu_s, cpu_s_by_thread, memory_mib
from bench.service_process import question
from orchestrator.config import Settings
from orchestrator.store.books import TenantRules
from tests.e2e.serving import new_key, serving
from tests.postgres.server import postgres_server

LEVELS = (50, 200, 500)
_POSTGRESQL_LEVELS = (50, 200)
_LIVE_CONTAINERS = 50
_TURNS = 10
_CREATED = 800
_CREATORS = 32
_SHORT_RUNS = 250
"""At the least: where there are more clients each has one."""
_WATCHERS = 1_000
_WATCHED_TURNS = 25
_PACED_TURNS = 5
_PACE_S = 2.0
_PART_S = 240.0
_AGAIN_S = 0.5
_LONGEST_LINE = 1 << 24
_MOST_TURNS = 10_000

_SCRIPT = f"""
import asyncio, os

def run(question, depth):
    yield "kept = {{n: str(n) for n in range(10_000)}}\\nprint(llm_query('wait'))"
    for turn in range({_TURNS - 2}):
        yield f"x = {{turn}}"
    yield "FINAL('done')"

async def complete(prompt):
    while not os.path.exists(LOG):
        await asyncio.sleep(0.1)
    return "go"
"""


Stream: TypeAlias = asyncio.Task[list[float]]
"""The times at which its events came."""


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

    async def create(self, name: object, turns: int = _TURNS) -> str:
        """A new run about a short text."""
        request = pb.CreateRunRequest(
            idempotency_key=f"bench-{name}",
            question=question(turns),
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

    async def events(self, run_id: str) -> AsyncGenerator[pb.WatchRunResponse, None]:
        """All of a run's, until it has ended. A stream that breaks is taken up again."""
        position = 0
        while True:
            request = pb.WatchRunRequest(run_id=run_id, from_position=position)
            try:
                async for event in self.call("WatchRun", request):
                    position = event.position + 1
                    yield event
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                await asyncio.sleep(_AGAIN_S)
            else:
                return

    async def watch(self, run_id: str, came: list[float] | None = None) -> list[float]:
        """The times at which its events came, `came` with them."""
        came = [] if came is None else came
        async for _ in self.events(run_id):
            came.append(time.time())
        return came

    async def live(self) -> int:
        """Runs that run now."""
        count, token = 0, ""
        while True:
            page = await self.call(
                "ListRuns",
                pb.ListRunsRequest(states=[pb.RUN_STATE_RUNNING], page_size=200, page_token=token),
            )
            count, token = count + len(page.runs), page.next_page_token
            if not token:
                return count

    async def until_live(self, count: int) -> None:
        """Wait until so many runs run."""
        while await self.live() < count:  # noqa: ASYNC110 - a question to another process
            await asyncio.sleep(0.2)

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


class Load:
    """What a piece of work takes: of time, of the server's CPU and of this process's."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._began = (time.perf_counter(), cpu_s(pid), time.process_time())
        self._threads_began = cpu_s_by_thread(pid)
        self.took_s = 0.0
        self.cpu_s = 0.0
        self.own_cpu_s = 0.0
        self.threads_s: dict[str, float] = {}

    def stop(self) -> None:
        """It is done."""
        now = (time.perf_counter(), cpu_s(self._pid), time.process_time())
        self.took_s, self.cpu_s, self.own_cpu_s = (
            after - before for after, before in zip(now, self._began, strict=True)
        )

        now_s = cpu_s_by_thread(self._pid)
        self.threads_s = {name: max(0.0, now_s[name] - self._threads_began[name]) for name in now_s}

    def cpu_ms_each(self, count: int) -> float:
        """The server's."""
        return round(self.cpu_s * 1_000 / count, 2)

    def cores(self) -> dict[str, float]:
        """How busy both processes were, and which of the server's threads: its loop is `main`."""
        return {
            "server": round(self.cpu_s / self.took_s, 2),
            "client": round(self.own_cpu_s / self.took_s, 2),
            **{f"server_{name}": round(spent_s / self.took_s, 2) for name, spent_s in self.threads_s.items()},
        }


@asynccontextmanager
async def served(max_running: int, *, pause_s: float = 0.0, store_url: str = "") -> AsyncIterator[Server]:
    """A fresh server."""
    with tempfile.TemporaryDirectory(prefix="rlm") as directory:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "bench.service_process", directory,
            store_url, str(max_running), str(pause_s),
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


# --- Parts ---------------------------------------------------------------------------------------------


async def creations(store_url: str = "") -> dict[str, Any]:
    """Runs created a second, while nothing runs but one that is held."""
    async with served(1, store_url=store_url) as server:
        await server.create_many(_CREATORS)
        took: list[float] = []
        numbers = iter(range(_CREATORS, _CREATORS + _CREATED))

        async def creator() -> None:
            for number in numbers:
                began = time.perf_counter()
                await server.create(number)
                took.append(time.perf_counter() - began)

        load = Load(server.process.pid)
        await asyncio.gather(*(creator() for _ in range(_CREATORS)))
        load.stop()
        return {
            "per_s": round(_CREATED / load.took_s, 1),
            "server_cpu_ms_each": load.cpu_ms_each(_CREATED),
            "cores": load.cores(),
            "ms": spread_ms(took),
        }


async def live(count: int, store_url: str = "") -> dict[str, Any]:
    """So many runs live at once."""
    async with served(count, store_url=store_url) as server:
        await server.create("first")
        await asyncio.sleep(1.0)
        base_mib = server.memory_mib
        run_ids = await server.create_many(count - 1)
        await server.until_live(count)
        await asyncio.sleep(1.0)
        held_mib = server.memory_mib
        load = Load(server.process.pid)
        server.let_go()
        events = sum(map(len, await asyncio.gather(*map(server.watch, run_ids))))
        load.stop()
        turns_s = (await server.times())["turns_s"]
        return {
            "runs": count,
            "memory_mib_each": round((held_mib - base_mib) / (count - 1), 3),
            "turns_per_s": round(count * _TURNS / load.took_s, 1),
            "events_per_s": round(events / load.took_s, 1),
            "server_cpu_ms_per_turn": load.cpu_ms_each(count * _TURNS),
            "cores": load.cores(),
            "turn_ms": spread_ms(turns_s),
            "sustained": await _sustained(server, count),
        }


async def _sustained(server: Server, clients: int) -> dict[str, Any]:
    """Each client creates a run, watches it to its end, and creates the next."""
    each = max(1, _SHORT_RUNS // clients)

    async def client(name: int) -> None:
        for number in range(each):
            await server.watch(await server.create(f"short-{name}-{number}", turns=1))

    load = Load(server.process.pid)
    await asyncio.gather(*map(client, range(clients)))
    load.stop()
    return {
        "runs_per_s": round(clients * each / load.took_s, 1),
        "server_cpu_ms_per_run": load.cpu_ms_each(clients * each),
        "cores": load.cores(),
    }


@asynccontextmanager
async def _watched(
    server: Server, turns: int
) -> AsyncIterator[tuple[list[asyncio.Task[list[float]]], float]]:
    """A held run and a thousand streams of it, which have all that there is; in how many seconds."""
    run_id = await server.create("watched", turns)
    await server.until_live(1)
    came: list[list[float]] = [[] for _ in range(_WATCHERS)]
    began = time.perf_counter()
    streams = [asyncio.create_task(server.watch(run_id, times)) for times in came]
    while not all(came):  # noqa: ASYNC110 - nobody else asks
        await asyncio.sleep(0.05)
    opened_s = time.perf_counter() - began
    await asyncio.sleep(2.0)
    yield streams, opened_s


async def watchers() -> dict[str, Any]:
    """One run and a thousand streams of its events."""
    async with served(1) as server:
        base_mib = server.memory_mib
        async with _watched(server, _WATCHED_TURNS) as (streams, opened_s):
            watched_mib = server.memory_mib
            load, began = Load(server.process.pid), time.time()
            server.let_go()
            seen = await asyncio.gather(*streams)
            load.stop()
        delivered = sum(at >= began for times in seen for at in times)
        assert len({len(times) for times in seen}) == 1, "every stream has every event"
        return {
            "streams": _WATCHERS,
            "events": len(seen[0]),
            "opened_s": round(opened_s, 2),
            "delivered_per_s": round(delivered / load.took_s),
            "memory_kib_each": round((watched_mib - base_mib) * 1_024 / _WATCHERS, 1),
            "server_cpu_us_per_delivery": round(load.cpu_s * 1e6 / delivered, 1),
            "cores": load.cores(),
        }


async def delays() -> dict[str, float]:
    """From the moment something happens until a stream of a thousand has the event; it is stored between."""
    async with served(1, pause_s=_PACE_S) as server:
        async with _watched(server, _PACED_TURNS) as (streams, _):
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


async def on_postgresql(part: Callable[[str], Awaitable[dict[str, Any]]]) -> dict[str, Any]:
    """A part with its database on a server in a container beside it."""
    server = postgres_server()
    postgres = await asyncio.to_thread(server.__enter__)
    try:
        return await part(await asyncio.to_thread(postgres.new_database))
    finally:
        await asyncio.to_thread(server.__exit__, None, None, None)


async def containers(count: int = _LIVE_CONTAINERS) -> dict[str, Any]:
    """Runs in real containers, each with something in its namespace, live at once and then let go."""
    with tempfile.TemporaryDirectory(prefix="rlm") as name:
        directory = Path(name)
        image = Settings(state_dir=directory / "state")
        most = {"RLM_MAX_SANDBOXES": str(count), "RLM_MAX_RUNS": str(count)}
        async with serving(directory, image, _SCRIPT, **most) as process:
            key = await new_key(directory, rules=TenantRules(max_concurrent_runs=count))
            async with grpc.aio.insecure_channel(process.grpc) as channel:
                server = Server(process.process, run_pb2_grpc.RunServiceStub(channel), key)
                before = (server.memory_mib, _available_mib())
                began = time.perf_counter()
                run_ids = await server.create_many(count)
                await server.until_live(count)
                await asyncio.gather(*(_until_it_waits(server, run_id) for run_id in run_ids))
                started_s = time.perf_counter() - began
                after = (server.memory_mib, _available_mib())
                load = Load(server.process.pid)
                (directory / "asked").touch()
                await asyncio.gather(*map(server.watch, run_ids))
                load.stop()
                return {
                    "runs": count,
                    "started_per_s": round(count / started_s, 2),
                    "server_mib_each": round((after[0] - before[0]) / count, 3),
                    "machine_mib_each": round((before[1] - after[1]) / count, 1),
                    "turns_per_s": round(count * _TURNS / load.took_s, 1),
                    "server_cpu_ms_per_turn": load.cpu_ms_each(count * _TURNS),
                    "cores": load.cores(),
                }


async def _until_it_waits(server: Server, run_id: str) -> None:
    """For its first sub-call, and so with its namespace."""
    async with aclosing(server.events(run_id)) as events:
        async for event in events:
            if json.loads(event.event_json)["kind"] == "sub_call_started":
                return


def _available_mib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) / 1_024
    raise AssertionError("proc(5) has it")


# --- All of them ---------------------------------------------------------------------------------------

_DATABASES = {"SQLite": "live-", "PostgreSQL": "postgresql-live-"}

Part = Callable[[], Awaitable[dict[str, Any]]]

PARTS: Mapping[str, Part] = {
    "creations": creations,
    **{f"live-{count}": partial(live, count) for count in LEVELS},
    "watchers": watchers,
    "delays": delays,
    "containers": containers,
    "postgresql-creations": partial(on_postgresql, creations),
    **{
        f"postgresql-live-{count}": partial(on_postgresql, partial(live, count))
        for count in _POSTGRESQL_LEVELS
    },
}


async def measured(part: Part) -> dict[str, Any]:
    """Its result, with how busy the machine was before."""
    load_before = round(os.getloadavg()[0], 1)
    async with asyncio.timeout(_PART_S):
        return {**await part(), "load_before": load_before}


def with_plots(parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The result as the page takes it, of as many parts as there are."""
    aims = []
    if "creations" in parts:
        aims.append(at_least("runs created a second", parts["creations"]["per_s"], 50, ""))
    if "watchers" in parts:
        aims.append(at_least("streams of one run's events", parts["watchers"]["streams"], _WATCHERS, ""))
    return {"aims": aims, "parts": parts, "growth": [*_plots(parts)]}


_PLOTS = (
    ("Runs a second, from creation to end", "runs/s", ("sustained", "runs_per_s")),
    ("Turns a second", "turns/s", ("turns_per_s",)),
    ("Events a second", "events/s", ("events_per_s",)),
    ("A turn, median", "ms", ("turn_ms", "p50")),
    ("CPU of a turn, server", "ms", ("server_cpu_ms_per_turn",)),
    ("Memory of a live run, server", "MiB", ("memory_mib_each",)),
)


def _plots(parts: Mapping[str, Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    levels = {
        database: [count for count in LEVELS if f"{prefix}{count}" in parts]
        for database, prefix in _DATABASES.items()
    }
    for title, unit, path in _PLOTS:
        series = {
            database: {
                "x": counts,
                "y": [_at(parts[f"{_DATABASES[database]}{count}"], path) for count in counts],
            }
            for database, counts in levels.items()
            if counts
        }
        if series:
            yield {"title": title, "x_name": "live runs", "y_name": unit, "series": series}


def _at(part: Mapping[str, Any], path: Sequence[str]) -> float:
    value: Any = part
    for name in path:
        value = value[name]
    number: float = value
    return number


def main() -> None:
    """Measure and keep; the exit code tells whether a part failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.service")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}")
    names = parser.parse_args().parts or list(PARTS)
    if unknown := set(names) - set(PARTS):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    file = RESULTS / "service.json"
    parts: dict[str, Any] = json.loads(file.read_text())["parts"] if file.exists() else {}
    failed = []
    for name in names:
        began = time.monotonic()
        try:
            parts[name] = asyncio.run(measured(PARTS[name]))
        except Exception as error:
            failed.append(name)
            after = f"after {time.monotonic() - began:.0f} s"
            print(f"{name}: failed {after}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            continue
        # A result of the moment: the next part may fail in a way that ends this process.
        keep("service", with_plots({name: parts[name] for name in PARTS if name in parts}))
        print(f"{name}, {time.monotonic() - began:.0f} s: {json.dumps(parts[name])}", flush=True)
    raise SystemExit(bool(failed))


if __name__ == "__main__":
    main()
