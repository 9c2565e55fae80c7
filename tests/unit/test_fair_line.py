import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orchestrator.errors import InvariantError
from orchestrator.fair_line import FairLine
from orchestrator.ids import TenantId

A, B, C = TenantId("a"), TenantId("b"), TenantId("c")


def served(line: FairLine[str]) -> list[str]:
    """All that are served now."""
    names: list[str] = []
    while (name := line.next()) is not None:
        names.append(name)
    return names


def test_of_one_run_tree_who_asked_first_is_served_first() -> None:
    line: FairLine[str] = FairLine(2)
    for name in ("1", "2", "3"):
        line.ask(name, A, "tree")
    assert served(line) == ["1", "2"]
    line.give_back(A, "tree")
    assert served(line) == ["3"]


def test_tenants_and_their_run_trees_have_equal_parts() -> None:
    line: FairLine[str] = FairLine(8)
    for number in range(8):
        line.ask(f"a{number}", A, "wide")
    for number in range(4):
        line.ask(f"b{number}", B, "one")
    for number in range(4):
        line.ask(f"c{number}", B, "two")
    assert served(line) == ["a0", "b0", "a1", "c0", "a2", "b1", "a3", "c1"]


def test_a_tenant_whose_calls_are_long_has_no_more_than_its_part_of_them_in_flight() -> None:
    line: FairLine[str] = FairLine(4)
    for number in range(100):
        line.ask(f"long{number}", A, "tree")
        line.ask(f"short{number}", B, "tree")
    now = served(line)
    for _ in range(50):
        # Only short ones end.
        line.give_back(B, "tree")
        now += served(line)
    assert sum(name.startswith("long") for name in now) == 2


def test_what_wants_many_units_is_not_starved_by_what_wants_one() -> None:
    line: FairLine[str] = FairLine(3)
    for number in range(6):
        line.ask(f"a{number}", A, "tree")
    assert len(served(line)) == 3
    line.ask("chain", B, "tree", wants=3)
    for _ in range(2):
        line.give_back(A, "tree")
        assert served(line) == []
    line.give_back(A, "tree")
    assert served(line) == ["chain"]


def test_a_tenant_that_has_what_it_may_is_passed_over_until_it_gives_something_back() -> None:
    line: FairLine[str] = FairLine(5)
    for number in range(3):
        line.ask(f"a{number}", A, "tree", most=2)
    line.ask("b0", B, "tree")
    assert served(line) == ["a0", "b0", "a1"]
    assert line.free == 2
    assert line.held_by(A) == 2
    line.give_back(A, "tree")
    assert served(line) == ["a2"]


def test_a_tenant_has_no_more_than_the_room_that_it_was_given_whatever_was_asked_with() -> None:
    line: FairLine[str] = FairLine(9)
    line.set_room(A, 2)
    for number in range(6):
        line.ask(f"a{number}", A, "tree", most=4)
    line.ask("b", B, "tree", wants=2)
    assert served(line) == ["a0", "b", "a1"]
    assert (line.held_by(A), line.awaited_by(A), line.awaited_by(B)) == (2, 4, 0)
    line.set_room(A, 5)
    assert served(line) == ["a2", "a3", "a4"]
    line.set_room(A, 3)
    for _ in range(2):
        line.give_back(A, "tree")
        assert served(line) == []
    line.give_back(A, "tree")
    assert served(line) == ["a5"]
    assert line.awaited_by(A) == 0


def test_what_does_not_fit_into_the_room_of_its_tenant_waits_also_where_that_has_nothing() -> None:
    line: FairLine[str] = FairLine(9)
    line.ask("chain", A, "tree", wants=3)
    line.set_room(A, 2)
    assert served(line) == []
    line.set_room(A, None)
    assert served(line) == ["chain"]
    line.give_back(A, "tree", 3)
    line.ask("1", A, "tree", most=1)
    line.ask("2", A, "tree", most=1)
    assert served(line) == ["1"], "without a room that counts what is asked with"
    assert line.withdraw("2")
    assert line.awaited_by(A) == 0


def test_trees_need_not_be_told_apart() -> None:
    line: FairLine[str] = FairLine(1)
    line.ask("a", A, None)
    line.ask("b", B, None)
    assert served(line) == ["a"]
    line.give_back(A, None)
    assert served(line) == ["b"]


