"""A tenant's allowance that lasts as long as the process."""

from orchestrator.budget import Amounts
from orchestrator.errors import InvariantError


class MemoryTenantAccount:
    """`TenantAccount` in memory. No lock: nothing is awaited between the look and the draw."""

    def __init__(self, allowance: Amounts) -> None:
        self._allowance = allowance
        self.drawn = Amounts()

    async def grant(self, wanted: Amounts) -> Amounts:
        """See `TenantAccount.grant`."""
        left = self._allowance.minus(self.drawn)
        granted = Amounts(*(max(0, min(pair)) for pair in zip(wanted, left, strict=True)))
        self.drawn = self.drawn.plus(granted)
        return granted

    async def charge(self, overdraft: Amounts) -> None:
        """See `TenantAccount.charge`."""
        self.drawn = self.drawn.plus(overdraft)

    async def give_back(self, unused: Amounts) -> None:
        """See `TenantAccount.give_back`."""
        if not unused.fits(self.drawn):
            raise InvariantError("more was given back than was drawn")
        self.drawn = self.drawn.minus(unused)
