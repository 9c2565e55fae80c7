"""What this machine offers to runs: a container engine, the sandbox image, runtimes, a state directory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from docker import DockerClient
from docker.errors import APIError

from orchestrator.config import SandboxSettings, Settings
from orchestrator.contexts.store import ContextStore
from orchestrator.errors import EngineError
from orchestrator.runs.admission import SandboxSlots
from orchestrator.sandbox import image
from orchestrator.sandbox.docker_driver import DockerDriver, connect_engine, containers_by_instance
from orchestrator.sandbox.instance import Instance, claim_instance, dead_instances, forget_instance
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.sandbox.posture import Resources
from orchestrator.shielding import run_shielded

_MIB = 1024 * 1024


@dataclass(frozen=True, kw_only=True, slots=True)
class Workplace:
    """The part of a machine that works without an engine: where contexts are staged."""

    instance: Instance
    contexts: ContextStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """Everything a run tree needs of the machine."""

    contexts: ContextStore
    leases: SandboxLeases
    slots: SandboxSlots


@asynccontextmanager
async def open_workplace(settings: Settings) -> AsyncIterator[Workplace]:
    """This process's private directory, gone after the block with everything staged in it.

    Raises:
        MachineError: The state directory cannot be used.
    """
    with claim_instance(settings.state_dir) as instance:
        contexts = ContextStore(instance.contexts_dir)
        try:
            yield Workplace(instance=instance, contexts=contexts)
        finally:
            contexts.close()


@asynccontextmanager
async def open_machine(settings: Settings, workplace: Workplace, *, runtime: str) -> AsyncIterator[Machine]:
    """The machine's engine, for the length of the block.

    What a killed orchestrator left behind is removed first.

    Raises:
        EngineError: No engine answers, or it lacks the runtime.
        ImageMissingError: The sandbox image has to be built.
    """
    client, pinned_image_id = await asyncio.to_thread(_connect, settings, runtime)
    driver = DockerDriver(
        client.api,
        image_id=pinned_image_id,
        instance_id=workplace.instance.instance_id,
        resources=resources(settings.sandbox),
    )
    try:
        await asyncio.to_thread(reap_dead_instances, client, settings)
        yield Machine(
            contexts=workplace.contexts,
            leases=SandboxLeases(workplace.instance, driver, memory_bytes=settings.sandbox.memory_mib * _MIB),
            slots=SandboxSlots(settings.max_sandboxes),
        )
    finally:
        await run_shielded(driver.aclose())


def reap_dead_instances(client: DockerClient, settings: Settings) -> int:
    """Remove containers and directories of orchestrators that are gone; how many there were. Blocks."""
    dead = dead_instances(settings.state_dir)
    if not dead:
        return 0
    containers = containers_by_instance(client.api)
    for instance_id in dead:
        for container in containers.get(instance_id, []):
            try:
                client.api.remove_container(container, force=True, v=True)
            except APIError as error:
                if error.status_code not in {404, 409}:
                    raise EngineError(
                        f"a sandbox left behind could not be removed: {error.explanation}"
                    ) from error
        forget_instance(settings.state_dir, instance_id)
    return len(dead)


def resources(settings: SandboxSettings) -> Resources:
    """The settings in the engine's units."""
    return Resources(
        memory_bytes=settings.memory_mib * _MIB,
        cpus=settings.cpus,
        pids=settings.pids,
        tmp_bytes=settings.tmp_mib * _MIB,
        shm_bytes=settings.shm_mib * _MIB,
        open_files=settings.open_files,
        file_size_bytes=settings.file_size_mib * _MIB,
    )


def runtimes(client: DockerClient) -> frozenset[str]:
    """The OCI runtimes that the engine knows by name; whether they work is another matter. Blocks."""
    return frozenset(client.info().get("Runtimes", {}))


def image_id(client: DockerClient, settings: Settings) -> str:
    """The image that sandboxes are made of: the one the settings pin, or that of the present sources. Blocks.

    Raises:
        InvalidRequestError: The settings name it by a tag alone.
        ImageMissingError: It has to be pulled or built.
        EngineError: The engine does not answer.
    """
    return image.pinned(client, settings.image) if settings.image else image.find(client)


def _connect(settings: Settings, runtime: str) -> tuple[DockerClient, str]:
    client = connect_engine()
    known = runtimes(client)
    if runtime not in known:
        raise EngineError(
            f"the container engine has no runtime {runtime!r}; it has {', '.join(sorted(known))}. "
            "deploy/setup-host registers runsc where it is packaged"
        )
    return client, image_id(client, settings)
