"""A fault at every point at which one model call, or one sub-call, can be suspended (I12).

The points are found, not listed: every task that the call starts runs in a `Stepper`, which counts each time
one of them gives up control. A first pass counts them; then each point gets an exception of its own, then a
cancellation. For a crash, what a new process would find is looked at, at every point: the stored events and
the provider's log as they are there. That log is the independent witness all along.
"""

import asyncio
import time
from collections.abc import Callable, Coroutine, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from orchestrator.budget import Amounts
from orchestrator.cells import CellClock
from orchestrator.conversation import Told
from orchestrator.errors import Billing, ModelError
from orchestrator.ids import RunId
from orchestrator.limits import RunLimits
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.runs.admission import SandboxSlots
from orchestrator.runs.model_calls import Wish
from orchestrator.runs.sub_calls import SubCalls
from orchestrator.runs.tree import RunResult, RunSpec, RunTree
from orchestrator.store.memory import MemoryRunStore
from orchestrator.store.port import NO_BLOBS, LedgerEntry
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.trajectory import CallHeld, CallSettled, Event, Tally, settle_after_crash
from tests.fakes.tree import FakeTree
from tests.ledger.witness import Provider, WatchedLedger

LIMITS = RunLimits(max_tokens=100_000, max_concurrency=2)


class InjectedError(Exception):
    """What is raised at a point."""


# --- Finding the points ----------------------------------------------------------------------------------


class Points:
    """Counts the points of all tasks together, and raises at one of them."""

    def __init__(self, at: int | None = None, error: Callable[[], BaseException] = InjectedError) -> None:
        self.count = 0
        self.armed = False
        self.looks: list[Callable[[], None]] = []
        """Called at every point."""
        self._at = at
        self._error = error

    def task(
        self, loop: asyncio.AbstractEventLoop, coro: Any, **options: Any
    ) -> "asyncio.Task[Any] | asyncio.Future[Any]":
        """A task factory."""
        return asyncio.Task(Stepper(coro, self) if self.armed else coro, loop=loop, **options)

    def pass_one(self) -> BaseException | None:
        """One point more; what to raise there."""
        if not self.armed:
            return None
        self.count += 1
        for look in self.looks:
            look()
        return self._error() if self.count == self._at else None


class Stepper(Coroutine[Any, Any, Any]):
    """A coroutine, and between it and its task the points."""

    def __init__(self, coro: Coroutine[Any, Any, Any], points: Points) -> None:
        self._coro = coro
        self._points = points

    def send(self, value: Any) -> Any:
        return self._passed(self._coro.send(value))

    def throw(self, *error: Any) -> Any:
        return self._passed(self._coro.throw(*error))

    def close(self) -> None:
        self._coro.close()

    def __await__(self) -> Generator[Any, Any, Any]:
        raise AssertionError("tasks call send and throw")

    def _passed(self, awaited: Any) -> Any:
        while (error := self._points.pass_one()) is not None:
            if awaited is not None:
                # It was on its way to its task, which will not see it.
                awaited._asyncio_future_blocking = False
            awaited = self._coro.throw(error)
        return awaited


# --- The world around one call ---------------------------------------------------------------------------


