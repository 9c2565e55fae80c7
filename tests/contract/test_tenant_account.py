"""What every tenant's account must do. A new one joins `account`, and nowhere else."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping

import pytest

from orchestrator.budget import UNLIMITED, Amounts
from orchestrator.errors import InvariantError
from orchestrator.store.books import Quota
from orchestrator.store.database import open_database
from orchestrator.store.sql_usage import SqlUsageBook
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.tenants.port import TenantAccount
from orchestrator.tenants.sql import SqlTenantAccount
from tests.databases import DATABASES
from tests.fakes.tenancy import a_tenant, stored_run

# Calls and child runs have no quota.
ALLOWANCE = Amounts(tokens=100, cost_microusd=1_000, calls=UNLIMITED, child_runs=UNLIMITED)
QUOTA = Quota(max_tokens=100, max_cost_microusd=1_000)
ALL = Amounts(tokens=100, cost_microusd=1_000)


@pytest.fixture(params=["memory", *DATABASES])
async def account(
    request: pytest.FixtureRequest, new_store_url: Callable[[str], str]
) -> AsyncIterator[TenantAccount]:
    """Every TenantAccount we ship."""
    if request.param == "memory":
        yield MemoryTenantAccount(ALLOWANCE)
        return

    async def windows() -> Mapping[str, Quota]:
        return {"day:2026-11-23": QUOTA, "month:2026-11": Quota()}

    async with open_database(new_store_url(request.param)) as database:
        tenant_id = await a_tenant(database)
        tree = await stored_run(database, tenant_id)
        yield SqlTenantAccount(SqlUsageBook(database), tenant_id, tree=tree, windows=windows)


async def test_what_is_wanted_is_granted_while_it_is_there(account: TenantAccount) -> None:
    assert await account.grant(Amounts(60, 100, 1, 0)) == Amounts(60, 100, 1, 0)
    assert await account.grant(Amounts(60, 100, 1, 0)) == Amounts(40, 100, 1, 0)
    assert await account.grant(Amounts(60, 100, 1, 0)) == Amounts(0, 100, 1, 0)


async def test_what_is_given_back_can_be_granted_again(account: TenantAccount) -> None:
    await account.grant(ALL)
    await account.give_back(Amounts(tokens=30))
    assert await account.grant(ALL) == Amounts(tokens=30)


async def test_more_than_was_drawn_is_not_taken_back(account: TenantAccount) -> None:
    await account.grant(Amounts(tokens=30))
    with pytest.raises(InvariantError):
        await account.give_back(Amounts(tokens=31))
    assert await account.grant(ALL) == Amounts(tokens=70, cost_microusd=1_000)


async def test_an_overdraft_is_booked_and_blocks_the_next_grant(account: TenantAccount) -> None:
    await account.grant(Amounts(tokens=90))
    await account.charge(Amounts(tokens=50))
    assert await account.grant(Amounts(tokens=1, calls=1)) == Amounts(calls=1)


async def test_draws_side_by_side_never_exceed_the_allowance(account: TenantAccount) -> None:
    granted = await asyncio.gather(*(account.grant(Amounts(tokens=7)) for _ in range(64)))
    assert sum(amounts.tokens for amounts in granted) == 100
