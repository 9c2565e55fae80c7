"""Probes in one real sandbox, made on the way that every run's is made on.

The same probes serve the tests and `rlm doctor --probe`. They need no model and no key, and leave nothing
behind.
"""

import asyncio
import json
import os
import platform
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from typing import Any

from docker import APIClient
from docker.errors import APIError

from orchestrator.cells import CellClock, CellOutcome
from orchestrator.config import Settings
from orchestrator.errors import EngineError
from orchestrator.ids import LOCAL_TENANT
from orchestrator.machine import open_machine, open_workplace, resources
from orchestrator.probes import calls, container, kernel, network, storage
from orchestrator.probes.finding import Facts, Finding, Probe, find, read_facts
from orchestrator.probes.host import (
    Host,
    Listeners,
    Process,
    file_hashes,
    listening,
    read_namespaces,
    read_process,
)
from orchestrator.sandbox.docker_driver import connect_engine
from orchestrator.sandbox.lease import LeasedSandbox
from orchestrator.sandbox.posture import LABEL_SANDBOX

PROBES: Sequence[Probe] = (*container.PROBES, *storage.PROBES, *kernel.PROBES, *network.PROBES)
"""All that are shipped, in the order of their cases but for A10 and C06."""

_CONTEXT = b"nothing to see here\n"
_CELL_S = 60.0
_DOOR = "orchestrator.probes.guest.door"
METADATA_SERVICE = "169.254.169.254"
"""Where clouds keep a machine's credentials. We have no listener there; the refusal itself is looked at."""
SOME_NAME = "example.com"
"""A name that anybody could look up."""


async def probe_sandbox(
    settings: Settings, runtime: str, probes: Sequence[Probe] = PROBES
) -> AsyncIterator[Finding]:
    """Try the doors of one sandbox on that runtime; a finding for each probe, all at the end.

    Raises:
        MachineError: There can be no sandbox: no engine, no image, no such runtime.
        SandboxStartError: It did not start.
    """
    facts, host = await collect(settings, runtime, probes)
    for probe in probes:
        yield find(probe, facts[probe.source], host)


async def collect(
    settings: Settings, runtime: str, probes: Sequence[Probe]
) -> tuple[dict[str, Facts | str], Host]:
    """What the probes' guest files printed in one sandbox, or why not, and what the host saw meanwhile."""
    client = await asyncio.to_thread(connect_engine)
    try:
        hosts = ["127.0.0.1", "::1", *await asyncio.to_thread(_bridge_addresses, client.api)]
        with listening(hosts) as listeners:
            return await _collect(settings, runtime, probes, client.api, listeners)
    finally:
        client.close()


async def _collect(
    settings: Settings, runtime: str, probes: Sequence[Probe], engine: APIClient, listeners: Listeners
) -> tuple[dict[str, Facts | str], Host]:
    context_dirs: list[Path] = []
    async with open_workplace(settings) as workplace:
        context = workplace.contexts.stage_text(LOCAL_TENANT, _CONTEXT)

        def put_context(directory: Path) -> None:
            workplace.contexts.link_into(context, directory)
            context_dirs.append(directory)

        async with (
            open_machine(settings, workplace, runtime=runtime) as machine,
            machine.leases.open(
                put_context, runtime=runtime, guest_services=(), max_concurrent_calls=1
            ) as sandbox,
        ):
            before = file_hashes(context_dirs[0])
            inspected, process = await asyncio.to_thread(_look_at, engine, sandbox)
            await _run(sandbox, _prelude(listeners))
            sources = list(dict.fromkeys(probe.source for probe in probes))
            facts = {source: await _facts(sandbox, source) for source in sources}
            host = Host(
                runtime=runtime,
                machine=platform.machine(),
                release=platform.release(),
                namespaces=read_namespaces("self"),
                uid=os.geteuid(),
                resources=resources(settings.sandbox, runtime),
                inspected=inspected,
                sandbox=process,
                arrived=listeners.arrived(),
                context_changed=file_hashes(context_dirs[0]) != before,
                core_pattern=_core_pattern(),
            )
    return facts, host


async def _facts(sandbox: LeasedSandbox, source: str) -> Facts | str:
    """What a guest file printed, or why it did not."""
    try:
        return read_facts(source, await _run(sandbox, _guest_file(source)))
    except (EngineError, ValueError) as error:
        return str(error)


async def _run(sandbox: LeasedSandbox, code: str) -> str:
    """What a cell printed.

    Raises:
        EngineError: It did not come to its end.
    """
    clock = CellClock(
        started_s=time.monotonic(), cell_timeout_s=_CELL_S, cell_cpu_s=_CELL_S, cell_ceiling_s=_CELL_S
    )
    result = await sandbox.run_cell(code, clock)
    if result.outcome is not CellOutcome.OK:
        last_line = (result.traceback.splitlines() or [""])[-1]
        raise EngineError(f"the probe ended as {result.outcome.value}: {last_line}")
    return result.output


def _guest_file(name: str) -> str:
    return files("orchestrator.probes.guest").joinpath(f"{name}.py").read_text(encoding="utf-8")


def _prelude(listeners: Listeners) -> str:
    """The cell that makes `door`, and what the host tells it, importable under its own name."""
    machine = platform.machine()
    addresses = [name.split() for name in listeners.tcp]
    arguments: dict[str, Any] = {
        "machine": machine,
        "calls": calls.named(machine),
        "sweep": calls.sweep(machine),
        "abstract": list(listeners.abstract),
        "name": SOME_NAME,
        "tcp": [*((host, int(port)) for host, port in addresses), (METADATA_SERVICE, 80)],
        "udp": [(host, int(port)) for host, port in map(str.split, listeners.udp)],
    }
    return (
        "import json, sys, types\n"
        f"sys.modules[{_DOOR!r}] = types.ModuleType({_DOOR!r})\n"
        f"exec(compile({_guest_file('door')!r}, 'door.py', 'exec'), sys.modules[{_DOOR!r}].__dict__)\n"
        f"sys.modules[{_DOOR!r}].arguments.update(json.loads({json.dumps(arguments)!r}))\n"
    )


def _look_at(engine: APIClient, sandbox: LeasedSandbox) -> tuple[dict[str, Any], Process | None]:
    """The container as the engine describes it, and its process as the host does. Blocks."""
    (container,) = engine.containers(filters={"label": f"{LABEL_SANDBOX}={sandbox.sandbox_id}"})
    inspected: dict[str, Any] = engine.inspect_container(container["Id"])
    return inspected, read_process(inspected["State"]["Pid"])


def _bridge_addresses(engine: APIClient) -> list[str]:
    """The host's own addresses on the engine's default network, if it has one. Blocks."""
    with suppress(APIError):
        pools = engine.inspect_network("bridge")["IPAM"]["Config"] or []
        return [pool["Gateway"] for pool in pools if "Gateway" in pool]
    return []


def _core_pattern() -> str:
    with suppress(OSError):
        return Path("/proc/sys/kernel/core_pattern").read_text().strip()
    return ""
