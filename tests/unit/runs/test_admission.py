import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import EngineError, InvalidRequestError
from orchestrator.ids import TenantId
from orchestrator.runs.admission import SandboxSlots, TreeSlots


async def settle() -> None:
    """Let every task that can go on do so."""
    for _ in range(20):
        await asyncio.sleep(0)


async def assert_all_free(slots: SandboxSlots, capacity: int) -> None:
    async with asyncio.timeout(1), slots.admit(capacity - 1):
        pass


async def test_a_chain_longer_than_all_there_is_is_refused_with_what_to_do() -> None:
    slots = SandboxSlots(2)
    with pytest.raises(
        InvalidRequestError, match=r"needs 3 sandboxes .* only 2 .*--max-depth.*RLM_MAX_SANDBOXES"
    ):
        async with slots.admit(2):
            pass
    await assert_all_free(slots, 2)


@pytest.mark.case("F06")
async def test_places_withheld_are_given_to_nobody_and_come_back() -> None:
    slots = SandboxSlots(4)
    async with slots.admit(1) as tree:
        slots.withhold(2)
        waiting = asyncio.create_task(slots.admit(0).__aenter__())
        await settle()
        assert not waiting.done()
        # Who was admitted has its chain all the same.
        async with tree.take(0), tree.take(1):
            pass
        with pytest.raises(EngineError, match=r"2 of 4 places .* and 3 are needed"):
            await slots.admit(2).__aenter__()
        slots.withhold(1)
        await settle()
        assert waiting.done()
    waiting.result()
    slots.withhold(0)
    await asyncio.wait_for(slots.admit(2).__aenter__(), 1)


async def test_a_second_root_run_waits_until_its_whole_chain_is_free() -> None:
    slots = SandboxSlots(3)
    async with AsyncExitStack() as first:
        await first.enter_async_context(slots.admit(1))
        waiting = asyncio.create_task(slots.admit(1).__aenter__())
        await settle()
        assert not waiting.done()
        await first.aclose()
        assert isinstance(await waiting, TreeSlots)


async def test_root_runs_are_admitted_first_in_first_out_even_past_one_that_would_fit() -> None:
    slots = SandboxSlots(4)
    admitted: list[str] = []

    async def root(name: str, max_depth: int, until: asyncio.Event) -> None:
        async with slots.admit(max_depth):
            admitted.append(name)
            await until.wait()

    over = asyncio.Event()
    done = asyncio.Event()
    done.set()
    async with asyncio.TaskGroup() as group:
        group.create_task(root("holds 3", 2, over))
        await settle()
        group.create_task(root("wants 4", 3, done))
        await settle()
        group.create_task(root("wants 1", 0, done))
        await settle()
        assert admitted == ["holds 3"]
        over.set()
    assert admitted == ["holds 3", "wants 4", "wants 1"]


async def test_a_run_has_its_chains_sandbox_whoever_waits_for_free_ones() -> None:
    slots = SandboxSlots(2)
    async with slots.admit(1) as tree:
        waiting = asyncio.create_task(slots.admit(1).__aenter__())
        await settle()
        async with asyncio.timeout(1), tree.take(0), tree.take(1):
            pass
        waiting.cancel()
        with suppress(asyncio.CancelledError):
            await waiting


async def test_siblings_beyond_the_chain_share_what_is_free() -> None:
    slots = SandboxSlots(3)
    async with slots.admit(1) as tree, AsyncExitStack() as held, asyncio.timeout(1):
        await held.enter_async_context(tree.take(0))
        await held.enter_async_context(tree.take(1))
        await held.enter_async_context(tree.take(1))
        third = asyncio.create_task(tree.take(1).__aenter__())
        await settle()
        assert not third.done()
        third.cancel()
        with suppress(asyncio.CancelledError):
            await third


async def test_a_chains_sandbox_comes_back_to_its_chain_and_not_to_the_free_ones() -> None:
    slots = SandboxSlots(2)
    async with slots.admit(1) as tree:
        stranger = asyncio.create_task(slots.admit(0).__aenter__())
        async with tree.take(0), tree.take(1):
            pass
        await settle()
        assert not stranger.done()
    await stranger


