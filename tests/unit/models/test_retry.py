import asyncio
from collections.abc import Awaitable, Callable

import pytest

from orchestrator.errors import Billing, DeadlineExceededError, ModelError
from orchestrator.models.retry import BASE_S, CAP_S, with_retries


def _failure(retry_after_s: float | None = None, *, retryable: bool = True) -> ModelError:
    return ModelError("busy", billing=Billing.NOTHING, retryable=retryable, retry_after_s=retry_after_s)


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self, left_s: float = 3_600.0) -> None:
        self.left_s = left_s
        self.slept: list[float] = []

    def deadline(self) -> float:
        return self.left_s

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.left_s -= seconds


def _all_of(low: float, high: float) -> float:
    return high


def _none_of(low: float, high: float) -> float:
    return low


def _plays(*plays: Exception | str) -> tuple[Callable[[int], Awaitable[str]], list[int]]:
    numbers: list[int] = []

    async def attempt(number: int) -> str:
        numbers.append(number)
        play = plays[min(number, len(plays)) - 1]
        if isinstance(play, Exception):
            raise play
        return play

    return attempt, numbers


async def test_the_first_success_is_the_result_and_attempts_are_numbered_from_one() -> None:
    attempt, numbers = _plays(_failure(), _failure(), "fine")
    clock = Clock()
    result = await with_retries(attempt, deadline=clock.deadline, attempts=6, sleep=clock.sleep)
    assert (result, numbers) == ("fine", [1, 2, 3])


async def test_waits_grow_from_the_base_to_the_cap() -> None:
    attempt, numbers = _plays(_failure())
    clock = Clock()
    with pytest.raises(ModelError):
        await with_retries(attempt, deadline=clock.deadline, attempts=9, sleep=clock.sleep, jitter=_all_of)
    assert clock.slept == [0.5, 1, 2, 4, 8, 16, 20, 20]
    assert (BASE_S, CAP_S) == (0.5, 20)
    assert numbers == list(range(1, 10))


async def test_jitter_is_full_it_can_shorten_a_wait_to_nothing() -> None:
    attempt, _ = _plays(_failure(), _failure(), "fine")
    clock = Clock()
    await with_retries(attempt, deadline=clock.deadline, attempts=6, sleep=clock.sleep, jitter=_none_of)
    assert clock.slept == [0, 0]


async def test_the_last_failure_is_raised_when_the_attempts_are_used_up() -> None:
    last = _failure()
    attempt, numbers = _plays(_failure(), last)
    clock = Clock()
    with pytest.raises(ModelError) as caught:
        await with_retries(attempt, deadline=clock.deadline, attempts=2, sleep=clock.sleep)
    assert caught.value is last
    assert numbers == [1, 2]


@pytest.mark.parametrize(
    "error", [_failure(retryable=False), ValueError("ours"), asyncio.CancelledError(), TimeoutError()]
)
async def test_nothing_but_a_retryable_model_error_is_tried_again(error: BaseException) -> None:
    numbers: list[int] = []

    async def attempt(number: int) -> str:
        numbers.append(number)
        raise error

    clock = Clock()
    with pytest.raises(type(error)):
        await with_retries(attempt, deadline=clock.deadline, attempts=6, sleep=clock.sleep)
    assert numbers == [1]
    assert clock.slept == []


async def test_retry_after_is_honoured_and_callers_are_spread_behind_it() -> None:
    attempt, _ = _plays(_failure(30.0), "fine")
    for jitter, expected in ((_none_of, 30.0), (_all_of, 30.5)):
        clock = Clock()
        await with_retries(attempt, deadline=clock.deadline, attempts=6, sleep=clock.sleep, jitter=jitter)
        assert clock.slept == [expected]


async def test_a_retry_after_past_the_deadline_fails_at_once_with_the_providers_error() -> None:
    attempt, numbers = _plays(_failure(4_294_967.0))
    clock = Clock(left_s=3.0)
    with pytest.raises(ModelError, match="busy"):
        await with_retries(attempt, deadline=clock.deadline, attempts=6, sleep=clock.sleep)
    assert (numbers, clock.slept) == ([1], [])


async def test_jitter_alone_does_not_push_a_retry_after_past_the_deadline() -> None:
    attempt, _ = _plays(_failure(10.0), "fine")
    clock = Clock(left_s=10.2)
    result = await with_retries(
        attempt, deadline=clock.deadline, attempts=6, sleep=clock.sleep, jitter=_all_of
    )
    assert result == "fine"
    assert clock.left_s > 0


async def test_no_wait_ends_past_the_deadline() -> None:
    attempt, numbers = _plays(_failure())
    clock = Clock(left_s=4.0)
    with pytest.raises(ModelError, match="busy"):
        await with_retries(attempt, deadline=clock.deadline, attempts=99, sleep=clock.sleep, jitter=_all_of)
    assert clock.slept == [0.5, 1, 2]
    assert numbers == [1, 2, 3, 4]


async def test_past_the_deadline_no_attempt_begins() -> None:
    attempt, numbers = _plays("fine")
    with pytest.raises(DeadlineExceededError):
        await with_retries(attempt, deadline=lambda: 0.0, attempts=6)
    assert numbers == []


async def test_an_attempt_under_way_at_the_deadline_is_cancelled_and_can_settle() -> None:
    settled: list[int] = []

    async def attempt(number: int) -> str:
        try:
            await asyncio.sleep(3_600)
        finally:
            settled.append(number)
        return "never"

    with pytest.raises(DeadlineExceededError, match="while the model was asked"):
        await with_retries(attempt, deadline=lambda: 0.02, attempts=6)
    assert settled == [1]


async def test_a_cancelled_wait_stays_cancelled() -> None:
    attempt, numbers = _plays(_failure())
    waiting = asyncio.Event()

    async def sleep(seconds: float) -> None:
        waiting.set()
        await asyncio.sleep(3_600)

    task = asyncio.create_task(with_retries(attempt, deadline=lambda: 7_200.0, attempts=6, sleep=sleep))
    await waiting.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert numbers == [1]


async def test_every_retry_is_reported_before_its_wait() -> None:
    attempt, _ = _plays(_failure(1.0), _failure(2.0), "fine")
    clock = Clock()
    told: list[tuple[int, str, float]] = []
    await with_retries(
        attempt,
        deadline=clock.deadline,
        attempts=6,
        on_retry=lambda number, error, wait_s: told.append((number, str(error), wait_s)),
        sleep=clock.sleep,
        jitter=_none_of,
    )
    assert told == [(1, "busy", 1.0), (2, "busy", 2.0)]
