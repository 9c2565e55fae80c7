"""A run's right to a sandbox: a made one is handed over once, and destroyed with the end of its lease.

A sandbox is never used twice. It may have been made ahead (`pool.py`); what makes it the run's comes all at
once and only here: context, services, limits.
"""

import asyncio
import copy
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from orchestrator.cells import CellClock, CellOutcome, CellResult, Resource, SandboxLoss
from orchestrator.errors import EngineError, SandboxLostError, SandboxStartError
from orchestrator.ids import LOCAL_TENANT, SandboxId, TenantId
from orchestrator.limits import LOOK_AT_LOSS_S, RunLimits
from orchestrator.rpc.guest_server import AddServices
from orchestrator.sandbox.endings import judged, since, why_lost
from orchestrator.sandbox.instance import Instance
from orchestrator.sandbox.making import MadeSandbox, SandboxMaker
from orchestrator.sandbox.pool import SandboxPool
from orchestrator.sandbox.port import Ending, SandboxDriver
from orchestrator.sandbox.session import CpuMeter

_STR_SHARE = 4
"""A context text is a real str up to this fraction of the sandbox's memory (design, section 4)."""
_LOOK_AGAIN_S = 0.1
_MAY_CHANGE_S = {
    Ending.RUNNING: LOOK_AT_LOSS_S,  # its process ends after its stream
    Ending.KILLED: 0.5,  # a container that somebody removes is killed first
}
_SEEN_WHEN_IT_ENDS = {SandboxLoss.WORKER_ENDED, SandboxLoss.CONTAINER_GONE}
_ENGINE_ENDS_S = 2.0
_WANTED_FOR_S = RunLimits().deadline_s


PutContext = Callable[[Path], None]
"""Puts a context's files into a sandbox's directory; quick, because it only links."""
OnTrouble = Callable[[], None]
"""Told, before the run hears of it, that it was not the guest which cost it its sandbox: the engine is away,
or makes none."""


class LeasedSandbox:
    """A live sandbox that belongs to one run."""

    def __init__(
        self,
        made: MadeSandbox,
        driver: SandboxDriver,
        *,
        sizes: Mapping[Resource, int],
        wait_s: float,
        hash_seed: int = 0,
        on_trouble: OnTrouble | None = None,
    ) -> None:
        self.sandbox_id: SandboxId = made.sandbox_id
        self.runtime = made.runtime
        self.image = driver.image
        self.wait_s = wait_s
        """From asking for it to having it."""
        self.hash_seed = hash_seed or made.session.hash_seed
        """The interpreter's seed, for replaying the run."""
        self._session = made.session
        self._driver = driver
        self._sizes = sizes
        self._counters = driver.counters(made.sandbox_id)
        self._on_trouble = on_trouble

    async def run_cell(self, code: str, clock: CellClock) -> CellResult:
        """Run one cell under its clock. What goes wrong in the sandbox is in the result."""
        result = await self._session.run_cell(code, clock, CpuMeter(self._driver, self.sandbox_id))
        # Before anything else: of a sandbox that ended the kernel forgets the counters within milliseconds.
        before, self._counters = self._counters, self._driver.counters(self.sandbox_id)
        facts = since(before, self._counters)
        if result.outcome is CellOutcome.SANDBOX_LOST:
            loss = why_lost(
                self._session.stream_end,
                await self._engine_says(),
                facts,
                worker_is_out_of_reach=self.runtime == "runc",
            )
            if self._on_trouble is not None and await self._was_the_engines(loss):
                self._on_trouble()
            return result.lost_for(loss)
        return judged(result, facts, self._sizes)

    async def _engine_says(self) -> Ending | None:
        """What became of the container, once it has ended or is not going to; None without an answer."""
        lost_s = time.monotonic()
        while True:
            try:
                ending = await self._driver.ending(self.sandbox_id)
            except EngineError:
                return None
            if time.monotonic() >= lost_s + _MAY_CHANGE_S.get(ending, 0.0):
                return ending
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _was_the_engines(self, loss: SandboxLoss) -> bool:
        """Whether the engine took the sandbox along. One that ends, ends its containers first."""
        look_until_s = time.monotonic() + (_ENGINE_ENDS_S if loss in _SEEN_WHEN_IT_ENDS else 0.0)
        while loss is not SandboxLoss.ENGINE_GONE and time.monotonic() < look_until_s:
            await asyncio.sleep(_LOOK_AGAIN_S)
            try:
                await self._driver.ending(self.sandbox_id)
            except EngineError:
                return True
        return loss is SandboxLoss.ENGINE_GONE


