"""1,000 sub-calls from one cell: `python -m bench.fan_out [RUNTIME...]`.

A run as `rlm run` makes it, in a real sandbox: its cell makes 1,000 calls with `llm_query_batched`, 100 at a
time, to a provider that answers each after 200 ms. The provider is a fake in a process of its own, asked
through the provider process as ever. What counts is from the cell's start to its end: wall time, and the CPU
time of orchestrator, provider process and guest (worker and interpreter) within it. The best round counts
for the first row, the table has all.

`speed` is how fast prompts travel: calls of 1 kB and of 100 kB, answered at once by a model in the
orchestrator's process, so it is the way from the cell to the orchestrator alone; `bare` is as many gRPC calls
with the same bytes from one process to another.
"""

import argparse
import asyncio
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from bench.cells import installed_runtimes
from bench.measuring import at_most, keep
from bench.processes import cpu_s, memory_mib, reset_peak_memory
from bench.provider_process import AT_ONCE_PLEASE, CALL_S
from orchestrator.app import RunOptions, Tenant, root_run
from orchestrator.budget import UNLIMITED, Amounts
from orchestrator.collector import collecting_seldom
from orchestrator.config import Settings
from orchestrator.conversation import Reply, StopReason
from orchestrator.ids import LOCAL_TENANT, new_run_id
from orchestrator.limits import RunLimits
from orchestrator.machine import open_machine, open_workplace
from orchestrator.models.breaker import GuardedClient
from orchestrator.models.port import Completion, Model, ModelClient, ModelRequest
from orchestrator.models.provider.connection import connect
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.models.provider.sealed import SealedCredentials
from orchestrator.pricing import Usage, free_model
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.trajectory import CellEnded, CellStarted, Event
from orchestrator.turn import Outcome

CALLS, AT_ONCE = 1_000, 100
IDEAL_S = CALLS * CALL_S / AT_ONCE
ROUNDS = 5
SPEED_BYTES = (1_000, 100_000)
GROWTH = (1_000, 3_000, 10_000)

_LIMITS = RunLimits(
    max_tokens=10**12, max_cost_microusd=10**12, max_calls=10**9, max_concurrency=AT_ONCE, max_turns=1_000
)

CELL = """
import json, time
def _guest():
    told = {}
    for who, place in (("worker", "1"), ("interpreter", "self")):
        fields = open(f"/proc/{place}/stat").read().rpartition(")")[2].split()
        status = dict(line.split(":", 1) for line in open(f"/proc/{place}/status"))
        told[who] = {"cpu_s": (int(fields[11]) + int(fields[12])) / 100,
                     "peak_mib": int(status.get("VmHWM", status["VmRSS"]).split()[0]) / 1024,
                     "now_mib": int(status["VmRSS"].split()[0]) / 1024}
    return told
prompts = (f"%(before)s{number} ".ljust(%(prompt_bytes)d, "x") for number in range(%(calls)d))
before, began = _guest(), time.monotonic()
%(work)s
took, after = time.monotonic() - began, _guest()
print(json.dumps({"took_s": took, "before": before, "after": after}))
"""
BATCH = "answers = llm_query_batched(prompts)\nassert len(answers) == %(calls)d"
COMPLETED = (
    "seen = 0\nfor place, answer in llm_query_as_completed(prompts):\n    seen += 1\nassert seen == %(calls)d"
)


def cell(*, calls: int = CALLS, prompt_bytes: int = 1_000, at_once: bool = False, work: str = BATCH) -> str:
    """A cell that makes so many calls and prints what they took of its guest."""
    # The number first: prompts that begin alike are asked in another order.
    values = {"calls": calls, "prompt_bytes": prompt_bytes, "before": AT_ONCE_PLEASE if at_once else ""}
    return CELL % {**values, "work": work % values}


