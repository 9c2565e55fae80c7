"""Waiting for the ledger: the asynchronous side of `budget`."""

import asyncio
from collections.abc import Callable

from orchestrator.budget import Account, Ask, Ledger, Request, Standing
from orchestrator.errors import DeadlineExceededError, InvariantError


async def take_hold(
    ledger: Ledger,
    account: Account,
    ask: Ask,
    *,
    timeout_s: float,
    while_waiting: Callable[[], None] = lambda: None,
) -> Request:
    """A granted hold, which the caller must settle. `while_waiting` is called when it has to be waited for.

    Raises:
        BudgetExceededError: It can't ever be granted.
        DeadlineExceededError: Open holds stood in its way until the time was over.
    """
    decided: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def wake(_request: Request) -> None:
        if not decided.done():
            decided.set_result(None)

    request = ledger.request(account, ask, wake)
    if request.standing is Standing.WAITING:
        try:
            while_waiting()
            async with asyncio.timeout(timeout_s):
                await decided
        except BaseException as error:
            ledger.give_up(request)
            if isinstance(error, TimeoutError):
                raise DeadlineExceededError("the run's deadline passed while waiting for budget") from error
            raise
    if request.refusal is not None:
        raise request.refusal
    if request.standing is not Standing.GRANTED:
        raise InvariantError(f"a decided request is {request.standing.value}")
    return request
