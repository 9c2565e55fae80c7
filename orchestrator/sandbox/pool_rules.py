"""Which sandboxes are made ahead, who gets which, and which go unused.

Rules. They live in this file and nowhere else:

1. A sandbox is *starting*, *waiting*, *lent* or *ending*, in this order, and never again what it was. A
   waiting one is lent at most once, to whoever has asked longest for its runtime.
2. No more than a plan's `size` wait. What starts is not made for anybody: the first one ready goes to the
   first in line, and a start that nobody needs any longer is ended.
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

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from math import inf

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
    runtime: str
    phase: Phase
    since_s: float


@dataclass(frozen=True, slots=True)
class _Asking:
    runtime: str
    own: bool
    since_s: float


@dataclass(slots=True)
class _Pause:
    """Of one runtime's refill."""

    until_s: float = 0.0
    """0 for none."""
    failures: int = 0
    """In a row."""


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
        self.stats: dict[str, PoolStats] = {runtime: PoolStats() for runtime in plans}
        self._plans = plans
        self._capacity = capacity
        self._refills_at_once = refills_at_once
        self._refill_after_s = refill_after_s
        self._sandboxes: dict[int, _Sandbox] = {}
        self._asking: dict[int, _Asking] = {}
        self._pauses: dict[str, _Pause] = {runtime: _Pause() for runtime in plans}
        self._withheld = 0
        self._last_number = 0
        self._is_closed = False

    def count(self, phase: Phase, runtime: str | None = None) -> int:
        """How many stand there, of one runtime or of all."""
        return sum(1 for _ in self._numbers(phase, runtime))

    def phase(self, number: int) -> Phase | None:
        """Where one stands; None when it is gone."""
        sandbox = self._sandboxes.get(number)
        return None if sandbox is None else sandbox.phase

    def next_look_s(self) -> float:
        """When `TimePassed` is due, if nothing else happens; infinite for never."""
        due_s = [pause.until_s for pause in self._pauses.values() if pause.until_s]
        for runtime, plan in self._plans.items():
            oldest = next(self._numbers(Phase.WAITING, runtime), None)
            if oldest is not None:
                due_s.append(self._sandboxes[oldest].since_s + plan.max_age_s)
            if plan.when_empty is WhenEmpty.QUEUE:
                due_s += [asking.since_s + plan.queue_s for asking in self._in_line(runtime).values()]
        return min(due_s, default=inf)

    def step(self, event: Event, now_s: float) -> list[Action]:
        """What an event calls for.

        Args:
            event: What happened.
            now_s: Seconds on a clock that never goes back.
        """
        for pause in self._pauses.values():
            if pause.until_s <= now_s:
                pause.until_s = 0.0
        actions = list(self._take(event, now_s))
        if not self._is_closed:
            actions += self._expire(now_s)
            actions += self._hand_out(now_s)
            actions += self._drop_unneeded()
            actions += self._start_wanted(now_s)
            actions += self._refill(now_s)
        return actions

    # --- Events -------------------------------------------------------------------------------------------

    def _take(self, event: Event, now_s: float) -> Iterator[Action]:
        match event:
            case Wanted(ticket, runtime, own):
                if self._is_closed:
                    yield Refuse(ticket)
                else:
                    self._asking[ticket] = _Asking(runtime, own or self._plan(runtime).size == 0, now_s)
            case GivenUp(ticket):
                self._asking.pop(ticket, None)
            case Started(number):
                sandbox = self._sandboxes[number]
                if sandbox.phase is Phase.STARTING:
                    # At the end of the line: the one that has waited longest is the first of its phase.
                    self._sandboxes[number] = self._sandboxes.pop(number)
                    sandbox.phase, sandbox.since_s = Phase.WAITING, now_s
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

    def _died(self, number: int, now_s: float) -> Iterator[Action]:
        sandbox = self._sandboxes[number]
        if sandbox.phase is Phase.WAITING:
            self._stats(sandbox.runtime).died += 1
            self._put_off(sandbox.runtime, now_s)
            yield self._end(number)

    def _gone(self, number: int, now_s: float) -> Iterator[Action]:
        sandbox = self._sandboxes.pop(number)
        if sandbox.phase is not Phase.STARTING:
            return
        self._stats(sandbox.runtime).failed += 1
        self._put_off(sandbox.runtime, now_s)
        first = next(iter(self._in_line(sandbox.runtime)), None)
        if first is not None:
            del self._asking[first]
            yield Fail(first, number)

    def _close(self) -> Iterator[Action]:
        self._is_closed = True
        for ticket in self._asking:
            yield Refuse(ticket)
        self._asking.clear()
        for number, sandbox in self._sandboxes.items():
            if sandbox.phase is not Phase.ENDING:
                yield self._end(number)

    def _put_off(self, runtime: str, now_s: float) -> None:
        pause = self._pauses[runtime]
        pause.until_s = now_s + min(_LAST_RETRY_S, _FIRST_RETRY_S * 2.0**pause.failures)
        pause.failures = min(pause.failures + 1, 10)

    # --- Consequences -------------------------------------------------------------------------------------

    def _expire(self, now_s: float) -> Iterator[Action]:
        for runtime, plan in self._plans.items():
            for number in list(self._numbers(Phase.WAITING, runtime)):
                if now_s - self._sandboxes[number].since_s >= plan.max_age_s:
                    self._stats(runtime).expired += 1
                    yield self._end(number)

    def _hand_out(self, now_s: float) -> Iterator[Action]:
        for ticket, asking in list(self._asking.items()):
            if asking.own:
                continue
            stats = self._stats(asking.runtime)
            number = next(self._numbers(Phase.WAITING, asking.runtime), None)
            if number is not None:
                sandbox = self._sandboxes[number]
                if asking.since_s < sandbox.since_s:
                    stats.cold += 1
                else:
                    stats.warm += 1
                sandbox.phase = Phase.LENT
                pause = self._pauses[asking.runtime]
                # That one lived from its start until it was wanted: starts are worth it again.
                pause.failures = 0
                # Not extended: leases one after the other do not keep the pool empty.
                if self._refill_after_s:
                    pause.until_s = min(pause.until_s or inf, now_s + self._refill_after_s)
                del self._asking[ticket]
                yield HandOut(ticket, number)
            elif self._waits_in_vain(asking, now_s):
                stats.refused += 1
                del self._asking[ticket]
                yield Refuse(ticket)

    def _waits_in_vain(self, asking: _Asking, now_s: float) -> bool:
        plan = self._plan(asking.runtime)
        return plan.when_empty is WhenEmpty.REFUSE or (
            plan.when_empty is WhenEmpty.QUEUE and now_s - asking.since_s >= plan.queue_s
        )

    def _drop_unneeded(self) -> Iterator[Action]:
        """End what is too much for its plan, and what waits where leaks have taken the room."""
        for runtime, plan in self._plans.items():
            waiting = list(self._numbers(Phase.WAITING, runtime))
            starting = list(self._numbers(Phase.STARTING, runtime))
            demand = len(self._in_line(runtime)) if plan.when_empty is WhenEmpty.COLD else 0
            needed = demand + max(0, plan.size - len(waiting))
            for surplus in (*waiting[plan.size :], *starting[needed:]):
                yield self._yielded(surplus)
        while self._free() + self.count(Phase.ENDING) < 0 and (number := self._unneeded()) is not None:
            yield self._yielded(number)

    def _start_wanted(self, now_s: float) -> Iterator[Action]:
        """Starts for those who ask. Where there is no room for one, it is made, and he waits for that."""
        coming = self.count(Phase.ENDING)
        wanted: list[tuple[str, int | None]] = [
            (asking.runtime, ticket) for ticket, asking in self._asking.items() if asking.own
        ]
        wanted += [(runtime, None) for runtime in self._plans for _ in range(self._missing(runtime))]
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
                yield Start(self._new(runtime, Phase.STARTING, now_s), runtime)
            else:
                del self._asking[ticket]
                self._stats(runtime).own += 1
                yield MakeOwn(ticket, self._new(runtime, Phase.LENT, now_s))

    def _refill(self, now_s: float) -> Iterator[Action]:
        """Starts ahead of demand, in room that nobody waits for."""
        if any(asking.own for asking in self._asking.values()) or any(map(self._missing, self._plans)):
            return
        ahead = sum(self.count(Phase.STARTING, runtime) - self._demand(runtime) for runtime in self._plans)
        for runtime, plan in self._plans.items():
            if self._pauses[runtime].until_s:
                continue
            there = self.count(Phase.STARTING, runtime) + self.count(Phase.WAITING, runtime)
            short = plan.size - there
            if plan.when_empty is WhenEmpty.COLD:
                short += self._demand(runtime)
            for _ in range(min(short, self._refills_at_once - ahead, self._free())):
                ahead += 1
                yield Start(self._new(runtime, Phase.STARTING, now_s), runtime)

    # --- What follows from what is there ------------------------------------------------------------------

    def _demand(self, runtime: str) -> int:
        """Starts that those in line for a pooled sandbox are entitled to."""
        in_line, plan = len(self._in_line(runtime)), self._plan(runtime)
        return in_line if plan.when_empty is WhenEmpty.COLD else min(in_line, plan.size)

    def _missing(self, runtime: str) -> int:
        return max(0, self._demand(runtime) - self.count(Phase.STARTING, runtime))

    def _free(self) -> int:
        return self._capacity - self._withheld - len(self._sandboxes)

    def _unneeded(self) -> int | None:
        """One that may be ended for somebody's sake: the oldest that waits, else the newest start ahead."""
        for number in self._numbers(Phase.WAITING):
            return number
        for runtime in self._plans:
            starting = list(self._numbers(Phase.STARTING, runtime))
            if len(starting) > self._demand(runtime):
                return starting[-1]
        return None

    def _in_line(self, runtime: str) -> Mapping[int, _Asking]:
        return {
            ticket: asking
            for ticket, asking in self._asking.items()
            if asking.runtime == runtime and not asking.own
        }

    def _numbers(self, phase: Phase, runtime: str | None = None) -> Iterator[int]:
        for number, sandbox in self._sandboxes.items():
            if sandbox.phase is phase and runtime in (None, sandbox.runtime):
                yield number

    def _new(self, runtime: str, phase: Phase, now_s: float) -> int:
        self._last_number += 1
        self._sandboxes[self._last_number] = _Sandbox(runtime, phase, now_s)
        return self._last_number

    def _end(self, number: int) -> End:
        self._sandboxes[number].phase = Phase.ENDING
        return End(number)

    def _yielded(self, number: int) -> End:
        self._stats(self._sandboxes[number].runtime).yielded += 1
        return self._end(number)

    def _plan(self, runtime: str) -> Plan:
        return self._plans.get(runtime, _NO_POOL)

    def _stats(self, runtime: str) -> PoolStats:
        return self.stats.setdefault(runtime, PoolStats())
