"""Two witnesses of a bill: a ledger that looks at itself after every transition, a provider with a log."""

import asyncio
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field

from orchestrator.budget import ZERO, Account, Amounts, Ask, Ledger, Request
from orchestrator.conversation import Reply, StopReason, Told, utf8_bytes
from orchestrator.models.port import Completion, ModelRequest
from orchestrator.pricing import Usage


@dataclass(slots=True)
class WatchedLedger(Ledger):
    """A ledger that checks the rules of all its accounts after every transition, not only at the end."""

    accounts: list[Account] = field(default_factory=list)
    trace: list[tuple[str, tuple[Amounts, ...]]] = field(default_factory=list)
    """Each transition, and what was used and held on each account after it."""

    def open_account(self, scope: str, limit: Amounts, parent: Account | None = None) -> Account:
        account = Ledger.open_account(self, scope, limit, parent)
        self.accounts.append(account)
        return account

    def request(
        self, account: Account, ask: Ask, on_decided: Callable[[Request], None] | None = None
    ) -> Request:
        request = Ledger.request(self, account, ask, on_decided)
        self._look("request")
        return request

    def settle(self, request: Request, *, confirmed: Amounts = ZERO, unconfirmed: Amounts = ZERO) -> None:
        Ledger.settle(self, request, confirmed=confirmed, unconfirmed=unconfirmed)
        self._look("settle")

    def give_up(self, request: Request) -> None:
        Ledger.give_up(self, request)
        self._look("give_up")

    def raise_limit(self, account: Account, limit: Amounts) -> None:
        Ledger.raise_limit(self, account, limit)
        self._look("raise_limit")

    def _decide(self, request: Request, blocked: set[Account]) -> bool:
        # Every grant, those among them that a settlement brings about.
        decided = Ledger._decide(self, request, blocked)
        self._look("decide")
        return decided

    def _look(self, what: str) -> None:
        taken = {account: account.used().plus(account.held()) for account in self.accounts}
        self.trace.append((what, tuple(taken.values())))
        below: defaultdict[Account, Amounts] = defaultdict(Amounts)
        for account, amounts in taken.items():
            held, limit = account.held(), account.limit.plus(account.overdraft)
            assert held == held.above_zero(), f"less than nothing is held on {account.scope}"
            assert all(unit <= most for unit, most in zip(amounts, limit, strict=True)), (
                f"{account.scope}: {amounts} used and held of {limit}"
            )
            if len(account.path) > 1:
                below[account.path[-2]] = below[account.path[-2]].plus(amounts)
        for parent, amounts in below.items():
            assert amounts.minus(taken[parent]).above_zero() == ZERO, "children have more than their parent"


@dataclass
class Provider:
    """A `ModelClient` that counts a token for each four bytes, and writes its log when it is asked.

    So the log has what a provider may bill for calls that nobody waited for, too.
    """

    reply: Callable[[ModelRequest], str | Reply] = lambda _request: "yes"
    delay_s: float = 0.0
    gate: asyncio.Event | None = None
    """Replies wait for it."""
    asked: list[ModelRequest] = field(default_factory=list)
    log: list[Usage] = field(default_factory=list)
    in_flight: int = 0
    in_flight_at_most: int = 0

    async def complete(self, request: ModelRequest) -> Completion:
        reply = self.reply(request)
        if isinstance(reply, str):
            reply = Reply(({"type": "text", "text": reply},), StopReason.END_TURN)
        usage = self.bill(request, reply)
        self.asked.append(request)
        self.log.append(usage)
        self.in_flight += 1
        self.in_flight_at_most = max(self.in_flight_at_most, self.in_flight)
        try:
            await asyncio.sleep(self.delay_s)
            if self.gate is not None:
                await self.gate.wait()
        finally:
            self.in_flight -= 1
        return Completion(reply, usage)

    def bill(self, request: ModelRequest, reply: Reply) -> Usage:
        told = sum(utf8_bytes(str(getattr(entry, "text", ""))) for entry in request.conversation)
        tokens_out = min(request.max_tokens, -(-utf8_bytes(str(reply.content)) // 4))
        return Usage(input=-(-(told + utf8_bytes(request.system)) // 4), output=tokens_out)

    def billed_tokens(self) -> int:
        return sum(usage.total for usage in self.log)

    async def aclose(self) -> None:
        pass


def prompt_of(request: ModelRequest) -> str:
    """The text of a sub-call."""
    (told,) = request.conversation
    assert isinstance(told, Told)
    return told.text