def test_who_asked_before_its_tenant_might_have_less_is_served_once_that_has_nothing() -> None:
    line: FairLine[str] = FairLine(5)
    for name, wants in (("1", 1), ("2", 3)):
        line.ask(name, A, "tree", wants=wants, most=2)
    assert served(line) == ["1"]
    line.give_back(A, "tree")
    assert served(line) == ["2"]


def test_who_has_withdrawn_is_not_served_and_stands_in_nobodys_way() -> None:
    line: FairLine[str] = FairLine(1)
    line.ask("1", A, "tree")
    assert served(line) == ["1"]
    line.ask("chain", B, "tree", wants=5)
    line.ask("2", C, "tree")
    line.give_back(A, "tree")
    assert served(line) == []
    assert line.withdraw("chain")
    assert not line.withdraw("chain")
    assert not line.withdraw("1")
    assert served(line) == ["2"]


def test_what_nobody_has_cannot_be_given_back() -> None:
    line: FairLine[str] = FairLine(1)
    with pytest.raises(InvariantError):
        line.give_back(A, "tree")
    line.ask("1", A, "tree")
    assert served(line) == ["1"]
    for tenant, tree, count in ((A, "another", 1), (B, "tree", 1), (A, "tree", 2)):
        with pytest.raises(InvariantError):
            line.give_back(tenant, tree, count)


def test_with_fewer_units_than_are_had_nobody_is_served_until_enough_came_back() -> None:
    line: FairLine[str] = FairLine(3)
    for name in ("1", "2", "3", "4"):
        line.ask(name, A, "tree")
    assert len(served(line)) == 3
    line.add_units(-2)
    for _ in range(2):
        line.give_back(A, "tree")
        assert served(line) == []
    line.give_back(A, "tree")
    assert served(line) == ["4"]


# --- The bounds -------------------------------------------------------------------------------------------


class _World:
    """Others who ask, withdraw and give back in any order, as an adversary chooses."""

    def __init__(self, seed: int, *, units: int, others: int, most_wanted: int) -> None:
        self.chance = random.Random(seed)  # noqa: S311 - no secret
        self.line: FairLine[str] = FairLine(units)
        self.tenants = [TenantId(f"t{number}") for number in range(others)]
        self.most_wanted = most_wanted
        self.held: list[tuple[TenantId, str, int]] = []
        self.asked: dict[str, tuple[TenantId, str, int]] = {}
        self.numbers = 0

    def ask(self) -> None:
        tenant = self.chance.choice(self.tenants)
        tree = f"{tenant}-{self.chance.randrange(3)}"
        wants = self.chance.randint(1, self.most_wanted)
        name = f"other-{self.numbers}"
        self.numbers += 1
        self.line.ask(name, tenant, tree, wants=wants)
        self.asked[name] = (tenant, tree, wants)

    def withdraw(self) -> None:
        if self.asked:
            name = self.chance.choice(sorted(self.asked))
            assert self.line.withdraw(name)
            del self.asked[name]

    def serve(self) -> list[str]:
        now = served(self.line)
        self.held += [self.asked.pop(name) for name in now if name in self.asked]
        return now

    def give_back(self, which: int) -> int:
        """The number of units; other tenants ask again at once."""
        tenant, tree, count = self.held.pop(which)
        self.line.give_back(tenant, tree, count)
        for _ in range(self.chance.randrange(4)):
            self.ask()
        return count


@given(
    units=st.integers(1, 6),
    others=st.integers(1, 5),
    most_wanted=st.integers(1, 3),
    flood=st.integers(0, 80),
    seed=st.integers(0, 2**32),
)
def test_a_tenant_with_nothing_is_served_after_as_many_units_as_tenants_wait_times_what_each_wants(
    units: int, others: int, most_wanted: int, flood: int, seed: int
) -> None:
    """The bound of the docstring; floods go on while it waits, and who gives back what is arbitrary."""
    most_wanted = min(most_wanted, units)
    world = _World(seed, units=units, others=others, most_wanted=most_wanted)
    for _ in range(flood):
        world.ask()
        if world.chance.random() < 0.5:
            world.serve()
    world.serve()
    world.line.ask("mine", TenantId("late"), "tree", wants=world.chance.randint(1, most_wanted))
    given_back = 0
    while "mine" not in world.serve():
        given_back += world.give_back(world.chance.randrange(len(world.held)))
        if world.chance.random() < 0.2:
            world.withdraw()
    # What is given back in one step counts whole, also where a part of it would have done.
    assert given_back < (others + 1) * most_wanted + most_wanted


