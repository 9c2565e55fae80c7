"""One orchestrator process with several tenants in it, in real containers, and what the host sees of them.

A test either plays runs (`House.run`), or drives a sandbox cell by cell (`House.sandbox`), which leaves it
time to look at the container from the host between two cells.
"""

import asyncio
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from docker import DockerClient

from orchestrator import app
from orchestrator.app import RunOptions, Tenant
from orchestrator.budget import UNLIMITED, Amounts
from orchestrator.cells import CellClock, CellResult
from orchestrator.config import Settings
from orchestrator.ids import TenantId, new_run_id
from orchestrator.limits import RunLimits
from orchestrator.machine import Machine, Workplace, open_machine, open_workplace
from orchestrator.models.port import Completion, Model, ModelRequest
from orchestrator.models.scripted import ScriptedClient, Step
from orchestrator.pricing import ModelCard, Tier
from orchestrator.rpc.guest_server import AddServices
from orchestrator.runs.tree import ROOT_ALIAS, SUB_ALIAS, RunResult
from orchestrator.sandbox.lease import LeasedSandbox
from orchestrator.tenants.memory import MemoryTenantAccount
from tests.e2e.playing import LAST_WORDS, Played

T = TypeVar("T")

NO_QUOTA = Amounts(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED)
CARD = ModelCard(
    name="scripted",
    window_tokens=1_000_000,
    max_output_tokens=32_000,
    tiers=(
        Tier(
            up_to_input_tokens=1_000_000,
            input=1_000_000,
            output=5_000_000,
            cache_read=100_000,
            cache_write=1_250_000,
        ),
    ),
)
"""Not free, so that a run's cost can be looked at."""


# --- Runs ----------------------------------------------------------------------------------------------


async def _echo(prompt: str) -> str:
    return prompt


@dataclass(frozen=True, slots=True)
class Script:
    """What the models of a run tree say: see `models.scripted`."""

    steps: Sequence[Step]
    child_steps: Sequence[Step] = ()
    complete: Callable[[str], Awaitable[Any]] = _echo
    last_words: str = LAST_WORDS

    def run(self, question: str, depth: int) -> Generator[Step, str, str]:
        # Not `yield from`: what iterates over a sequence can't be sent a report.
        for step in self.child_steps if depth else self.steps:  # noqa: UP028
            yield step
        return self.last_words


async def _nothing(_request: ModelRequest) -> None:
    """Before a request that nobody waits for."""


class Recording(ScriptedClient):
    """A provider with a log of its own."""

    def __init__(
        self, script: object, requests: list[ModelRequest], before: Callable[[ModelRequest], Awaitable[None]]
    ) -> None:
        super().__init__(script)
        self._requests = requests
        self._before = before
        self.billed_tokens = 0

    async def complete(self, request: ModelRequest) -> Completion:
        self._requests.append(request)
        await self._before(request)
        completion = await super().complete(request)
        self.billed_tokens += completion.usage.total
        return completion


@dataclass(kw_only=True, slots=True)
class Story(Played):
    """A run and all that was said in it."""

    result: RunResult | None = None
    billed_tokens: int = 0
    """By the provider's own count."""
    took_s: float = 0.0

    @property
    def end(self) -> RunResult:
        assert self.result is not None
        return self.result


@dataclass(frozen=True, slots=True)
class House:
    """See `open_house`."""

    machine: Machine
    workplace: Workplace
    engine: DockerClient
    settings: Settings
    runtime: str

    async def run(
        self,
        script: object,
        *,
        tenant: Tenant | None = None,
        context: Sequence[Path] = (),
        text: str = "nothing to see",
        question: str = "What is in there?",
        limits: RunLimits | None = None,
        before: Callable[[ModelRequest], Awaitable[None]] = _nothing,
        story: Story | None = None,
    ) -> Story:
        """Play a run tree to its end.

        Args:
            script: A `Script`, or what else `ScriptedClient` takes.
            tenant: Who pays; somebody new unless given.
            context: Files or directories; `text` in a file unless given.
            text: See `context`.
            question: What is asked.
            limits: Of the run tree.
            before: Awaited before each request is answered.
            story: Filled while the run goes on; for runs that don't return.
        """
        story = Story() if story is None else story
        tenant = somebody() if tenant is None else tenant
        limits = RunLimits() if limits is None else limits
        client = Recording(script, story.requests, before)
        model = Model(CARD, client)
        started_s = time.monotonic()
        async with AsyncExitStack() as stack:
            stack.push_async_callback(client.aclose)
            staged = (
                await stack.enter_async_context(app.staged(self.workplace.contexts, tenant, context))
                if context
                else self.workplace.contexts.stage_text(tenant.tenant_id, text.encode())
            )
            if not context:
                stack.callback(self.workplace.contexts.release, staged)
            story.result = await app.root_run(
                new_run_id(),
                RunOptions(
                    question=question,
                    context_paths=(),
                    model=CARD.name,
                    runtime=self.runtime,
                    limits=limits,
                ),
                machine=self.machine,
                tenant=tenant,
                models={CARD.name: model, ROOT_ALIAS: model, SUB_ALIAS: model},
                context=staged,
                observers=(story.events.append,),
            )
        story.billed_tokens = client.billed_tokens
        story.took_s = time.monotonic() - started_s
        return story

    async def cells(self, *cells: Step, **more: Any) -> Story:
        """Run these cells one after the other."""
        return await self.run(Script(cells), **more)

    # --- Single sandboxes ------------------------------------------------------------------------------

    @asynccontextmanager
    async def sandbox(
        self,
        text: str = "nothing to see",
        *,
        guest_services: Sequence[AddServices] = (),
        hash_seed: int = 0,
    ) -> AsyncIterator["Inmate"]:
        """A leased sandbox for the length of the block, with nobody at its broker's end."""
        tenant = somebody()
        context = self.workplace.contexts.stage_text(tenant.tenant_id, text.encode())
        try:
            async with self.machine.leases.open(
                lambda directory: self.workplace.contexts.link_into(context, directory),
                runtime=self.runtime,
                guest_services=guest_services,
                max_concurrent_calls=8,
                hash_seed=hash_seed,
            ) as leased:
                container = await asyncio.to_thread(
                    self.engine.api.inspect_container, f"rlm-{leased.sandbox_id}"
                )
                yield Inmate(leased, container)
        finally:
            self.workplace.contexts.release(context)


