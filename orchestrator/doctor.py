"""What a run needs of this machine, looked at one by one with real parts."""

import asyncio
import statistics
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from enum import Enum

from orchestrator.access import check_address
from orchestrator.config import Settings
from orchestrator.engine import LookedAt, look_at_engine
from orchestrator.errors import EngineError, MachineError, OrchestratorError
from orchestrator.ids import LOCAL_TENANT
from orchestrator.machine import check_state_dir, image_id
from orchestrator.models.provider.connection import connect
from orchestrator.models.provider.launch import ProviderProcess
from orchestrator.runtime_probe import probe_runtime
from orchestrator.sandbox.engine_facts import EngineFacts
from orchestrator.sandbox.preflight import Objection, runtime_objection
from orchestrator.sandbox.runtimes import EVERYBODY, RUNTIMES, runtime_for

_PROBE_CELLS = 200
_OWN_SERVER = "name a server of your own with --base-url"


class Level(Enum):
    """How good or bad a finding is."""

    OK = "ok"
    WARNING = "warning"
    """A run works; something about it is weaker than it could be."""
    FAILURE = "failure"
    """No run works, or none may be started."""


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at. Its words may come from an engine: hostile text."""

    name: str
    level: Level
    detail: str
    what_to_do: str = ""


async def doctor(settings: Settings, provider: ProviderProcess) -> AsyncIterator[Check]:
    """Look at everything a run needs; each finding as it comes. The provider process is connected to."""
    yield _check_state_dir(settings)
    tenants = _check_tenants(settings)
    if tenants is not None:
        yield tenants
    if settings.debug_switches:
        yield Check(
            "debug switches",
            Level.WARNING,
            f"{', '.join(settings.debug_switches)}: libraries write down what models and cells say",
            "unset them",
        )
    try:
        engine = await asyncio.to_thread(look_at_engine, settings)
    except EngineError as error:
        mend = "start Docker, or run deploy/setup-host as root"
        yield Check("engine", Level.FAILURE, str(error), mend)
    else:
        with closing(engine.client):
            async for check in _engine_and_what_it_has(settings, engine):
                yield check
    yield await _check_key(provider)
    yield await _check_provider(provider)


async def _engine_and_what_it_has(settings: Settings, engine: LookedAt) -> AsyncIterator[Check]:
    yield Check("engine", Level.OK, _described(engine.facts))
    for check in _wall(engine.objections):
        yield check
    try:
        found = await asyncio.to_thread(image_id, engine.client, settings)
    except OrchestratorError as error:
        mend = (
            "unset RLM_IMAGE, or name an image that is there" if settings.image else "run `rlm image build`"
        )
        yield Check("image", Level.FAILURE, str(error), mend)
        return
    yield Check("image", Level.OK, found)
    for runtime in RUNTIMES:
        yield await _check_runtime(settings, runtime, engine)


def _described(facts: EngineFacts) -> str:
    parts = ", ".join(f"{one.name} {one.version or 'of unknown version'}" for one in facts.components[1:])
    security = ", ".join(sorted(facts.security)) or "no security options"
    return f"Docker {facts.version}, {parts}, cgroup v{facts.cgroup_version}, {security}"


def _wall(objections: Sequence[Objection]) -> Iterator[Check]:
    if not any(objection.refuses for objection in objections):
        yield Check("wall", Level.OK, "the engine has all that a sandbox is refused without")
    for objection in objections:
        level = Level.FAILURE if objection.refuses else Level.WARNING
        yield Check(objection.name, level, objection.described, objection.what_to_do)


def runtime_check(runtime: str) -> str:
    """The name of the check of a runtime."""
    return f"runtime {runtime}"


async def _check_runtime(settings: Settings, runtime: str, engine: LookedAt) -> Check:
    """Start a real sandbox on the runtime and run cells in it."""
    name = runtime_check(runtime)
    needed = runtime == runtime_for(LOCAL_TENANT, None, held_to_gvisor=settings.runsc_tenants)
    bad = Level.FAILURE if needed else Level.WARNING
    missing = runtime_objection(runtime, engine.facts)
    if missing is not None:
        return Check(name, bad, f"not offered: {missing.detail}", missing.what_to_do)
    probe = await probe_runtime(settings, runtime, cells=_PROBE_CELLS)
    if not probe.works:
        return Check(name, bad, f"not offered: {probe.why_not}", "docs/runtimes.md says what it needs")
    p50_ms = statistics.median(probe.cells_s) * 1e3
    p99_ms = statistics.quantiles(probe.cells_s, n=100)[98] * 1e3
    detail = (
        f"sandbox ready in {probe.start_s:.2f} s, cell round trip p50 {p50_ms:.2f} ms, p99 {p99_ms:.2f} ms"
    )
    return Check(name, Level.OK, f"{detail} over {len(probe.cells_s)} cells")


def _check_state_dir(settings: Settings) -> Check:
    try:
        check_state_dir(settings.state_dir)
    except MachineError as error:
        return Check("state directory", Level.FAILURE, str(error))
    return Check("state directory", Level.OK, str(settings.state_dir))


def _check_tenants(settings: Settings) -> Check | None:
    if not settings.runsc_tenants:
        return None
    held = "everybody" if EVERYBODY in settings.runsc_tenants else ", ".join(sorted(settings.runsc_tenants))
    return Check("tenants", Level.OK, f"held to gVisor: {held}")


async def _check_key(provider: ProviderProcess) -> Check:
    try:
        connection = await connect(provider)
    except OrchestratorError as error:
        mend = f"docs/models.md has the names; to do without: {_OWN_SERVER}"
        return Check("key", Level.FAILURE, str(error), mend)
    await connection.client.aclose()
    if connection.credentials:
        detail = f"{', '.join(connection.credentials)} held in a process of its own"
    else:
        detail = f"{type(provider.platform).__name__}: credentials are looked for with the first call"
    return Check("key", Level.OK, detail)


async def _check_provider(provider: ProviderProcess) -> Check:
    try:
        await check_address(provider.base_url)
    except OrchestratorError as error:
        return Check("provider", Level.FAILURE, str(error), f"check the network, or {_OWN_SERVER}")
    return Check("provider", Level.OK, f"{provider.base_url} answers")
