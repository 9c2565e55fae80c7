"""Which sandboxes are made ahead, who gets which, and which go unused.

Rules. They live in this file and nowhere else:

1. A sandbox is *starting*, *waiting*, *lent* or *ending*, in this order, and never again what it was. A
   waiting one is lent at most once, to who is next of those who ask for its runtime: tenants take turns
   (`fair_line`), and of a tenant it is who has asked longest. So where T tenants ask, one that has just come
   gets the T-th sandbox at the latest, however many the others ask for.
2. No more than a plan's `size` wait. What starts is not made for anybody: the first one ready goes to who is
   next then, and a start that nobody needs any longer is ended.
3. All of them together, with those that leaked, are at most `capacity`. Who asks was admitted within it
   (`runs/admission.py`), so the pool yields: one that waits, or starts ahead of demand, is ended for him.
   Where nothing is left to yield, which takes a leak, he is not made to wait: admission has decided.
4. Who finds none waiting: COLD starts one more, QUEUE starts no more than `size` at once and refuses after
   `queue_s`, REFUSE refuses at once. Who needs one of his own (a runtime without a pool, a lease longer than
   pooled sandboxes may live, a resumed run's seed) is always started one, and never given a pooled one.
5. At most `refills_at_once` start ahead of demand, and none within `refill_after_s` of a hand-out: the first
   cell of whoever got that one goes first. A start that fails, or a sandbox that dies waiting, puts off the
   next refill of its runtime, longer each time. Neither puts off demand. A failed start fails whoever has
   asked longest: that was one start fewer for him.
6. One that waited for `max_age_s` is ended, and not lent any more.

Plain synchronous code: no await, no I/O, no clock. One event-loop thread calls it, hence no lock.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from itertools import islice
from math import inf

from orchestrator.fair_line import FairLine
from orchestrator.ids import TenantId
from orchestrator.limits import POOL_MAX_AGE_S, POOL_QUEUE_S, POOL_REFILL_AFTER_S, POOL_REFILLS_AT_ONCE
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

_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 60.0


class WhenEmpty(Enum):
    """What becomes of a lease that finds no sandbox waiting."""

    COLD = "cold"
    QUEUE = "queue"
    REFUSE = "refuse"


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """How many sandboxes of one runtime are kept waiting, and how."""

    size: int
    when_empty: WhenEmpty = WhenEmpty.COLD
    queue_s: float = POOL_QUEUE_S
    """With QUEUE: how long a lease waits before it is refused."""
    max_age_s: float = POOL_MAX_AGE_S
    """How long a sandbox waits before it is replaced."""


_NO_POOL = Plan(size=0)


@dataclass(slots=True)
class PoolStats:
    """What became of one runtime's sandboxes and leases so far. Counters never fall."""

    warm: int = 0
    """Leases that found one waiting."""
    cold: int = 0
    """Leases that waited for a start, whether it was begun for them or before."""
    own: int = 0
    """Leases that started one of their own."""
    refused: int = 0
    """Leases that got none."""
    failed: int = 0
    """Starts that failed, but for those of their own."""
    died: int = 0
    """While they waited."""
    expired: int = 0
    yielded: int = 0
    """Ended, waiting or starting, because room was needed or nobody wanted them any more."""


@dataclass(slots=True)
class _Sandbox:
    home: "_Runtime"
    phase: Phase
    since_s: float


