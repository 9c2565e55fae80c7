import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.errors import InvalidRequestError, InvariantError
from orchestrator.ids import RunId, TenantId
from orchestrator.service.fair import FairQueue, Waiting

A, B, C = TenantId("a"), TenantId("b"), TenantId("c")


def run(name: str, tenant: TenantId = A, chain: int = 1) -> Waiting:
    return Waiting(RunId(name), tenant, chain)


def started(queue: FairQueue) -> list[str]:
    """All that are started now."""
    names: list[str] = []
    while (waiting := queue.next()) is not None:
        names.append(waiting.run_id)
    return names


def test_a_tenants_runs_are_started_in_the_order_of_queueing() -> None:
    queue = FairQueue(max_running=2, sandboxes=10)
    for name in ("1", "2", "3"):
        queue.add(run(name), max_running=10)
    assert started(queue) == ["1", "2"]
    queue.ended(RunId("2"))
    assert started(queue) == ["3"]


def test_tenants_take_turns() -> None:
    queue = FairQueue(max_running=100, sandboxes=100)
    for number in range(3):
        queue.add(run(f"a{number}", A), max_running=10)
    for number in range(3):
        queue.add(run(f"b{number}", B), max_running=10)
    assert started(queue) == ["a0", "b0", "a1", "b1", "a2", "b2"]


def test_no_tenant_has_more_running_than_it_may() -> None:
    queue = FairQueue(max_running=100, sandboxes=100)
    for number in range(5):
        queue.add(run(f"a{number}"), max_running=2)
    assert started(queue) == ["a0", "a1"]
    assert queue.waiting() == 3
    queue.ended(RunId("a0"))
    assert started(queue) == ["a2"]


def test_a_long_chain_is_not_starved_by_short_ones() -> None:
    queue = FairQueue(max_running=100, sandboxes=4)
    for number in range(4):
        queue.add(run(f"a{number}", A), max_running=10)
    assert started(queue) == ["a0", "a1", "a2", "a3"]
    queue.add(run("long", B, chain=3), max_running=10)
    queue.add(run("a4", A), max_running=10)
    for name in ("a0", "a1"):
        queue.ended(RunId(name))
        assert started(queue) == []
    queue.ended(RunId("a2"))
    assert started(queue) == ["long"]


def test_a_chain_that_can_never_be_had_is_refused() -> None:
    queue = FairQueue(max_running=1, sandboxes=2)
    with pytest.raises(InvalidRequestError, match="needs 3 sandboxes"):
        queue.add(run("1", chain=3), max_running=1)
    assert queue.waiting() == 0


def test_a_run_that_was_removed_is_not_started() -> None:
    queue = FairQueue(max_running=1, sandboxes=1)
    queue.add(run("1"), max_running=1)
    queue.add(run("2"), max_running=1)
    assert queue.remove(RunId("1"), A)
    assert not queue.remove(RunId("1"), A)
    assert not queue.remove(RunId("2"), B)
    assert started(queue) == ["2"]


def test_a_run_that_could_not_be_started_is_its_tenants_first_again_and_stands_in_nobodys_way() -> None:
    queue = FairQueue(max_running=1, sandboxes=1)
    queue.add(run("a0", A), max_running=1)
    queue.add(run("a1", A), max_running=1)
    queue.add(run("b0", B), max_running=1)
    assert started(queue) == ["a0"]
    queue.put_back(RunId("a0"))
    queue.hold_back(A, held=True)
    assert started(queue) == ["b0"]
    queue.ended(RunId("b0"))
    assert started(queue) == []
    queue.hold_back(A, held=False)
    assert started(queue) == ["a0"]


@given(order=st.permutations(["1", "2", "3"]))
def test_runs_that_are_put_back_wait_in_the_order_of_queueing(order: list[str]) -> None:
    queue = FairQueue(max_running=3, sandboxes=10)
    for name in ("1", "2", "3", "4"):
        queue.add(run(name), max_running=10)
    assert started(queue) == ["1", "2", "3"]
    for name in order:
        queue.put_back(RunId(name))
    assert started(queue) == ["1", "2", "3"]
    queue.ended(RunId("2"))
    assert started(queue) == ["4"]


def test_a_tenant_with_many_queued_is_not_starved_by_others_that_come_and_go() -> None:
    """Each of three others queues one run whenever its last has ended, a moment after another was started."""
    queue = FairQueue(max_running=1, sandboxes=1)
    for number in range(100):
        queue.add(run(f"a{number}", A), max_running=10)
    guests = [TenantId(f"guest{number}") for number in range(3)]
    now = started(queue)
    for guest in guests:
        queue.add(run(f"{guest}-0", guest), max_running=1)
    order: list[str] = []
    for number in range(1, 41):
        queue.ended(RunId(now[0]))
        before, now = now, started(queue)
        order += now
        if before[0].startswith("guest"):
            guest = TenantId(before[0].partition("-")[0])
            queue.add(run(f"{guest}-{number}", guest), max_running=1)
    assert sum(name.startswith("a") for name in order) == 10


