"""The rules of the warm pool: each rule alone, and all of them under any order of events."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.ids import TenantId
from orchestrator.sandbox.pool_events import (
    Action,
    Closed,
    Died,
    End,
    Event,
    Fail,
    GivenUp,
    Gone,
    HandOut,
    MakeOwn,
    Phase,
    Refuse,
    Start,
    Started,
    TimePassed,
    Wanted,
    Withheld,
)
from orchestrator.sandbox.pool_rules import Plan, PoolRules, WhenEmpty

MAX_AGE_S = 100.0
QUEUE_S = 10.0


def rules(
    size: int = 2,
    *,
    capacity: int = 8,
    when_empty: WhenEmpty = WhenEmpty.COLD,
    refill_after_s: float = 0.0,
    **others: Plan,
) -> PoolRules:
    plan = Plan(size=size, when_empty=when_empty, queue_s=QUEUE_S, max_age_s=MAX_AGE_S)
    plans = {"runc": plan, **others}
    return PoolRules(plans, capacity=capacity, refills_at_once=2, refill_after_s=refill_after_s)


def filled(pool: PoolRules, now_s: float = 0.0) -> PoolRules:
    """With every start that it asks for done at once."""
    actions = pool.step(TimePassed(), now_s)
    while starts := [action for action in actions if isinstance(action, Start)]:
        actions = [action for start in starts for action in pool.step(Started(start.number), now_s)]
    return pool


def test_it_fills_a_few_at_a_time() -> None:
    pool = rules(size=3)
    assert pool.step(TimePassed(), 0.0) == [Start(1, "runc"), Start(2, "runc")]
    assert pool.step(Started(1), 0.0) == [Start(3, "runc")]
    assert pool.step(Started(2), 0.0) == []
    assert pool.step(Started(3), 0.0) == []


def test_a_lease_gets_the_one_that_has_waited_longest_and_it_is_replaced() -> None:
    pool = filled(rules())
    assert pool.step(Wanted(1, "runc"), 1.0) == [HandOut(1, 1), Start(3, "runc")]
    assert pool.stats["runc"].warm == 1


def test_the_refill_leaves_the_first_cell_of_a_lease_alone_and_no_row_of_leases_puts_it_off() -> None:
    pool = filled(rules(refill_after_s=0.1))
    assert pool.step(Wanted(1, "runc"), 1.0) == [HandOut(1, 1)]
    assert pool.step(Wanted(2, "runc"), 1.05) == [HandOut(2, 2)]
    assert pool.next_look_s() == 1.1
    assert pool.step(TimePassed(), 1.1) == [Start(3, "runc"), Start(4, "runc")]


def test_demand_waits_for_no_refill() -> None:
    pool = filled(rules(size=1, refill_after_s=0.1))
    pool.step(Wanted(1, "runc"), 1.0)
    assert pool.step(Wanted(2, "runc"), 1.0) == [Start(2, "runc")]


def test_what_starts_goes_to_the_first_in_line_whoever_it_was_begun_for() -> None:
    pool = rules(size=1)
    pool.step(TimePassed(), 0.0)
    assert pool.step(Wanted(1, "runc"), 0.1) == [Start(2, "runc")]
    assert pool.step(Wanted(2, "runc"), 0.2) == [Start(3, "runc")]
    assert pool.step(Started(1), 0.3) == [HandOut(1, 1)]
    assert pool.step(Started(2), 0.4) == [HandOut(2, 2)]
    assert pool.step(Started(3), 0.5) == []
    assert (pool.stats["runc"].cold, pool.stats["runc"].warm) == (2, 0)


def test_tenants_take_turns_at_what_is_ready_however_many_one_of_them_asks_for() -> None:
    a, b, c = TenantId("a"), TenantId("b"), TenantId("c")
    pool = rules(size=1, capacity=40)
    for ticket in range(10):
        pool.step(Wanted(ticket, "runc", tenant_id=a), 0.0)
    for ticket, tenant in ((10, b), (11, b), (12, c), (13, c)):
        pool.step(Wanted(ticket, "runc", tenant_id=tenant), 0.1)
    pool.step(GivenUp(12), 0.2)
    handed: list[int] = []
    for number in range(1, 10):
        handed += [one.ticket for one in pool.step(Started(number), 1.0) if isinstance(one, HandOut)]
    assert handed == [0, 10, 13, 1, 11, 2, 3, 4, 5]


@given(asked=st.lists(st.integers(0, 3), max_size=30), given_up=st.sets(st.integers(0, 29)))
def test_who_has_just_come_gets_the_sandbox_of_his_turn_at_the_latest(
    asked: list[int], given_up: set[int]
) -> None:
    pool = rules(size=1, capacity=80)
    for ticket, tenant in enumerate(asked):
        pool.step(Wanted(ticket, "runc", tenant_id=TenantId(f"t{tenant}")), 0.0)
    pool.step(Wanted(99, "runc", tenant_id=TenantId("late")), 0.1)
    for ticket in sorted(given_up & set(range(len(asked)))):
        pool.step(GivenUp(ticket), 0.2)
    handed: list[int] = []
    for number in range(1, len(set(asked)) + 2):
        handed += [one.ticket for one in pool.step(Started(number), 1.0) if isinstance(one, HandOut)]
    assert 99 in handed


def test_who_gives_up_ends_a_start_that_nobody_else_needs() -> None:
    pool = filled(rules(size=1))
    pool.step(Wanted(1, "runc"), 0.0)
    pool.step(Wanted(2, "runc"), 0.0)
    assert pool.step(GivenUp(2), 0.0) == [End(3)]


def test_a_runtime_without_a_pool_starts_one_for_each_lease() -> None:
    pool = rules()
    assert pool.step(Wanted(1, "runsc"), 0.0)[0] == MakeOwn(1, 1)


def test_a_lease_that_needs_its_own_leaves_the_waiting_ones_alone() -> None:
    pool = filled(rules())
    assert pool.step(Wanted(1, "runc", own=True), 0.0) == [MakeOwn(1, 3)]
    assert pool.count(Phase.WAITING) == 2


def test_a_waiting_one_makes_room_for_a_lease_that_cannot_use_it() -> None:
    pool = filled(rules(size=2, capacity=2))
    assert pool.step(Wanted(1, "runsc"), 0.0) == [End(1)]
    assert pool.step(Gone(1), 0.0) == [MakeOwn(1, 3)]
    assert pool.step(Gone(3), 0.0) == [Start(4, "runc")]


def test_a_start_ahead_of_demand_makes_room_too() -> None:
    pool = rules(size=1, capacity=1)
    pool.step(TimePassed(), 0.0)
    assert pool.step(Wanted(1, "runsc"), 0.0) == [End(1)]
    assert pool.step(Gone(1), 0.0) == [MakeOwn(1, 2)]


def test_where_only_leaks_are_in_the_way_a_lease_goes_ahead() -> None:
    pool = rules(capacity=1)
    pool.step(Withheld(1), 0.0)
    assert pool.step(Wanted(1, "runsc"), 0.0) == [MakeOwn(1, 1)]


def test_a_leak_takes_the_room_of_one_that_waits() -> None:
    pool = filled(rules(size=2, capacity=2))
    assert pool.step(Withheld(1), 0.0) == [End(1)]
    assert pool.step(Gone(1), 0.0) == []
    assert pool.step(Withheld(0), 0.0) == [Start(3, "runc")]


def test_one_that_waited_too_long_is_replaced_and_not_lent() -> None:
    pool = filled(rules(size=1))
    assert pool.next_look_s() == MAX_AGE_S
    assert pool.step(Wanted(1, "runc"), MAX_AGE_S) == [End(1), Start(2, "runc"), Start(3, "runc")]
    assert pool.stats["runc"].expired == 1


def test_one_that_dies_waiting_is_replaced_later_and_each_time_later() -> None:
    pool = filled(rules(size=1))
    assert pool.step(Died(1), 0.0) == [End(1)]
    assert pool.step(Gone(1), 0.0) == []
    assert pool.next_look_s() == 1.0
    assert pool.step(TimePassed(), 1.0) == [Start(2, "runc")]
    pool.step(Started(2), 1.0)
    pool.step(Died(2), 1.0)
    pool.step(Gone(2), 1.0)
    assert pool.next_look_s() == 3.0


def test_a_failed_start_fails_who_has_asked_longest_and_does_not_put_off_the_others() -> None:
    pool = rules(size=1)
    pool.step(Wanted(1, "runc"), 0.0)
    assert pool.step(Gone(1), 0.1) == [Fail(1, 1)]
    assert pool.step(Wanted(2, "runc"), 0.2) == []
    assert pool.step(Wanted(3, "runc"), 0.2) == [Start(3, "runc")]


def test_a_queue_starts_no_more_than_the_pools_size_at_once_and_is_bounded_in_time() -> None:
    pool = rules(size=1, when_empty=WhenEmpty.QUEUE)
    pool.step(Wanted(1, "runc"), 0.0)
    assert pool.step(Wanted(2, "runc"), 1.0) == []
    assert pool.next_look_s() == QUEUE_S
    assert pool.step(TimePassed(), QUEUE_S) == [Refuse(1)]
    assert pool.step(Started(1), QUEUE_S) == [HandOut(2, 1), Start(2, "runc")]
    assert pool.stats["runc"].refused == 1


def test_an_empty_pool_refuses_at_once_where_it_is_told_to() -> None:
    pool = filled(rules(size=1, when_empty=WhenEmpty.REFUSE))
    assert HandOut(1, 1) in pool.step(Wanted(1, "runc"), 0.0)
    assert Refuse(2) in pool.step(Wanted(2, "runc"), 0.0)


def test_closing_ends_everything_and_lets_nobody_in() -> None:
    pool = filled(rules(size=1))
    pool.step(Wanted(1, "runc"), 0.0)
    pool.step(Wanted(2, "runc"), 0.0)
    assert pool.step(Closed(), 0.0) == [Refuse(2), End(1), End(2), End(3)]
    assert pool.step(Wanted(3, "runc"), 0.0) == [Refuse(3)]
    assert pool.step(Gone(1), 0.0) == []


# --- Any order of events ---------------------------------------------------------------------------------


@dataclass
class World:
    """The other side: it does what it is told, in any order, and notices what must not be."""

    rules: PoolRules
    plans: dict[str, Plan]
    capacity: int
    now_s: float = 0.0
    leaked: int = 0
    tickets: dict[int, str] = field(default_factory=dict)
    """Those who ask, with the runtime."""
    starting: dict[int, str] = field(default_factory=dict)
    ready_at_s: dict[int, float] = field(default_factory=dict)
    runtime_of: dict[int, str] = field(default_factory=dict)
    """Every pooled one that was ever ready."""
    lent: set[int] = field(default_factory=set)
    ending: set[int] = field(default_factory=set)
    ever_lent: set[int] = field(default_factory=set)
    asked: int = 0

    def tell(self, event: Event) -> None:
        for action in self.rules.step(event, self.now_s):
            self._obey(action)
        self._check()

    def _obey(self, action: Action) -> None:
        match action:
            case Start(number, runtime):
                assert number not in self.runtime_of
                self.starting[number] = self.runtime_of[number] = runtime
            case HandOut(ticket, number):
                assert number not in self.ever_lent, "lent twice"
                assert self.tickets.pop(ticket) == self.runtime_of[number]
                age_s = self.now_s - self.ready_at_s.pop(number)
                assert age_s < self.plans[self.runtime_of[number]].max_age_s
                self._lend(number)
            case MakeOwn(ticket, number):
                assert number not in self.runtime_of
                del self.tickets[ticket]
                self._lend(number)
            case Fail(ticket, _) | Refuse(ticket):
                del self.tickets[ticket]
            case End(number):
                assert number not in self.ending
                self.starting.pop(number, None)
                self.ready_at_s.pop(number, None)
                self.lent.discard(number)
                self.ending.add(number)

    def _lend(self, number: int) -> None:
        self.ever_lent.add(number)
        self.lent.add(number)

    def _check(self) -> None:
        for runtime, plan in self.plans.items():
            waiting = [number for number in self.ready_at_s if self.runtime_of[number] == runtime]
            assert len(waiting) <= plan.size
            in_line = [ticket for ticket, wanted in self.tickets.items() if wanted == runtime]
            starting = [number for number in self.starting if self.runtime_of[number] == runtime]
            assert len(starting) <= len(in_line) + plan.size
        unneeded = len(self.ready_at_s) > 0
        total = len(self.starting) + len(self.ready_at_s) + len(self.lent) + len(self.ending) + self.leaked
        assert total <= self.capacity or self.leaked or not unneeded
        # Whoever asks is on his way: something starts or ends, or time alone decides.
        assert not self.tickets or self.starting or self.ending or self.rules.next_look_s() < float("inf")
        assert self.rules.next_look_s() >= self.now_s

    def settle(self) -> None:
        """Everything that is under way comes to its good end, and nobody asks for more."""
        self.tell(TimePassed())
        for _ in range(10_000):
            if self.starting:
                self.start(0)
            elif self.ending:
                self.end(0)
            elif not self.tickets and len(self.ready_at_s) == self.most_waiting():
                return
            else:
                self.now_s = self.rules.next_look_s()
                self.tell(TimePassed())
        raise AssertionError("it never comes to rest")

    def most_waiting(self) -> int:
        room = self.capacity - self.leaked - len(self.lent)
        return max(0, min(room, sum(plan.size for plan in self.plans.values())))

    def start(self, which: int) -> None:
        number = list(self.starting)[which % len(self.starting)]
        del self.starting[number]
        self.ready_at_s[number] = self.now_s
        self.tell(Started(number))

    def end(self, which: int) -> None:
        number = sorted(self.ending)[which % len(self.ending)]
        self.ending.discard(number)
        self.tell(Gone(number))

    def do(self, what: str, which: int) -> None:
        match what:
            case "ask" if len(self.lent) + len(self.tickets) + self.leaked < self.capacity:
                self.asked += 1
                runtime = ("runc", "runsc", "other")[which % 3]
                self.tickets[self.asked] = runtime
                self.tell(Wanted(self.asked, runtime, own=which % 7 == 0))
            case "give up" if self.tickets:
                ticket = sorted(self.tickets)[which % len(self.tickets)]
                del self.tickets[ticket]
                self.tell(GivenUp(ticket))
            case "start" if self.starting:
                self.start(which)
            case "fail" if self.starting:
                number = list(self.starting)[which % len(self.starting)]
                del self.starting[number]
                self.tell(Gone(number))
            case "die" if self.ready_at_s:
                self.tell(Died(sorted(self.ready_at_s)[which % len(self.ready_at_s)]))
            case "return" if self.lent:
                number = sorted(self.lent)[which % len(self.lent)]
                self.lent.discard(number)
                self.tell(Gone(number))
            case "end" if self.ending:
                self.end(which)
            case "leak":
                # Admission never has more places out than are left, so only free ones leak here.
                self.leaked = min(which % 3, self.capacity - len(self.lent) - len(self.tickets))
                self.tell(Withheld(self.leaked))
            case "wait":
                self.now_s += which % 80
                self.tell(TimePassed())


WHAT = ("ask", "ask", "ask", "start", "start", "start", "return", "return", "end", "end")
RARELY = ("give up", "fail", "die", "leak", "wait")
PLANS = st.fixed_dictionaries(
    {
        runtime: st.builds(
            Plan,
            size=st.integers(1, 5),
            when_empty=st.sampled_from(WhenEmpty),
            queue_s=st.just(QUEUE_S),
            max_age_s=st.just(MAX_AGE_S),
        )
        for runtime in ("runc", "runsc")
    }
)
EVENTS = st.lists(st.tuples(st.sampled_from(WHAT + RARELY), st.integers(0, 1_000)), max_size=80)


@pytest.mark.case("F05")
@given(plans=PLANS, capacity=st.integers(1, 9), script=EVENTS)
@settings(max_examples=100, deadline=None)
def test_no_sandbox_is_lent_twice_and_no_limit_is_passed_whatever_happens_in_which_order(
    plans: dict[str, Plan], capacity: int, script: Sequence[tuple[str, int]]
) -> None:
    world = World(PoolRules(plans, capacity=capacity, refills_at_once=2), plans, capacity)
    for what, which in script:
        world.do(what, which)


@given(plans=PLANS, capacity=st.integers(1, 9), script=EVENTS)
@settings(max_examples=100, deadline=None)
def test_it_comes_to_rest_full_as_far_as_there_is_room_with_everybody_served(
    plans: dict[str, Plan], capacity: int, script: Sequence[tuple[str, int]]
) -> None:
    world = World(PoolRules(plans, capacity=capacity, refills_at_once=2), plans, capacity)
    for what, which in script:
        world.do(what, which)
    world.settle()


@given(plans=PLANS, script=EVENTS)
@settings(max_examples=50, deadline=None)
def test_after_closing_nothing_starts_and_everything_is_told_to_end(
    plans: dict[str, Plan], script: Sequence[tuple[str, int]]
) -> None:
    world = World(PoolRules(plans, capacity=6, refills_at_once=2), plans, capacity=6)
    for what, which in script:
        world.do(what, which)
    world.tell(Closed())
    assert (world.tickets, world.starting, world.ready_at_s, world.lent) == ({}, {}, {}, set())
    while world.ending:
        world.end(0)
    assert all(world.rules.count(phase) == 0 for phase in Phase)
