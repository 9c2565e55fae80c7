"""What every tenant's account must do. A new one joins `ACCOUNTS`, and nowhere else."""

import asyncio
from collections.abc import Callable

import pytest

from orchestrator.budget import Amounts
from orchestrator.tenants.memory import MemoryTenantAccount
from orchestrator.tenants.port import TenantAccount

ALLOWANCE = Amounts(tokens=100, cost_microusd=1_000, calls=10, child_runs=2)
ACCOUNTS = [pytest.param(lambda: MemoryTenantAccount(ALLOWANCE), id="memory")]


@pytest.fixture(params=ACCOUNTS)
def account(request: pytest.FixtureRequest) -> TenantAccount:
    make: Callable[[], TenantAccount] = request.param
    return make()


async def test_what_is_wanted_is_granted_while_it_is_there(account: TenantAccount) -> None:
    assert await account.grant(Amounts(60, 100, 1, 0)) == Amounts(60, 100, 1, 0)
    assert await account.grant(Amounts(60, 100, 1, 0)) == Amounts(40, 100, 1, 0)
    assert await account.grant(Amounts(60, 100, 1, 0)) == Amounts(0, 100, 1, 0)


async def test_what_is_given_back_can_be_granted_again(account: TenantAccount) -> None:
    await account.grant(ALLOWANCE)
    await account.give_back(Amounts(tokens=30))
    assert await account.grant(ALLOWANCE) == Amounts(tokens=30)


async def test_an_overdraft_is_booked_and_blocks_the_next_grant(account: TenantAccount) -> None:
    await account.grant(Amounts(tokens=90))
    await account.charge(Amounts(tokens=50))
    assert await account.grant(Amounts(tokens=1, calls=1)) == Amounts(calls=1)


async def test_draws_side_by_side_never_exceed_the_allowance(account: TenantAccount) -> None:
    granted = await asyncio.gather(*(account.grant(Amounts(tokens=7)) for _ in range(64)))
    assert sum(amounts.tokens for amounts in granted) == 100
