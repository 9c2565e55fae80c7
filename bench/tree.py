"""A tree of 156 runs with instant model replies: `python -m bench.tree [RUNTIME...]`.

Depth 3, each run but the deepest asking five children at once, every run in a sandbox of its own; against
the engine alone, which creates, starts, waits for and removes as many containers of the same posture at
whichever concurrency it is best at. Three times: without a pool, with a small one, and with one that holds a
sandbox for each run, filled before the clock starts.
"""

import argparse
import asyncio
import tempfile
import time
from collections.abc import Generator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench.bare_engine import bare_engine
from bench.cells import installed_runtimes
from bench.measuring import at_least, at_most, keep
from bench.sandbox_cost import per_second
from orchestrator.app import RunOptions, Tenant, root_run
from orchestrator.budget import UNLIMITED, Amounts
from orchestrator.config import PoolSettings, Settings
from orchestrator.ids import LOCAL_TENANT, new_run_id
from orchestrator.limits import RunLimits
from orchestrator.machine import open_machine, open_workplace
from orchestrator.models.port import Model
from orchestrator.models.scripted import ScriptedClient
from orchestrator.pricing import ModelCard, Tier
from orchestrator.runs.tree import ROOT_ALIAS, SUB_ALIAS
from orchestrator.sandbox.pool_events import Phase
from orchestrator.tenants.memory import MemoryTenantAccount

_DEPTH, _WIDTH = 3, 5
RUNS = sum(_WIDTH**depth for depth in range(_DEPTH + 1))
_PARENTS = sum(_WIDTH**depth for depth in range(_DEPTH))
_SMALL_POOL = 8
_SANDBOXES = _PARENTS + 16
"""Every parent keeps its own while it waits; so many leaves at once beside them."""
_BARE_AT_ONCE = (2, 3, 4, 6)
_BARE_TRIAL = 12
_FULL_S = 200.0
_AIM, _WARM_AIM = 1.5, 2.0

_PARENT = f"answers = rlm_query_batched(['how many below you?'] * {_WIDTH}, ['1'] * {_WIDTH})\n"
_PARENT += "FINAL(1 + sum(int(answer) for answer in answers))"
_LEAF = "FINAL(1)"

_CARD = ModelCard(
    name="scripted",
    window_tokens=1_000_000,
    max_output_tokens=32_000,
    tiers=(Tier(up_to_input_tokens=1_000_000, input=0, output=0, cache_read=0, cache_write=0),),
)
_LIMITS = RunLimits(
    max_depth=_DEPTH, max_child_runs=RUNS, max_tokens=500_000_000, max_calls=10 * RUNS, max_concurrency=32
)


class _Counting:
    """The models' script: each run counts itself and those below it."""

    def run(self, question: str, depth: int) -> Generator[str, str, str]:
        yield _LEAF if depth == _DEPTH else _PARENT
        return "no cell ended this run"

    def complete(self, prompt: str) -> str:
        return prompt


async def tree_s(settings: Settings, runtime: str, *, pool: int) -> float:
    """Seconds that the tree takes, from asking for its root run until it has ended and nothing is left."""
    settings = replace(settings, pool=PoolSettings(runc=pool, runsc=pool))
    async with AsyncExitStack() as stack:
        workplace = await stack.enter_async_context(open_workplace(settings))
        machine = await stack.enter_async_context(open_machine(settings, workplace, runtime=runtime))
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"1")
        client = ScriptedClient(_Counting())
        stack.push_async_callback(client.aclose)
        model = Model(_CARD, client)
        async with asyncio.timeout(_FULL_S):
            while machine.pool.count(Phase.WAITING) < pool:  # noqa: ASYNC110 - nobody else asks
                await asyncio.sleep(0.1)
        tenant = Tenant(
            tenant_id=LOCAL_TENANT,
            account=MemoryTenantAccount(Amounts(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED)),
        )
        started_s = time.perf_counter()
        result = await root_run(
            new_run_id(),
            RunOptions(
                question="how many?", context_paths=(), model="scripted", runtime=runtime, limits=_LIMITS
            ),
            machine=machine,
            tenant=tenant,
            models={"scripted": model, ROOT_ALIAS: model, SUB_ALIAS: model},
            context=context,
        )
        took_s = time.perf_counter() - started_s
        assert result.answer == str(RUNS), result
    return took_s


async def bare_s(settings: Settings, runtime: str) -> dict[str, Any]:
    """Seconds that the engine alone takes for as many containers, and the concurrency it is best at."""
    with bare_engine(settings, runtime, at_once=max(_BARE_AT_ONCE)) as bare:
        await bare.run()
        rates = {
            at_once: await per_second(bare.run, at_once=at_once, count=_BARE_TRIAL)
            for at_once in _BARE_AT_ONCE
        }
        best = max(rates, key=lambda at_once: rates[at_once])
        return {"at_once": best, "s": round(RUNS / await per_second(bare.run, at_once=best, count=RUNS), 2)}


async def measure(runtime: str) -> dict[str, Any]:
    """Seconds of the engine alone and of the tree, and their ratios."""
    with tempfile.TemporaryDirectory(prefix="rlm") as state_dir:
        settings = Settings(state_dir=Path(state_dir), max_sandboxes=_SANDBOXES)
        bare = await bare_s(settings, runtime)
        tree = {
            "without_a_pool": await tree_s(settings, runtime, pool=0),
            "small_pool": await tree_s(settings, runtime, pool=_SMALL_POOL),
            "pool_for_all": await tree_s(replace(settings, max_sandboxes=RUNS), runtime, pool=RUNS),
        }
    return {
        "runs": RUNS,
        "engine_alone": bare,
        "tree_s": {name: round(took_s, 2) for name, took_s in tree.items()},
        "ratio": {name: round(took_s / bare["s"], 2) for name, took_s in tree.items()},
    }


def _aims(runtime: str, ratio: dict[str, float]) -> list[dict[str, object]]:
    return [
        at_most(
            f"tree of {RUNS} runs against the engine alone at its best (this, or the next), {runtime}",
            ratio["without_a_pool"],
            _AIM,
            "×",
        ),
        at_least(
            f"the same with the pool warm, times faster than the engine alone, {runtime}",
            round(1 / ratio["pool_for_all"], 2),
            _WARM_AIM,
            "×",
        ),
    ]


def main() -> None:
    """Print the times and keep them."""
    parser = argparse.ArgumentParser(description="A tree of runs.")
    parser.add_argument("runtimes", nargs="*", default=["runc"], help="runc, runsc")
    wanted = parser.parse_args().runtimes
    unknown = set(wanted) - set(installed_runtimes())
    if unknown:
        parser.error(f"not installed: {', '.join(sorted(unknown))}")
    measured = {runtime: asyncio.run(measure(runtime)) for runtime in wanted}
    print(measured)
    aims = [row for runtime in wanted for row in _aims(runtime, measured[runtime]["ratio"])]
    bars = [
        {
            "title": f"{RUNS} runs as a tree, {runtime}",
            "unit": "s",
            "rows": {
                "engine alone": measured[runtime]["engine_alone"]["s"],
                "without a pool": measured[runtime]["tree_s"]["without_a_pool"],
                f"pool of {_SMALL_POOL}": measured[runtime]["tree_s"]["small_pool"],
                "pool for all": measured[runtime]["tree_s"]["pool_for_all"],
            },
        }
        for runtime in wanted
    ]
    keep("tree", {"aims": aims, **measured, "bars": bars})


if __name__ == "__main__":
    main()
