"""From asking for a sandbox to its first cell's result, cold: `python -m bench.cold_start [RUNTIME...]`.

Against the engine alone: a container of the same image and flags that runs `python3 -c "import grpc"`, until
it has ended. Both in turns, one at a time; removing either is not counted.
"""

import argparse
import asyncio
import tempfile
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from bench.bare_engine import bare_engine
from bench.cells import CELL, installed_runtimes
from bench.measuring import at_most, keep, spread_ms
from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import Settings
from orchestrator.ids import LOCAL_TENANT
from orchestrator.machine import open_machine, open_workplace

_TIMES = {"runc": 30, "runsc": 10}
_AIM = 1.3


async def measure(runtime: str) -> dict[str, Any]:
    """Milliseconds of both, and their ratio."""
    ours_s, bare_s, made_s = [], [], []
    async with AsyncExitStack() as stack:
        state_dir = stack.enter_context(tempfile.TemporaryDirectory(prefix="rlm"))
        settings = Settings(state_dir=Path(state_dir))
        bare = stack.enter_context(bare_engine(settings, runtime, at_once=1))
        workplace = await stack.enter_async_context(open_workplace(settings))
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"x" * 1_000)
        machine = await stack.enter_async_context(open_machine(settings, workplace, runtime=runtime))
        for turn in range(_TIMES[runtime] + 1):
            started_s = time.perf_counter()
            async with machine.leases.open(
                lambda directory: workplace.contexts.link_into(context, directory),
                runtime=runtime,
                guest_services=(),
                max_concurrent_calls=1,
            ) as sandbox:
                leased_s = time.perf_counter()
                clock = CellClock(
                    started_s=time.monotonic(), cell_timeout_s=10.0, cell_cpu_s=10.0, cell_ceiling_s=10.0
                )
                result = await sandbox.run_cell(CELL, clock)
                ended_s = time.perf_counter()
                assert result.outcome is CellOutcome.OK, result
            bare_started_s = time.perf_counter()
            name = await bare.run_to_exit()
            bare_ended_s = time.perf_counter()
            await bare.remove(name)
            if turn:  # the first warms the page cache
                made_s.append(leased_s - started_s)
                ours_s.append(ended_s - started_s)
                bare_s.append(bare_ended_s - bare_started_s)
    ours_ms, bare_ms = spread_ms(ours_s), spread_ms(bare_s)
    return {
        "first_result_ms": ours_ms,
        "leased_ms": spread_ms(made_s),
        "bare_ms": bare_ms,
        "ratio": round(ours_ms["p50"] / bare_ms["p50"], 2),
    }


def main() -> None:
    """Print the medians and keep all."""
    parser = argparse.ArgumentParser(description="A cold start against the engine alone.")
    parser.add_argument("runtimes", nargs="*", help="runc, runsc; all that are installed when none is named")
    wanted = parser.parse_args().runtimes or installed_runtimes()
    measured = {runtime: asyncio.run(measure(runtime)) for runtime in wanted}
    print(measured)
    aims = [
        at_most(
            f"cold start to first cell's result against `docker run` of `import grpc`, p50, {runtime}",
            measured[runtime]["ratio"],
            _AIM,
            "×",
        )
        for runtime in wanted
    ]
    bars = [
        {
            "title": f"Cold start, {runtime}, median",
            "unit": "ms",
            "rows": {
                "engine alone, import grpc": measured[runtime]["bare_ms"]["p50"],
                "sandbox leased": measured[runtime]["leased_ms"]["p50"],
                "first cell's result": measured[runtime]["first_result_ms"]["p50"],
            },
        }
        for runtime in wanted
    ]
    keep("cold_start", {"aims": aims, **measured, "bars": bars})


if __name__ == "__main__":
    main()
