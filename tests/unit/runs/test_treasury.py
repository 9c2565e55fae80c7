import asyncio

import pytest

from orchestrator.budget import UNLIMITED, Amounts, Ask
from orchestrator.errors import BudgetExceededError
from orchestrator.runs.treasury import Treasury
from orchestrator.tenants.memory import MemoryTenantAccount

ROOMY = Amounts(UNLIMITED, UNLIMITED, UNLIMITED, UNLIMITED)
STEP = Amounts(tokens=100, cost_microusd=100, calls=10, child_runs=1)


def tokens(amount: int, **options: object) -> Ask:
    return Ask(fixed=Amounts(tokens=amount, calls=1), **options)  # type: ignore[arg-type]


async def spend(treasury: Treasury, amount: int) -> None:
    hold = await treasury.hold(treasury.account, tokens(amount), timeout_s=5)
    await asyncio.sleep(0)
    treasury.ledger.settle(hold, confirmed=hold.amounts)


async def test_a_tree_draws_a_step_and_gives_back_what_it_did_not_use() -> None:
    tenant = MemoryTenantAccount(Amounts(1_000, 0, 100, 0))
    treasury = Treasury(tenant, ROOMY, step=STEP)
    await spend(treasury, 30)
    await spend(treasury, 30)
    assert tenant.drawn == Amounts(tokens=100, calls=10)
    await treasury.close()
    assert tenant.drawn == Amounts(tokens=60, calls=2)


async def test_more_than_a_step_is_drawn_when_one_call_needs_it() -> None:
    tenant = MemoryTenantAccount(Amounts(1_000, 0, 100, 0))
    treasury = Treasury(tenant, ROOMY, step=STEP)
    await spend(treasury, 700)
    assert tenant.drawn.tokens == 700


async def test_two_trees_of_one_tenant_cannot_overspend_together() -> None:
    tenant = MemoryTenantAccount(Amounts(1_000, 0, 1_000, 0))
    trees = [Treasury(tenant, ROOMY, step=STEP) for _ in range(2)]
    outcomes = await asyncio.gather(
        *(spend(trees[number % 2], 90) for number in range(64)), return_exceptions=True
    )
    spent = sum(tree.account.used().tokens for tree in trees)
    refusals = [outcome for outcome in outcomes if isinstance(outcome, BudgetExceededError)]
    assert spent <= 1_000
    assert spent + 90 * len(refusals) == 64 * 90
    assert {refusal.account for refusal in refusals} == {"tenant"}


async def test_the_tenant_is_named_when_its_allowance_is_what_is_short() -> None:
    treasury = Treasury(MemoryTenantAccount(Amounts(50, 0, 100, 0)), ROOMY, step=STEP)
    with pytest.raises(BudgetExceededError) as refused:
        await treasury.hold(treasury.account, tokens(60), timeout_s=5)
    assert refused.value.account == "tenant"
    assert (refused.value.wanted["tokens"], refused.value.left["tokens"]) == (60, 50)


async def test_what_is_kept_for_the_last_answer_is_kept_from_the_tenants_money_too() -> None:
    treasury = Treasury(MemoryTenantAccount(Amounts(100, 0, 100, 0)), ROOMY, step=STEP)
    turn = await treasury.hold(treasury.account, tokens(10, keep=Amounts(tokens=40, calls=1)), timeout_s=5)
    treasury.ledger.settle(turn, confirmed=turn.amounts)
    with pytest.raises(BudgetExceededError):
        await treasury.hold(treasury.account, tokens(60), timeout_s=5)
    last = await treasury.hold(treasury.account, tokens(40, last_answer=True), timeout_s=5)
    assert last.amounts.tokens == 40


async def test_what_a_provider_bills_past_everything_drawn_is_charged_to_the_tenant() -> None:
    tenant = MemoryTenantAccount(Amounts(1_000, 0, 100, 0))
    treasury = Treasury(tenant, ROOMY, step=STEP)
    hold = await treasury.hold(treasury.account, tokens(50), timeout_s=5)
    treasury.ledger.settle(hold, confirmed=Amounts(tokens=250, calls=1))
    await treasury.close()
    assert tenant.drawn.tokens == 250


async def test_a_thousand_holds_side_by_side_draw_only_what_they_need() -> None:
    tenant = MemoryTenantAccount(Amounts(10_000, 0, 10_000, 0))
    treasury = Treasury(tenant, ROOMY, step=STEP)
    await asyncio.gather(*(spend(treasury, 5) for _ in range(1_000)))
    assert treasury.account.used() == Amounts(tokens=5_000, calls=1_000)
    await treasury.close()
    assert tenant.drawn == Amounts(tokens=5_000, calls=1_000)


async def test_a_hold_that_waits_for_the_trees_own_holds_is_not_refused_for_lack_of_the_tenants_money() -> (
    None
):
    """Nor shrunk: what others use up meanwhile is drawn for it too. Here the tree is short of money, and the
    tenant of tokens unless it is asked for more."""
    tree_limit = Amounts(tokens=1_200, cost_microusd=10)
    step = Amounts(tokens=1_000, cost_microusd=10)
    treasury = Treasury(MemoryTenantAccount(Amounts(10_000, 10_000)), tree_limit, step=step)
    flexible = Ask(fixed=Amounts(tokens=100, cost_microusd=3), output_tokens=200, least_output_tokens=10)
    outputs: list[int] = []

    async def spend_flexibly() -> None:
        hold = await treasury.hold(treasury.account, flexible, timeout_s=5)
        outputs.append(hold.output_tokens)
        await asyncio.sleep(0)
        treasury.ledger.settle(hold, confirmed=hold.amounts)

    first = await treasury.hold(
        treasury.account, Ask(fixed=Amounts(tokens=300, cost_microusd=10)), timeout_s=1
    )
    waiting = [asyncio.create_task(spend_flexibly()) for _ in range(3)]
    await asyncio.sleep(0)
    treasury.ledger.settle(first, confirmed=Amounts(tokens=300, cost_microusd=1))
    await asyncio.gather(*waiting)
    assert outputs == [200] * 3
    with pytest.raises(BudgetExceededError, match="of the run tree"):
        await treasury.hold(treasury.account, Ask(fixed=Amounts(tokens=300)), timeout_s=1)
