"""When to try a model call again.

1. Only what the failure calls retryable; nothing else, and a cancellation never.
2. Wait as long as the provider asks, plus up to the jitter below, so that a thousand waiting calls don't
   come back at the same moment. Otherwise up to 0.5 s, 1 s, 2 s, ... 20 s, a random part of it ("full
   jitter").
3. Never past the deadline: a wait that would end there is not begun, the failure is raised at once; an
   attempt that is still under way there is cancelled.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception

from orchestrator.errors import DeadlineExceededError, ModelError

T = TypeVar("T")
OnRetry = Callable[[int, ModelError, float], None]
"""Told the number of the failed attempt, its failure, and the seconds until the next."""

BASE_S = 0.5
CAP_S = 20.0


async def with_retries(
    attempt: Callable[[int], Awaitable[T]],
    *,
    deadline: Callable[[], float],
    attempts: int,
    on_retry: OnRetry | None = None,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    jitter: Callable[[float, float], float] = random.uniform,
) -> T:
    """The result of the first attempt that succeeds.

    Each attempt is a call of its own, because each has its own hold on the budget.

    Args:
        attempt: Given the number of the attempt, from 1.
        deadline: Seconds left.
        attempts: The most, the first included.
        on_retry: Called before each wait.
        sleep: For tests.
        jitter: For tests.

    Raises:
        ModelError: The last attempt's failure.
        DeadlineExceededError: The deadline passed before or during an attempt.
    """

    def wait_s(state: RetryCallState) -> float:
        spread_s = jitter(0.0, min(CAP_S, BASE_S * 2 ** (state.attempt_number - 1)))
        asked_s = _failure(state).retry_after_s
        if asked_s is None:
            return spread_s
        # The jitter alone must not turn a wait that fits into one that doesn't.
        return asked_s + min(spread_s, max(0.0, deadline() - asked_s) / 2)

    def is_over(state: RetryCallState) -> bool:
        # tenacity decides on the wait before it asks whether to stop.
        return state.attempt_number >= attempts or state.upcoming_sleep >= deadline()

    def tell(state: RetryCallState) -> None:
        if on_retry is not None:
            on_retry(state.attempt_number, _failure(state), state.upcoming_sleep)

    # Almost every call needs one attempt, and to set up retries costs a twentieth of a sub-call.
    try:
        return await _until(deadline(), attempt, 1)
    except ModelError as failure:
        if not failure.retryable:
            raise
        # Taken out when it is raised again: its traceback has this frame, and the two would keep each other.
        first = [failure]
    async for manager in AsyncRetrying(
        retry=retry_if_exception(_is_retryable),
        wait=wait_s,
        stop=is_over,
        before_sleep=tell,
        sleep=sleep,
        reraise=True,
    ):
        with manager:
            number = manager.retry_state.attempt_number
            if number == 1:
                raise first.pop()
            return await _until(deadline(), attempt, number)
    raise AssertionError("tenacity ends with a result or an exception")


async def _until(left_s: float, attempt: Callable[[int], Awaitable[T]], number: int) -> T:
    if left_s <= 0:
        raise DeadlineExceededError("the run's deadline passed before the model could be asked")
    limit = asyncio.timeout(left_s)
    try:
        async with limit:
            return await attempt(number)
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineExceededError("the run's deadline passed while the model was asked") from None


def _is_retryable(error: BaseException) -> bool:
    return isinstance(error, ModelError) and error.retryable


def _failure(state: RetryCallState) -> ModelError:
    error = state.outcome.exception() if state.outcome is not None else None
    assert isinstance(error, ModelError), "only a ModelError is ever retried"  # noqa: S101 - for the types
    return error