@dataclass(slots=True)
class PlayedRoot:
    """The model of the run: a cell, then a word."""

    cells: Sequence[str]
    turn: int = 0

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient`."""
        if self.turn == len(self.cells):
            return Completion(
                Reply(({"type": "text", "text": "done"},), StopReason.END_TURN), Usage(1, 0, 0, 1)
            )
        code = self.cells[self.turn]
        self.turn += 1
        call = {"type": "tool_use", "id": f"toolu_{self.turn}", "name": "python", "input": {"code": code}}
        return Completion(Reply((call,), StopReason.TOOL_USE), Usage(1, 0, 0, 1))

    async def aclose(self) -> None:
        """See `ModelClient`."""


class AtOnce:
    """A model in this process that answers at once."""

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient`."""
        return Completion(Reply(({"type": "text", "text": "yes"},), StopReason.END_TURN), Usage(1, 0, 0, 1))

    async def aclose(self) -> None:
        """See `ModelClient`."""


@asynccontextmanager
async def fake_provider() -> AsyncIterator[tuple[ModelClient, int]]:
    """A client of a provider process, and that one's id; the provider is a process of its own too."""
    me = (sys.executable, "-m", "bench.provider_process", "--serve")
    server = await asyncio.create_subprocess_exec(
        *me, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert server.stdin is not None
    assert server.stdout is not None
    try:
        url = (await server.stdout.readline()).decode().strip()
        credentials = SealedCredentials.of({"ANTHROPIC_API_KEY": "sk-ant-of-a-benchmark"})
        with ProviderProcess(credentials, base_url=url) as process:
            connection = await connect(process)
            yield GuardedClient(connection.client), process.pid
            await connection.client.aclose()
    finally:
        server.stdin.close()
        await server.wait()


class Watch:
    """Reads this process's and the provider process's CPU time and memory at a cell's start and end."""

    def __init__(self, provider_pid: int | None) -> None:
        self._provider_pid = provider_pid
        self._began: dict[str, float] = {}
        self.cells: list[dict[str, Any]] = []

    def __call__(self, event: Event) -> None:
        """See `Observer`."""
        match event.payload:
            case CellStarted():
                reset_peak_memory()
                self._began = self._now()
            case CellEnded() as ended:
                now = self._now()
                assert ended.outcome == "ok", ended
                told = json.loads(str(ended.output))
                guest_s = {
                    who: round(told["after"][who]["cpu_s"] - told["before"][who]["cpu_s"], 2)
                    for who in ("worker", "interpreter")
                }
                self.cells.append(
                    {
                        "wall_s": round(told["took_s"], 3),
                        "orchestrator_cpu_s": round(now["cpu_s"] - self._began["cpu_s"], 2),
                        "provider_cpu_s": round(now["provider_cpu_s"] - self._began["provider_cpu_s"], 2),
                        "worker_cpu_s": guest_s["worker"],
                        "interpreter_cpu_s": guest_s["interpreter"],
                        "orchestrator_more_mib": round(now["now_mib"] - self._began["now_mib"], 1),
                        "orchestrator_peak_more_mib": round(now["peak_mib"] - self._began["now_mib"], 1),
                        "worker_peak_mib": round(told["after"]["worker"]["peak_mib"], 1),
                        "interpreter_peak_mib": round(told["after"]["interpreter"]["peak_mib"], 1),
                    }
                )
            case _:
                pass

    def _now(self) -> dict[str, float]:
        memory = memory_mib(os.getpid())
        return {
            "cpu_s": time.process_time(),
            "provider_cpu_s": cpu_s(self._provider_pid) if self._provider_pid else 0.0,
            "now_mib": memory["now"],
            "peak_mib": memory["peak"],
        }


async def run_cells(
    cells: Sequence[str], sub_model: ModelClient, *, runtime: str, provider_pid: int | None
) -> list[dict[str, Any]]:
    """What each cell of one run took."""
    watch = Watch(provider_pid)
    card = free_model("m", window_tokens=1_000_000, max_output_tokens=32_000)
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir:
        settings = Settings(state_dir=Path(state_dir))
        async with (
            open_workplace(settings) as workplace,
            open_machine(settings, workplace, runtime=runtime) as machine,
        ):
            result = await root_run(
                new_run_id(),
                RunOptions(
                    question="How fast?", context_paths=(), model="m", runtime=runtime, limits=_LIMITS
                ),
                machine=machine,
                tenant=Tenant(tenant_id=LOCAL_TENANT, account=_unlimited()),
                models={"root": Model(card, PlayedRoot(cells)), "sub": Model(card, sub_model)},
                context=workplace.contexts.stage_text(LOCAL_TENANT, b"nothing to see"),
                observers=(watch,),
            )
            assert result.outcome is Outcome.ANSWERED, result
    return watch.cells


def _unlimited() -> MemoryTenantAccount:
    return MemoryTenantAccount(Amounts(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED))


async def fan_out(runtime: str) -> dict[str, Any]:
    """1,000 calls of 200 ms, as a list and as they come: the quickest round of each."""
    rounds = [cell(), cell(work=COMPLETED)] * ROUNDS
    async with fake_provider() as (client, pid):
        rows = await run_cells(rounds, client, runtime=runtime, provider_pid=pid)
    return {name: min(rows[first::2], key=_wall_s) for first, name in enumerate(("list", "as_completed"))}


async def speed(runtime: str) -> list[dict[str, Any]]:
    """How fast 1,000 prompts of each size get from a cell to the orchestrator, against bare calls."""
    told = []
    for prompt_bytes in SPEED_BYTES:
        cells = [cell(prompt_bytes=prompt_bytes)] * 3
        here = min(await run_cells(cells, AtOnce(), runtime=runtime, provider_pid=None), key=_wall_s)
        bare_s = min([await bare(prompt_bytes) for _ in range(3)])
        mb = CALLS * prompt_bytes / 1e6
        told.append(
            {
                "prompt_bytes": prompt_bytes,
                "here_mb_s": round(mb / here["wall_s"], 1),
                "bare_mb_s": round(mb / bare_s, 1),
                "ratio": round(here["wall_s"] / bare_s, 2),
                **here,
            }
        )
    return told


async def grown(runtime: str) -> list[dict[str, Any]]:
    """What it costs as the calls of one cell become more."""
    cells = [cell(calls=calls) for calls in GROWTH]
    rows = await run_cells(cells, AtOnce(), runtime=runtime, provider_pid=None)
    return [{"calls": calls, **row} for calls, row in zip(GROWTH, rows, strict=True)]


async def bare(prompt_bytes: int) -> float:
    """Seconds for as many unary calls, 100 at a time, over a Unix socket from another process to this one."""

    async def answer(request: bytes, _context: object) -> bytes:
        return request[:3]

    handler: Any = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"call": handler}),))
    with tempfile.TemporaryDirectory(prefix="rlm") as folder:
        address = f"unix:{folder}/socket"
        server.add_insecure_port(address)
        await server.start()
        command = (sys.executable, "-m", "bench.fan_out", "--bare-client", address, str(prompt_bytes))
        client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        said, _ = await client.communicate()
        await server.stop(None)
    return float(said)


