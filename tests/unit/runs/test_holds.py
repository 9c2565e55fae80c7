import asyncio

import pytest

from orchestrator.budget import ZERO, Account, Amounts, Ask, Ledger, Request, Standing
from orchestrator.errors import BudgetExceededError, DeadlineExceededError
from orchestrator.runs.holds import take_hold

LONG_S = 30.0


def tokens(amount: int) -> Ask:
    return Ask(fixed=Amounts(tokens=amount))


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
def account(ledger: Ledger) -> Account:
    return ledger.open_account("run", Amounts(tokens=100))


async def waiting(ledger: Ledger, account: Account, *, timeout_s: float = LONG_S) -> "asyncio.Task[Request]":
    """Somebody who waits for more than is free now."""
    task = asyncio.create_task(take_hold(ledger, account, tokens(60), timeout_s=timeout_s))
    await asyncio.sleep(0)
    assert len(ledger.waiting) == 1
    return task


async def test_a_hold_that_fits_is_there_at_once_even_when_no_time_is_left(
    ledger: Ledger, account: Account
) -> None:
    hold = await take_hold(ledger, account, tokens(60), timeout_s=0)
    assert hold.standing is Standing.GRANTED
    assert account.held() == Amounts(tokens=60)


async def test_what_can_never_be_granted_is_refused_at_once(ledger: Ledger, account: Account) -> None:
    with pytest.raises(BudgetExceededError):
        await take_hold(ledger, account, tokens(101), timeout_s=LONG_S)


async def test_a_hold_that_comes_back_is_given_to_whoever_waits(ledger: Ledger, account: Account) -> None:
    hold = await take_hold(ledger, account, tokens(60), timeout_s=LONG_S)
    task = await waiting(ledger, account)
    ledger.settle(hold)
    assert (await task).standing is Standing.GRANTED
    assert account.held() == Amounts(tokens=60)


async def test_a_wait_that_became_hopeless_is_refused(ledger: Ledger, account: Account) -> None:
    hold = await take_hold(ledger, account, tokens(60), timeout_s=LONG_S)
    task = await waiting(ledger, account)
    ledger.settle(hold, confirmed=Amounts(tokens=60))
    with pytest.raises(BudgetExceededError):
        await task


async def test_a_wait_past_the_deadline_leaves_the_queue(ledger: Ledger, account: Account) -> None:
    await take_hold(ledger, account, tokens(60), timeout_s=LONG_S)
    with pytest.raises(DeadlineExceededError):
        await take_hold(ledger, account, tokens(60), timeout_s=0.01)
    assert not ledger.waiting
    assert account.held() == Amounts(tokens=60)


async def test_no_time_left_means_no_wait(ledger: Ledger, account: Account) -> None:
    await take_hold(ledger, account, tokens(60), timeout_s=LONG_S)
    with pytest.raises(DeadlineExceededError):
        await take_hold(ledger, account, tokens(60), timeout_s=-1)
    assert not ledger.waiting


async def test_a_cancelled_wait_leaves_the_queue_and_lets_those_behind_go_on(
    ledger: Ledger, account: Account
) -> None:
    await take_hold(ledger, account, tokens(60), timeout_s=LONG_S)
    task = await waiting(ledger, account)
    behind = asyncio.create_task(take_hold(ledger, account, tokens(40), timeout_s=LONG_S))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await behind).standing is Standing.GRANTED


@pytest.mark.parametrize("cancelled_first", [True, False])
async def test_a_cancellation_at_the_moment_of_the_grant_leaks_nothing(
    ledger: Ledger, account: Account, cancelled_first: bool
) -> None:
    hold = await take_hold(ledger, account, tokens(60), timeout_s=LONG_S)
    task = await waiting(ledger, account)
    if cancelled_first:
        task.cancel()
        ledger.settle(hold)
    else:
        ledger.settle(hold)
        task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (account.held(), account.used()) == (ZERO, ZERO)
    assert not ledger.waiting


@pytest.mark.parametrize("granted_after_s", [0.045, 0.055])
async def test_a_time_out_at_the_moment_of_the_grant_leaks_nothing(
    ledger: Ledger, account: Account, granted_after_s: float
) -> None:
    loop = asyncio.get_running_loop()
    hold = await take_hold(ledger, account, tokens(60), timeout_s=LONG_S)
    task = await waiting(ledger, account, timeout_s=0.05)
    loop.call_later(granted_after_s, ledger.settle, hold)
    # Blocks the loop past both, so that they come in the same turn of it, one right after the other.
    until_s = loop.time() + 0.07
    while loop.time() < until_s:
        pass
    with pytest.raises(DeadlineExceededError):
        await task
    assert account.held() == ZERO


async def test_a_cancellation_at_the_moment_of_a_refusal_leaks_nothing(
    ledger: Ledger, account: Account
) -> None:
    hold = await take_hold(ledger, account, tokens(60), timeout_s=LONG_S)
    task = await waiting(ledger, account)
    ledger.settle(hold, confirmed=Amounts(tokens=60))
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert account.held() == ZERO
