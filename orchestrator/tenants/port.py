"""The allowance of a tenant, from which its run trees draw."""

from typing import Protocol

from orchestrator.budget import Amounts


class TenantAccount(Protocol):
    """One tenant's allowance, shared by all its run trees, wherever they run.

    A run tree draws in steps and keeps its own books of what it drew, so that a model call needs no round
    trip to a database. What a tree holds back is bounded by one step and what its calls
    wait for.

    One contract suite (`tests/contract/test_tenant_account.py`) runs over every implementation.
    """

    async def grant(self, wanted: Amounts) -> Amounts:
        """Draw up to `wanted`; what was drawn, which may be nothing, never more than is left.

        Units are independent: plenty of tokens may come with few dollars.
        """
        ...

    async def charge(self, overdraft: Amounts) -> None:
        """Book what a provider billed past everything drawn. Never refused: the money is gone."""
        ...

    async def give_back(self, unused: Amounts) -> None:
        """Return what was drawn and not used. What is never given back counts as used."""
        ...
