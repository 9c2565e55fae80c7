"""What benchmarks share: taking turns, percentiles, and keeping results with the machine they came from."""

import json
import os
import platform
import statistics
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"

Step = Callable[[], Awaitable[object]]


async def take_turns(ways: Mapping[str, Step], *, times: int, warm_up: int) -> dict[str, list[float]]:
    """Seconds that each way took, each time.

    They alternate, so that whatever else the machine does hits all of them alike; the ratios are the result.
    """
    took_s: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(warm_up + times):
        for name, step in ways.items():
            step_s = await timed_s(step)
            if number >= warm_up:
                took_s[name].append(step_s)
    return took_s


def spread_ms(took_s: Sequence[float]) -> dict[str, float]:
    """Median, 90th and 99th percentile, and the extremes, in milliseconds."""
    in_order = sorted(took_s)
    return {
        "min": _ms(in_order[0]),
        "p50": _ms(statistics.median(in_order)),
        "p90": _ms(_percentile(in_order, 90)),
        "p99": _ms(_percentile(in_order, 99)),
        "max": _ms(in_order[-1]),
        "times": len(in_order),
    }


async def timed_s(step: Step) -> float:
    """Seconds that one step takes."""
    started_s = time.perf_counter()
    await step()
    return time.perf_counter() - started_s


def at_most(measure: str, measured: float, aim: float, unit: str) -> dict[str, object]:
    """A row of a result's list `aims`: what is measured, in which unit, and whether that is little enough."""
    return _aim(measure, measured, f"≤ {aim:g}{unit}", unit, reached=measured <= aim)


def at_least(measure: str, measured: float, aim: float, unit: str) -> dict[str, object]:
    """Likewise, and whether it is enough."""
    return _aim(measure, measured, f"≥ {aim:g}{unit}", unit, reached=measured >= aim)


def _aim(measure: str, measured: float, aim: str, unit: str, *, reached: bool) -> dict[str, object]:
    return {"measure": measure, "aim": aim, "measured": f"{measured:,g}{unit}", "reached": reached}


def keep(name: str, measured: Mapping[str, Any]) -> Path:
    """Write results to `bench/results/NAME.json`, with the machine they were taken on."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({**measured, "machine": _machine()}, indent=2, sort_keys=False) + "\n")
    return path


def _percentile(in_order: Sequence[float], percent: int) -> float:
    """The nearest rank: an observed value, also of few observations."""
    return in_order[min(len(in_order) - 1, -(-len(in_order) * percent // 100) - 1)]


def _ms(seconds: float) -> float:
    return round(seconds * 1_000, 3)


def _machine() -> dict[str, object]:
    return {
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "load_after": round(os.getloadavg()[0], 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "grpcio": version("grpcio"),
    }