class SlowStore(MemoryRunStore):
    """Gives up control before and after it stores, like one that writes to a disk."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Event] = []
        self.failed = 0
        """Appends of which nothing was stored."""

    async def append(
        self,
        run_id: RunId,
        expected_seq: int,
        events: Sequence[Event],
        *,
        blobs: Mapping[str, bytes] = NO_BLOBS,
        ledger_entries: Sequence[LedgerEntry] = (),
    ) -> None:
        try:
            await asyncio.sleep(0)
        except BaseException:
            self.failed += 1
            raise
        await super().append(run_id, expected_seq, events, blobs=blobs, ledger_entries=ledger_entries)
        self.kept.extend(events)


class SlowTenant(MemoryTenantAccount):
    """Gives up control before and after it grants, like one in a database."""

    async def grant(self, wanted: Amounts) -> Amounts:
        await asyncio.sleep(0)
        granted = await super().grant(wanted)
        await asyncio.sleep(0)
        return granted


class SlowProvider(Provider):
    """Refuses once, unbilled; then takes a few steps before it has worked, and a few after."""

    refused = False

    async def complete(self, request: ModelRequest) -> Completion:
        await asyncio.sleep(0)
        if not self.refused:
            self.refused = True
            raise ModelError("overloaded", billing=Billing.NOTHING, retryable=True)
        completion = await super().complete(request)
        await asyncio.sleep(0)
        return completion


class World:
    """A run tree with slow parts."""

    def __init__(self, directory: Path, slots: Any, points: Points) -> None:
        self.provider = SlowProvider()
        self.tree = FakeTree(directory, slots, self.provider, limits=LIMITS)
        self.store = SlowStore()
        self.tree.treasury._tenant = SlowTenant(Amounts(*(10**9,) * 4))
        self.recorder = self.tree.recorder
        self.recorder._store = self.store
        self.points = points

    async def model_call(self) -> None:
        wish = Wish(
            call="turn-1",
            model=self.tree.model,
            system="",
            conversation=(Told("x" * 2_000),),
            python_tool=False,
            output_tokens=500,
            least_output_tokens=500,
        )
        await self.tree.calls.ask(wish, self.tree.account, self.recorder)

    async def sub_call(self) -> None:
        """In its cell, which ends whatever becomes of it; what is at the provider is waited for."""
        spec = self.tree.spec()
        calls = SubCalls(self.tree.tree, spec, self.recorder, _no_child)
        clock = CellClock(started_s=time.monotonic(), cell_timeout_s=1e6, cell_cpu_s=1e6, cell_ceiling_s=1e6)
        try:
            with calls.executing(1, clock):
                await calls.complete("c1", b"x" * 2_000, model_name="", max_tokens=500)
        finally:
            await calls.aclose(1.0)
            self.tree.contexts.release(spec.context)

    def charged_in_memory(self) -> int:
        return self.tree.account.used().tokens

    def charged_after_recovery(self) -> int:
        """What a new process charges: what the store has, and the holds that it leaves open there."""
        lost = [settled for _, settled in settle_after_crash(self.store.kept)]
        stored = [event.payload for event in self.store.kept if isinstance(event.payload, CallSettled)]
        return sum(one.confirmed.tokens + one.unconfirmed.tokens for one in (*stored, *lost))

    def held_and_settled(self) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        held, settled = [], []
        for event in self.store.kept:
            if isinstance(event.payload, CallHeld):
                held.append((event.payload.call, event.payload.attempt))
            if isinstance(event.payload, CallSettled):
                settled.append((event.payload.call, event.payload.attempt))
        return held, settled


async def _no_child(tree: RunTree, spec: RunSpec) -> RunResult:
    raise AssertionError("no child run was asked for")


Path_: TypeAlias = Callable[[World], Coroutine[Any, Any, None]]


@contextmanager
def stepping(points: Points) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    points.armed = True
    loop.set_task_factory(points.task)
    try:
        yield
    finally:
        points.armed = False
        loop.set_task_factory(None)


async def play(directory: Path, path: Path_, points: Points, look: bool = False) -> World:
    """One call from its beginning to its end, whatever happens to it."""
    directory.mkdir()  # noqa: ASYNC240 - nobody waits
    async with SandboxSlots(4).admit(0) as slots:
        world = World(directory, slots, points)
        if look:
            points.looks.append(lambda: _a_crash_here_is_charged(world))
        with stepping(points):
            call = asyncio.ensure_future(path(world))
            with suppress(InjectedError, ModelError, asyncio.CancelledError, Exception):
                await call
        # Whatever the call left behind: a shielded write, or a call at the provider.
        while rest := [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]:
            await asyncio.wait(rest)
        world.tree.contexts.close()
        return world


def _a_crash_here_is_charged(world: World) -> None:
    assert world.provider.billed_tokens() <= world.charged_after_recovery()


@pytest.mark.case("I12")
@pytest.mark.parametrize("path", [World.model_call, World.sub_call], ids=["model_call", "sub_call"])
@pytest.mark.parametrize("error", [InjectedError, asyncio.CancelledError])
async def test_i12_a_fault_at_any_point_leaves_nothing_held_and_nothing_unpaid(
    tmp_path: Path, path: Path_, error: type[BaseException]
) -> None:
    counting = Points()
    whole = await play(tmp_path / "whole", path, counting)
    assert whole.charged_in_memory() == whole.provider.billed_tokens() > 0
    assert counting.count > 12, "two attempts, four writes and a grant have more points than that"
    cut_short = 0
    for at in range(1, counting.count + 1):
        points = Points(at, error)
        world = await play(tmp_path / str(at), path, points)
        why = f"point {at} of {counting.count}"
        assert points.count >= at, why
        served = world.provider.billed_tokens()
        assert isinstance(world.tree.ledger, WatchedLedger)
        assert not world.tree.ledger.waiting, why
        assert all(account.held() == Amounts() for account in world.tree.ledger.accounts), why
        assert served <= world.charged_in_memory(), why
        assert served <= world.charged_after_recovery(), why
        held, settled = world.held_and_settled()
        assert len(set(held)) == len(held), why
        assert len(set(settled)) == len(settled), why
        if not world.store.failed:
            assert held == settled, why
        cut_short += served == 0
    assert cut_short > 3, "faults before the provider was reached cost nothing"


@pytest.mark.case("I12")
@pytest.mark.parametrize("path", [World.model_call, World.sub_call], ids=["model_call", "sub_call"])
async def test_i12_a_crash_at_any_point_is_charged_from_what_was_stored(tmp_path: Path, path: Path_) -> None:
    points = Points()
    world = await play(tmp_path / "run", path, points, look=True)
    assert points.count > 12
    assert settle_after_crash(world.store.kept) == []
    assert world.charged_after_recovery() == world.provider.billed_tokens()


@pytest.mark.case("I12")
def test_what_was_settled_after_a_crash_is_settled_for_good() -> None:
    run_id = RunId("r" + "0" * 20)
    amounts = Amounts(tokens=700, cost_microusd=9, calls=1)
    held = [
        CallHeld(call=call, attempt=attempt, model="m", input_bound_tokens=200, held=amounts)
        for call, attempt in (("turn-1", 1), ("turn-1", 2), ("1.1", 1))
    ]
    events = [Event(run_id, seq, 0.0, payload) for seq, payload in enumerate(held)]
    ((_, first), *others) = settle_after_crash(events)
    assert (first.call, first.attempt, first.confirmed, first.unconfirmed) == (
        "turn-1",
        1,
        Amounts(),
        amounts,
    )
    assert [(one.call, one.attempt) for _, one in others] == [("turn-1", 2), ("1.1", 1)]
    events += [
        Event(run, len(events) + place, 0.0, one)
        for place, (run, one) in enumerate(settle_after_crash(events))
    ]
    assert settle_after_crash(events) == []
    tally = Tally.of(events)
    assert (tally.open_calls, tally.unconfirmed.tokens) == (0, 2_100)