@dataclass(slots=True)
class _Runtime:
    """The sandboxes of one runtime, and who asks for a pooled one of them."""

    name: str
    plan: Plan
    stats: PoolStats = field(default_factory=PoolStats)
    numbers: dict[Phase, dict[int, None]] = field(default_factory=lambda: {phase: {} for phase in Phase})
    """By phase, in the order in which they came to it."""
    in_line: dict[int, float] = field(default_factory=dict)
    """Tickets, with when they were drawn; the first is the oldest."""
    turns: FairLine[int] = field(default_factory=lambda: FairLine(sys.maxsize))
    """Whose turn it is of those; there is always room, because it is asked when a sandbox is there."""
    tenants: dict[int, TenantId] = field(default_factory=dict)
    """Whose those tickets are."""
    pause_until_s: float = 0.0
    """No refill until then; 0 for no pause."""
    failures: int = 0
    """In a row: the next pause is the longer."""

    def count(self, phase: Phase) -> int:
        return len(self.numbers[phase])

    def next_in_line(self) -> int | None:
        """Whose turn it is, which is over with that."""
        ticket = self.turns.next()
        if ticket is not None:
            self.turns.give_back(self.tenants[ticket], None)
        return ticket

    @property
    def demand(self) -> int:
        """Starts that those in line are entitled to."""
        in_line = len(self.in_line)
        return in_line if self.plan.when_empty is WhenEmpty.COLD else min(in_line, self.plan.size)

    @property
    def missing(self) -> int:
        """Starts that are to be begun for them."""
        return max(0, self.demand - self.count(Phase.STARTING))

    @property
    def needed(self) -> int:
        """Starts that are of use: for them, and for the pool to be full after."""
        refill = max(0, self.plan.size - self.count(Phase.WAITING))
        return refill + (self.demand if self.plan.when_empty is WhenEmpty.COLD else 0)

    def put_off(self, now_s: float) -> None:
        """Something went wrong: refill later."""
        self.pause_until_s = now_s + min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0**self.failures)
        self.failures = min(self.failures + 1, 10)


