"""What the orchestrator's work costs as it grows: `python -m bench.growth`.

CPU time and memory of the orchestrator's process alone, over real sockets and gRPC; models answer at once,
and guests in another process play their interpreters. Each series starts in a fresh process. Whatever grows
faster than its work is a defect.

    turns      one run of 1,000 turns, each with a cell, whose conversation grows by half a kilobyte a turn
    sub-calls  10,000 calls of one cell, 100 at a time
    runs       so many live runs, some turns old, all waiting for their models
    ceiling    50 runs at once, as fast as they can
"""

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from bench.guests_elsewhere import GuestsElsewhere
from bench.measuring import at_most, keep
from bench.processes import memory_mib
from orchestrator.app import RunOptions, Tenant, root_run
from orchestrator.budget import UNLIMITED, Amounts
from orchestrator.collector import collecting_seldom
from orchestrator.contexts.store import ContextStore
from orchestrator.conversation import Reply, StopReason
from orchestrator.ids import LOCAL_TENANT, new_run_id
from orchestrator.limits import RunLimits
from orchestrator.machine import Machine
from orchestrator.models.port import Completion, Model, ModelRequest
from orchestrator.pricing import Usage, free_model
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.tree import RunResult
from orchestrator.sandbox.instance import claim_instance
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.sandbox.making import SandboxMaker
from orchestrator.sandbox.pool import SandboxPool
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.trajectory import CellEnded, Event, SubCallEnded
from orchestrator.turn import Outcome

TURNS, CALLS, AT_ONCE = 1_000, 10_000, 100
RUNS = (1, 50, 200, 500)
AGE_TURNS = 10
CEILING_RUNS, CEILING_TURNS, CEILING_CALLS = 50, 40, 400
IDLE_S = 5.0
FACTOR = 1.5
"""What the last tenth of the work may cost more than an even share."""
_LIMITS = RunLimits(
    max_tokens=10**12,
    max_cost_microusd=10**12,
    max_calls=10**9,
    max_turns=TURNS + 1,
    max_depth=0,
    max_concurrency=AT_ONCE,
)
_WORDS = "# " + "what this cell is for, at some length " * 10


@dataclass(slots=True)
class Player:
    """A model that gives each of its runs so many cells, then waits for leave to answer."""

    turns: int
    cell: str
    may_answer: asyncio.Event = field(default_factory=asyncio.Event)
    waiting: int = 0

    async def complete(self, request: ModelRequest) -> Completion:
        """See `ModelClient`. A request without a system prompt is a sub-call."""
        usage = Usage(input=1, output=1)
        if not request.system:
            return Completion(Reply(({"type": "text", "text": "yes"},), StopReason.END_TURN), usage)
        turn = (len(request.conversation) - 1) // 2
        if turn == self.turns:
            self.waiting += 1
            await self.may_answer.wait()
            return Completion(Reply(({"type": "text", "text": "done"},), StopReason.END_TURN), usage)
        code = f"{self.cell}\n{_WORDS}"
        call = {"type": "tool_use", "id": f"toolu_{turn}", "name": "python", "input": {"code": code}}
        return Completion(Reply((call,), StopReason.TOOL_USE), usage)

    async def aclose(self) -> None:
        """See `ModelClient`."""


Run = Callable[[Player, Callable[[Event], None]], "asyncio.Task[RunResult]"]
"""Starts a run of its own tree."""


@asynccontextmanager
async def house() -> AsyncIterator[Run]:
    """A machine of fake sandboxes."""
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir, claim_instance(Path(state_dir)) as instance:
        contexts = ContextStore(instance.contexts_dir)
        context = contexts.stage_text(LOCAL_TENANT, b"nothing to see")
        account = MemoryTenantAccount(Amounts(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED))
        card = free_model("m", window_tokens=10_000_000, max_output_tokens=32_000)
        options = RunOptions(question="How?", context_paths=(), model="m", runtime="runc", limits=_LIMITS)
        async with GuestsElsewhere() as driver:
            pool = SandboxPool(SandboxMaker(instance, driver))
            machine = Machine(
                contexts=contexts,
                leases=SandboxLeases(instance, driver, memory_bytes=1 << 29, pool=pool),
                slots=SandboxSlots(max(RUNS)),
                pool=pool,
            )

            def start(player: Player, observe: Callable[[Event], None]) -> asyncio.Task[RunResult]:
                model = Model(card, player)
                return asyncio.create_task(
                    root_run(
                        new_run_id(),
                        options,
                        machine=machine,
                        tenant=Tenant(tenant_id=LOCAL_TENANT, account=account),
                        models={"root": model, "sub": model},
                        context=context,
                        observers=(observe,),
                    )
                )

            yield start
        contexts.close()


async def grown(
    player: Player, kind: type[CellEnded] | type[SubCallEnded], every: int
) -> list[dict[str, float]]:
    """CPU seconds and memory since the first event of that kind, after each so many of them."""
    points: list[dict[str, float]] = []
    seen, began_s, began_mib = 0, 0.0, 0.0

    def observe(event: Event) -> None:
        nonlocal seen, began_s, began_mib
        if not isinstance(event.payload, kind):
            return
        if seen == 0:
            began_s, began_mib = time.process_time(), memory_mib(os.getpid())["now"]
        elif seen % every == 0:
            more_mib = memory_mib(os.getpid())["now"] - began_mib
            points.append(
                {"x": seen, "cpu_s": round(time.process_time() - began_s, 3), "mib": round(more_mib, 1)}
            )
        seen += 1

    player.may_answer.set()
    async with house() as start:
        result = await start(player, observe)
        assert result.outcome is Outcome.ANSWERED, result
    return points