async def bare_client(address: str, prompt_bytes: int) -> float:
    """The other side."""
    async with grpc.aio.insecure_channel(address) as channel:
        call: Any = channel.unary_unary("/bare/call")
        slots = asyncio.Semaphore(AT_ONCE)

        async def one(number: int) -> None:
            async with slots:
                await call((b"%d" % number).ljust(prompt_bytes, b"x"))

        await one(0)
        began_s = time.monotonic()
        await asyncio.gather(*(one(number) for number in range(CALLS)))
        return time.monotonic() - began_s


def _wall_s(row: Mapping[str, float]) -> float:
    return row["wall_s"]


async def measure(runtime: str) -> dict[str, Any]:
    """All of it on one runtime."""
    return {
        "fan_out": await fan_out(runtime),
        "speed": await speed(runtime),
        "growth_rows": await grown(runtime),
    }


def main() -> None:
    """Print what was measured and keep it."""
    parser = argparse.ArgumentParser(description="1,000 sub-calls from one cell.")
    parser.add_argument("runtimes", nargs="*", default=["runc"], help="runc, runsc")
    parser.add_argument("--bare-client", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.bare_client is not None:
        print(asyncio.run(bare_client(given.bare_client[0], int(given.bare_client[1]))))
        return
    unknown = set(given.runtimes) - set(installed_runtimes())
    if unknown:
        parser.error(f"not installed: {', '.join(sorted(unknown))}")
    with collecting_seldom():
        measured = {runtime: asyncio.run(measure(runtime)) for runtime in given.runtimes}
    print(json.dumps(measured, indent=2))
    aims, growth = [], []
    for runtime, found in measured.items():
        best = found["fan_out"]["list"]
        calls = f"{CALLS:,} sub-calls of 200 ms, {AT_ONCE} at once"
        ratio = round(best["wall_s"] / IDEAL_S, 2)
        aims += [
            at_most(f"{calls}, wall against ideal, {runtime}", ratio, 1.25, "×"),
            at_most(f"{calls}, the orchestrator's CPU, {runtime}", best["orchestrator_cpu_s"], 1.5, " s"),
        ]
        growth += [
            {
                "title": title,
                "x_name": f"sub-calls of one cell, {runtime}",
                "y_name": unit,
                "x": [row["calls"] for row in found["growth_rows"]],
                "y": [row[what] for row in found["growth_rows"]],
            }
            for title, unit, what in (
                ("the orchestrator's CPU", "s", "orchestrator_cpu_s"),
                ("wall time", "s", "wall_s"),
            )
        ]
    keep("fan_out", {"aims": aims, **measured, "growth": growth})


if __name__ == "__main__":
    main()
