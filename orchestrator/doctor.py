"""What a run needs of this machine, looked at one by one with real parts."""

import asyncio
import statistics
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

from orchestrator.access import check_address, provider_url
from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import Settings
from orchestrator.errors import EngineError, OrchestratorError
from orchestrator.ids import LOCAL_TENANT
from orchestrator.machine import image_id, open_machine, open_workplace, runtimes
from orchestrator.sandbox.docker_driver import connect_engine

RUNTIMES = ("runc", "runsc")
_PROBE_S = 60.0
_PROBE_CELLS = 200
_CELL = "x = globals().get('x', 0) + 1; print(x)"


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at."""

    name: str
    ok: bool
    detail: str
    what_to_do: str = ""


async def doctor(settings: Settings) -> AsyncIterator[Check]:
    """Look at everything a run needs; each finding as it comes."""
    try:
        client = await asyncio.to_thread(connect_engine)
        version = (await asyncio.to_thread(client.version))["Version"]
        known = await asyncio.to_thread(runtimes, client)
    except EngineError as error:
        yield Check("engine", False, str(error), "start Docker, or run deploy/setup-host as root")
        return
    yield Check("engine", True, f"Docker {version}")
    try:
        found = await asyncio.to_thread(image_id, client, settings)
    except OrchestratorError as error:
        mend = (
            "unset RLM_IMAGE, or name an image that is there" if settings.image else "run `rlm image build`"
        )
        yield Check("image", False, str(error), mend)
    else:
        yield Check("image", True, found)
        for runtime in RUNTIMES:
            yield await _probe_runtime(settings, runtime, known=runtime in known)
    yield _check_key(settings)
    yield await _check_provider(settings)


async def _probe_runtime(settings: Settings, runtime: str, *, known: bool) -> Check:
    """Start a real sandbox on the runtime and run cells in it."""
    name = f"runtime {runtime}"
    needed = runtime == RUNTIMES[0]
    if not known:
        return Check(name, not needed, "not registered with the engine", "run deploy/setup-host as root")
    try:
        async with asyncio.timeout(_PROBE_S):
            start_s, cells_s = await _measure(settings, runtime)
    except (OrchestratorError, TimeoutError) as error:
        return Check(name, not needed, f"a sandbox does not work on it: {error or 'no answer'}")
    p50_ms, p99_ms = statistics.median(cells_s) * 1e3, statistics.quantiles(cells_s, n=100)[98] * 1e3
    detail = f"sandbox ready in {start_s:.2f} s, cell round trip p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms"
    return Check(name, True, f"{detail} over {len(cells_s)} cells")


async def _measure(settings: Settings, runtime: str) -> tuple[float, list[float]]:
    async with open_workplace(settings) as workplace:
        context = workplace.contexts.stage_text(LOCAL_TENANT, b"probe\n")
        async with (
            open_machine(settings, workplace, runtime=runtime) as machine,
            machine.leases.open(
                lambda directory: workplace.contexts.link_into(context, directory),
                runtime=runtime,
                guest_services=(),
                max_concurrent_calls=1,
            ) as sandbox,
        ):
            cells_s: list[float] = []
            for _ in range(_PROBE_CELLS):
                clock = CellClock(
                    started_s=time.monotonic(), cell_timeout_s=10.0, cell_cpu_s=10.0, cell_ceiling_s=10.0
                )
                result = await sandbox.run_cell(_CELL, clock)
                if result.outcome is not CellOutcome.OK:
                    raise EngineError(f"a trivial cell ended as {result.outcome.value}")
                cells_s.append(result.duration_s)
            return sandbox.wait_s, cells_s


def _check_key(settings: Settings) -> Check:
    if settings.platform:
        return Check(
            "key", True, f"{type(settings.platform).__name__}: credentials are looked for with the first call"
        )
    if settings.api_key:
        return Check("key", True, "ANTHROPIC_API_KEY is set")
    return Check(
        "key", False, "no key", "set ANTHROPIC_API_KEY, or name a server of your own with --base-url"
    )


async def _check_provider(settings: Settings) -> Check:
    url = provider_url(settings)
    try:
        await check_address(url)
    except OrchestratorError as error:
        return Check("provider", False, str(error), "check the network, or name a server with --base-url")
    return Check("provider", True, f"{url} answers")