async def turns() -> list[dict[str, float]]:
    """As their number grows."""
    return await grown(Player(TURNS, "pass"), CellEnded, TURNS // 10 - 1)


async def sub_calls() -> list[dict[str, float]]:
    """As their number grows."""
    cell = (
        f"for start in range(0, {CALLS}, {AT_ONCE}):\n"
        f"    await gather(*(llm(str(number)) for number in range(start, start + {AT_ONCE})))"
    )
    return await grown(Player(1, cell), SubCallEnded, CALLS // 10 - 1)


def _nothing(_event: Event) -> None:
    """Nobody watches."""


async def runs() -> list[dict[str, float]]:
    """Memory and idle CPU of so many live runs."""
    points = []
    async with house() as start:
        player = Player(1, "pass")
        player.may_answer.set()
        await start(player, _nothing)
        before_mib = memory_mib(os.getpid())["now"]
        player = Player(AGE_TURNS, "pass")
        alive: list[asyncio.Task[RunResult]] = []
        for count in RUNS:
            alive += [start(player, _nothing) for _ in range(count - len(alive))]
            while player.waiting < count:  # noqa: ASYNC110 - tenths of a second, in a benchmark
                await asyncio.sleep(0.1)
            began_s = time.process_time()
            await asyncio.sleep(IDLE_S)
            idle_share = (time.process_time() - began_s) / IDLE_S
            more_mib = memory_mib(os.getpid())["now"] - before_mib
            points.append({"x": count, "mib": round(more_mib, 1), "idle_cpu_share": round(idle_share, 4)})
        player.may_answer.set()
        await asyncio.gather(*alive)
    return points


async def ceiling() -> list[dict[str, float]]:
    """How many turns and sub-calls one event loop does in a second, of 50 runs."""
    rows: list[dict[str, float]] = []
    for cell, in_each, in_run in (
        ("pass", 1, CEILING_TURNS),
        (f"await gather(*(llm(str(number)) for number in range({AT_ONCE // 10})))", AT_ONCE // 10, 10),
    ):
        player = Player(in_run, cell)
        player.may_answer.set()
        async with house() as start:
            await start(player, _nothing)
            began_s, cpu_began_s = time.perf_counter(), time.process_time()
            await asyncio.gather(*(start(player, _nothing) for _ in range(CEILING_RUNS)))
            took_s, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_began_s
        count = CEILING_RUNS * in_run * in_each
        rows.append({"x": in_each, "per_cpu_s": round(count / cpu_s), "per_s": round(count / took_s)})
    return rows


SERIES = {
    "turns": turns,
    "sub_calls": sub_calls,
    "runs": runs,
    "ceiling": ceiling,
}


def in_fresh_process(series: str) -> list[dict[str, float]]:
    """One of the series."""
    command = [sys.executable, "-m", "bench.growth", "--measure", series]
    told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    points: list[dict[str, float]] = json.loads(told.stdout)
    return points


def steepness(points: Sequence[Mapping[str, float]], what: str) -> float:
    """What the last unit of work costs, against the average one before the middle."""
    middle = points[len(points) // 2]
    last, before = points[-1], points[-2]
    late = (last[what] - before[what]) / (last["x"] - before["x"])
    return round(late / (middle[what] / middle["x"]), 2)


def main() -> None:
    """Measure all, print and keep it."""
    parser = argparse.ArgumentParser(description="What the orchestrator's work costs as it grows.")
    parser.add_argument("--measure", choices=SERIES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure is not None:
        with collecting_seldom():
            print(json.dumps(asyncio.run(SERIES[given.measure]())))
        return
    measured = {series: in_fresh_process(series) for series in SERIES}
    for series, points in measured.items():
        print(series, *points, sep="\n    ")
    aims = [
        at_most(f"the last {what} of {count:,}, CPU against those before", found, FACTOR, "×")
        for what, count, found in (
            ("turns", TURNS, steepness(measured["turns"], "cpu_s")),
            ("sub-calls", CALLS, steepness(measured["sub_calls"], "cpu_s")),
        )
    ] + [
        at_most(
            f"memory of the last of {RUNS[-1]} live runs, against the average one before",
            steepness(measured["runs"], "mib"),
            FACTOR,
            "×",
        )
    ]
    plots = (
        ("turns", "turns of one run", "cpu_s", "CPU, s"),
        ("sub_calls", "sub-calls of one cell", "cpu_s", "CPU, s"),
        ("runs", "live runs", "mib", "memory, MiB"),
        ("runs", "live runs", "idle_cpu_share", "idle CPU, cores"),
    )
    growth = [
        {
            "x_name": x_name,
            "y_name": y_name,
            "x": [point["x"] for point in measured[series]],
            "y": [point[what] for point in measured[series]],
        }
        for series, x_name, what, y_name in plots
    ]
    keep("growth", {"aims": aims, **measured, "growth": growth})


if __name__ == "__main__":
    main()