def somebody(allowance: Amounts = NO_QUOTA) -> Tenant:
    """A tenant of their own."""
    return Tenant(tenant_id=TenantId(f"t-{new_run_id()}"), account=MemoryTenantAccount(allowance))


@asynccontextmanager
async def open_house(settings: Settings, engine: DockerClient, runtime: str) -> AsyncIterator[House]:
    """An orchestrator's machine for the length of the block."""
    async with (
        open_workplace(settings) as workplace,
        open_machine(settings, workplace, runtime=runtime) as machine,
    ):
        yield House(machine, workplace, engine, settings, runtime)


@dataclass(frozen=True, slots=True)
class Inmate:
    """One sandbox, from inside and from the host."""

    leased: LeasedSandbox
    container: dict[str, Any]
    """As the engine inspects it."""

    @property
    def pid(self) -> int:
        """Of its first process, on the host."""
        return int(self.container["State"]["Pid"])

    async def cell(self, code: str, *, timeout_s: float = 30.0) -> CellResult:
        clock = CellClock(
            started_s=time.monotonic(), cell_timeout_s=timeout_s, cell_cpu_s=1e6, cell_ceiling_s=1e6
        )
        return await self.leased.run_cell(code, clock)

    async def says(self, code: str, *, timeout_s: float = 30.0) -> str:
        """What a cell that must end well prints."""
        result = await self.cell(code, timeout_s=timeout_s)
        assert result.outcome.value == "ok", (result.outcome, result.output, result.traceback)
        return result.output.strip()

    def cgroup(self, file_v1: str, file_v2: str) -> str:
        """A control file of the whole container, read on the host.

        Args:
            file_v1: As `controller/file`, where each controller has a hierarchy of its own.
            file_v2: As `file`, of the one hierarchy.
        """
        controller, _, name = file_v1.partition("/")
        root, lines = Path("/sys/fs/cgroup"), Path(f"/proc/{self.pid}/cgroup").read_text().splitlines()
        places = {
            part: path
            for line in lines
            for _, parts, path in [line.split(":", 2)]
            for part in parts.split(",")
        }
        if controller in places:
            return (root / controller / places[controller].lstrip("/") / name).read_text()
        return (root / places[""].lstrip("/") / file_v2).read_text()

    def host_pids(self) -> set[int]:
        """All its processes, on the host."""
        return {int(pid) for pid in self.cgroup("pids/cgroup.procs", "cgroup.procs").split()}


# --- What else the host sees ---------------------------------------------------------------------------


def resident_bytes(pid: int | str = "self") -> int:
    """Memory that a process has now."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def forget_peak() -> None:
    """Let `peak_bytes` begin anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes() -> int:
    """The most memory this process had since `forget_peak`."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def open_files_of_host() -> int:
    """Of all processes of the machine, as the kernel counts them."""
    return int(Path("/proc/sys/fs/file-nr").read_text().split()[0])


def own_open_files() -> int:
    """Of the orchestrator's process, which the tests are."""
    return len(list(Path("/proc/self/fd").iterdir()))


async def until(happened: Callable[[], bool], most_s: float = 20.0) -> None:
    """Wait for something that has no event of its own."""
    async with asyncio.timeout(most_s):
        while not happened():  # noqa: ASYNC110 - most of it is the kernel's
            await asyncio.sleep(0.02)