class SandboxLeases:
    """Makes leases on one instance with one driver."""

    def __init__(
        self,
        instance: Instance,
        driver: SandboxDriver,
        *,
        memory_bytes: int,
        sizes: Mapping[Resource, int] | None = None,
        of_runtimes: Mapping[str, Mapping[Resource, int]] | None = None,
        pool: SandboxPool | None = None,
    ) -> None:
        """Makes leases.

        Args:
            instance: Whose sandboxes they are.
            driver: Makes them.
            memory_bytes: Of each sandbox.
            sizes: Of what a sandbox has only so much, for telling what a cell used up ...
            of_runtimes: ... but of those on these runtimes.
            pool: Where sandboxes come from; None to make each when it is asked for.
        """
        self._pool = pool or SandboxPool(SandboxMaker(instance, driver))
        self._driver = driver
        self._max_str_bytes = memory_bytes // _STR_SHARE
        self._sizes = {Resource.MEMORY: memory_bytes, **(sizes or {})}
        self._of_runtimes = of_runtimes or {}
        self._on_trouble: OnTrouble | None = None

    def telling(self, on_trouble: OnTrouble) -> "SandboxLeases":
        """The same, but that somebody is told when the engine costs a run its sandbox."""
        leases = copy.copy(self)
        leases._on_trouble = on_trouble
        return leases

    @asynccontextmanager
    async def open(
        self,
        put_context: PutContext,
        *,
        runtime: str,
        guest_services: Sequence[AddServices],
        max_concurrent_calls: int,
        wanted_for_s: float = _WANTED_FOR_S,
        hash_seed: int = 0,
        tenant_id: TenantId = LOCAL_TENANT,
    ) -> AsyncIterator[LeasedSandbox]:
        """A sandbox for the length of the block, with a context in it and `guest_services` on its socket.

        Args:
            put_context: See `PutContext`.
            runtime: Of the container.
            guest_services: Built for one run.
            max_concurrent_calls: Sub-calls in flight at once.
            wanted_for_s: After that the run has ended in any case. The container expires a while later.
            hash_seed: Of a run that is resumed, whose sandbox is never one made ahead. 0 for a new run.
            tenant_id: Whose turn it takes where others ask too.

        Raises:
            SandboxStartError: It did not start.
            SandboxLostError: It went away at once.
            SandboxBusyError: None is ready, and the settings say not to start one.
            EngineError: The engine lacks something.
        """
        asked_s = time.monotonic()

        async def begun(stack: AsyncExitStack, *, own: bool) -> MadeSandbox:
            made = await stack.enter_async_context(
                self._pool.sandbox(runtime=runtime, wanted_for_s=wanted_for_s, own=own, tenant_id=tenant_id)
            )
            put_context(made.context_dir)
            made.services.bind(guest_services)
            await made.session.lease(
                max_concurrent_calls=max_concurrent_calls,
                max_str_bytes=self._max_str_bytes,
                hash_seed=hash_seed,
            )
            return made

        async with AsyncExitStack() as stack:
            try:
                try:
                    made = await begun(stack, own=bool(hash_seed))
                except SandboxLostError:
                    # One that waited can have died unseen. The next is made for this lease, so it ends here.
                    await stack.aclose()
                    made = await begun(stack, own=True)
            except (EngineError, SandboxStartError, SandboxLostError, OSError):
                # OSError: the state directory has no room for its sockets.
                if self._on_trouble is not None:
                    self._on_trouble()
                raise
            wait_s = time.monotonic() - asked_s
            sizes = self._of_runtimes.get(runtime, self._sizes)
            yield LeasedSandbox(
                made,
                self._driver,
                sizes=sizes,
                wait_s=wait_s,
                hash_seed=hash_seed,
                on_trouble=self._on_trouble,
            )
