"""What this machine offers to runs: a container engine, the sandbox image, runtimes, a state directory."""

import asyncio
import os
import resource
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from docker import DockerClient

from orchestrator.cells import Resource
from orchestrator.config import PoolSettings, SandboxSettings, Settings
from orchestrator.contexts.store import ContextStore
from orchestrator.engine import LookedAt, fit_engine
from orchestrator.errors import MachineError
from orchestrator.runs.admission import SandboxSlots
from orchestrator.sandbox import image
from orchestrator.sandbox.docker_driver import DockerDriver
from orchestrator.sandbox.instance import Instance, claim_instance
from orchestrator.sandbox.lease import SandboxLeases
from orchestrator.sandbox.making import SandboxMaker
from orchestrator.sandbox.pool import SandboxPool, pooling
from orchestrator.sandbox.pool_rules import Plan
from orchestrator.sandbox.posture import TMP_FILES, Resources
from orchestrator.sandbox.preflight import Objection, sentence, state_dir_objection
from orchestrator.sandbox.reaper import Reaper, reaping
from orchestrator.sandbox.runtimes import GVISOR
from orchestrator.shielding import run_shielded

_MIB = 1024 * 1024
_GVISORS_OWN = 8
"""How much more the host counts of a gVisor sandbox: for each busy thread of the guest up to seven of its own
(seen with ptrace: 64 of them were 560). Where the host refuses gVisor one, the whole sandbox ends."""


_FILES_FOR_SANDBOX = 16
"""Descriptors of ours for one: ten, and its guest may open three connections more."""
_FILES_FOR_REST = 1_024


async def _nothing_to_look_at() -> None:
    """There is no engine."""


def _nothing_to_hurry() -> None:
    """Likewise."""


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
    pool: SandboxPool
    """Where the leases get their sandboxes from."""
    look: Callable[[], Awaitable[None]] = _nothing_to_look_at
    """Whether its engine answers now; raises `EngineError` where not."""
    hurry: Callable[[], None] = _nothing_to_hurry
    """Wait for nothing of the engine's for long any more: this process is to end."""
    held_to_gvisor: frozenset[str] = frozenset()
    """Ids of tenants, or `*`: see `sandbox.runtimes`."""
    objections: Sequence[Objection] = ()
    """What speaks against sandboxes on it without refusing them."""


@asynccontextmanager
async def open_workplace(settings: Settings) -> AsyncIterator[Workplace]:
    """This process's private directory, gone after the block with everything staged in it.

    Raises:
        MachineError: The state directory cannot be used.
    """
    check_state_dir(settings.state_dir)
    with claim_instance(settings.state_dir) as instance:
        contexts = ContextStore(instance.contexts_dir)
        try:
            yield Workplace(instance=instance, contexts=contexts)
        finally:
            contexts.close()


@asynccontextmanager
async def open_machine(
    settings: Settings, workplace: Workplace, *, runtime: str, also: Sequence[str] = ()
) -> AsyncIterator[Machine]:
    """The machine's engine, for the length of the block.

    What a killed orchestrator left behind is removed first.

    Args:
        settings: The process's settings.
        workplace: This process's directory.
        runtime: On which sandboxes run.
        also: Other runtimes on which some may.

    Raises:
        EngineError: No engine answers, or it lacks a runtime or another part of the wall: see
            `engine.fit_engine`.
        ImageMissingError: The sandbox image has to be built.
    """
    allow_open_files(settings.max_sandboxes)
    for other in also:
        found = await asyncio.to_thread(fit_engine, settings, runtime=other)
        found.client.close()
    engine, pinned_image_id = await asyncio.to_thread(_connect, settings, runtime)
    instance, slots = workplace.instance, SandboxSlots(settings.max_sandboxes)
    given = resources(settings.sandbox, runtime)
    of_others = {other: resources(settings.sandbox, other) for other in also}
    driver = DockerDriver(
        engine.client.api,
        image_id=pinned_image_id,
        instance_id=instance.instance_id,
        resources=given,
        of_runtimes=of_others,
    )
    planned = {name: plan for one in (runtime, *also) for name, plan in plans(settings.pool, one).items()}
    pool = SandboxPool(SandboxMaker(instance, driver), planned, capacity=settings.max_sandboxes)

    def withhold(count: int) -> None:
        """A sandbox that cannot be ended takes the place of another one."""
        slots.withhold(count)
        pool.withhold(count)

    instance.on_leaks = withhold
    try:
        async with reaping(Reaper(instance, driver)), pooling(pool):
            yield Machine(
                contexts=workplace.contexts,
                leases=SandboxLeases(
                    instance,
                    driver,
                    memory_bytes=given.memory_bytes,
                    sizes=sizes(given),
                    of_runtimes={other: sizes(of_it) for other, of_it in of_others.items()},
                    pool=pool,
                ),
                slots=slots,
                pool=pool,
                look=driver.look,
                hurry=driver.hurry,
                held_to_gvisor=settings.runsc_tenants,
                objections=engine.objections,
            )
    finally:
        await run_shielded(driver.aclose())


def resources(settings: SandboxSettings, runtime: str) -> Resources:
    """The settings in the engine's units, for sandboxes on this runtime."""
    return Resources(
        memory_bytes=settings.memory_mib * _MIB,
        cpus=settings.cpus,
        pids=settings.pids * (_GVISORS_OWN if runtime == GVISOR else 1),
        tmp_bytes=settings.tmp_mib * _MIB,
        shm_bytes=settings.shm_mib * _MIB,
        open_files=settings.open_files,
        file_size_bytes=settings.file_size_mib * _MIB,
    )


def plans(settings: PoolSettings, runtime: str) -> dict[str, Plan]:
    """What is made ahead, of the one runtime that the machine is opened for."""
    size = settings.runsc if runtime == GVISOR else settings.runc
    return {runtime: Plan(size=size, when_empty=settings.when_empty)} if size else {}


def sizes(given: Resources) -> dict[Resource, int]:
    """What a cell may be told that it used up."""
    return {
        Resource.MEMORY: given.memory_bytes,
        Resource.PROCESSES: given.pids,
        Resource.TMP_BYTES: given.tmp_bytes,
        Resource.TMP_FILES: TMP_FILES,
        Resource.SHM_BYTES: given.shm_bytes,
        Resource.OPEN_FILES: given.open_files,
    }


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


def allow_open_files(max_sandboxes: int) -> None:
    """Raise this process's soft limit, which is often 1,024, to what so many sandboxes need, if it may be."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Neither is unlimited: the kernel grants no more of these than fs.nr_open.
    wanted = min(hard, _FILES_FOR_REST + _FILES_FOR_SANDBOX * max_sandboxes)
    if soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _connect(settings: Settings, runtime: str) -> tuple[LookedAt, str]:
    engine = fit_engine(settings, runtime=runtime)
    try:
        return engine, image_id(engine.client, settings)
    except BaseException:
        engine.client.close()
        raise


def check_state_dir(path: Path) -> None:
    """Raise unless the state directory is ours alone to change, or still to be made.

    Raises:
        MachineError: It is not.
    """
    try:
        found = path.stat()
    except FileNotFoundError:
        return  # claim_instance makes it, for us alone
    except OSError as error:
        raise MachineError(f"the state directory {str(path)!r} cannot be used ({error.strerror})") from error
    objection = state_dir_objection(
        str(path), mode=found.st_mode, owner_uid=found.st_uid, own_uid=os.geteuid()
    )
    if objection is not None:
        raise MachineError(sentence([objection]))
