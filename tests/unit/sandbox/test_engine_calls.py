import asyncio
import threading
from collections.abc import Callable, Iterator

import pytest

from orchestrator.errors import EngineError
from orchestrator.sandbox.engine_calls import EngineCalls


class Engine:
    """One whose calls can be made to hang."""

    def __init__(self) -> None:
        self.go_on = threading.Event()
        self.calls: list[str] = []

    def stuck(self, name: str = "stuck") -> Callable[[], str]:
        def call() -> str:
            self.calls.append(name)
            self.go_on.wait(30)
            return name

        return call

    def quick(self, name: str = "quick") -> Callable[[], str]:
        def call() -> str:
            self.calls.append(name)
            return name

        return call


@pytest.fixture
def engine() -> Iterator[Engine]:
    opened = Engine()
    yield opened
    opened.go_on.set()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - threads set no event of ours
            await asyncio.sleep(0.01)


async def test_a_call_gives_what_it_returns_and_raises_what_it_raises() -> None:
    calls = EngineCalls(2)
    assert await calls.ask("s1", lambda: 7, within_s=5) == 7
    with pytest.raises(ValueError, match="x"):
        await calls.ask("s1", lambda: int("x"), within_s=5)


@pytest.mark.case("F06")
async def test_many_stuck_sandboxes_leave_all_permits_to_the_others(engine: Engine) -> None:
    calls = EngineCalls(2)
    stuck = [calls.ask(f"s{number}", engine.stuck(), within_s=0.2) for number in range(20)]
    ended = await asyncio.gather(*stuck, return_exceptions=True)
    assert all(isinstance(error, EngineError) for error in ended)
    # Two at a time were let in; those that waited for a permit in vain started nothing.
    assert 2 <= calls.overdue == engine.calls.count("stuck")
    assert (
        await asyncio.gather(*(calls.ask(f"t{number}", engine.quick(), within_s=5) for number in range(20)))
        == ["quick"] * 20
    )
    engine.go_on.set()
    await until(lambda: calls.overdue == 0)


@pytest.mark.case("F06")
async def test_a_stuck_sandbox_has_one_thread_and_its_other_calls_are_refused_at_once(engine: Engine) -> None:
    calls = EngineCalls(2)
    with pytest.raises(EngineError, match=r"did not answer within 0\.05 s"):
        await calls.ask("s1", engine.stuck(), within_s=0.05)
    for _ in range(5):
        with pytest.raises(EngineError, match="still owes an answer"):
            await calls.ask("s1", engine.quick(), within_s=5)
    assert engine.calls == ["stuck"]
    engine.go_on.set()
    await until(lambda: calls.overdue == 0)
    assert await calls.ask("s1", engine.quick(), within_s=5) == "quick"


async def test_calls_about_one_sandbox_follow_one_another_also_behind_a_cancelled_one(engine: Engine) -> None:
    calls = EngineCalls(4)
    first = asyncio.create_task(calls.ask("s1", engine.stuck("first"), within_s=5))
    await until(lambda: engine.calls == ["first"])
    first.cancel()
    second = asyncio.create_task(calls.ask("s1", engine.quick("second"), within_s=5))
    await asyncio.sleep(0.05)
    assert engine.calls == ["first"]
    engine.go_on.set()
    assert await second == "second"
    with pytest.raises(asyncio.CancelledError):
        await first


async def test_a_call_that_nobody_waits_for_any_more_gives_its_permit_back(engine: Engine) -> None:
    calls = EngineCalls(1)
    waiting = asyncio.create_task(calls.ask("s1", engine.stuck(), within_s=0.1))
    await until(lambda: engine.calls == ["stuck"])
    waiting.cancel()
    assert await calls.ask("s2", engine.quick(), within_s=5) == "quick"
    assert calls.overdue == 1


async def test_an_error_that_comes_after_the_deadline_disturbs_nobody(engine: Engine) -> None:
    calls = EngineCalls(1)

    def fail() -> None:
        engine.go_on.wait(30)
        raise OSError("late")

    with pytest.raises(EngineError):
        await calls.ask("s1", fail, within_s=0.05)
    engine.go_on.set()
    await until(lambda: calls.overdue == 0)


async def test_who_is_to_end_waits_for_no_call_longer_than_that(engine: Engine) -> None:
    calls = EngineCalls(4)
    under_way = asyncio.create_task(calls.ask("a", engine.stuck(), within_s=60))
    await asyncio.sleep(0.05)
    calls.hurry(0.1)
    async with asyncio.timeout(10):
        with pytest.raises(EngineError, match=r"0\.1 s"):
            await under_way
        with pytest.raises(EngineError, match=r"0\.1 s"):
            await calls.ask("b", engine.stuck(), within_s=60)
        assert await calls.ask("c", engine.quick(), within_s=60) == "quick"
