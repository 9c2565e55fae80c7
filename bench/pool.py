"""From asking a warm pool for a sandbox to its first cell's result: `python -m bench.pool [RUNTIME...]`.

Three ways in turns. *settled*: the pool has come to rest, as a run finds it that is not one of many. *in a
row*: at once after another lease, while the engine removes that one's sandbox and makes the next. *cold*: a
sandbox is started for the lease. How they end is not counted.

Besides, what a waiting sandbox costs while it waits, and what pausing it would: the figures behind the
decision not to.
"""

import argparse
import asyncio
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from docker import APIClient
from docker.errors import APIError

from bench.cells import CELL, installed_runtimes
from bench.guests import Guest
from bench.measuring import at_most, keep, spread_ms
from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import PoolSettings, Settings
from orchestrator.contexts.store import ContextStore, StagedContext
from orchestrator.ids import LOCAL_TENANT
from orchestrator.limits import POOLED_LEASE_S
from orchestrator.machine import Machine, open_machine, open_workplace
from orchestrator.sandbox.docker_driver import connect_engine
from orchestrator.sandbox.pool_events import Phase

_SIZE = 4
_TIMES = {"runc": 15, "runsc": 5}
_IDLE_S = 10.0
_PAUSES = 10
_REST_S = 0.3
"""After the pool is full: the engine has ended the last sandbox too."""
_FULL_S = 60.0
_P50_AIM_MS, _P99_AIM_MS = 20.0, 60.0


@dataclass(frozen=True, slots=True)
class _Bench:
    machine: Machine
    contexts: ContextStore
    context: StagedContext
    runtime: str

    async def first_result_s(self, *, own: bool = False) -> float:
        """Seconds from asking to the first cell's result."""
        started_s = time.perf_counter()
        async with self.machine.leases.open(
            lambda directory: self.contexts.link_into(self.context, directory),
            runtime=self.runtime,
            guest_services=(),
            max_concurrent_calls=1,
            wanted_for_s=POOLED_LEASE_S + 1 if own else 60.0,
        ) as sandbox:
            clock = CellClock(
                started_s=time.monotonic(), cell_timeout_s=30.0, cell_cpu_s=30.0, cell_ceiling_s=30.0
            )
            result = await sandbox.run_cell(CELL, clock)
            took_s = time.perf_counter() - started_s
            assert result.outcome is CellOutcome.OK, result
        return took_s

    async def filled(self) -> None:
        """The pool has come to rest."""
        async with asyncio.timeout(_FULL_S):
            while self.machine.pool.count(Phase.WAITING) < _SIZE:  # noqa: ASYNC110 - nobody else asks
                await asyncio.sleep(0.02)
        await asyncio.sleep(_REST_S)


async def measure(runtime: str) -> dict[str, Any]:
    """Milliseconds of the three ways, and what waiting costs."""
    async with AsyncExitStack() as stack:
        state_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm"))
        settings = Settings(state_dir=Path(state_dir), pool=PoolSettings(runc=_SIZE, runsc=_SIZE))
        workplace = await stack.enter_async_context(open_workplace(settings))
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"x" * 1_000)
        machine = await stack.enter_async_context(open_machine(settings, workplace, runtime=runtime))
        bench = _Bench(machine, workplace.contexts, context, runtime)
        engine = await asyncio.to_thread(connect_engine)
        stack.callback(engine.close)
        await bench.filled()
        guests = [await asyncio.to_thread(Guest, engine.api, one) for one in workplace.instance.alive]
        waiting = await _waiting(guests, engine.api)
        settled_s, in_a_row_s, cold_s = [], [], []
        for turn in range(_TIMES[runtime] + 1):
            await bench.filled()
            settled_s.append(await bench.first_result_s())
            in_a_row_s.append(await bench.first_result_s())
            if turn % 5 == 0:
                await bench.filled()
                cold_s.append(await bench.first_result_s(own=True))
    # The first of each warms up.
    ways = {"settled": settled_s[1:], "in_a_row": in_a_row_s[1:], "cold": cold_s[1:]}
    return {**{f"{way}_ms": spread_ms(took_s) for way, took_s in ways.items()}, "waiting": waiting}


async def _waiting(guests: list[Guest], engine: APIClient) -> dict[str, float]:
    """What one that waits uses, and what the engine takes to pause it and to let it go on."""
    before_s = [guest.cpu_s() for guest in guests]
    await asyncio.sleep(_IDLE_S)
    spent_s = [guest.cpu_s() - before for guest, before in zip(guests, before_s, strict=True)]
    pss_mib = [(await asyncio.to_thread(guest.pss_mib))["all"] for guest in guests]
    pause_s, unpause_s, failed = [], [], 0
    for _ in range(_PAUSES):
        try:
            pause_s.append(await _took_s(engine.pause, guests[0].name))
            unpause_s.append(await _took_s(engine.unpause, guests[0].name))
        except APIError:
            # "unable to freeze", "is not paused": seen with runc on cgroup version 1 of a busy machine.
            failed += 1
    for guest in guests:
        guest.close()
    return {
        "cpu_ms_per_s": round(statistics.median(spent_s) / _IDLE_S * 1_000, 2),
        "pss_mib": round(statistics.median(pss_mib), 1),
        "pause_ms": round(statistics.median(pause_s) * 1_000, 1),
        "unpause_ms": round(statistics.median(unpause_s) * 1_000, 1),
        "pauses_failed": failed,
    }


async def _took_s(call: Callable[[str], object], name: str) -> float:
    started_s = time.perf_counter()
    await asyncio.to_thread(call, name)
    return time.perf_counter() - started_s


def _aims(runtime: str, settled_ms: dict[str, float]) -> list[dict[str, object]]:
    measure = f"lease from a warm pool to first cell's result, {runtime}"
    return [
        at_most(f"{measure}, p50", settled_ms["p50"], _P50_AIM_MS, " ms"),
        at_most(f"{measure}, p99", settled_ms["p99"], _P99_AIM_MS, " ms"),
    ]


def main() -> None:
    """Print the percentiles and keep them."""
    parser = argparse.ArgumentParser(description="A lease from a warm pool.")
    parser.add_argument("runtimes", nargs="*", help="runc, runsc; all that are installed when none is named")
    wanted = parser.parse_args().runtimes or installed_runtimes()
    measured = {runtime: asyncio.run(measure(runtime)) for runtime in wanted}
    for runtime, rows in measured.items():
        for what, row in rows.items():
            print(f"{runtime} {what}: {row}")
    aims = [row for runtime in wanted for row in _aims(runtime, measured[runtime]["settled_ms"])]
    bars = [
        {
            "title": f"From asking for a sandbox to its first cell's result, {runtime}, median",
            "unit": "ms",
            "rows": {
                "pool, settled": measured[runtime]["settled_ms"]["p50"],
                "pool, in a row": measured[runtime]["in_a_row_ms"]["p50"],
                "cold": measured[runtime]["cold_ms"]["p50"],
            },
            "log": True,
        }
        for runtime in wanted
    ]
    keep("pool", {"aims": aims, **measured, "bars": bars})


if __name__ == "__main__":
    main()