def test_chains_of_a_tenants_runs_never_need_more_sandboxes_than_it_may_have() -> None:
    queue = FairQueue(max_running=100, sandboxes=100)
    for number in range(4):
        queue.add(run(f"a{number}", A, chain=3), max_running=10, max_sandboxes=7)
    queue.add(run("b0", B, chain=3), max_running=10)
    assert started(queue) == ["a0", "b0", "a1"]
    queue.ended(RunId("a0"))
    assert started(queue) == ["a2"]
    with pytest.raises(InvalidRequestError, match="needs 8 sandboxes at once and you may have 7"):
        queue.add(run("long", A, chain=8), max_running=10, max_sandboxes=7)


def test_a_run_that_was_queued_before_its_tenant_might_have_less_is_run_alone() -> None:
    queue = FairQueue(max_running=100, sandboxes=100)
    queue.add(run("short", A, chain=1), max_running=10)
    assert started(queue) == ["short"]
    queue.add(run("long", A, chain=3), max_running=10)
    queue.put_back(RunId("short"))
    queue.add(run("last", A, chain=1), max_running=10, max_sandboxes=2)
    assert started(queue) == ["short"]
    queue.ended(RunId("short"))
    assert started(queue) == ["long"]
    queue.ended(RunId("long"))
    assert started(queue) == ["last"]


def test_what_does_not_run_can_neither_end_nor_be_put_back() -> None:
    queue = FairQueue(max_running=1, sandboxes=1)
    with pytest.raises(InvariantError):
        queue.ended(RunId("1"))
    with pytest.raises(InvariantError):
        queue.put_back(RunId("1"))


@given(
    places=st.integers(1, 6),
    others=st.integers(1, 5),
    flood=st.integers(1, 120),
    max_running=st.integers(1, 8),
    seed=st.integers(0, 2**32),
)
def test_a_tenants_first_run_starts_after_at_most_as_many_ends_as_tenants_wait(
    places: int, others: int, flood: int, max_running: int, seed: int
) -> None:
    """The bound of the docstring, whatever the others have queued and whoever ends when."""
    chance = random.Random(seed)  # noqa: S311 - no secret
    queue = FairQueue(max_running=places, sandboxes=places)
    tenants = [TenantId(f"t{number}") for number in range(others)]
    running: list[RunId] = []
    for number in range(flood):
        tenant = chance.choice(tenants)
        queue.add(run(f"{tenant}-{number}", tenant), max_running=max_running)
        if chance.random() < 0.5:
            running += [RunId(name) for name in started(queue)]
    running += [RunId(name) for name in started(queue)]
    queue.add(run("mine", TenantId("late")), max_running=1)
    ends = 0
    while "mine" not in (now := started(queue)):
        running += [RunId(name) for name in now]
        queue.ended(running.pop(chance.randrange(len(running))))
        ends += 1
    assert ends <= others + 1


@given(seed=st.integers(0, 2**32), places=st.integers(1, 5))
def test_one_tenants_500_runs_delay_anothers_by_one_end(seed: int, places: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret
    queue = FairQueue(max_running=places, sandboxes=3 * places)
    for number in range(500):
        queue.add(run(str(number), A, chain=3), max_running=500)
    running = started(queue)
    assert len(running) == places
    for number in range(chance.randrange(20)):
        queue.ended(RunId(running.pop(chance.randrange(places))))
        running += started(queue)
        assert len(running) == places, number
    queue.add(run("mine", B, chain=3), max_running=1)
    assert started(queue) == []
    queue.ended(RunId(running.pop(chance.randrange(places))))
    assert started(queue) == ["mine"]


@given(st.data())
def test_room_is_never_exceeded_and_none_is_left_while_somebody_may_start(data: st.DataObject) -> None:
    max_running, sandboxes = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 9))
    queue = FairQueue(max_running=max_running, sandboxes=sandboxes)
    running: dict[str, Waiting] = {}
    queued: dict[str, Waiting] = {}
    for number in range(data.draw(st.integers(1, 40))):
        ending: bool = data.draw(st.booleans())
        if running and ending:
            name = data.draw(st.sampled_from(sorted(running)))
            del running[name]
            queue.ended(RunId(name))
        else:
            tenant = data.draw(st.sampled_from((A, B, C)))
            new = run(f"{number}", tenant, chain=data.draw(st.integers(1, sandboxes)))
            queued[new.run_id] = new
            queue.add(new, max_running=2)
        for name in started(queue):
            running[name] = queued.pop(name)
        assert queue.running == len(running) <= max_running
        assert queue.waiting() == len(queued)
        assert sum(one.chain for one in running.values()) <= sandboxes
        for tenant in (A, B, C):
            assert sum(one.tenant_id == tenant for one in running.values()) <= 2
    while running:
        queue.ended(RunId(running.popitem()[0]))
        running |= {name: queued.pop(name) for name in started(queue)}
    assert not queued, "everything is started in the end"
