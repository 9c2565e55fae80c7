"""A run tree's money: its own ledger, and its line to the tenant's allowance.

The tree draws from the tenant in steps and books what it drew as the limit of an account above its own. So
the ledger's rules cover run, run tree and tenant alike, and a hold needs a round trip to the tenant's account
only when a step is used up. Two trees of one tenant can't overspend together: what one drew, the other can't.
"""

import asyncio
from collections.abc import Callable

from orchestrator.budget import ZERO, Account, Amounts, Ask, Ledger, Request, most_output
from orchestrator.errors import BudgetExceededError
from orchestrator.runs.holds import take_hold
from orchestrator.tenants.port import TenantAccount

TENANT_SCOPE = "tenant"
TREE_SCOPE = "run tree"

STEP = Amounts(tokens=1_000_000, cost_microusd=1_000_000, calls=100, child_runs=10)
"""Drawn at once, unless more is needed: what one tree can keep from the tenant's others without using it."""


class Treasury:
    """Made for one run tree; `close` gives back what it did not use."""

    def __init__(
        self,
        tenant: TenantAccount,
        tree_limit: Amounts,
        *,
        step: Amounts = STEP,
        used: tuple[Amounts, Amounts] = (ZERO, ZERO),
    ) -> None:
        """Open the tree's books.

        Args:
            tenant: Its tenant's allowance.
            tree_limit: Of the tree.
            step: Drawn at once.
            used: What the tree has used before, confirmed and unconfirmed, if it is resumed. It counts as
                drawn from the tenant by the process that used it.
        """
        confirmed, unconfirmed = used
        self.ledger = Ledger()
        self._tenant_account = self.ledger.open_account(TENANT_SCOPE, confirmed.plus(unconfirmed))
        self.account = self.ledger.open_account(TREE_SCOPE, tree_limit, self._tenant_account)
        """The run tree's; the root run pays from it directly."""
        self.ledger.carry_over(self.account.path, confirmed=confirmed, unconfirmed=unconfirmed)
        self._tenant = tenant
        self._step = step
        self._drawing = asyncio.Lock()

    async def hold(
        self,
        account: Account,
        ask: Ask,
        *,
        timeout_s: float,
        while_waiting: Callable[[], None] = lambda: None,
    ) -> Request:
        """A granted hold, which the caller must settle with the ledger.

        Args:
            account: Pays, with all its ancestors.
            ask: What is to be held.
            timeout_s: The longest wait for open holds.
            while_waiting: Called when there has to be one.

        Raises:
            BudgetExceededError: It can't ever be granted.
            DeadlineExceededError: Open holds stood in its way until the time was over.
        """
        await self._cover(ask)
        return await take_hold(self.ledger, account, ask, timeout_s=timeout_s, while_waiting=while_waiting)

    def refusal(self, account: Account, ask: Ask) -> BudgetExceededError | None:
        """Why the tree itself can't ever grant this hold, or None. Nothing is held, and nothing drawn.

        The tenant is not asked: it may have more than was drawn.
        """
        for one in account.path:
            if one is not self._tenant_account:
                most = most_output(one, ask)
                if isinstance(most, BudgetExceededError):
                    return most
        return None

    async def close(self) -> None:
        """Give back what was drawn and not used. No hold may be open any more."""
        left = self._tenant_account.left_without_holds()
        await self._tenant.give_back(left.above_zero())
        past_what_was_drawn = ZERO.minus(left).above_zero()
        if past_what_was_drawn != ZERO:
            await self._tenant.charge(past_what_was_drawn)

    async def _cover(self, ask: Ask) -> None:
        """Draw what the tenant's account lacks for this hold. Whether it is enough, the ledger decides."""
        if self._missing(ask) == ZERO:
            return
        # One draw at a time, else ten holds of one breath would draw ten steps.
        async with self._drawing:
            missing = self._missing(ask)
            if missing == ZERO:
                return
            wanted = Amounts(*(max(pair) if pair[0] else 0 for pair in zip(missing, self._step, strict=True)))
            drawn = await self._tenant.grant(wanted)
            self.ledger.raise_limit(self._tenant_account, self._tenant_account.limit.plus(drawn))

    def _missing(self, ask: Ask) -> Amounts:
        wanted = ask.at(ask.output_tokens)
        kept = ZERO if ask.last_answer else ask.keep or self._tenant_account.kept
        wanted = wanted.plus(kept).plus(self._wanted_by_those_who_wait())
        return wanted.minus(self._tenant_account.free).above_zero()

    def _wanted_by_those_who_wait(self) -> Amounts:
        """What waits for the tree's own holds must not find, when they come back, the tenant's money gone.

        Nobody draws for a request while it waits. All of them together can't use more than the tree has left;
        one more is drawn for, so that it is the tree that refuses what is too much for both.
        """
        waiting = [request.ask.at(request.ask.output_tokens) for request in self.ledger.waiting]
        if not waiting:
            return ZERO
        room = self.account.left_without_holds().above_zero()
        return Amounts(
            *(
                min(sum(unit), left + max(unit))
                for unit, left in zip(zip(*waiting, strict=True), room, strict=True)
            )
        )