@settings(max_examples=60)
@given(
    free=st.integers(1, 6),
    others=st.integers(1, 4),
    mine=st.integers(1, 4),
    seed=st.integers(0, 2**32),
)
def test_a_tenant_that_has_some_waits_for_those_who_have_fewer_only(
    free: int, others: int, mine: int, seed: int
) -> None:
    world = _World(seed, units=mine + free, others=others, most_wanted=1)
    me = TenantId("me")
    for number in range(mine):
        world.line.ask(f"had-{number}", me, "tree")
    assert len(world.serve()) == mine
    for _ in range(free + world.chance.randrange(20)):
        world.ask()
        world.serve()
    world.line.ask("wanted", me, "tree")
    of_those_with_more = steps = 0
    while "wanted" not in world.serve() and steps < 150:
        which = world.chance.randrange(len(world.held))
        tenant, _, _ = world.held[which]
        of_those_with_more += world.line.held_by(tenant) > mine
        world.give_back(which)
        steps += 1
    assert of_those_with_more <= mine * (others + 1)


@given(seed=st.integers(0, 2**32), units=st.integers(1, 16))
@settings(max_examples=20)
def test_500_run_trees_of_one_tenant_delay_anothers_call_by_one_that_ends(seed: int, units: int) -> None:
    chance = random.Random(seed)  # noqa: S311 - no secret
    line: FairLine[str] = FairLine(units)
    for number in range(2_000):
        line.ask(f"a{number}", A, f"tree-{number % 500}")
    assert len(served(line)) == units
    line.ask("mine", B, "tree")
    assert served(line) == []
    line.give_back(A, f"tree-{chance.randrange(units)}")
    assert served(line) == ["mine"]


# --- Whatever happens -------------------------------------------------------------------------------------


class Line(RuleBasedStateMachine):
    """The line against a plain list of who has what and who waits."""

    units = 4

    def __init__(self) -> None:
        super().__init__()
        self.line: FairLine[int] = FairLine(self.units)
        self.there_are = self.units
        self.waiting: dict[int, tuple[TenantId, str, int]] = {}
        self.had: list[tuple[TenantId, str, int]] = []
        self.number = 0

    @rule(tenant=st.sampled_from((A, B, C)), tree=st.sampled_from("xyz"), wants=st.integers(1, units))
    def ask(self, tenant: TenantId, tree: str, wants: int) -> None:
        self.number += 1
        self.line.ask(self.number, tenant, tree, wants=wants, most=self.units if tenant == A else None)
        self.waiting[self.number] = (tenant, tree, wants)

    @rule(tenant=st.sampled_from((B, C)), tree=st.sampled_from("xyz"))
    def take_at_once(self, tenant: TenantId, tree: str) -> None:
        has_one = self.line.take_at_once(tenant, tree)
        assert has_one == (not self.waiting and self.line.free + has_one > 0)
        if has_one:
            self.had.append((tenant, tree, 1))

    @rule()
    def serve(self) -> None:
        while (name := self.line.next()) is not None:
            of = self.waiting[name][:2]
            assert name == next(one for one, asked in self.waiting.items() if asked[:2] == of), (
                "FIFO in a tree"
            )
            self.had.append(self.waiting.pop(name))

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.waiting)))
        assert self.line.withdraw(name)
        del self.waiting[name]

    @precondition(lambda self: self.had)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        tenant, tree, count = self.had.pop(data.draw(st.integers(0, len(self.had) - 1)))
        self.line.give_back(tenant, tree, count)

    @rule(count=st.sampled_from((-1, 1)))
    def change(self, count: int) -> None:
        if 1 <= self.there_are + count <= 2 * self.units:
            self.there_are += count
            self.line.add_units(count)

    @invariant()
    def nothing_is_lost_or_had_twice(self) -> None:
        assert self.line.waiting == len(self.waiting)
        assert self.line.free == self.there_are - sum(count for *_, count in self.had)
        for tenant in (A, B, C):
            has = sum(count for one, _, count in self.had if one == tenant)
            assert self.line.held_by(tenant) == has
            assert tenant != A or has <= self.units

    def teardown(self) -> None:
        """Once everything comes back everybody is served, and nobody is remembered."""
        self.line.add_units(2 * self.units - self.there_are)
        while self.waiting or self.had:
            for tenant, tree, count in self.had:
                self.line.give_back(tenant, tree, count)
            self.had.clear()
            before = len(self.waiting)
            self.serve()
            assert len(self.waiting) < before or not self.waiting
        assert not self.line._tenants


TestLine = Line.TestCase
TestLine.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
