"""A run's right to a sandbox: a made one is handed over once, and destroyed with the end of its lease.

A sandbox is never used twice.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from orchestrator.cells import CellClock, CellOutcome, CellResult, Resource
from orchestrator.errors import EngineError
from orchestrator.ids import SandboxId
from orchestrator.limits import LOOK_AT_LOSS_S, SANDBOX_EXPIRY_GRACE_S, RunLimits
from orchestrator.rpc.guest_server import AddServices
from orchestrator.sandbox.endings import judged, since, why_lost
from orchestrator.sandbox.instance import Instance
from orchestrator.sandbox.making import MadeSandbox, SandboxMaker
from orchestrator.sandbox.port import Ending, SandboxDriver
from orchestrator.sandbox.session import CpuMeter

_STR_SHARE = 4
"""A context text is a real str up to this fraction of the sandbox's memory (design, section 4)."""
_LOOK_AGAIN_S = 0.1
_MAY_CHANGE_S = {
    Ending.RUNNING: LOOK_AT_LOSS_S,  # its process ends after its stream
    Ending.KILLED: 0.5,  # a container that somebody removes is killed first
}
_WANTED_FOR_S = RunLimits().deadline_s


PutContext = Callable[[Path], None]
"""Puts a context's files into a sandbox's directory; quick, because it only links."""


class LeasedSandbox:
    """A live sandbox that belongs to one run."""

    def __init__(
        self, made: MadeSandbox, driver: SandboxDriver, *, sizes: Mapping[Resource, int], wait_s: float
    ) -> None:
        self.sandbox_id: SandboxId = made.sandbox_id
        self.runtime = made.runtime
        self.image = driver.image
        self.wait_s = wait_s
        """From asking for it to having it."""
        self._session = made.session
        self._driver = driver
        self._sizes = sizes
        self._counters = driver.counters(made.sandbox_id)

    @property
    def hash_seed(self) -> int:
        """The interpreter's seed, for replaying the run."""
        return self._session.hash_seed

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


class SandboxLeases:
    """Makes leases on one instance with one driver."""

    def __init__(
        self,
        instance: Instance,
        driver: SandboxDriver,
        *,
        memory_bytes: int,
        sizes: Mapping[Resource, int] | None = None,
    ) -> None:
        """Makes leases.

        Args:
            instance: Whose sandboxes they are.
            driver: Makes them.
            memory_bytes: Of each sandbox.
            sizes: Of what a sandbox has only so much, for telling what a cell used up.
        """
        self._maker = SandboxMaker(instance, driver)
        self._driver = driver
        self._max_str_bytes = memory_bytes // _STR_SHARE
        self._sizes = {Resource.MEMORY: memory_bytes, **(sizes or {})}

    @asynccontextmanager
    async def open(
        self,
        put_context: PutContext,
        *,
        runtime: str,
        guest_services: Sequence[AddServices],
        max_concurrent_calls: int,
        wanted_for_s: float = _WANTED_FOR_S,
    ) -> AsyncIterator[LeasedSandbox]:
        """A sandbox for the length of the block, with a context in it and `guest_services` on its socket.

        Args:
            put_context: See `PutContext`.
            runtime: Of the container.
            guest_services: Built for one run.
            max_concurrent_calls: Sub-calls in flight at once.
            wanted_for_s: After that the run has ended in any case. The container expires a while later.

        Raises:
            SandboxStartError: It did not start.
            EngineError: The engine lacks something.
        """
        asked_s = time.monotonic()
        expires_at_s = int(time.time() + wanted_for_s) + SANDBOX_EXPIRY_GRACE_S
        async with self._maker.make(runtime=runtime, expires_at_s=expires_at_s) as made:
            put_context(made.context_dir)
            made.services.bind(guest_services)
            await made.session.lease(
                max_concurrent_calls=max_concurrent_calls, max_str_bytes=self._max_str_bytes
            )
            yield LeasedSandbox(made, self._driver, sizes=self._sizes, wait_s=time.monotonic() - asked_s)