# --- Cancellation -----------------------------------------------------------------------------------------


async def test_a_waiter_cancelled_in_the_same_breath_as_a_slot_comes_free_breaks_nobody() -> None:
    """Its future is cancelled at once, its task runs later; in between somebody gives a sandbox back."""
    slots = SandboxSlots(1)
    held = slots.admit(0)
    await held.__aenter__()
    doomed = asyncio.create_task(slots.admit(0).__aenter__())
    behind = asyncio.create_task(slots.admit(0).__aenter__())
    await settle()
    doomed.cancel()
    await held.__aexit__(None, None, None)
    async with asyncio.timeout(1):
        assert isinstance(await behind, TreeSlots)
    assert doomed.cancelled()


async def test_a_waiter_cancelled_just_after_it_was_served_gives_it_back() -> None:
    slots = SandboxSlots(1)
    held = slots.admit(0)
    await held.__aenter__()
    doomed = asyncio.create_task(slots.admit(0).__aenter__())
    await settle()
    await held.__aexit__(None, None, None)
    doomed.cancel()
    await settle()
    assert doomed.cancelled()
    await assert_all_free(slots, 1)


@pytest.mark.parametrize("after", range(16))
async def test_a_tree_cancelled_at_any_point_gives_every_sandbox_back(after: int) -> None:
    slots = SandboxSlots(3)

    async def child(tree: TreeSlots) -> None:
        async with tree.take(1):
            await asyncio.sleep(0)

    async def root() -> None:
        async with slots.admit(1) as tree, tree.take(0), asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(child(tree))

    other = asyncio.create_task(root())
    task = asyncio.create_task(root())
    for _ in range(after):
        await asyncio.sleep(0)
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
    async with asyncio.timeout(1):
        await other
    await assert_all_free(slots, 3)


# --- No deadlock ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Node:
    """A run: how long it works, and the children it waits for while it holds its sandbox."""

    work: int
    children: tuple["Node", ...] = ()
    in_parallel: bool = True

    @property
    def depth(self) -> int:
        return 1 + max((child.depth for child in self.children), default=-1)


def nodes(depth: int) -> st.SearchStrategy[Node]:
    work = st.integers(0, 3)
    if depth == 0:
        return st.builds(Node, work)
    children = st.lists(nodes(depth - 1), max_size=3).map(tuple)
    return st.builds(Node, work, children, st.booleans())


async def run(tree: TreeSlots, node: Node, depth: int) -> int:
    """How many runs ended below and with this one."""
    async with tree.take(depth):
        for _ in range(node.work):
            await asyncio.sleep(0)
        if node.in_parallel:
            below: Sequence[int] = await asyncio.gather(
                *(run(tree, child, depth + 1) for child in node.children)
            )
        else:
            below = [await run(tree, child, depth + 1) for child in node.children]
    return 1 + sum(below)


def size(node: Node) -> int:
    return 1 + sum(map(size, node.children))


@given(
    roots=st.lists(nodes(3), min_size=1, max_size=4),
    spare=st.integers(0, 3),
    cancel=st.sets(st.integers(0, 3)),
)
@settings(max_examples=150, deadline=None)
def test_every_forest_of_runs_ends_with_room_for_one_chain_only(
    roots: list[Node], spare: int, cancel: set[int]
) -> None:
    capacity = 4 + spare

    async def root(slots: SandboxSlots, node: Node) -> int:
        async with slots.admit(node.depth) as tree:
            return await run(tree, node, 0)

    async def forest() -> None:
        slots = SandboxSlots(capacity)
        tasks = [asyncio.create_task(root(slots, node)) for node in roots]
        for _ in range(5):
            await asyncio.sleep(0)
        for number in cancel:
            if number < len(tasks):
                tasks[number].cancel()
        async with asyncio.timeout(20):
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for number, (node, result) in enumerate(zip(roots, ended, strict=True)):
            assert result == size(node) or (number in cancel and isinstance(result, asyncio.CancelledError))
        await assert_all_free(slots, capacity)

    asyncio.run(forest())


