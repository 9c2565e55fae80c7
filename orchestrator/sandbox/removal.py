"""Removing a sandbox whose runtime may hang.

The engine answers no question about a container that hangs in its start until the runtime's processes are
gone (seen with gVisor's platform kvm on a machine without virtualisation).
"""

import asyncio
import time
from collections.abc import Collection

from orchestrator.errors import EngineError
from orchestrator.ids import SandboxId
from orchestrator.sandbox.leftovers import end_leftovers
from orchestrator.sandbox.port import SandboxDriver

_UNSTUCK_S = 15.0
"""From the end of a stuck runtime to the engine's being free of it; seen: two seconds."""
_UNSTUCK_LOOK_S = 0.5


async def destroy_stuck(driver: SandboxDriver, sandbox_id: SandboxId, containers: Collection[str]) -> int:
    """Destroy a sandbox, if need be after its runtime's processes were killed.

    Args:
        driver: Destroys it.
        sandbox_id: One that nobody uses any more.
        containers: What the engine called it, as far as that is known. Nothing else is killed.

    Returns:
        How many processes were killed.

    Raises:
        EngineError: It may still be there.
    """
    killed = 0
    try:
        await driver.destroy(sandbox_id)
    except EngineError:
        killed = await asyncio.to_thread(end_leftovers, containers)
        if not killed:
            raise
        await _destroy_unstuck(driver, sandbox_id)
    # The engine can have removed the container and left these.
    return killed + await asyncio.to_thread(end_leftovers, containers)


async def _destroy_unstuck(driver: SandboxDriver, sandbox_id: SandboxId) -> None:
    give_up_s = time.monotonic() + _UNSTUCK_S
    while True:
        try:
            return await driver.destroy(sandbox_id)
        except EngineError:
            # The call that hung has yet to come back.
            if time.monotonic() >= give_up_s:
                raise
            await asyncio.sleep(_UNSTUCK_LOOK_S)
