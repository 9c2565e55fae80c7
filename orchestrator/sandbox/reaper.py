"""Removes what orchestrators left behind, and nothing else.

What may be removed is decided in `is_left_behind`, by these rules; the first that fits decides:

1. A sandbox of our own instance goes, unless it is being made or in use. (One that we failed to destroy, or
   whose making the engine confirmed to nobody.)
2. One of an instance in our state directory goes when that instance's lock is free.
3. One of any other instance may belong to an orchestrator with another state directory, whose locks we
   don't see. It goes when it has expired, which is some time after the deadline of its run, and its uid
   belongs to no living process of this host. Without an expiry it stays.

With a dead instance's last sandbox go its sockets, staged contexts and lock file, and processes that a
runtime left running without a container (`leftovers.py`). Uids leave quarantine once the engine lists
nobody who has them. As long as something cannot be removed, what is needed to find it again stays, and it
is tried again with the next look.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Collection, Set
from contextlib import asynccontextmanager
from dataclasses import dataclass

from orchestrator.errors import EngineError
from orchestrator.ids import InstanceId, SandboxId
from orchestrator.limits import ENGINE_STARTS_AT_ONCE, REAP_AT_START_S, REAP_EVERY_S
from orchestrator.sandbox.instance import (
    Instance,
    containers_of,
    dead_instances,
    forget_instance,
    forget_unborn,
    living_instances,
)
from orchestrator.sandbox.leftovers import end_leftovers
from orchestrator.sandbox.port import Found, SandboxDriver
from orchestrator.sandbox.removal import destroy_stuck
from orchestrator.sandbox.uids import GuestUids, is_guest_uid

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Swept:
    """What one look found and removed."""

    sandboxes: int = 0
    instances: int = 0
    """Dead ones, forgotten with all they had."""
    processes: int = 0
    """Killed: a runtime's, without a container."""
    uids: int = 0
    """Out of quarantine."""
    stuck: int = 0
    """Sandboxes that could not be removed."""


def is_left_behind(
    found: Found,
    *,
    own: InstanceId,
    alive: Collection[SandboxId],
    dead: Collection[InstanceId],
    living: Collection[InstanceId],
    uids: GuestUids | None,
    now_s: float,
) -> bool:
    """Whether a sandbox may be removed. The rules are in the module's docstring.

    Args:
        found: A sandbox on the engine.
        own: Our instance.
        alive: Our sandboxes that are being made or in use.
        dead: Instances in our state directory whose lock is free.
        living: Those whose lock is held.
        uids: None when we are not root, and so cannot know who of root's is alive.
        now_s: Unix time.
    """
    if found.instance_id == own:
        return found.sandbox_id not in alive
    if found.instance_id in dead:
        return True
    if found.instance_id in living or not 0 < found.expires_at_s < now_s:
        return False
    if not is_guest_uid(found.uid):
        return True
    return uids is not None and not uids.has_living_owner(found.uid)


class Reaper:
    """Looks after one instance and the dead around it."""

    def __init__(self, instance: Instance, driver: SandboxDriver) -> None:
        self._instance = instance
        self._driver = driver
        self._removals = asyncio.Semaphore(ENGINE_STARTS_AT_ONCE)

    async def sweep(self) -> Swept:
        """Look once.

        Raises:
            EngineError: The engine does not say what there is.
        """
        instance = self._instance
        # In this order: an instance that is dead now makes no more sandboxes.
        dead = await asyncio.to_thread(dead_instances, instance.state_dir)
        await asyncio.to_thread(forget_unborn, instance.state_dir)
        living = living_instances(instance.state_dir, dead)
        found = await self._driver.found()
        doomed = {
            one.sandbox_id
            for one in found
            if is_left_behind(
                one,
                own=instance.instance_id,
                alive=instance.alive,
                dead=dead,
                living=living,
                uids=instance.uids,
                now_s=time.time(),
            )
        } | instance.leaked.keys()
        known = {
            name: container
            for instance_id in (instance.instance_id, *dead)
            for name, container in (
                await asyncio.to_thread(containers_of, instance.state_dir, instance_id)
            ).items()
        }
        killed = await asyncio.gather(*(self._remove(name, known.get(name)) for name in doomed))
        removed = {name for name, processes in zip(doomed, killed, strict=True) if processes is not None}
        processes = sum(filter(None, killed))
        self._close_books(removed)
        there = {one.sandbox_id for one in found} - removed
        forgotten = 0
        for dead_id in dead:
            containers = await asyncio.to_thread(containers_of, instance.state_dir, dead_id)
            if not there.isdisjoint(containers) or any(
                one.instance_id == dead_id and one.sandbox_id in there for one in found
            ):
                continue
            processes += await asyncio.to_thread(end_leftovers, list(containers.values()))
            await asyncio.to_thread(forget_instance, instance.state_dir, dead_id)
            forgotten += 1
        uids = 0
        if instance.uids is not None:
            uids = instance.uids.end_quarantine(there, ours=instance.alive | instance.leaked.keys())
        return Swept(
            sandboxes=len(removed),
            instances=forgotten,
            processes=processes,
            uids=uids,
            stuck=len(doomed) - len(removed),
        )

    async def _remove(self, sandbox_id: SandboxId, container: str | None) -> int | None:
        """How many processes of its runtime were killed for it; None when it may still be there."""
        async with self._removals:
            try:
                return await destroy_stuck(self._driver, sandbox_id, [container] if container else [])
            except EngineError as error:
                _log.error("sandbox %s was left behind and cannot be removed: %s", sandbox_id, error)
                return None

    def _close_books(self, removed: Set[SandboxId]) -> None:
        """Our own that are gone at last."""
        for sandbox_id in removed & self._instance.leaked.keys():
            _log.warning("sandbox %s is gone at last", sandbox_id)
            self._instance.ended(sandbox_id, self._instance.leaked[sandbox_id])

    async def run(self, first: asyncio.Event) -> None:
        """Look again and again; `first` is set after the first look. Ends when it is cancelled."""
        while True:
            try:
                swept = await self.sweep()
            except EngineError as error:
                _log.error("nothing left behind could be looked for: %s", error)
            except Exception:
                # What goes wrong here must not end the looking, nor any run.
                _log.exception("looking for what was left behind failed")
            else:
                if swept != Swept():
                    _log.info("removed what was left behind: %s", swept)
            first.set()
            await asyncio.sleep(REAP_EVERY_S)


@asynccontextmanager
async def reaping(reaper: Reaper) -> AsyncIterator[None]:
    """Keep looking for the length of the block, which begins after the first look unless that takes long."""
    first = asyncio.Event()
    looking = asyncio.create_task(reaper.run(first), name="reaper")
    try:
        try:
            async with asyncio.timeout(REAP_AT_START_S):
                await first.wait()
        except TimeoutError:
            _log.warning("looking for what was left behind takes long; going on meanwhile")
        yield
    finally:
        looking.cancel()
        await asyncio.wait((looking,))
