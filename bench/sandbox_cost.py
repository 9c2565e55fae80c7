"""What a run's sandbox costs, from asking until it is gone: `python -m bench.sandbox_cost [RUNTIME...]`.

Ours, four at a time, each running one cell, in sandboxes per second; against the engine alone, which creates,
starts, waits for and removes containers of the same posture that load gRPC, at whichever concurrency it is
best at. Rounds of all take turns; the median round of each counts.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from bench.bare_engine import bare_engine
from bench.cells import CELL, installed_runtimes
from bench.measuring import at_least, keep
from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import Settings
from orchestrator.ids import LOCAL_TENANT
from orchestrator.machine import open_machine, open_workplace

_OURS_AT_ONCE = 4
_BARE_AT_ONCE = (2, 3, 4, 6)
_IN_A_ROUND = {"runc": 16, "runsc": 8}
_ROUNDS = 3
_AIM = 0.9


async def per_second(one: Callable[[], Awaitable[object]], *, at_once: int, count: int) -> float:
    """How many of them end in a second."""
    slots = asyncio.Semaphore(at_once)

    async def in_slot() -> None:
        async with slots:
            await one()

    started_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(in_slot())
    return count / (time.perf_counter() - started_s)


async def measure(runtime: str) -> dict[str, Any]:
    """Sandboxes per second of both."""
    count = _IN_A_ROUND[runtime]
    async with AsyncExitStack() as stack:
        state_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm"))
        settings = Settings(state_dir=Path(state_dir))
        bare = stack.enter_context(bare_engine(settings, runtime, at_once=max(_BARE_AT_ONCE)))
        workplace = await stack.enter_async_context(open_workplace(settings))
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"x" * 1_000)
        machine = await stack.enter_async_context(open_machine(settings, workplace, runtime=runtime))

        async def run_in_sandbox() -> None:
            async with machine.leases.open(
                lambda directory: workplace.contexts.link_into(context, directory),
                runtime=runtime,
                guest_services=(),
                max_concurrent_calls=1,
            ) as sandbox:
                clock = CellClock(
                    started_s=time.monotonic(), cell_timeout_s=30.0, cell_cpu_s=30.0, cell_ceiling_s=30.0
                )
                assert (await sandbox.run_cell(CELL, clock)).outcome is CellOutcome.OK

        await run_in_sandbox()
        await bare.run()
        ours: list[float] = []
        alone: dict[int, list[float]] = {at_once: [] for at_once in _BARE_AT_ONCE}
        for _ in range(_ROUNDS):
            ours.append(await per_second(run_in_sandbox, at_once=_OURS_AT_ONCE, count=count))
            for at_once, rates in alone.items():
                rates.append(await per_second(bare.run, at_once=at_once, count=count))
    rate = statistics.median(ours)
    by_concurrency = {at_once: round(statistics.median(rates), 2) for at_once, rates in alone.items()}
    return {
        "ours_per_s": round(rate, 2),
        "engine_alone_per_s": by_concurrency,
        "ratio": round(rate / max(by_concurrency.values()), 2),
    }


def main() -> None:
    """Print the rates and keep them."""
    parser = argparse.ArgumentParser(description="What a run's sandbox costs.")
    parser.add_argument("runtimes", nargs="*", help="runc, runsc; all that are installed when none is named")
    wanted = parser.parse_args().runtimes or installed_runtimes()
    measured = {runtime: asyncio.run(measure(runtime)) for runtime in wanted}
    print(measured)
    aims = [
        at_least(
            f"sandboxes per second, start to gone, 4 at a time, against the engine at its best, {runtime}",
            measured[runtime]["ratio"],
            _AIM,
            "×",
        )
        for runtime in wanted
    ]
    bars = [
        {
            "title": f"Sandboxes per second, start to gone, {runtime}",
            "unit": "per second",
            "rows": {
                **{
                    f"engine alone, {at_once} at a time": rate
                    for at_once, rate in measured[runtime]["engine_alone_per_s"].items()
                },
                f"ours, {_OURS_AT_ONCE} at a time": measured[runtime]["ours_per_s"],
            },
        }
        for runtime in wanted
    ]
    keep("sandbox_cost", {"aims": aims, **measured, "bars": bars})


if __name__ == "__main__":
    main()
