"""Many live sandboxes at once, each with a namespace: `python -m bench.live_sandboxes [--count N]`.

One sandbox is leased and its cells are timed while it is alone. Then all others are leased, four at a time,
and each runs a cell that keeps something in its namespace. With all of them idle the first one's cells are
timed again, and what they cost is read: memory and CPU time of the sandboxes, of the engine's own processes,
and of this one. The last lease is timed by itself: one started for it, and one from a pool that waits beside
all the others.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.cells import CELL
from bench.guests import Guest, engine_cpu_s, engine_pss_mib, own_open_files
from bench.measuring import at_least, keep, spread_ms, timed_s
from bench.processes import cpu_s, memory_mib
from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import PoolSettings, Settings
from orchestrator.contexts.store import ContextStore, StagedContext
from orchestrator.ids import LOCAL_TENANT
from orchestrator.limits import POOLED_LEASE_S
from orchestrator.machine import Machine, open_machine, open_workplace
from orchestrator.sandbox.docker_driver import connect_engine
from orchestrator.sandbox.lease import LeasedSandbox
from orchestrator.sandbox.pool_events import Phase

_COUNT = 250
_AT_ONCE = 4
_CELLS = 1_000
_IDLE_S = 20.0
_NAMESPACE = "kept = {number: str(number) for number in range(10_000)}; print(len(kept))"


@dataclass(frozen=True, slots=True)
class _Bench:
    machine: Machine
    contexts: ContextStore
    context: StagedContext
    stack: AsyncExitStack

    async def lease(self, *, own: bool = True) -> LeasedSandbox:
        """One for the rest of the benchmark, with something in its namespace."""
        sandbox = await self.stack.enter_async_context(
            self.machine.leases.open(
                lambda directory: self.contexts.link_into(self.context, directory),
                runtime="runc",
                guest_services=(),
                max_concurrent_calls=1,
                wanted_for_s=POOLED_LEASE_S + 1 if own else 600.0,
            )
        )
        await run_cell(sandbox, _NAMESPACE)
        return sandbox


async def run_cell(sandbox: LeasedSandbox, code: str = CELL) -> None:
    """A cell that must end well."""
    clock = CellClock(started_s=time.monotonic(), cell_timeout_s=60.0, cell_cpu_s=60.0, cell_ceiling_s=60.0)
    result = await sandbox.run_cell(code, clock)
    assert result.outcome is CellOutcome.OK, result


async def cells_ms(sandbox: LeasedSandbox) -> dict[str, float]:
    """The round trips of its cells."""
    return spread_ms([await timed_s(lambda: run_cell(sandbox)) for _ in range(_CELLS)])


async def measure(count: int) -> dict[str, Any]:
    """All of it; see the module."""
    pid = os.getpid()
    async with AsyncExitStack() as stack:
        state_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm"))
        settings = Settings(state_dir=Path(state_dir), max_sandboxes=count + 1, pool=PoolSettings(runc=1))
        workplace = await stack.enter_async_context(open_workplace(settings))
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"x" * 1_000)
        machine = await stack.enter_async_context(open_machine(settings, workplace, runtime="runc"))
        engine = await asyncio.to_thread(connect_engine)
        stack.callback(engine.close)
        bench = _Bench(
            machine, workplace.contexts, context, await stack.enter_async_context(AsyncExitStack())
        )

        first = await bench.lease()
        files, memory, engine_mib = own_open_files(), memory_mib(pid)["now"], engine_pss_mib()
        alone_ms = await cells_ms(first)
        slots = asyncio.Semaphore(_AT_ONCE)

        async def one_more() -> None:
            async with slots:
                await bench.lease()

        started_s = time.perf_counter()
        await asyncio.gather(*(one_more() for _ in range(count - 3)))
        starting_s = time.perf_counter() - started_s
        while machine.pool.count(Phase.WAITING) < 1:  # noqa: ASYNC110 - nobody else asks
            await asyncio.sleep(0.1)
        cold_s = await timed_s(bench.lease)
        warm_s = await timed_s(lambda: bench.lease(own=False))
        # The pool fills its one place again, which makes one more than was asked for.
        while machine.pool.count(Phase.WAITING) < 1:  # noqa: ASYNC110 - likewise
            await asyncio.sleep(0.1)

        live = sorted(workplace.instance.alive)
        guests = [await asyncio.to_thread(Guest, engine.api, sandbox_id) for sandbox_id in live]
        pss_mib = [await asyncio.to_thread(guest.pss_mib) for guest in guests]
        before_s = (sum(guest.cpu_s() for guest in guests), engine_cpu_s(), cpu_s(pid))
        await asyncio.sleep(_IDLE_S)
        after_s = (sum(guest.cpu_s() for guest in guests), engine_cpu_s(), cpu_s(pid))
        cores = [
            round((after - before) / _IDLE_S, 3) for before, after in zip(before_s, after_s, strict=True)
        ]
        crowded_ms = await cells_ms(first)
        per_sandbox = len(live) - 1
        result = {
            "live": len(live),
            "pss_mib_each": {
                part: round(statistics.median(one[part] for one in pss_mib), 1) for part in pss_mib[0]
            },
            "pss_gib_all": round(sum(one["all"] for one in pss_mib) / 1_024, 2),
            "engine_mib_each": {
                program: round((mib - engine_mib[program]) / per_sandbox, 2)
                for program, mib in engine_pss_mib().items()
            },
            "orchestrator_each": {
                "open_files": round((own_open_files() - files) / per_sandbox, 2),
                "rss_mib": round((memory_mib(pid)["now"] - memory) / per_sandbox, 3),
            },
            "idle_cores": dict(zip(("sandboxes", "engine", "orchestrator"), cores, strict=True)),
            "starts_per_s": round((count - 3) / starting_s, 2),
            "last_lease_ms": {"cold": round(cold_s * 1_000, 1), "warm": round(warm_s * 1_000, 1)},
            "cell_ms": {"alone": alone_ms, "others_idle": crowded_ms},
        }
        for guest in guests:
            guest.close()
        ending_s = time.perf_counter()
    return {**result, "ends_per_s": round(len(live) / (time.perf_counter() - ending_s), 2)}


def main() -> None:
    """Print and keep them."""
    parser = argparse.ArgumentParser(description="Many live sandboxes.")
    parser.add_argument("--count", type=int, default=_COUNT, help="how many")
    measured = asyncio.run(measure(parser.parse_args().count))
    print(measured)
    cells = measured["cell_ms"]
    aims = [at_least("live sandboxes at once on 24 GB, each with a namespace", measured["live"], _COUNT, "")]
    bars = [
        {
            "title": "A cell's round trip, alone and among idle sandboxes",
            "unit": "ms",
            "rows": {
                "alone, p50": cells["alone"]["p50"],
                "others idle, p50": cells["others_idle"]["p50"],
                "alone, p99": cells["alone"]["p99"],
                "others idle, p99": cells["others_idle"]["p99"],
            },
        }
    ]
    keep("live_sandboxes", {"aims": aims, **measured, "bars": bars})


if __name__ == "__main__":
    main()
