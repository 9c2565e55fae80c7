import asyncio

import pytest

from orchestrator.shielding import run_shielded


async def test_what_the_work_returns_is_returned() -> None:
    async def work() -> int:
        return 7

    assert await run_shielded(work()) == 7


async def test_what_the_work_raises_is_raised() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await run_shielded(work())


@pytest.mark.parametrize("cancellations", [1, 3])
async def test_work_is_finished_although_its_task_is_cancelled_and_the_cancellation_is_raised_after(
    cancellations: int,
) -> None:
    go_on, finished = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        finished.set()

    task = asyncio.create_task(run_shielded(work()))
    for _ in range(cancellations):
        await asyncio.sleep(0)
        task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert finished.is_set()


async def test_a_failure_behind_a_cancellation_is_not_lost() -> None:
    go_on = asyncio.Event()

    async def work() -> None:
        await go_on.wait()
        raise ValueError("broken")

    task = asyncio.create_task(run_shielded(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError) as raised:
        await task
    assert isinstance(raised.value.__cause__, ValueError)


async def test_a_time_limit_around_it_still_ends_as_a_time_out() -> None:
    finished = asyncio.Event()

    async def work() -> None:
        await asyncio.sleep(0.05)
        finished.set()

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await run_shielded(work())
    assert finished.is_set()


async def test_work_that_cancels_itself_is_a_cancellation() -> None:
    async def work() -> None:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await run_shielded(work())
