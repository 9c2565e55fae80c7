"""Rooms of several servers, and the whole of it as a machine of servers that claim whenever they like."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orchestrator.fair_rooms import Answer, Claim, Room, answer, shares
from orchestrator.ids import RunId
from orchestrator.service.rooms import TenantRoom
from orchestrator.store.books import TenantRooms


def runs(chains: int, wants: int | None = None, units: int = 0) -> Room:
    return Room(units=units, chains=chains, wants=chains if wants is None else wants)


def waits(wants: int, turn: int, units: int = 0) -> Room:
    return Room(units=units, wants=wants, turn=turn)


def claim(chains: int, wants: int, *, asks: int = 0, keeps: int = 0) -> Claim:
    return Claim(chains=chains, wants=wants, asks=asks, keeps=keeps)


# --- Shares -----------------------------------------------------------------------------------------------


def test_one_server_alone_has_all() -> None:
    assert shares(10, {"a": waits(2, 1)}) == {"a": 10}
    told = answer(10, {}, "a", claim(0, 2, asks=2))
    assert (told.may_have, told.room, told.is_granted) == (10, Room(units=10, chains=2, wants=2), True)
    assert not told.is_contended


@pytest.mark.parametrize(
    ("rooms", "expected"),
    [
        ({"a": runs(2, 30), "b": runs(2, 30)}, {"a": 5, "b": 5}),
        ({"a": runs(2, 3), "b": runs(2, 30)}, {"a": 3, "b": 7}),
        ({"a": runs(7, 30), "b": runs(2, 30)}, {"a": 7, "b": 3}),
        ({"a": runs(2, 30), "b": runs(2, 30), "c": runs(2, 30)}, {"a": 4, "b": 3, "c": 3}),
        ({"a": runs(1, 2), "b": runs(1, 4)}, {"a": 5, "b": 5}),
        ({"a": runs(2, 30), "b": Room(units=4)}, {"a": 10, "b": 0}),
        ({"a": Room(units=6), "b": Room(units=4)}, {"a": 0, "b": 0}),
    ],
)
def test_those_that_want_more_have_equal_parts_beyond_their_chains(
    rooms: dict[str, Room], expected: dict[str, int]
) -> None:
    assert shares(10, rooms) == expected


def test_who_runs_nothing_has_its_chain_before_anybody_has_more_than_chains() -> None:
    assert shares(10, {"a": runs(3, 30), "b": waits(4, 1)}) == {"a": 6, "b": 4}


def test_nobody_slips_past_the_first_that_waits_for_its_chain() -> None:
    rooms = {"a": runs(4, 30), "b": waits(8, 1), "c": waits(2, 2)}
    assert shares(10, rooms) == {"a": 4, "b": 6, "c": 0}
    assert shares(10, {**rooms, "a": runs(2, 30)}) == {"a": 2, "b": 8, "c": 0}


def test_who_waits_longer_is_first() -> None:
    assert shares(3, {"a": waits(3, 7), "b": waits(3, 6)}) == {"a": 0, "b": 3}


def test_with_less_than_there_was_everybody_keeps_the_chains_of_what_runs() -> None:
    assert shares(2, {"a": runs(3, 9), "b": runs(1, 9), "c": waits(1, 1)}) == {"a": 3, "b": 1, "c": 0}


def test_what_was_queued_when_there_was_more_runs_where_nothing_else_does() -> None:
    assert shares(2, {"a": runs(1), "b": waits(4, 1)}) == {"a": 1, "b": 1}
    assert shares(2, {"a": Room(), "b": waits(4, 1)}) == {"a": 0, "b": 4}
    assert shares(2, {"a": waits(1, 1), "b": waits(4, 2)}) == {"a": 1, "b": 1}


# --- Claims -----------------------------------------------------------------------------------------------


def test_what_others_have_is_not_given_away_before_they_give_it_back() -> None:
    rooms = {"a": Room(units=10, chains=2, wants=20)}
    second = answer(10, rooms, "b", claim(0, 2, asks=2))
    assert (second.is_granted, second.room, second.is_contended) == (False, waits(2, 1), True)
    rooms["b"] = second.room
    first = answer(10, rooms, "a", claim(2, 20, keeps=9))
    assert (first.may_have, first.room.units) == (8, 9)
    rooms["a"] = answer(10, rooms, "a", claim(2, 20, keeps=8)).room
    second = answer(10, rooms, "b", claim(0, 2, asks=2))
    assert (second.is_granted, second.room) == (True, Room(units=2, chains=2, wants=2))


def test_a_chain_is_had_whole_or_not_at_all() -> None:
    rooms = {"a": Room(units=7, chains=7, wants=7), "b": Room(units=3, chains=1, wants=1)}
    assert answer(10, rooms, "b", claim(1, 3, asks=2, keeps=3)).is_granted
    told = answer(10, rooms, "b", claim(1, 4, asks=3, keeps=3))
    assert (told.is_granted, told.room) == (False, Room(units=3, chains=1, wants=4))


def test_who_waits_keeps_its_turn_and_who_has_begun_something_gets_a_later_one() -> None:
    rooms = {"a": runs(3, units=3), "b": waits(3, 4), "c": waits(3, 9)}
    assert answer(3, rooms, "b", claim(0, 3, asks=3)).room.turn == 4
    assert answer(3, rooms, "a", claim(0, 3, asks=3, keeps=3)).room.turn == 10


# --- Several servers that claim whenever they like ---------------------------------------------------------


@dataclass
class _Tree:
    run_id: RunId
    chain: int
    is_admitted: bool = False
    more: int = 0
    """Sandboxes that it has beyond its chain."""


@dataclass
class _Server:
    """What `service/rooms.py` does, without waiting for anything."""

    mine: TenantRoom = field(default_factory=TenantRoom)
    trees: list[_Tree] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)
    wide: int = 0
    """Sandboxes that its trees could use beyond their chains."""
    waited: int = 0
    """Ends of others' runs since its first run could not be begun and nothing ran here."""

    @property
    def has(self) -> int:
        return sum(tree.more + tree.is_admitted * tree.chain for tree in self.trees)

    @property
    def chains(self) -> int:
        return sum(tree.chain for tree in self.trees)

    def claim(self, asks: int = 0) -> Claim:
        return self.mine.claim(self.has, self.chains + self.wide - self.has, 40, asks)


