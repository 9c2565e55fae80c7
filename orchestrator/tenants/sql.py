"""A tenant's allowance that is kept in the database, for as many servers as there are."""

from collections.abc import Awaitable, Callable, Mapping

from orchestrator.budget import Amounts
from orchestrator.ids import RunId, TenantId
from orchestrator.store.books import Quota, UsageBook

WindowsNow = Callable[[], Awaitable[Mapping[str, Quota]]]
"""The windows that now falls into, with the tenant's quotas as they are now. Asked at every draw: a quota
that an operator lowers binds the runs that are under way."""


class SqlTenantAccount:
    """`TenantAccount` of one run tree over a `UsageBook`.

    What is drawn counts in the windows of the moment of drawing, and what is given back goes back there: a
    run that passes midnight takes nothing from tomorrow that it drew today.
    """

    def __init__(self, usage: UsageBook, tenant_id: TenantId, *, tree: RunId, windows: WindowsNow) -> None:
        self._usage = usage
        self._tenant_id = tenant_id
        self._tree = tree
        self._windows = windows

    async def grant(self, wanted: Amounts) -> Amounts:
        """See `TenantAccount.grant`. Calls and child runs have no quota."""
        return await self._usage.grant(self._tenant_id, await self._windows(), wanted, tree=self._tree)

    async def charge(self, overdraft: Amounts) -> None:
        """See `TenantAccount.charge`."""
        await self._usage.charge(self._tenant_id, list(await self._windows()), overdraft, tree=self._tree)

    async def give_back(self, unused: Amounts) -> None:
        """See `TenantAccount.give_back`."""
        await self._usage.give_back(self._tenant_id, unused, tree=self._tree)
