"""Whether a server may judge that another one is lost."""

from collections.abc import Iterator
from typing import Any

import pytest

from orchestrator.errors import StoreError, TakenOverError
from orchestrator.service import presence
from orchestrator.service.presence import Presence

LEASE_S = 60.0


class Clock:
    """The time that this server sees."""

    def __init__(self) -> None:
        self.now_s = 1_000.0

    def monotonic(self) -> float:
        return self.now_s


class Homes:
    """A `HomeBook` of one home, which may be away."""

    def __init__(self) -> None:
        self.epoch = 0
        self.others = False
        self.is_away = False

    async def enter(self, _home: str, *, lease_s: float) -> int:
        assert lease_s == LEASE_S
        self.epoch += 1
        return self.epoch

    async def beat(self, _home: str, epoch: int, *, lease_s: float) -> bool:
        assert lease_s == LEASE_S
        if self.is_away:
            raise StoreError("away")
        if epoch != self.epoch:
            raise TakenOverError("taken over")
        return self.others


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    with monkeypatch.context() as patched:
        patched.setattr(presence, "time", clock)
        yield clock


@pytest.fixture
def homes() -> Any:
    return Homes()


@pytest.fixture
async def mine(clock: Clock, homes: Any) -> Presence:
    one = Presence(homes, "home", lease_s=LEASE_S)
    await one.enter()
    return one


async def beat_for(mine: Presence, clock: Clock, seconds: float) -> None:
    over = clock.now_s + seconds
    while clock.now_s < over:
        clock.now_s += mine.beat_every_s
        await mine.beat()


async def test_who_has_just_come_judges_nobody_for_as_long_as_a_lease(mine: Presence, clock: Clock) -> None:
    await beat_for(mine, clock, LEASE_S / 2)
    assert not mine.may_judge
    await beat_for(mine, clock, LEASE_S / 2)
    assert mine.may_judge


async def test_a_database_that_was_away_has_nobody_taken_over(
    mine: Presence, clock: Clock, homes: Homes
) -> None:
    await beat_for(mine, clock, 2 * LEASE_S)
    homes.is_away = True
    clock.now_s += mine.beat_every_s
    with pytest.raises(StoreError):
        await mine.beat()
    assert not mine.may_judge
    homes.is_away = False
    await beat_for(mine, clock, LEASE_S / 2)
    assert not mine.may_judge, "the others may not have been heard of since"
    await beat_for(mine, clock, LEASE_S)
    assert mine.may_judge


async def test_who_stood_still_judges_nobody(mine: Presence, clock: Clock) -> None:
    await beat_for(mine, clock, 2 * LEASE_S)
    clock.now_s += LEASE_S
    await mine.beat()
    assert not mine.may_judge


async def test_whether_it_is_alone_is_what_the_last_beat_said(mine: Presence, homes: Homes) -> None:
    await mine.beat()
    assert mine.is_alone
    homes.others = True
    await mine.beat()
    assert not mine.is_alone


async def test_an_epoch_that_is_over_is_told_until_it_enters_again(mine: Presence, homes: Homes) -> None:
    homes.epoch += 1
    for _ in range(2):
        with pytest.raises(TakenOverError):
            await mine.beat()
    await mine.enter()
    await mine.beat()
    assert mine.epoch == homes.epoch