HOMES = ("a", "b", "c")


class _World:
    def __init__(self, most: int) -> None:
        self.most = most
        self.rooms: dict[str, Room] = {}
        self.servers = {home: _Server() for home in HOMES}
        self.numbers = itertools.count()

    def send(self, home: str, asks: int = 0) -> Answer:
        server = self.servers[home]
        told = answer(self.most, self.rooms, home, server.claim(asks))
        self.rooms[home] = told.room
        server.mine.heard(told)
        return told

    def ask(self, home: str) -> bool:
        """Try to begin its first run."""
        server = self.servers[home]
        if not server.queued:
            return False
        mine, chain = server.mine, server.queued[0]
        may_begin = (mine.most is not None and mine.fits(chain)) or self.send(home, asks=chain).is_granted
        if may_begin:
            tree = _Tree(RunId(f"{next(self.numbers)}"), server.queued.pop(0))
            server.trees.append(tree)
            mine.chains[tree.run_id], mine.lacks, server.waited = chain, None, 0
        else:
            mine.lacks = (RunId("first"), chain)
            self.give_back(home)
        self.serve(home)
        return may_begin

    def look(self, home: str) -> None:
        mine = self.servers[home].mine
        if home not in self.rooms:
            return
        mine.is_contended = any(room.is_short for other, room in self.rooms.items() if other != home)
        around = TenantRooms(most=self.most, rooms=self.rooms)
        if mine.is_stale(around, home, self.servers[home].claim()):
            self.send(home)
            self.give_back(home)
        self.serve(home)

    def give_back(self, home: str) -> None:
        server = self.servers[home]
        if server.mine.has_too_much(server.has):
            self.send(home)

    def serve(self, home: str) -> None:
        """As the line does: chains first here, then whatever its trees can use."""
        server = self.servers[home]
        for tree in server.trees:
            if server.has + tree.chain <= server.mine.may_have:
                tree.is_admitted = True
        if server.trees and all(tree.is_admitted for tree in server.trees):
            wide = server.wide - sum(tree.more for tree in server.trees)
            server.trees[0].more += max(0, min(wide, server.mine.may_have - server.has))

    def narrow(self, home: str) -> None:
        """All beyond its chains end."""
        for tree in self.servers[home].trees:
            tree.more = 0

    def end(self, home: str, number: int) -> None:
        server = self.servers[home]
        if not server.trees:
            return
        tree = server.trees[number % len(server.trees)]
        if tree.is_admitted:
            server.trees.remove(tree)
            del server.mine.chains[tree.run_id]
            for other in HOMES:
                self.servers[other].waited += other != home

    def kill(self, home: str) -> None:
        self.servers[home] = _Server()
        self.rooms.pop(home, None)

    def check(self) -> None:
        assert sum(room.units for room in self.rooms.values()) <= self.most
        for home, server in self.servers.items():
            units = self.rooms.get(home, Room()).units
            assert max(server.has, server.mine.may_have) <= units
            assert server.chains <= server.mine.may_have, "what was begun has its chain"

    def go_on(self) -> None:
        """One round in which everybody does what he can, and everything that can end does."""
        for home in HOMES:
            self.narrow(home)
            self.look(home)
            self.ask(home)
            self.check()
        for home in HOMES:
            self.end(home, 0)


