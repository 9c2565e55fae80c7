"""Budgets of one run tree: accounts, holds, and who may go next.

Rules. They live in this file and nowhere else:

1. Nothing is spent without a hold, and a hold is taken on an account and all its ancestors, or on none.
2. On every account, at every instant: used + held <= limit. Used is what was *confirmed* by a provider plus
   what is *unconfirmed*: the whole hold of an attempt whose bill nobody knows.
3. A provider may bill more than was held. The tokens are gone, so they count as used; the excess is recorded
   apart as *overdraft*, and rule 2 reads used + held <= limit + overdraft. The next hold sees it.
4. A hold is settled exactly once.
5. Too little left even if every open hold came back: refused, and the outermost such account is named.
   Too little only because of holds: the request waits, holding nothing. Requests that are short on the same
   account are served first in, first out; one that is short elsewhere does not stand in their way. A unit
   that a request wants nothing of never stands in its way, overdrawn or not.
6. An explicit `max_tokens` is never changed. A default shrinks to what is left with no hold open, to no less
   than a stated least; then it waits for that much.
7. A part of an account and of all its ancestors can be *kept*: it counts as used for everybody but the
   root's last answer.
8. A limit can be lowered by a child and never raised by one: a child's limit only adds an account below its
   parent's.

Plain synchronous code: no await, no I/O, no clock. One event-loop thread calls it, hence no lock.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import NamedTuple

from orchestrator.errors import BudgetExceededError, InvariantError

UNLIMITED = 1 << 62
"""A limit nobody reaches; keeps the arithmetic free of None."""


class Amounts(NamedTuple):
    """What a limit can be put on. Whole, non-negative units."""

    tokens: int = 0
    cost_microusd: int = 0
    calls: int = 0
    child_runs: int = 0

    def plus(self, other: "Amounts") -> "Amounts":
        """The sum, unit by unit."""
        tokens, cost, calls, runs = self
        more_tokens, more_cost, more_calls, more_runs = other
        return Amounts(tokens + more_tokens, cost + more_cost, calls + more_calls, runs + more_runs)

    def minus(self, other: "Amounts") -> "Amounts":
        """The difference, unit by unit; may be negative."""
        tokens, cost, calls, runs = self
        less_tokens, less_cost, less_calls, less_runs = other
        return Amounts(tokens - less_tokens, cost - less_cost, calls - less_calls, runs - less_runs)

    def above_zero(self) -> "Amounts":
        """Negative units as zero."""
        return Amounts(*(max(0, amount) for amount in self))

    def fits(self, room: "Amounts") -> bool:
        """Whether every unit is at most that of `room`. Nothing always fits, even into less than nothing."""
        tokens, cost, calls, runs = self
        tokens_room, cost_room, calls_room, runs_room = room
        return (
            (tokens <= tokens_room or not tokens)
            and (cost <= cost_room or not cost)
            and (calls <= calls_room or not calls)
            and (runs <= runs_room or not runs)
        )


ZERO = Amounts()


class Account:
    """One limit and what was used of it. Made by `Ledger`; read by anybody, written by the ledger alone."""

    __slots__ = ("confirmed", "free", "kept", "limit", "overdraft", "path", "scope", "unconfirmed")

    def __init__(self, scope: str, limit: Amounts, parent: "Account | None") -> None:
        self.scope = scope
        self.limit = limit
        self.path: tuple[Account, ...] = (*parent.path, self) if parent else (self,)
        """From the outermost account to this one."""
        self.free = limit
        """Neither used nor held; negative after an overdraft. What is kept is part of it."""
        self.confirmed = ZERO
        self.unconfirmed = ZERO
        self.kept = ZERO
        self.overdraft = ZERO

    def used(self) -> Amounts:
        """Confirmed and unconfirmed."""
        return self.confirmed.plus(self.unconfirmed)

    def held(self) -> Amounts:
        """By all open holds together."""
        return self.left_without_holds().minus(self.free)

    def left_without_holds(self) -> Amounts:
        """What there would be if every open hold came back whole; what is kept is part of it."""
        return self.limit.minus(self.confirmed).minus(self.unconfirmed)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ask:
    """What a model call would have to hold: a fixed part, and output that may be negotiable (rule 6)."""

    fixed: Amounts
    """The input's upper bound, its price, and the call itself."""
    output_tokens: int = 0
    least_output_tokens: int = 0
    """Equal to `output_tokens` when the caller asked for exactly that."""
    output_microusd_per_mtok: int = 0
    keep: Amounts | None = None
    """What the account and its ancestors keep for the last answer once this is granted; None leaves it as it
    is. It must fit beside the hold, else the call could eat what it is meant to leave."""
    last_answer: bool = False
    """May use what is kept."""

    def at(self, output_tokens: int) -> Amounts:
        """The hold with so much output."""
        tokens, cost_microusd, calls, child_runs = self.fixed
        cost_microusd -= -output_tokens * self.output_microusd_per_mtok // 1_000_000
        return Amounts(tokens + output_tokens, cost_microusd, calls, child_runs)

    def most_output(self, room: Amounts) -> int:
        """The most output, up to what was asked, whose hold fits into `room`; negative when none does."""
        if not self.fixed.fits(room):
            return -1
        spare = room.minus(self.fixed).above_zero()
        most = min(self.output_tokens, spare.tokens)
        if self.output_microusd_per_mtok:
            most = min(most, spare.cost_microusd * 1_000_000 // self.output_microusd_per_mtok)
        return most


class Standing(Enum):
    """Where a request for a hold stands."""

    WAITING = "waiting"
    GRANTED = "granted"
    REFUSED = "refused"
    WITHDRAWN = "withdrawn"


@dataclass(slots=True, eq=False)
class Request:
    """One request for a hold, and the hold once it is granted."""

    account: Account
    ask: Ask
    on_decided: "Callable[[Request], None] | None" = None
    """Called once, when a request that had to wait is granted or refused."""
    standing: Standing = Standing.WAITING
    amounts: Amounts = ZERO
    """What it holds; before the grant, what it waits for."""
    output_tokens: int = 0
    """The output that `amounts` pays for."""
    refusal: BudgetExceededError | None = None
    settled: bool = False


@dataclass(slots=True)
class Ledger:
    """All accounts of one run tree and the requests that wait for holds."""

    waiting: list[Request] = field(default_factory=list)

    def open_account(self, scope: str, limit: Amounts, parent: Account | None = None) -> Account:
        """An account below `parent`. Its limit can only add to the parent's, never lift it."""
        return Account(scope, limit, parent)

    def carry_over(self, accounts: Sequence[Account], *, confirmed: Amounts, unconfirmed: Amounts) -> None:
        """Book what was used of accounts before this ledger began, by a process that is gone.

        Args:
            accounts: Of which nothing is held yet.
            confirmed: See `settle`.
            unconfirmed: Likewise.
        """
        used = confirmed.plus(unconfirmed)
        for account in accounts:
            account.free = account.free.minus(used)
            account.confirmed = account.confirmed.plus(confirmed)
            account.unconfirmed = account.unconfirmed.plus(unconfirmed)
            account.overdraft = account.overdraft.plus(ZERO.minus(account.free).above_zero())

    def request(
        self, account: Account, ask: Ask, on_decided: Callable[[Request], None] | None = None
    ) -> Request:
        """Ask for a hold. The request comes back granted, refused, or waiting."""
        request = Request(account, ask, on_decided)
        blocked: set[Account] = set()
        for waiter in self.waiting:
            blocked.update(_short_of_room(waiter))
        if not self._decide(request, blocked):
            self.waiting.append(request)
        elif ask.keep is not None:
            # What is kept now may be what somebody was waiting for.
            self._serve_waiting()
        return request

    def give_up(self, request: Request) -> None:
        """Stop waiting, or give back unused what was granted at the last moment. Those behind may go on."""
        if request.standing is Standing.GRANTED:
            self.settle(request)
        elif request.standing is Standing.WAITING:
            request.standing = Standing.WITHDRAWN
            self.waiting.remove(request)
            self._serve_waiting()

    def settle(self, request: Request, *, confirmed: Amounts = ZERO, unconfirmed: Amounts = ZERO) -> None:
        """Turn a hold into what was billed. The rest comes back, and those who waited for it are decided.

        Args:
            request: A granted request, settled by nobody yet.
            confirmed: What the provider said it billed; may exceed the hold (rule 3).
            unconfirmed: What it may have billed; never more than the hold.

        Raises:
            InvariantError: The request holds nothing, was settled before, or `unconfirmed` exceeds the hold.
        """
        if request.standing is not Standing.GRANTED or request.settled:
            raise InvariantError("a hold is settled exactly once")
        if not unconfirmed.fits(request.amounts):
            raise InvariantError("an unconfirmed bill is at most its hold")
        request.settled = True
        billed = confirmed.plus(unconfirmed)
        back = request.amounts.minus(billed)
        over = ZERO if billed.fits(request.amounts) else billed.minus(request.amounts).above_zero()
        for account in request.account.path:
            account.free = account.free.plus(back)
            account.confirmed = account.confirmed.plus(confirmed)
            # Both are rare, and this is the ledger's innermost loop.
            if unconfirmed != ZERO:
                account.unconfirmed = account.unconfirmed.plus(unconfirmed)
            if over != ZERO:
                account.overdraft = account.overdraft.plus(over)
        self._serve_waiting()

    def raise_limit(self, account: Account, limit: Amounts) -> None:
        """Give an account a higher limit: a tenant's port granted more. Those who waited are decided."""
        if not account.limit.fits(limit):
            raise InvariantError("a limit is only ever raised")
        account.free = account.free.plus(limit.minus(account.limit))
        account.limit = limit
        self._serve_waiting()

    def _decide(self, request: Request, blocked: set[Account]) -> bool:
        """Grant or refuse the request, or leave it waiting; whether it was decided."""
        ask, path = request.ask, request.account.path
        is_blocked = not blocked.isdisjoint(path)
        request.output_tokens, request.amounts = ask.output_tokens, ask.at(ask.output_tokens)
        if is_blocked or _short_of_room(request):
            output = ask.output_tokens
            for account in path:
                most = most_output(account, ask)
                if isinstance(most, BudgetExceededError):
                    request.standing = Standing.REFUSED
                    request.amounts = ask.at(ask.least_output_tokens)
                    request.refusal = most
                    return True
                output = min(output, most)
            request.output_tokens, request.amounts = output, ask.at(output)
            if is_blocked or _short_of_room(request):
                return False
        for account in path:
            account.free = account.free.minus(request.amounts)
            if ask.keep is not None:
                account.kept = ask.keep
        request.standing = Standing.GRANTED
        return True

    def _serve_waiting(self) -> None:
        """Decide, in order, all who can now be decided."""
        if not self.waiting:
            return
        blocked: set[Account] = set()
        decided: list[Request] = []
        still_waiting: list[Request] = []
        for request in self.waiting:
            if self._decide(request, blocked):
                decided.append(request)
            else:
                still_waiting.append(request)
                blocked.update(_short_of_room(request))
        self.waiting = still_waiting
        for request in decided:
            if request.on_decided is not None:
                request.on_decided(request)
        if any(request.ask.keep is not None for request in decided):
            # What is kept now may be what somebody further ahead was waiting for.
            self._serve_waiting()


def most_output(account: Account, ask: Ask) -> int | BudgetExceededError:
    """The output for which this account could pay if every hold came back, or why it can't pay at all."""
    room = account.left_without_holds().minus(_kept_from(ask, account))
    most = ask.most_output(room)
    if most >= ask.least_output_tokens:
        return most
    least = ask.at(ask.least_output_tokens)
    return BudgetExceededError(account.scope, least._asdict(), room.above_zero()._asdict())


def _kept_from(ask: Ask, account: Account) -> Amounts:
    """What the request must leave on the account for the last answer (rule 7)."""
    if ask.last_answer:
        return ZERO
    return account.kept if ask.keep is None else ask.keep


def _short_of_room(request: Request) -> list[Account]:
    """The accounts on the path where open holds stand in the way of the request."""
    short = []
    for account in request.account.path:
        kept = _kept_from(request.ask, account)
        room = account.free if kept == ZERO else account.free.minus(kept)
        if not request.amounts.fits(room):
            short.append(account)
    return short
