"""A sandbox for one run: made, handed over, destroyed.

A sandbox is never used twice. Whoever opens a lease gets a live session, and after the block the container,
the socket, the server and both directories are gone, also when the block was cancelled.
"""

import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rlm_proto.v1 import sandbox_pb2_grpc

from orchestrator.cells import CellClock, CellResult
from orchestrator.errors import SandboxStartError
from orchestrator.ids import SandboxId, new_sandbox_id
from orchestrator.limits import WORKER_DIAL_IN_S
from orchestrator.rpc.guest_server import AddServices, guest_server
from orchestrator.sandbox.instance import Instance
from orchestrator.sandbox.port import Ending, SandboxDriver, SandboxSpec
from orchestrator.sandbox.session import CpuMeter, SandboxSession
from orchestrator.shielding import run_shielded

_LOOK_AT_START_S = 2.0
"""How often the engine is asked whether a sandbox that has not dialled in still runs."""
_STR_SHARE = 4
"""A context text is a real str up to this fraction of the sandbox's memory (design, section 4)."""


PutContext = Callable[[Path], None]
"""Puts a context's files into a sandbox's directory; quick, because it only links."""


@dataclass(frozen=True, slots=True)
class LeasedSandbox:
    """A live sandbox that belongs to one run."""

    sandbox_id: SandboxId
    runtime: str
    image: str
    wait_s: float
    _session: SandboxSession
    _driver: SandboxDriver

    @property
    def hash_seed(self) -> int:
        """The interpreter's seed, for replaying the run."""
        return self._session.hash_seed

    async def run_cell(self, code: str, clock: CellClock) -> CellResult:
        """Run one cell under its clock. What goes wrong in the sandbox is in the result."""
        return await self._session.run_cell(code, clock, CpuMeter(self._driver, self.sandbox_id))


class SandboxLeases:
    """Makes leases on one instance with one driver."""

    def __init__(self, instance: Instance, driver: SandboxDriver, *, memory_bytes: int) -> None:
        self._instance = instance
        self._driver = driver
        self._max_str_bytes = memory_bytes // _STR_SHARE

    @asynccontextmanager
    async def open(
        self,
        put_context: PutContext,
        *,
        runtime: str,
        guest_services: Sequence[AddServices],
        max_concurrent_calls: int,
    ) -> AsyncIterator[LeasedSandbox]:
        """A sandbox for the length of the block, with a context in it and `guest_services` on its socket.

        Raises:
            SandboxStartError: It did not start.
            EngineError: The engine lacks something.
        """
        started_s = time.monotonic()
        sandbox_id = new_sandbox_id()
        with (
            self._instance.guest_uid() as uid,
            self._instance.sandbox_directories(sandbox_id) as (socket_dir, context_dir),
        ):
            if uid is not None:
                os.chown(socket_dir, -1, uid)
                socket_dir.chmod(0o750)
            put_context(context_dir)
            session = SandboxSession()
            spec = SandboxSpec(
                sandbox_id=sandbox_id,
                socket_dir=socket_dir,
                context_dir=context_dir,
                uid=os.geteuid() if uid is None else uid,
                runtime=runtime,
            )
            services = (
                lambda server: sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(session, server),
                *guest_services,
            )
            async with guest_server(socket_dir, services, group_id=uid):
                await self._driver.start(spec)
                try:
                    await self._wait_ready(session, sandbox_id)
                    await session.lease(
                        max_concurrent_calls=max_concurrent_calls, max_str_bytes=self._max_str_bytes
                    )
                    yield LeasedSandbox(
                        sandbox_id=sandbox_id,
                        runtime=runtime,
                        image=self._driver.image,
                        wait_s=time.monotonic() - started_s,
                        _session=session,
                        _driver=self._driver,
                    )
                finally:
                    await run_shielded(self._driver.destroy(sandbox_id))

    async def _wait_ready(self, session: SandboxSession, sandbox_id: SandboxId) -> None:
        give_up_s = time.monotonic() + WORKER_DIAL_IN_S
        while not await session.ready_within(_LOOK_AT_START_S):
            if await self._driver.ending(sandbox_id) is not Ending.RUNNING:
                raise SandboxStartError("the sandbox ended before its worker dialled in")
            if time.monotonic() >= give_up_s:
                raise SandboxStartError(f"the sandbox's worker did not dial in within {WORKER_DIAL_IN_S:g} s")
