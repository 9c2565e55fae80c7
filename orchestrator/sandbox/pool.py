"""Sandboxes made ahead, so that a lease costs milliseconds; `pool_rules.py` decides, this file carries out.

A pooled sandbox is one that `making.py` makes, with nothing added: it has no tenant, no run, no context, no
services but its own stream, and seeds of its own. One task makes it, keeps it, and destroys it, also when it
was lent in between: so whatever ends a lease or the process, whoever created has destroyed.

They wait as they are, not paused: a waiting sandbox takes 0.4 ms of CPU time a second (runc; 5 ms with
gVisor), pausing gives no memory back, and to unpause would cost each lease a call to the engine, 11 ms.
"""

import asyncio
import itertools
import logging
import sys
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from math import isinf

from orchestrator.errors import MachineError, SandboxBusyError, SandboxError, SandboxStartError
from orchestrator.fair_slots import FairSlots
from orchestrator.ids import LOCAL_TENANT, TenantId
from orchestrator.limits import (
    ENGINE_SLOW_START_S,
    OWN_STARTS_AT_ONCE,
    POOLED_LEASE_S,
    SANDBOX_EXPIRY_GRACE_S,
)
from orchestrator.sandbox import pool_events as events
from orchestrator.sandbox.making import MadeSandbox, SandboxMaker
from orchestrator.sandbox.pool_events import Phase
from orchestrator.sandbox.pool_rules import Plan, PoolRules, PoolStats
from orchestrator.shielding import run_shielded

_log = logging.getLogger(__name__)

_BUSY = "all sandboxes made ahead are in use, and RLM_POOL_WHEN_EMPTY says to start no more: try again later"


@dataclass(slots=True, eq=False)
class _Pooled:
    """A sandbox of the pool's own, from its start until it is gone."""

    leave: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    """Done when it is to end."""
    task: "asyncio.Task[None] | None" = None
    made: MadeSandbox | None = None
    error: SandboxError | MachineError | None = None


