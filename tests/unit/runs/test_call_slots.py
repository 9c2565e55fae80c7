import asyncio
import random
from collections.abc import Callable
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ids import TenantId
from orchestrator.runs.call_slots import CallSlots, TreeCallSlots

A, B = TenantId("a"), TenantId("b")


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(10):
        await asyncio.sleep(0)


class _Provider:
    """Calls in flight, each of which comes back when it is told to."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.in_flight: dict[str, asyncio.Future[None]] = {}
        self.at_most = 0

    async def call(self, tree: TreeCallSlots, name: str) -> None:
        async with tree.slot():
            self.log.append(name)
            self.in_flight[name] = asyncio.get_running_loop().create_future()
            self.at_most = max(self.at_most, len(self.in_flight))
            try:
                await self.in_flight[name]
            finally:
                del self.in_flight[name]

    async def reply(self, name: str) -> None:
        self.in_flight[name].set_result(None)
        await settle()


async def test_one_tenants_wide_runs_delay_anothers_call_by_one_that_comes_back() -> None:
    slots, provider = CallSlots(8), _Provider()
    tasks = []
    for run in range(50):
        tree = slots.of_tree(A, at_once=16)
        tasks += [asyncio.create_task(provider.call(tree, f"a{run}-{number}")) for number in range(40)]
    await settle()
    assert len(provider.in_flight) == 8
    assert slots.waiting == 50 * 16 - 8, "a tree has no more than its own limit in the common line"
    tasks.append(asyncio.create_task(provider.call(slots.of_tree(B, at_once=16), "mine")))
    await settle()
    assert "mine" not in provider.log
    await provider.reply(next(iter(provider.in_flight)))
    assert provider.log[-1] == "mine"
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)
    assert (slots.free, slots.waiting) == (8, 0)


async def test_run_trees_of_one_tenant_take_turns() -> None:
    slots, provider = CallSlots(1), _Provider()
    wide, narrow = slots.of_tree(A, at_once=16), slots.of_tree(A, at_once=16)
    async with asyncio.TaskGroup() as group:
        for number in range(5):
            group.create_task(provider.call(wide, f"wide{number}"))
        await settle()
        group.create_task(provider.call(narrow, "narrow"))
        for _ in range(6):
            await settle()
            await provider.reply(next(iter(provider.in_flight)))
    assert provider.log.index("narrow") == 1


async def test_a_run_tree_has_no_more_in_flight_than_its_own_limit() -> None:
    slots, provider = CallSlots(100), _Provider()
    tree = slots.of_tree(A, at_once=3)
    async with asyncio.TaskGroup() as group:
        for number in range(20):
            group.create_task(provider.call(tree, str(number)))
        for _ in range(20):
            await settle()
            await provider.reply(next(iter(provider.in_flight)))
    assert provider.at_most == 3
    assert slots.free == 100


async def test_a_call_that_gives_its_slot_up_lets_another_go_first_and_waits_for_one_again() -> None:
    slots = CallSlots(1)
    mine, yours = slots.of_tree(A, at_once=1), slots.of_tree(B, at_once=1)
    order: list[str] = []

    async def short_of_budget(budget: asyncio.Event) -> None:
        async with mine.slot() as slot:
            slot.give_up()
            slot.give_up()
            await budget.wait()
            await slot.take()
            await slot.take()
            order.append("mine")

    async def other(until: asyncio.Event) -> None:
        async with yours.slot():
            order.append("yours")
            await until.wait()

    budget, until = asyncio.Event(), asyncio.Event()
    async with asyncio.TaskGroup() as group:
        group.create_task(short_of_budget(budget))
        group.create_task(other(until))
        await settle()
        assert order == ["yours"]
        budget.set()
        await settle()
        assert order == ["yours"]
        until.set()
    assert order == ["yours", "mine"]
    assert slots.free == 1


@pytest.mark.parametrize("steps", range(12))
@pytest.mark.parametrize("comes_back", [False, True])
async def test_a_call_cancelled_at_any_point_keeps_no_slot(steps: int, *, comes_back: bool) -> None:
    slots, provider = CallSlots(1), _Provider()
    tree = slots.of_tree(A, at_once=1)
    first = asyncio.create_task(provider.call(slots.of_tree(B, at_once=1), "first"))
    await settle()

    async def twice() -> None:
        async with tree.slot() as slot:
            await asyncio.sleep(0)
            slot.give_up()
            await asyncio.sleep(0)
            await slot.take()
            await asyncio.sleep(0)

    doomed = asyncio.create_task(twice())
    if comes_back:
        provider.in_flight["first"].set_result(None)
    for _ in range(steps):
        await asyncio.sleep(0)
    doomed.cancel()
    if not comes_back and not first.done():
        # In the same breath as the slot that it waits for comes free.
        provider.in_flight["first"].set_result(None)
    with suppress(asyncio.CancelledError):
        await doomed
    await first
    async with asyncio.timeout(1):
        async with tree.slot():
            pass
    assert (slots.free, slots.waiting) == (1, 0)


@given(seed=st.integers(0, 2**32), at_once=st.integers(1, 4), tenants=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_whatever_comes_back_or_is_cancelled_when_no_slot_is_lost_and_none_is_had_twice(
    seed: int, at_once: int, tenants: int
) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret

    async def play() -> None:
        slots, provider = CallSlots(at_once), _Provider()
        trees = [slots.of_tree(TenantId(f"t{chance.randrange(tenants)}"), at_once=2) for _ in range(5)]
        tasks: list[asyncio.Task[None]] = []

        def ask() -> None:
            tasks.append(asyncio.create_task(provider.call(chance.choice(trees), str(len(tasks)))))

        def reply() -> None:
            open_ones = [call for call in provider.in_flight.values() if not call.done()]
            if open_ones:
                chance.choice(open_ones).set_result(None)

        def cancel() -> None:
            if tasks:
                chance.choice(tasks).cancel()

        steps: list[Callable[[], None]] = [ask, ask, reply, cancel]
        for _ in range(80):
            chance.choice(steps)()
            for _ in range(chance.randrange(4)):
                await asyncio.sleep(0)
            assert provider.at_most <= at_once
        while not all(task.done() for task in tasks):
            reply()
            await asyncio.sleep(0)
        assert (slots.free, slots.waiting) == (at_once, 0)

    asyncio.run(play())
