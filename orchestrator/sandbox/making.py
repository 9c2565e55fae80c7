"""A sandbox without a run: made, connected, and in the end destroyed.

Nothing in here knows a tenant, a run or a context; a lease (`lease.py`) brings those. Whoever makes a
sandbox gets one whose worker has dialled in and whose interpreter waits, and after the block its server,
socket, directories and container are gone, also when the block was cancelled. A container whose end the
engine does not confirm is recorded as leaked: it keeps its uid, the reaper goes on trying, and there is
room for one sandbox less meanwhile.
"""

import logging
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from rlm_proto.v1 import sandbox_pb2_grpc

from orchestrator.errors import EngineError, SandboxStartError
from orchestrator.ids import SandboxId, new_sandbox_id
from orchestrator.limits import WORKER_DIAL_IN_S
from orchestrator.rpc.guest_server import guest_server
from orchestrator.rpc.late import LateServices
from orchestrator.sandbox.instance import Instance
from orchestrator.sandbox.port import Ending, SandboxDriver, SandboxSpec
from orchestrator.sandbox.removal import destroy_stuck
from orchestrator.sandbox.session import SandboxSession
from orchestrator.shielding import run_shielded

_log = logging.getLogger(__name__)

_LOOK_AT_START_S = 2.0
"""How often the engine is asked whether a sandbox that has not dialled in still runs."""


@dataclass(frozen=True, slots=True)
class MadeSandbox:
    """A live sandbox that belongs to no run yet."""

    sandbox_id: SandboxId
    runtime: str
    context_dir: Path
    """Empty until a lease puts a context there; the guest sees it read-only."""
    session: SandboxSession
    services: LateServices
    """Until a run's own are bound the guest finds none but Attach."""


class SandboxMaker:
    """Makes sandboxes on one instance with one driver."""

    def __init__(self, instance: Instance, driver: SandboxDriver) -> None:
        self._instance = instance
        self._driver = driver

    @asynccontextmanager
    async def make(self, *, runtime: str, expires_at_s: int) -> AsyncIterator[MadeSandbox]:
        """A sandbox for the length of the block.

        Args:
            runtime: Of the container.
            expires_at_s: Unix time at which it is certainly no longer wanted.

        Raises:
            SandboxStartError: It did not start.
            EngineError: The engine lacks something.
        """
        sandbox_id = new_sandbox_id()
        session = SandboxSession()
        late = LateServices()
        services = late.on_server(
            lambda server: sandbox_pb2_grpc.add_SandboxServiceServicer_to_server(session, server)
        )
        uid = self._instance.begin(sandbox_id)
        started = False
        try:
            with self._instance.sandbox_directories(sandbox_id) as (socket_dir, context_dir):
                if uid is not None:
                    os.chown(socket_dir, -1, uid)
                    socket_dir.chmod(0o750)
                spec = SandboxSpec(
                    sandbox_id=sandbox_id,
                    socket_dir=socket_dir,
                    context_dir=context_dir,
                    uid=os.geteuid() if uid is None else uid,
                    runtime=runtime,
                    expires_at_s=expires_at_s,
                    record=self._instance.record(sandbox_id),
                )
                try:
                    async with guest_server(socket_dir, (services,), group_id=uid):
                        await self._driver.start(spec)
                        started = True
                        await self._wait_ready(session, sandbox_id)
                        yield MadeSandbox(sandbox_id, runtime, context_dir, session, late)
                finally:
                    # After the server has stopped: that takes every right from the guest and makes its worker
                    # end, also when the engine is stuck.
                    await run_shielded(self._end(sandbox_id, uid, started=started))
        finally:
            if sandbox_id in self._instance.alive:
                # It failed before there was anything to destroy.
                self._instance.ended(sandbox_id, uid)

    async def _end(self, sandbox_id: SandboxId, uid: int | None, *, started: bool) -> None:
        try:
            if started:
                await self._driver.destroy(sandbox_id)
            else:
                await destroy_stuck(self._driver, sandbox_id, self._instance.containers([sandbox_id]))
        except EngineError as error:
            self._instance.leak(sandbox_id, uid)
            _log.error("sandbox %s may still be there; the reaper goes on trying: %s", sandbox_id, error)
        else:
            self._instance.ended(sandbox_id, uid)

    async def _wait_ready(self, session: SandboxSession, sandbox_id: SandboxId) -> None:
        give_up_s = time.monotonic() + WORKER_DIAL_IN_S
        while not await session.ready_within(_LOOK_AT_START_S):
            if await self._driver.ending(sandbox_id) is not Ending.RUNNING:
                raise SandboxStartError("the sandbox ended before its worker dialled in")
            if time.monotonic() >= give_up_s:
                raise SandboxStartError(f"the sandbox's worker did not dial in within {WORKER_DIAL_IN_S:g} s")