class SandboxPool:
    """All sandboxes of one process: those waiting for a lease, and those lent. Made by `pooling`."""

    def __init__(
        self, maker: SandboxMaker, plans: Mapping[str, Plan] | None = None, *, capacity: int = sys.maxsize
    ) -> None:
        """Begin with none.

        Args:
            maker: Makes them.
            plans: By runtime; a runtime without one has no pool, and each of its leases starts its own.
            capacity: Sandboxes at once, as admission counts them.
        """
        self._maker = maker
        self._plans = plans or {}
        self._rules = PoolRules(self._plans, capacity=capacity)
        self._pooled: dict[int, _Pooled] = {}
        self._asking: dict[int, asyncio.Future[int]] = {}
        self._tickets = itertools.count(1)
        self._own_starts = FairSlots(OWN_STARTS_AT_ONCE)
        self._look: asyncio.TimerHandle | None = None

    def stats(self) -> Mapping[str, PoolStats]:
        """What became of sandboxes and leases so far, by runtime: a copy."""
        return {runtime: replace(stats) for runtime, stats in self._rules.stats.items()}

    def count(self, phase: Phase, runtime: str | None = None) -> int:
        """How many sandboxes stand there now, of one runtime or of all."""
        return self._rules.count(phase, runtime)

    def fill(self) -> None:
        """Begin to make sandboxes ahead."""
        self._feed(events.TimePassed())

    def withhold(self, count: int) -> None:
        """So many sandboxes should be gone and may not be: they take room."""
        self._feed(events.Withheld(count))

    @asynccontextmanager
    async def sandbox(
        self, *, runtime: str, wanted_for_s: float, own: bool = False, tenant_id: TenantId = LOCAL_TENANT
    ) -> AsyncIterator[MadeSandbox]:
        """A sandbox that nobody else had, for the length of the block; gone after it.

        Args:
            runtime: Of the container.
            wanted_for_s: After that it is certainly no longer wanted.
            own: Whether it must be started for this block alone.
            tenant_id: Whose turn it takes where others ask too. The sandbox is not told.

        Raises:
            SandboxStartError: It did not start.
            SandboxBusyError: None waits, and the plan does not start more.
            EngineError: The engine lacks something.
        """
        own = own or wanted_for_s > POOLED_LEASE_S
        number = await self._ask(runtime, own=own, tenant_id=tenant_id)
        pooled = self._pooled.get(number)
        if pooled is not None:
            assert pooled.made is not None, "what is handed out was ready"  # noqa: S101 - the rules' order
            try:
                yield pooled.made
            finally:
                await run_shielded(self._end(pooled))
            return
        try:
            async with AsyncExitStack() as stack:
                async with self._own_starts.slot(tenant_id) as turn:
                    # A start that hangs is no competitor, here as at the engine.
                    hangs = asyncio.get_running_loop().call_later(ENGINE_SLOW_START_S, turn.give_up)
                    try:
                        made = await stack.enter_async_context(
                            self._maker.make(runtime=runtime, expires_at_s=_expiry_s(wanted_for_s))
                        )
                    finally:
                        hangs.cancel()
                yield made
        finally:
            self._feed(events.Gone(number))

    async def aclose(self) -> None:
        """End every sandbox, lent ones too, and give nobody another. Each is gone, or recorded as leaked."""
        self._feed(events.Closed())
        if self._look is not None:
            self._look.cancel()
        tasks = [pooled.task for pooled in self._pooled.values() if pooled.task is not None]
        if tasks:
            await run_shielded(_all_over(tasks))

    async def _ask(self, runtime: str, *, own: bool, tenant_id: TenantId) -> int:
        """The number of a sandbox that is ours from now on."""
        ticket = next(self._tickets)
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asking[ticket] = answer
        self._feed(events.Wanted(ticket, runtime, own, tenant_id))
        try:
            return await answer
        except asyncio.CancelledError:
            if answer.done() and not answer.cancelled() and answer.exception() is None:
                await self._hand_back(answer.result())
            else:
                self._feed(events.GivenUp(ticket))
            raise
        finally:
            self._asking.pop(ticket, None)

    async def _hand_back(self, number: int) -> None:
        """It was given to somebody who was cancelled in that moment. Lent once, it is not lent again."""
        pooled = self._pooled.get(number)
        if pooled is None:
            self._feed(events.Gone(number))
        else:
            await run_shielded(self._end(pooled))

    # --- Carrying out -------------------------------------------------------------------------------------

    def _feed(self, event: events.Event) -> None:
        for action in self._rules.step(event, time.monotonic()):
            self._carry_out(action)
        self._look_again_at(self._rules.next_look_s())

    def _carry_out(self, action: events.Action) -> None:
        match action:
            case events.Start(number, runtime):
                pooled = self._pooled[number] = _Pooled()
                pooled.task = asyncio.create_task(self._keep(number, runtime, pooled), name=f"pool-{number}")
                # Not at the end of `_keep`, which does not run when it is cancelled before it began.
                pooled.task.add_done_callback(lambda _: self._forget(number))
            case events.End(number):
                self._let_go(number)
            case events.HandOut(ticket, number) | events.MakeOwn(ticket, number):
                answer = self._asking.pop(ticket)
                if not answer.cancelled():
                    answer.set_result(number)
                elif number in self._pooled:
                    self._let_go(number)
                else:
                    asyncio.get_running_loop().call_soon(self._feed, events.Gone(number))
            case events.Fail(ticket, number):
                self._turn_down(ticket, self._pooled[number].error or SandboxStartError("it did not start"))
            case events.Refuse(ticket):
                self._turn_down(ticket, SandboxBusyError(_BUSY))

    def _turn_down(self, ticket: int, error: SandboxError | MachineError) -> None:
        answer = self._asking.pop(ticket)
        if not answer.cancelled():
            answer.set_exception(error)

    def _look_again_at(self, due_s: float) -> None:
        if self._look is not None:
            self._look.cancel()
            self._look = None
        if not isinf(due_s):
            delay_s = max(0.0, due_s - time.monotonic())
            self._look = asyncio.get_running_loop().call_later(delay_s, self._feed, events.TimePassed())

    # --- One sandbox --------------------------------------------------------------------------------------

    async def _keep(self, number: int, runtime: str, pooled: _Pooled) -> None:
        """Make one, keep it until it is to end, end it. The task that does so lives as long as it."""
        longest_s = self._plans[runtime].max_age_s + POOLED_LEASE_S
        try:
            async with self._maker.make(runtime=runtime, expires_at_s=_expiry_s(longest_s)) as made:
                pooled.made = made
                self._feed(events.Started(number))
                await asyncio.wait((pooled.leave, made.session.over), return_when=asyncio.FIRST_COMPLETED)
                if not pooled.leave.done():
                    self._feed(events.Died(number))
                    await pooled.leave
        except (SandboxError, MachineError) as error:
            pooled.error = error
            _log.warning("no sandbox was made for the pool of %s: %s", runtime, error)
        except Exception:
            # A failure of ours in one sandbox is no reason to keep none.
            _log.exception("making a sandbox for the pool of %s failed", runtime)

    def _forget(self, number: int) -> None:
        """Nothing is left of it."""
        self._feed(events.Gone(number))
        del self._pooled[number]

    def _let_go(self, number: int) -> None:
        """End one: as if its time was over when it is ready, and by cancelling while it starts."""
        pooled = self._pooled.get(number)
        if pooled is None:
            # Of somebody who made it himself.
            return
        if pooled.made is None and pooled.task is not None:
            pooled.task.cancel()
        elif not pooled.leave.done():
            pooled.leave.set_result(None)

    async def _end(self, pooled: _Pooled) -> None:
        if not pooled.leave.done():
            pooled.leave.set_result(None)
        if pooled.task is not None:
            await asyncio.wait((pooled.task,))


@asynccontextmanager
async def pooling(pool: SandboxPool) -> AsyncIterator[SandboxPool]:
    """Keep a pool filled for the length of the block; all its sandboxes are gone after it."""
    pool.fill()
    try:
        yield pool
    finally:
        await pool.aclose()


def _expiry_s(wanted_for_s: float) -> int:
    """The Unix time on a sandbox's label. It cannot be changed later, so every lease must fit in it."""
    return int(time.time() + wanted_for_s) + SANDBOX_EXPIRY_GRACE_S


async def _all_over(tasks: list[asyncio.Task[None]]) -> None:
    await asyncio.wait(tasks)