async def test_a_tree_of_depth_4_and_width_8_ends_with_room_for_one_chain_only() -> None:
    def full(levels: int) -> Node:
        return Node(1, (full(levels - 1),) * 8 if levels else ())

    tree = full(4)
    slots = SandboxSlots(5)
    async with slots.admit(4) as chain:
        assert await run(chain, tree, 0) == 1 + 8 + 64 + 512 + 4_096
    await assert_all_free(slots, 5)


# --- Between tenants --------------------------------------------------------------------------------------

A, B, C = TenantId("a"), TenantId("b"), TenantId("c")


async def test_a_wide_run_tree_delays_anothers_first_chain_by_as_many_ends_as_it_is_long() -> None:
    slots = SandboxSlots(6)
    ends: list[asyncio.Event] = []

    async def child(tree: TreeSlots) -> None:
        async with tree.take(1):
            ends.append(asyncio.Event())
            await ends[-1].wait()

    async with slots.admit(1, tenant_id=A) as wide, asyncio.TaskGroup() as group:
        children = [group.create_task(child(wide)) for _ in range(200)]
        await settle()
        assert len(ends) == 5
        mine = group.create_task(slots.admit(1, tenant_id=B).__aenter__())
        await settle()
        # One of them has its chain's own sandbox, which comes back to the chain.
        for number, served in ((1, False), (2, True)):
            ends[number].set()
            await settle()
            assert mine.done() == served
        for task in children:
            task.cancel()


async def test_a_tenant_has_no_more_sandboxes_than_it_may_and_its_own_chain_in_any_case() -> None:
    slots = SandboxSlots(10)
    async with slots.admit(1, tenant_id=A, most=3) as tree, AsyncExitStack() as held, asyncio.timeout(5):
        for _ in range(2):
            await held.enter_async_context(tree.take(1))
        third = asyncio.create_task(tree.take(1).__aenter__())
        second_run = asyncio.create_task(slots.admit(1, tenant_id=A, most=3).__aenter__())
        await settle()
        assert not third.done()
        assert not second_run.done()
        async with tree.take(0), slots.admit(6, tenant_id=B):
            pass
        third.cancel()
        second_run.cancel()
        await asyncio.wait((third, second_run))
    with pytest.raises(InvalidRequestError, match="the tenant may have 3: lower max_depth"):
        await slots.admit(3, tenant_id=A, most=3).__aenter__()
    await assert_all_free(slots, 10)


@given(
    forests=st.lists(st.tuples(st.sampled_from((A, B, C)), nodes(2)), min_size=1, max_size=5),
    spare=st.integers(0, 3),
    most=st.integers(3, 5),
    cancel=st.sets(st.integers(0, 4)),
)
@settings(max_examples=60, deadline=None)
def test_every_forest_of_several_tenants_ends_and_nobody_has_more_than_he_may(
    forests: list[tuple[TenantId, Node]], spare: int, most: int, cancel: set[int]
) -> None:
    async def root(slots: SandboxSlots, tenant_id: TenantId, node: Node) -> int:
        async with slots.admit(node.depth, tenant_id=tenant_id, most=most) as tree:
            assert slots._line.held_by(tenant_id) <= most
            return await run(tree, node, 0)

    async def play() -> None:
        slots = SandboxSlots(3 + spare)
        tasks = [asyncio.create_task(root(slots, *one)) for one in forests]
        await asyncio.sleep(0)
        for number in cancel & set(range(len(tasks))):
            tasks[number].cancel()
        async with asyncio.timeout(5):
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for number, (result, (_, node)) in enumerate(zip(ended, forests, strict=True)):
            assert result == size(node) or number in cancel
        await assert_all_free(slots, 3 + spare)

    asyncio.run(play())