class Servers(RuleBasedStateMachine):
    """An adversary chooses who asks, looks, ends and is killed."""

    world: _World

    @initialize(most=st.integers(1, 12))
    def start(self, most: int) -> None:
        self.world = _World(most)

    @rule(home=st.sampled_from(HOMES), chain=st.integers(1, 5))
    def queue(self, home: str, chain: int) -> None:
        if chain <= self.world.most:
            self.world.servers[home].queued.append(chain)

    @rule(home=st.sampled_from(HOMES))
    def ask(self, home: str) -> None:
        self.world.ask(home)

    @rule(home=st.sampled_from(HOMES))
    def send(self, home: str) -> None:
        self.world.send(home)

    @rule(home=st.sampled_from(HOMES), wide=st.integers(0, 30))
    def use(self, home: str, wide: int) -> None:
        self.world.servers[home].wide = wide
        self.world.serve(home)

    @rule(home=st.sampled_from(HOMES))
    def narrow(self, home: str) -> None:
        self.world.narrow(home)

    @rule(home=st.sampled_from(HOMES), number=st.integers(0, 5))
    def end(self, home: str, number: int) -> None:
        self.world.end(home, number)

    @rule(home=st.sampled_from(HOMES))
    def kill(self, home: str) -> None:
        self.world.kill(home)

    @invariant()
    def never_more_than_there_is(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        """From wherever it came to, all that is queued is begun and ends."""
        if not hasattr(self, "world"):
            return
        world, servers = self.world, self.world.servers.values()
        todo = sum(len(server.queued) + len(server.trees) for server in servers)
        for _ in range(4 * todo + 4):
            world.go_on()
        assert not any(server.queued or server.trees for server in servers)


TestServers = Servers.TestCase
TestServers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def test_two_servers_of_which_each_needs_all_for_every_run_take_turns() -> None:
    world = _World(3)
    for home in ("a", "b"):
        world.servers[home].queued = [3] * 4
    order = ""
    while any(server.queued for server in world.servers.values()):
        for home in ("a", "b"):
            world.look(home)
            if world.ask(home):
                order += home
            world.check()
        world.end("a", 0)
        world.end("b", 0)
    assert order == "abababab"


@given(
    most=st.integers(2, 8),
    chain=st.integers(1, 8),
    others=st.lists(st.integers(1, 8), min_size=1, max_size=8),
    ends=st.lists(st.integers(0, 5), min_size=10, max_size=10),
)
def test_whoever_runs_nothing_is_not_starved_by_servers_that_always_have_another_run(
    most: int, chain: int, others: Sequence[int], ends: Sequence[int]
) -> None:
    world = _World(most)
    busy = [min(length, most) for length in others] * 20
    for home in ("a", "b"):
        world.servers[home].queued = list(busy)
        world.servers[home].wide = 30
    for _ in range(most):
        world.ask("a")
        world.ask("b")
    mine = world.servers["c"]
    mine.queued = [min(chain, most)]
    running = sum(len(server.trees) for server in world.servers.values())
    for number in range(200):
        if world.ask("c"):
            break
        for home in ("a", "b"):
            world.narrow(home)
            world.look(home)
            world.ask(home)
        world.check()
        for home in ("a", "b"):
            world.end(home, ends[number % len(ends)])
    assert not mine.queued
    assert mine.trees
    # What ran, what was begun before it was heard of, and one run each of those that waited before it.
    assert mine.waited <= running + 4


@given(
    most=st.integers(3, 20),
    wides=st.tuples(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30)),
)
def test_wide_trees_of_several_servers_have_equal_parts_in_the_end(
    most: int, wides: tuple[int, int, int]
) -> None:
    world = _World(most)
    for home, wide in zip(HOMES, wides, strict=True):
        world.servers[home].queued = [1]
        world.servers[home].wide = wide
    for _ in range(6):
        for home in HOMES:
            world.ask(home)
            world.look(home)
            world.check()
            world.narrow(home)
    for home in HOMES:
        world.look(home)
    wants = {home: min(40, 1 + wide) for home, wide in zip(HOMES, wides, strict=True)}
    has = {home: world.servers[home].has for home in HOMES}
    least = min((has[home] for home in HOMES if has[home] < wants[home]), default=most)
    assert max(has.values()) <= least + 1 or all(has[home] <= max(least + 1, 1) for home in HOMES)
    assert sum(has.values()) == min(most, sum(wants.values()))