class PoolRules:
    """All sandboxes of one process. Every event gives what is to be done about it, in order."""

    def __init__(
        self,
        plans: Mapping[str, Plan],
        *,
        capacity: int,
        refills_at_once: int = POOL_REFILLS_AT_ONCE,
        refill_after_s: float = POOL_REFILL_AFTER_S,
    ) -> None:
        """Begin with none; `TimePassed` begins the filling.

        Args:
            plans: By runtime. One without a plan has no pool.
            capacity: Sandboxes at once, whatever their phase.
            refills_at_once: Starts ahead of demand.
            refill_after_s: From a hand-out to the next of those.
        """
        self._runtimes = {name: _Runtime(name, plan) for name, plan in plans.items()}
        self._capacity = capacity
        self._refills_at_once = refills_at_once
        self._refill_after_s = refill_after_s
        self._sandboxes: dict[int, _Sandbox] = {}
        self._asking: dict[int, _Runtime] = {}
        self._own: dict[int, _Runtime] = {}
        """Those of them who need one of their own."""
        self._withheld = 0
        self._last_number = 0
        self._is_closed = False

    @property
    def stats(self) -> Mapping[str, PoolStats]:
        """By runtime; of one without a plan once it was asked for."""
        return {name: runtime.stats for name, runtime in self._runtimes.items()}

    def count(self, phase: Phase, name: str | None = None) -> int:
        """How many stand there, of one runtime or of all."""
        return sum(runtime.count(phase) for runtime in self._all() if name in (None, runtime.name))

    def next_look_s(self) -> float:
        """When `TimePassed` is due, if nothing else happens; infinite for never."""
        due_s = [runtime.pause_until_s for runtime in self._all() if runtime.pause_until_s]
        for runtime in self._all():
            for number in islice(runtime.numbers[Phase.WAITING], 1):
                due_s.append(self._sandboxes[number].since_s + runtime.plan.max_age_s)
            if runtime.plan.when_empty is WhenEmpty.QUEUE:
                due_s += [since_s + runtime.plan.queue_s for since_s in islice(runtime.in_line.values(), 1)]
        return min(due_s, default=inf)

    def step(self, event: Event, now_s: float) -> list[Action]:
        """What an event calls for.

        Args:
            event: What happened.
            now_s: Seconds on a clock that never goes back.
        """
        actions = list(self._take(event, now_s))
        if not self._is_closed:
            for runtime in self._all():
                if runtime.pause_until_s <= now_s:
                    runtime.pause_until_s = 0.0
                actions += self._expire(runtime, now_s)
                actions += self._hand_out(runtime, now_s)
                actions += self._refuse(runtime, now_s)
                actions += self._drop_surplus(runtime)
            actions += self._make_room_for_leaks()
            actions += self._start_wanted(now_s)
            actions += self._refill(now_s)
        return actions

    # --- Events -------------------------------------------------------------------------------------------

    def _take(self, event: Event, now_s: float) -> Iterator[Action]:
        match event:
            case Wanted():
                yield from self._wanted(event, now_s)
            case GivenUp(ticket):
                self._leave(ticket)
            case Started(number):
                if self._sandboxes[number].phase is Phase.STARTING:
                    self._move(number, Phase.WAITING, now_s)
            case Died(number):
                yield from self._died(number, now_s)
            case Gone(number):
                yield from self._gone(number, now_s)
            case Withheld(count):
                self._withheld = count
            case Closed():
                yield from self._close()
            case TimePassed():
                pass

    def _wanted(self, event: Wanted, now_s: float) -> Iterator[Action]:
        if self._is_closed:
            yield Refuse(event.ticket)
            return
        runtime = self._runtimes.setdefault(event.runtime, _Runtime(event.runtime, _NO_POOL))
        self._asking[event.ticket] = runtime
        if event.own or runtime.plan.size == 0:
            self._own[event.ticket] = runtime
        else:
            runtime.in_line[event.ticket] = now_s
            runtime.tenants[event.ticket] = event.tenant_id
            runtime.turns.ask(event.ticket, event.tenant_id, None)

    def _died(self, number: int, now_s: float) -> Iterator[Action]:
        sandbox = self._sandboxes[number]
        if sandbox.phase is Phase.WAITING:
            sandbox.home.stats.died += 1
            sandbox.home.put_off(now_s)
            yield self._end(number)

    def _gone(self, number: int, now_s: float) -> Iterator[Action]:
        sandbox = self._sandboxes.pop(number)
        del sandbox.home.numbers[sandbox.phase][number]
        if sandbox.phase is Phase.STARTING:
            sandbox.home.stats.failed += 1
            sandbox.home.put_off(now_s)
            for ticket in tuple(islice(sandbox.home.in_line, 1)):
                self._leave(ticket)
                yield Fail(ticket, number)

    def _close(self) -> Iterator[Action]:
        self._is_closed = True
        for ticket in tuple(self._asking):
            self._leave(ticket)
            yield Refuse(ticket)
        for number, sandbox in self._sandboxes.items():
            if sandbox.phase is not Phase.ENDING:
                yield self._end(number)

    # --- Consequences -------------------------------------------------------------------------------------

    def _expire(self, runtime: _Runtime, now_s: float) -> Iterator[Action]:
        for number in tuple(runtime.numbers[Phase.WAITING]):
            if now_s - self._sandboxes[number].since_s < runtime.plan.max_age_s:
                return
            runtime.stats.expired += 1
            yield self._end(number)

    def _hand_out(self, runtime: _Runtime, now_s: float) -> Iterator[Action]:
        for number in tuple(runtime.numbers[Phase.WAITING]):
            ticket = runtime.next_in_line()
            if ticket is None:
                return
            if runtime.in_line[ticket] < self._sandboxes[number].since_s:
                runtime.stats.cold += 1
            else:
                runtime.stats.warm += 1
            # That one lived from its start until it was wanted: starts are worth it again.
            runtime.failures = 0
            if self._refill_after_s:
                # Not extended: leases one after the other do not keep the pool empty.
                runtime.pause_until_s = min(runtime.pause_until_s or inf, now_s + self._refill_after_s)
            self._move(number, Phase.LENT, now_s)
            self._leave(ticket)
            yield HandOut(ticket, number)

    def _refuse(self, runtime: _Runtime, now_s: float) -> Iterator[Action]:
        plan = runtime.plan
        if plan.when_empty is WhenEmpty.COLD:
            return
        for ticket, since_s in tuple(runtime.in_line.items()):
            if plan.when_empty is WhenEmpty.QUEUE and now_s - since_s < plan.queue_s:
                return
            runtime.stats.refused += 1
            self._leave(ticket)
            yield Refuse(ticket)

    def _drop_surplus(self, runtime: _Runtime) -> Iterator[Action]:
        """End the newest starts that are of no use any more, and what is too much for the plan."""
        starting, waiting = runtime.numbers[Phase.STARTING], runtime.numbers[Phase.WAITING]
        for number in tuple(islice(reversed(starting), max(0, len(starting) - runtime.needed))):
            yield self._yielded(number)
        for number in tuple(islice(waiting, max(0, len(waiting) - runtime.plan.size))):
            yield self._yielded(number)

    def _make_room_for_leaks(self) -> Iterator[Action]:
        while self._free() + self.count(Phase.ENDING) < 0 and (number := self._unneeded()) is not None:
            yield self._yielded(number)

    def _start_wanted(self, now_s: float) -> Iterator[Action]:
        """Starts for those who ask. Where there is no room for one, it is made, and he waits for that."""
        coming = self.count(Phase.ENDING)
        wanted: list[tuple[_Runtime, int | None]] = [
            (runtime, ticket) for ticket, runtime in self._own.items()
        ]
        wanted += [(runtime, None) for runtime in self._all() for _ in range(runtime.missing)]
        for runtime, ticket in wanted:
            if self._free() <= 0:
                if coming > 0:
                    coming -= 1
                    continue
                unneeded = self._unneeded()
                if unneeded is not None:
                    yield self._yielded(unneeded)
                    continue
            if ticket is None:
                yield Start(self._new(runtime, Phase.STARTING, now_s), runtime.name)
            else:
                self._leave(ticket)
                runtime.stats.own += 1
                yield MakeOwn(ticket, self._new(runtime, Phase.LENT, now_s))

    def _refill(self, now_s: float) -> Iterator[Action]:
        """Starts ahead of demand, in room that nobody waits for."""
        if self._own or any(runtime.missing for runtime in self._all()):
            return
        ahead = sum(runtime.count(Phase.STARTING) - runtime.demand for runtime in self._all())
        for runtime in self._all():
            if runtime.pause_until_s:
                continue
            short = runtime.needed - runtime.count(Phase.STARTING)
            for _ in range(min(short, self._refills_at_once - ahead, self._free())):
                ahead += 1
                yield Start(self._new(runtime, Phase.STARTING, now_s), runtime.name)

    # --- What follows from what is there ------------------------------------------------------------------

    def _all(self) -> Iterable[_Runtime]:
        return self._runtimes.values()

    def _free(self) -> int:
        return self._capacity - self._withheld - len(self._sandboxes)

    def _unneeded(self) -> int | None:
        """One that may be ended for somebody's sake: the oldest that waits, else the newest start ahead."""
        for runtime in self._all():
            for number in runtime.numbers[Phase.WAITING]:
                return number
        for runtime in self._all():
            if runtime.count(Phase.STARTING) > runtime.demand:
                return next(reversed(runtime.numbers[Phase.STARTING]))
        return None

    def _new(self, runtime: _Runtime, phase: Phase, now_s: float) -> int:
        self._last_number += 1
        self._sandboxes[self._last_number] = _Sandbox(runtime, phase, now_s)
        runtime.numbers[phase][self._last_number] = None
        return self._last_number

    def _move(self, number: int, phase: Phase, now_s: float) -> None:
        sandbox = self._sandboxes[number]
        del sandbox.home.numbers[sandbox.phase][number]
        sandbox.home.numbers[phase][number] = None
        sandbox.phase, sandbox.since_s = phase, now_s

    def _end(self, number: int) -> End:
        self._move(number, Phase.ENDING, self._sandboxes[number].since_s)
        return End(number)

    def _yielded(self, number: int) -> End:
        self._sandboxes[number].home.stats.yielded += 1
        return self._end(number)

    def _leave(self, ticket: int) -> None:
        """He asks no longer, whatever he got."""
        runtime = self._asking.pop(ticket, None)
        if runtime is not None:
            if runtime.in_line.pop(ticket, None) is not None:
                del runtime.tenants[ticket]
                runtime.turns.withdraw(ticket)
            self._own.pop(ticket, None)
